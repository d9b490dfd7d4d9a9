"""LoRA: low-rank matrices A (r × in) and B (out × r) beside frozen weights, W' = W + (alpha / r) · B·A.

Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. The model is wrapped by
PEFT, so what is saved is a plain PEFT adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.data.advice import rows_for
from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.method_options import LoraMethod
from luthier.methods.base import Advice, TuningMethod, peft_task, register, whole_modules, wrapped_by_peft
from luthier.methods.parts import layer_numbers, module_names
from luthier.methods.pissa import begin_as_principal, whole_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register
class Lora(TuningMethod):
    """Low-rank matrices beside frozen weights."""

    name = "lora"
    trains = "low-rank matrices beside frozen weights"
    merges = True
    embeds = True
    learning_rate = 2e-4
    advice = Advice(
        learning_rate=(1e-4, 2e-4), epochs=(1, 3), examples=rows_for("lora", "a light adaptation"), rank=(4, 16)
    )

    def wrap(
        self, model: PreTrainedModel, options: LoraMethod, new_token_ids: list[int], task: TaskType = TaskType.CAUSAL_LM
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        from peft import LoraConfig

        extra: dict[str, Any] = {}
        whole = module_names(model, options.modules_to_save, "method.modules_to_save")
        if new_token_ids and model.get_input_embeddings() not in map(model.get_submodule, whole):
            # Only the new rows of the embeddings are trained and saved, not the whole matrix.
            extra["trainable_token_indices"] = new_token_ids
        targets = options.target_modules
        if options.layers_to_transform is not None:
            extra["layers_to_transform"] = layer_numbers(
                model, options.layers_to_transform, "method.layers_to_transform"
            )
            if isinstance(targets, str):
                # PEFT takes layers' numbers beside a list of names alone.
                targets = linear_names(model) if targets == "all-linear" else [targets]
        # PiSSA's matrices have a frozen half; alpha grows with the rank, so that the scale is that of the trained one.
        pissa = options.init_lora_weights == "pissa"
        ranks = 2 if pissa else 1
        alphas = math.sqrt(ranks) if options.use_rslora else ranks
        config = LoraConfig(
            task_type=peft_task(task),
            r=ranks * options.r,
            lora_alpha=alphas * options.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=options.lora_dropout,
            target_modules=targets,
            modules_to_save=whole_modules(model, whole, task),
            rank_pattern={name: ranks * rank for name, rank in options.rank_pattern.items()},
            alpha_pattern={name: alphas * alpha for name, alpha in options.alpha_pattern.items()},
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            **extra,
        )
        wrapped = wrapped_by_peft(
            model,
            config,
            "LoRA",
            where="method.target_modules",
            remedy="use all-linear, or the names of linear layers of this model",
        )
        base = wrapped.get_base_model()  # type: ignore[operator]
        adapted = [name for name, module in base.named_modules() if hasattr(module, "lora_A")]
        for field in ("rank_pattern", "alpha_pattern"):
            _require_matches(getattr(options, field), adapted, f"method.{field}")
        if pissa:
            begin_as_principal(wrapped)
        return wrapped

    def save(self, model: Any, folder: Path) -> None:
        """See :meth:`TuningMethod.save`."""
        model.save_pretrained(folder, state_dict=whole_state(model))

    def kept_values(self, options: LoraMethod, hidden: int, inner: int) -> int:
        """See :meth:`TuningMethod.kept_values`: the matrices' own inputs after dropout, seven places a layer."""
        ranks = 2 * options.r if options.init_lora_weights == "pissa" else options.r
        return (5 * hidden + 2 * inner if options.lora_dropout else 0) + 14 * ranks

    def rates(self, names: Iterable[str], options: LoraMethod, fresh: Sequence[str] = ()) -> dict[str, float]:
        """See :meth:`TuningMethod.rates`; LoRA+ lets B learn faster."""
        ratio = options.loraplus_lr_ratio
        return {} if ratio is None else {name: ratio for name in names if re.search(r"\.lora_(embedding_)?B\.", name)}


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of all linear layers but the output head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    found = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, kinds) and m is not head}
    return sorted(found)


def _require_matches(patterns: Iterable[str], adapted: list[str], where: str) -> None:
    """PEFT passes over a pattern that fits no layer; its rank would silently be the common one."""
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
            raise UserError(
                f"no layer with matrices is named {pattern!r}",
                where=where,
                remedy=f"name for example {adapted[0]!r}, or the end of such a name",
            )
