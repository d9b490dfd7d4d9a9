"""What a tuning method says of itself, and the registry of methods."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Advice:
    """Ranges that usually work for a method. A run outside them is warned of, not refused."""

    learning_rate: tuple[float, float]
    epochs: tuple[float, float]
    examples: tuple[int, int]
    """Fewest rows that are likely to help, and how many a light task wants."""
    rank: tuple[int, int] | None = None


@dataclass(frozen=True)
class TuningMethod:
    """A way to tune a model.

    Attributes:
        name: the name in the recipe.
        wrap: makes the model trainable in this way: ``(model, options, new_token_ids) -> model``; exactly the
            parameters it trains require gradients afterwards.
        adapter: True where a small adapter is saved beside an untouched base; False where the whole model is.
        merges: True where the adapter can become part of the base's weights.
        learning_rate: default peak learning rate.
        weight_decay: default weight decay.
        advice: ranges that usually work.
    """

    name: str
    wrap: Callable[[PreTrainedModel, Any, list[int]], torch.nn.Module]
    adapter: bool
    merges: bool
    learning_rate: float
    weight_decay: float
    advice: Advice


@contextlib.contextmanager
def peft_warnings_apart() -> Iterator[None]:
    """Without the warning that PEFT 0.21 draws from transformers 5 when it wraps a model; users cannot act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


METHODS: dict[str, TuningMethod] = {}


def register(method: TuningMethod) -> TuningMethod:
    """Make a method known under its name."""
    METHODS[method.name] = method
    return method


def get_method(name: str) -> TuningMethod:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}", where="method.name", remedy=f"known: {', '.join(METHODS)}")
    return METHODS[name]


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by name, each once (tied ones under their first name)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """``(trained, all)`` parameters, tied ones counted once."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())
