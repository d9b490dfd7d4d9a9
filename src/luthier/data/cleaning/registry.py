"""The built-in cleaners by name, and their options, checked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from rapidfuzz import process

from luthier.data.cleaning.characters import normalize_fullwidth, normalize_unicode, remove_special_chars
from luthier.data.cleaning.filters import filter_language, filter_length, filter_repetition, filter_symbols
from luthier.data.cleaning.markup import strip_html
from luthier.data.cleaning.mojibake import fix_mojibake
from luthier.data.cleaning.personal import mask_personal_data
from luthier.data.cleaning.spacing import normalize_cjk_spacing, normalize_whitespace, remove_empty_lines
from luthier.data.cleaning.truncate import truncate_by_tokens
from luthier.errors import UserError, shorten


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a cleaner."""

    name: str
    type: str
    """As it is written, for example ``int`` or ``"NFC" | "NFKC"``."""
    default: Any
    """None where it may be left out and means nothing; see ``required``."""
    required: bool
    doc: str


@dataclass(frozen=True, slots=True)
class Cleaner:
    """A built-in cleaner as documentation shows it."""

    name: str
    kind: Literal["text", "filter"]
    """Whether it changes texts or refuses rows."""
    doc: str
    """Its first sentence."""
    options: tuple[Option, ...]
    function: Callable[..., Any]


# In the order in which they are best used: what others rely on first.
_TEXT = (
    *(fix_mojibake, strip_html, normalize_unicode, normalize_fullwidth, remove_special_chars, normalize_cjk_spacing),
    *(normalize_whitespace, remove_empty_lines, mask_personal_data, truncate_by_tokens),
)
_FILTERS = (filter_length, filter_language, filter_repetition, filter_symbols)
BUILT_IN: dict[str, Callable[..., Any]] = {function.__name__: function for function in (*_TEXT, *_FILTERS)}

ON = Option(
    "on",
    '"all" | "prompt" | "answer"',
    "all",
    False,
    "which texts: answers are assistant turns, outputs, references and plain text; prompts are the rest.",
)


@cache
def cleaners() -> tuple[Cleaner, ...]:
    """Every built-in cleaner with its options and their defaults, in the order in which they are best used."""
    return tuple(_describe(function) for function in BUILT_IN.values())


def is_filter(function: Callable[..., Any]) -> bool:
    return function in _FILTERS


def nearest(name: str, known: Mapping[str, Any] | tuple[str, ...], cutoff: int = 60) -> str | None:
    """The known name that is most like a wrong one."""
    found = process.extractOne(name, list(known), score_cutoff=cutoff)
    return str(found[0]) if found else None


def check_options(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a built-in cleaner, as its parameters have them.

    Raises:
        UserError: an option is unknown, missing or of the wrong type.
    """
    name = function.__name__
    try:
        checked = _model(function).model_validate(dict(options))
    except ValidationError as error:
        item = error.errors()[0]
        option = str(item["loc"][0])
        known = [o.name for o in (*_describe(function).options, ON)]
        remedy = f"{name} has {_listed(known)}"
        if item["type"] == "extra_forbidden":
            near = nearest(option, tuple(known))
            what = f"{name} has no option {option!r}" + (f"; did you mean {near!r}?" if near else "")
        elif item["type"] == "missing":
            what = f"{name} needs the option {option!r}"
        else:
            message = item["msg"].removeprefix("Value error, ")
            place = ".".join(map(str, item["loc"]))
            what = f"{name}: {place}={shorten(item['input'])}: {message[:1].lower()}{message[1:]}"
        raise UserError(what, where=where, remedy=remedy) from None
    return {key: getattr(checked, key) for key in checked.model_fields_set}


def _listed(names: list[str]) -> str:
    return f"the option{'s' * (len(names) > 1)} {', '.join(names)}"


@cache
def _model(function: Callable[..., Any]) -> type[BaseModel]:
    """The keyword-only parameters of a cleaner as fields to check against; the tokenizer is no option."""
    hints = _hints(function)
    fields: dict[str, Any] = {}
    for parameter in _option_parameters(function):
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    return create_model(function.__name__, __config__=config, **fields)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    # The tokenizer's type is known to type checkers alone.
    return get_type_hints(function, localns={"PreTrainedTokenizerBase": Any}, include_extras=True)


def _option_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "tokenizer"]


@cache
def _describe(function: Callable[..., Any]) -> Cleaner:
    text = inspect.getdoc(function) or ""
    docs = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", text.partition("Args:")[2], re.MULTILINE))
    hints = _hints(function)
    options = tuple(
        Option(
            p.name,
            _type_name(hints[p.name]),
            None if p.default is p.empty else p.default,
            p.default is p.empty,
            " ".join(docs.get(p.name, "").split()),
        )
        for p in _option_parameters(function)
    )
    kind: Literal["text", "filter"] = "filter" if is_filter(function) else "text"
    return Cleaner(function.__name__, kind, " ".join(text.partition("\n\n")[0].split()), options, function)


def _type_name(hint: Any) -> str:
    """A type as a user writes it."""
    if hasattr(hint, "__metadata__"):
        return _type_name(hint.__origin__)
    if getattr(hint, "__origin__", None) is Literal:
        return " | ".join(f'"{value}"' for value in hint.__args__)
    arguments = [a for a in getattr(hint, "__args__", ()) if a is not type(None)]
    if not arguments:
        return "text" if hint is str else str(getattr(hint, "__name__", hint))
    inner = " | ".join(map(_type_name, arguments))
    return inner if type(None) in hint.__args__ else f"list of {inner}"
