"""JSON values, by Python's own parser, and what it takes that a row must not hold."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from luthier.data.examples import Reject, Source
from luthier.data.readers.rows import Row
from luthier.errors import shorten

DEEPEST = 100
"""Levels of lists and objects that a row may have; what writes rows again (pickle, Arrow, JSON) takes no more than some
hundreds."""

# Half a surrogate pair can only come from an escape: no encoding that is decoded strictly lets it through.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class Flaw(dict[str, Any]):
    """What stands in a parsed row for a value that Python's parser accepts (or breaks on) and a row must not hold."""

    reason = "bad_json"
    message = ""
    field: str | None = None
    """The row's key that it is under, where that is known."""


def _flaw(reason: str, message: str, content: dict[str, Any] | None = None, field: str | None = None) -> Flaw:
    flaw = Flaw(content or {})
    flaw.reason, flaw.message, flaw.field = reason, message, field
    return flaw


class Parser:
    """Parses one value after another. One decoder serves them all: to make one costs as much as to read a row."""

    def __init__(self) -> None:
        self._flawed = False
        decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=lambda name: self._noted(f"not valid JSON: {name} is no JSON value"),
            parse_int=self._integer,
            parse_float=self._float,
        )
        self._decode = decoder.decode
        self._scan = decoder.raw_decode

    def whole(self, text: str) -> Any:
        """The value that a text is.

        Raises:
            JSONDecodeError, RecursionError: it is none.
        """
        self._flawed = False
        if text.startswith("\ufeff"):
            raise json.JSONDecodeError("a byte order mark within the file", text, 0)
        return self._decode(text)

    def scan(self, text: str, begin: int) -> tuple[Any, int]:
        """The value that begins there, and where it ends.

        Raises:
            JSONDecodeError, RecursionError: none does.
        """
        self._flawed = False
        return self._scan(text, begin)

    def flaw(self, value: Any, text: str, begin: int = 0, end: int | None = None) -> Flaw | None:
        """The first flaw inside the value parsed last.

        Args:
            value: as parsed.
            text: what it was parsed from, between ``begin`` and ``end``.
        """
        end = len(text) if end is None else end
        if text.count("[", begin, end) + text.count("{", begin, end) > DEEPEST and _is_deep(value):
            return _flaw("bad_json", f"the JSON is nested too deeply, in more than {DEEPEST} levels")
        if not self._flawed and not _HALF.search(text, begin, end):
            return None
        if isinstance(value, dict) and not isinstance(value, Flaw):
            for key, inner in value.items():
                found = _first_flaw([key, inner])
                if found is not None:
                    found.field = _writable(key)
                    return found
        return _first_flaw(value)

    def _noted(self, message: str) -> Flaw:
        self._flawed = True
        return _flaw("bad_json", message)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        self._flawed = True
        return duplicate(twice, made)

    def _integer(self, digits: str) -> Any:
        try:
            return int(digits)
        except ValueError:  # Python reads no more than 4,300 digits
            return self._noted(f"a number of {len(digits):,} digits cannot be read")

    def _float(self, digits: str) -> Any:
        value = float(digits)
        return value if math.isfinite(value) else self._noted(f"the number {shorten(digits)} is too large")


def duplicate(key: str, content: dict[str, Any] | None = None) -> Flaw:
    """The flaw of an object that has a key twice."""
    message = f"the key {key!r} stands twice in one object, so one of its values would be lost"
    return _flaw("duplicate_key", message, content, _writable(key))


def _writable(key: str) -> str:
    """A key that may have half a character, as a file of rejects can hold it."""
    return key.encode("utf-8", "replace").decode("utf-8")


def _is_deep(value: Any) -> bool:
    """Whether a value has more levels than a row may have."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
    return bool(level)


def _first_flaw(value: Any) -> Flaw | None:
    """The first flaw inside a parsed value of no great depth."""
    if isinstance(value, Flaw):
        return value
    if isinstance(value, str):
        return None if value.isascii() else _half_character(value)
    if isinstance(value, dict):
        inner: Iterable[Any] = itertools.chain(value, value.values())
    else:
        inner = value if isinstance(value, list) else ()
    return next((flaw for item in inner if (flaw := _first_flaw(item)) is not None), None)


def _half_character(text: str) -> Flaw | None:
    """JSON can write half a surrogate pair (a lone \\ud83d), which no tokenizer takes and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return _flaw("half_character", f"the text has half a character, {text[error.start]!r}, at {error.start:,}")
    return None


def named(value: Any) -> str:
    """What kind of value it is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def as_row(value: Any, flaw: Flaw | None, path: str, line: int, text: str) -> Row | Reject:
    """A parsed value as a row, or as the reject that says why it is none.

    Args:
        value: as parsed.
        flaw: the first one in it.
        path: its file.
        line: its line, or its number in the file.
        text: what it was parsed from; may be empty where there is no flaw.
    """
    if not isinstance(value, dict):
        message = f"the row is {named(value)}, not an object with keys"
        shown = shorten(text.strip() if flaw else value)
        return Reject(path, line, "not_an_object", message, value=shown, remedy='write {"prompt": …, "response": …}')
    if flaw is not None:
        remedy = "name the key once" if flaw.reason == "duplicate_key" else "mend this value"
        return Reject(path, line, flaw.reason, flaw.message, flaw.field, shorten(text.strip()), remedy)
    return Row(value, Source(path, line))
