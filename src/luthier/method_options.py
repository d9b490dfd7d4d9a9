"""The recipe's `method` section: one class a tuning method."""

from __future__ import annotations

from typing import Annotated, Literal, Union, get_args

from pydantic import Field

from luthier.errors import UserError
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


Method = Annotated[Union[LoraMethod, FullMethod], Field(discriminator="name")]  # noqa: UP007


def options_of(name: str) -> type[Section]:
    """The class of a method's options.

    Raises:
        UserError: there is no such method.
    """
    kinds = {kind.model_fields["name"].default: kind for kind in get_args(get_args(Method)[0])}
    if name not in kinds:
        raise UserError(f"unknown method {name!r}", where="method.name", remedy=f"known: {', '.join(kinds)}")
    return kinds[name]
