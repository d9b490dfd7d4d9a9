"""The recipe's `method` section: one class a tuning method."""

from __future__ import annotations

from typing import Annotated, Literal, Union, get_args

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


class AdapterMethod(Section):
    """Bottleneck adapters in the residual branches of a frozen model."""

    name: Literal["adapter"] = "adapter"
    """Trains small layers after others, h + up(act(down(h))); they cannot be merged (Houlsby et al., 2019)."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """After attention and after the MLP (houlsby), or after the MLP alone (pfeiffer, arXiv:2005.00247)."""
    reduction_factor: int = Field(16, ge=1)
    """An adapter has hidden size / reduction_factor inner values, at least one."""
    non_linearity: Literal["relu", "gelu", "silu"] = "relu"
    """The activation between the two layers."""
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on an adapter's inner values."""
    target_modules: list[str] = Field(default_factory=list)
    """Names of the linear layers that adapters follow, in place of placement; empty: found by placement."""


Method = Annotated[Union[LoraMethod, FullMethod, AdapterMethod], Field(discriminator="name")]  # noqa: UP007
METHOD_NAMES: tuple[str, ...] = tuple(kind.model_fields["name"].default for kind in get_args(get_args(Method)[0]))
