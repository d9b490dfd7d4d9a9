"""The recipe's `method` section: one class a tuning method."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from luthier.errors import UserError
from luthier.section import Section


def _layers(value: list[int] | str | None) -> list[int] | str | None:
    if isinstance(value, str) and not re.fullmatch(r"(first|last) \d+|\d+-\d+", value):
        raise ValueError(f"{value!r} is no range of layers: write first 4, last 4, 2-5, or a list of numbers")
    return value


def _expressions(value: Any) -> Any:
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return value


Layers = Annotated[list[int] | str | None, AfterValidator(_layers)]
Modules = Annotated[list[str], AfterValidator(_expressions)]


class FullMethod(Section):
    """Every parameter is trained; what methods do, cost and merge: [methods.md](methods.md)."""

    name: Literal["full"] = "full"
    """Trains every parameter that is not frozen."""
    frozen_layers: Layers = None
    """Layers that stay as they are: numbers from 0, or first 20, last 2, 4-9; empty: none."""
    frozen_modules: Modules = Field(default_factory=list)
    """Other modules that stay as they are, by a name's end or a regular expression of it, for example embed_tokens;
    all-norms: every norm."""


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
    modules_to_save: Modules = Field(default_factory=list)
    """Modules trained and saved whole beside the matrices, by a name's end or a regular expression of it, for example
    embed_tokens or layers.29; all-norms: every norm."""
    layers_to_transform: Layers = None
    """Layers that get matrices: numbers from 0, or first 20, last 2, 4-9; empty: all."""
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]], AfterValidator(_expressions)] = Field(
        default_factory=dict
    )
    """Other ranks for some layers, by a name's end or a regular expression of it: {o_proj: 4, layers.29.*: 16}."""
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_expressions)] = Field(
        default_factory=dict
    )
    """Other lora_alpha for some layers, in the same way."""
    init_lora_weights: Literal["default", "pissa"] = "default"
    """How the matrices begin: noise and zeros (default), or the principal part of each weight (pissa; Meng et al.,
    2024, arXiv:2404.02948), which is computed exactly, takes lora_dropout 0, and is saved as a plain LoRA of rank
    2 r."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (Kalajdzievski, 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the length of each weight column apart from its direction (DoRA; Liu et al., 2024, arXiv:2402.09353):
    better at low ranks, slower."""
    loraplus_lr_ratio: float | None = Field(None, ge=1)
    """How many times faster B learns than A (LoRA+; Hayou et al., 2024, arXiv:2402.12354): 2 to 16; empty: as fast."""

    @model_validator(mode="after")
    def _whole_principal_part(self) -> LoraMethod:
        if self.init_lora_weights == "pissa" and self.lora_dropout:
            if "lora_dropout" in self.model_fields_set:
                raise ValueError(
                    "lora_dropout must be 0 with init_lora_weights=pissa: it would drop parts of the weights"
                )
            self.lora_dropout = 0.0
        return self


class PromptMethod(Section):
    """Trained vectors before every text; the model stays as it is."""

    name: Literal["prompt"] = "prompt"
    """Trains vectors before every text (prompt tuning, Lester et al., 2021, arXiv:2104.08691)."""
    num_virtual_tokens: int = Field(100, ge=1)
    """How many vectors; each takes a place of the model's context."""
    prompt_tuning_init_text: str | None = Field(None, min_length=1)
    """A text whose tokens' vectors they begin as, repeated or cut to their number; empty: those of tokens drawn from
    the vocabulary."""


class PTuningMethod(Section):
    """Trained vectors before every text, made by a small network that training alone needs."""

    name: Literal["p_tuning"] = "p_tuning"
    """Trains a network that makes vectors before every text (P-tuning, Liu et al., 2021, arXiv:2103.10385)."""
    num_virtual_tokens: int = Field(20, ge=1)
    """How many vectors; each takes a place of the model's context."""
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network: three linear layers, or a two-way LSTM and two."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width of the network; empty: the model's own."""
    encoder_num_layers: int = Field(2, ge=1)
    """Layers of the LSTM."""
    encoder_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout between the layers of the LSTM."""


class PrefixMethod(Section):
    """Trained keys and values before every text, in every layer."""

    name: Literal["prefix"] = "prefix"
    """Trains keys and values before every text (prefix tuning, Li and Liang, 2021, arXiv:2101.00190)."""
    num_virtual_tokens: int = Field(30, ge=1)
    """How many keys and values a layer; each takes a place of the model's context."""
    prefix_projection: bool = True
    """A small network makes them, which training alone needs; without it they begin as noise and learn badly."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width of that network; empty: the model's own."""


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


class MixedMethod(LoraMethod):
    """Low-rank matrices, other modules trained whole, and keys and values before every text, at rates of their own."""

    name: Literal["mixed"] = "mixed"  # type: ignore[assignment]
    """Trains low-rank matrices in some layers, other modules whole and, where num_virtual_tokens says so, keys and
    values before every text."""
    modules_to_save: Modules = Field(default=["all-norms"], min_length=1)
    """Modules trained and saved whole, by a name's end or a regular expression of it, for example embed_tokens or
    layers.29; all-norms: every norm. They get no matrices."""
    modules_to_save_lr_ratio: float = Field(0.1, gt=0)
    """Their learning rate, as a share of that of the matrices."""
    num_virtual_tokens: int = Field(0, ge=0)
    """How many keys and values a layer are trained before every text, as by method prefix; 0: none. With some, the
    mixture cannot be merged."""
    prefix_projection: bool = True
    """A small network makes them, which training alone needs; without it they begin as noise and learn badly."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width of that network; empty: the model's own."""
    prefix_lr_ratio: float = Field(5, gt=0)
    """How many times faster they, or the network, learn than the matrices."""

    @model_validator(mode="after")
    def _something_before_the_text(self) -> MixedMethod:
        fields = ("prefix_projection", "encoder_hidden_size", "prefix_lr_ratio")
        odd = [f for f in fields if getattr(self, f) != type(self).model_fields[f].default]
        if odd and not self.num_virtual_tokens:
            raise ValueError(f"{odd[0]} changes nothing where num_virtual_tokens is 0: give how many, for example 30")
        return self


class Ia3Method(Section):
    """Learnt factors of keys, values and inner activations."""

    name: Literal["ia3"] = "ia3"
    """Trains vectors that scale keys, values and the MLP's inner values (Liu et al., 2022, arXiv:2205.05638)."""
    target_modules: list[str] = Field(default_factory=list)
    """Linear layers whose outputs, or inputs for those of feedforward_modules, are scaled; empty: the projections of
    keys and values, and the last one of each MLP."""
    feedforward_modules: list[str] = Field(default_factory=list)
    """Those of target_modules whose inputs are scaled."""

    @model_validator(mode="after")
    def _feedforward_among_targets(self) -> Ia3Method:
        odd = set(self.feedforward_modules) - set(self.target_modules)
        if odd:
            raise ValueError(f"feedforward_modules names {sorted(odd)[0]!r}, which target_modules does not")
        return self


Method = Annotated[
    LoraMethod
    | QloraMethod
    | MixedMethod
    | FullMethod
    | AdapterMethod
    | Ia3Method
    | PromptMethod
    | PTuningMethod
    | PrefixMethod,
    Field(discriminator="name"),
]
METHODS_BY_NAME: dict[str, type[Section]] = {
    kind.model_fields["name"].default: kind for kind in get_args(get_args(Method)[0])
}


def options_of(name: str) -> type[Section]:
    """The class of a method's options.

    Raises:
        UserError: there is no such method.
    """
    if name not in METHODS_BY_NAME:
        raise UserError(f"unknown method {name!r}", where="method.name", remedy=f"known: {', '.join(METHODS_BY_NAME)}")
    return METHODS_BY_NAME[name]
