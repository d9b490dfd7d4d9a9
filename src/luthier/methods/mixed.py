"""A mixture: low-rank matrices in some layers, and other modules trained whole beside them at a rate of their own.

By default the norms are trained whole, which with the embeddings is what LongLoRA found LoRA to want beside it where
texts grow long (Chen et al., 2023, arXiv:2309.12307). The model is wrapped by PEFT, so what is saved is a plain PEFT
adapter. Keys and values before every text may be trained with them; then two plain PEFT adapters are saved, in folders
of their own, so that nothing loads the one and leaves out the other without being told to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.examples import TaskType
from luthier.method_options import LoraMethod, MixedMethod
from luthier.methods.base import TuningMethod, register, wrapped_by_peft
from luthier.methods.lora import Lora
from luthier.methods.prefix import Prefix, prefix_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PARTS = ("lora", "prefix")
"""Folders of a mixture with a prefix, in the order in which they go on the base."""


@register
class Mixed(Lora):
    """Low-rank matrices, and modules trained whole."""

    name = "mixed"
    trains = "low-rank matrices beside frozen weights, and other modules whole"

    def given(self, options: MixedMethod) -> TuningMethod:
        """See :meth:`TuningMethod.given`."""
        return MIXED_WITH_PREFIX if options.num_virtual_tokens else self

    def rates(self, names: Iterable[str], options: LoraMethod, fresh: Sequence[str] = ()) -> dict[str, float]:
        """See :meth:`TuningMethod.rates`; what is trained whole moves less than what begins as noise."""
        assert isinstance(options, MixedMethod)
        names, ratio = list(names), options.modules_to_save_lr_ratio
        begun = [f".{name}.modules_to_save." for name in fresh]
        whole = [n for n in names if ".modules_to_save." in n and not any(b in n for b in begun)] if ratio != 1 else []
        return super().rates(names, options) | dict.fromkeys(whole, ratio)


class MixedWithPrefix(Mixed, Prefix):
    """A mixture with keys and values before every text; what cannot be done with those cannot be done with it."""

    name = "mixed with a prefix"
    trains = f"low-rank matrices beside frozen weights, other modules whole, and {Prefix.trains}"
    merges = False
    instead = "method.num_virtual_tokens=0"

    def wrap(
        self, model: PreTrainedModel, options: Any, new_token_ids: list[int], task: TaskType = TaskType.CAUSAL_LM
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        from luthier.methods.prefixed import PrefixedLora

        lora: Any = super().wrap(model, options, new_token_ids, task)
        config = prefix_config(model, options, task)
        config.base_model_name_or_path = lora.active_peft_config.base_model_name_or_path
        where = "method.num_virtual_tokens"
        return wrapped_by_peft(lora, config, "a prefix", where=where, remedy="set it to 0", wrapper=PrefixedLora)

    def rates(self, names: Iterable[str], options: LoraMethod, fresh: Sequence[str] = ()) -> dict[str, float]:
        """See :meth:`TuningMethod.rates`."""
        assert isinstance(options, MixedMethod)
        names = list(names)
        before = [name for name in names if name.startswith("prompt_encoder.")]
        return super().rates(names, options, fresh) | dict.fromkeys(before, options.prefix_lr_ratio)

    def save(self, model: Any, folder: Path) -> None:
        """See :meth:`TuningMethod.save`."""
        model.save_pretrained(folder)

    def load(self, base: PreTrainedModel, folder: Path) -> torch.nn.Module:
        """See :meth:`TuningMethod.load`."""
        from luthier.methods.prefixed import PrefixedLora

        return PrefixedLora.loaded(base, folder)


MIXED_WITH_PREFIX = MixedWithPrefix()
