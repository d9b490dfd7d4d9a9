"""QLoRA: LoRA beside a frozen base whose linear layers are held in 4 or 8 bits.

Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314. Products are computed in the
training precision with weights that are unpacked for each; embeddings and output head stay as they are. What is
saved is a plain LoRA adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from luthier.data.advice import rows_for
from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.method_options import LoraMethod, QloraMethod
from luthier.methods.base import Advice, register
from luthier.methods.lora import Lora
from luthier.methods.parts import module_names
from luthier.models.quantized import Quantization, is_quantized, require_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.recipe import Recipe


@register
class Qlora(Lora):
    """Low-rank matrices beside frozen quantised weights."""

    name = "qlora"
    trains = "low-rank matrices beside frozen weights in 4 or 8 bits"
    divides = False
    learning_rate = 2e-4
    advice = Advice(
        learning_rate=(2e-4, 5e-4), epochs=(1, 3), examples=rows_for("lora", "a light adaptation"), rank=(4, 16)
    )

    def check(self, recipe: Recipe) -> None:
        """See :meth:`TuningMethod.check`."""
        super().check(recipe)
        if isinstance(recipe.method, QloraMethod) and recipe.method.init_lora_weights == "pissa":
            raise UserError(
                "PiSSA takes weights apart as they are stored, and method qlora holds them quantised",
                where="method.init_lora_weights",
                remedy="set it to default, or use method.name=lora",
            )
        require_bitsandbytes()

    def quantization(self, options: QloraMethod) -> Quantization:
        """See :meth:`TuningMethod.quantization`."""
        return Quantization(options.bits, options.quant_type, options.double_quant)

    def wrap(
        self, model: PreTrainedModel, options: LoraMethod, new_token_ids: list[int], task: TaskType = TaskType.CAUSAL_LM
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        for name in module_names(model, options.modules_to_save, "method.modules_to_save"):
            if any(is_quantized(p) for p in model.get_submodule(name).parameters()):
                raise UserError(
                    f"{name!r} is quantised and cannot be trained whole",
                    where="method.modules_to_save",
                    remedy="name only embeddings, norms or the output head, or use method.name=lora",
                )
        return super().wrap(model, options, new_token_ids, task)
