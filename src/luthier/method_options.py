"""The recipe's `method` section: one class a tuning method."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import Field

from luthier.section import Section


class FullMethod(Section):
    """Every parameter is trained; what methods do, cost and merge: [methods.md](methods.md)."""

    name: Literal["full"] = "full"
    """Trains every parameter."""


class LoraMethod(Section):
    """Low-rank matrices beside frozen weights."""

    name: Literal["lora"] = "lora"
    """Trains low-rank matrices beside frozen weights (Hu et al., 2021, arXiv:2106.09685)."""
    r: int = Field(8, ge=1)
    """Rank of the matrices."""
    lora_alpha: float = Field(32, gt=0)
    """Scale: the update is (lora_alpha / r) · B·A."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the input of the low-rank path."""
    target_modules: str | list[str] = "all-linear"
    """Which layers get matrices: all-linear (all but the output head) or a list of names."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Layers trained and saved whole beside the matrices, for example embed_tokens."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023, arXiv:2312.03732)."""


class QloraMethod(LoraMethod):
    """Low-rank matrices beside frozen weights that are held in 4 or 8 bits; needs `pip install 'luthier[qlora]'`."""

    name: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    """Trains low-rank matrices beside quantised weights (Dettmers et al., 2023, arXiv:2305.14314)."""
    bits: Literal[4, 8] = 4
    """Bits a weight; 8 is LLM.int8 (Dettmers et al., 2022, arXiv:2208.07339)."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of 4-bit weights: quantiles of a normal distribution (nf4) or tiny floats (fp4)."""
    double_quant: bool = True
    """The scales of blocks of 4-bit weights are quantised as well."""


Method = Annotated[Union[LoraMethod, QloraMethod, FullMethod], Field(discriminator="name")]  # noqa: UP007
