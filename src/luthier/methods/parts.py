"""Parts of a model by name and by number, as recipes choose them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from rapidfuzz import process

from luthier.errors import UserError

ALL_NORMS = "all-norms"


def module_names(model: Any, entries: Sequence[str], where: str) -> list[str]:
    """Full names of the modules that hold the parameters of what is named.

    Each entry is the end of a name, a regular expression of such an end, or ``all-norms``; what is named may be a
    whole layer. PEFT would go by letters alone, and take every norm of a model for ``norm``.

    Args:
        model: the base.
        entries: from the recipe.
        where: the recipe's field.

    Raises:
        UserError: the model has no module of a name, or the module holds no parameter.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    found: set[str] = set()
    for entry in entries:
        if entry == ALL_NORMS:
            chosen = [name for name, module in modules.items() if "norm" in type(module).__name__.lower()]
        else:
            chosen = [name for name in modules if re.fullmatch(rf"(.*\.)?({entry})", name)]
        holders = {
            f"{name}.{inner}" if inner else name
            for name in chosen
            for inner, module in modules[name].named_modules()
            if next(module.parameters(recurse=False), None) is not None
        }
        if not holders:
            raise UserError(
                f"no module with parameters is named {entry!r} in this model",
                where=where,
                remedy=_nearest(entry, modules),
            )
        found |= holders
    # What lies inside a module that is taken is taken with it.
    return sorted(n for n in found if not any(n.startswith(f"{outer}.") for outer in found))


def _nearest(entry: str, names: Iterable[str]) -> str:
    """Names of the model's own that a user may have meant: the last part of each, and what stands before it."""
    ends = {".".join(name.split(".")[-count:]) for name in names for count in (1, 2, 3, 4)}
    near = process.extractOne(entry, sorted(end for end in ends if not end.isdigit()))
    return f"did you mean {near[0]!r}?" if near else f"name a module, a regular expression of names, or {ALL_NORMS}"


def layer_numbers(model: Any, chosen: list[int] | str, where: str) -> list[int]:
    """Numbers of a model's layers, from 0.

    Args:
        model: the base.
        chosen: numbers, or ``first N``, ``last N`` or ``A-B`` with both ends.
        where: the recipe's field.

    Raises:
        UserError: the model has fewer layers, or none is named.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    numbers = chosen if isinstance(chosen, list) else list(_range(chosen, count))
    odd = [number for number in numbers if not 0 <= number < count]
    if odd or not numbers:
        raise UserError(
            f"the model has the layers 0 to {count - 1}, not {odd[0]}" if odd else "no layer is named",
            where=where,
            remedy="name layers of the model, or leave it empty",
        )
    return numbers


def _range(words: str, count: int) -> range:
    kind, _, number = words.partition(" ")
    if kind == "first":
        return range(int(number))
    if kind == "last":
        return range(count - int(number), count)
    begin, end = map(int, words.split("-"))
    return range(begin, end + 1)


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The model's numbered layers.

    Raises:
        UserError: they are not where transformers' decoders have them.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        "this model has no list of numbered layers",
        where="method.frozen_layers",
        remedy="name them in method.frozen_modules",
    )
