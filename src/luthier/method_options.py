"""The recipe's `method` section: one class a tuning method."""

from __future__ import annotations

from typing import Annotated, Literal

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


Method = Annotated[LoraMethod | FullMethod | PromptMethod | PTuningMethod | PrefixMethod, Field(discriminator="name")]
