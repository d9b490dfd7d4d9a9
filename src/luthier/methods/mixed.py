"""A mixture: low-rank matrices in some layers, and other modules trained whole beside them at a rate of their own.

By default the norms are trained whole, which with the embeddings is what LongLoRA found LoRA to want beside it where
texts grow long (Chen et al., 2023, arXiv:2309.12307). The model is wrapped by PEFT, so what is saved is a plain PEFT
adapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from luthier.method_options import LoraMethod, MixedMethod
from luthier.methods.base import register
from luthier.methods.lora import Lora


@register
class Mixed(Lora):
    """Low-rank matrices, and modules trained whole."""

    name = "mixed"
    trains = "low-rank matrices beside frozen weights, and other modules whole"

    def rates(self, names: Iterable[str], options: LoraMethod, fresh: Sequence[str] = ()) -> dict[str, float]:
        """See :meth:`TuningMethod.rates`; what is trained whole moves less than what begins as noise."""
        assert isinstance(options, MixedMethod)
        names, ratio = list(names), options.modules_to_save_lr_ratio
        begun = [f".{name}.modules_to_save." for name in fresh]
        whole = [n for n in names if ".modules_to_save." in n and not any(b in n for b in begun)] if ratio != 1 else []
        return super().rates(names, options) | dict.fromkeys(whole, ratio)
