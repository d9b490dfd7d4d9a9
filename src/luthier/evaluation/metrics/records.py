"""Answers that should be a JSON object: whether they are, whether all of it is right, and how much."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.evaluation.metrics.base import MeanMetric, Metric, References, Rows, f_measure

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


class JsonValid(MeanMetric):
    """One JSON object and nothing else: a fence around it is something else."""

    name, label, share, binary = "json_valid", "valid JSON", True, True
    wants = "references that are all JSON objects"

    def applies(self, references: Rows) -> bool:
        return is_json(references)

    def row(self, answer: str, references: Sequence[str]) -> float:
        return float(parse_object(answer) is not None)


class JsonExact(MeanMetric):
    """The same JSON object as a reference, whatever the order of keys and the white space."""

    name, label, share, binary = "json_exact", "JSON all right", True, True
    wants = "references that are all JSON objects"

    def applies(self, references: Rows) -> bool:
        return is_json(references)

    def row(self, answer: str, references: Sequence[str]) -> float:
        return float(is_json_exact(answer, references))


class JsonFieldF1(Metric):
    """F1 over the fields of all rows together: a field is right where the reference has the same value at its path.

    A path is the keys and the places in lists that lead to a value, so items of a list are compared in their order;
    an empty list or object is a value too. Of several references that with the highest F1 counts. JSON in a ``` fence
    is read. Any other answer has no fields, and all of the reference's are missing.
    """

    name, label = "json_field_f1", "JSON field F1"
    wants = "references that are all JSON objects"

    def applies(self, references: Rows) -> bool:
        return is_json(references)

    def statistics(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        """``[N, 3]``, fields that are right, that were said, and that the reference has."""
        stats = np.zeros((len(answers), 3))
        for i, (answer, row) in enumerate(zip(answers, references, strict=True)):
            said = _said_fields(answer)
            rights = [_fields(_object(reference)) for reference in row]
            counts = np.array([(len(said & right), len(said), len(right)) for right in rights])
            stats[i] = counts[f_measure(counts).argmax()]
        return stats

    def value(self, sums: np.ndarray, count: np.ndarray | int) -> np.ndarray:
        return f_measure(sums)

    def rows(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        return f_measure(self.statistics(answers, references))


def _said_fields(answer: str) -> set[tuple[str, str]]:
    """Fields of an answer's object; without a bare one, those of the first fenced."""
    for text in (answer, *_FENCED.findall(answer)):
        if (value := _object(text)) is not None:
            return _fields(value)
    return set()


def _fields(value: dict[str, Any] | None) -> set[tuple[str, str]]:
    """``(path, value)`` of all that holds nothing further, both as JSON: true is not 1, and "1" is not 1."""
    found: set[tuple[str, str]] = set()
    left: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while left:
        path, value = left.pop()
        if value and isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [((*path, key), item) for key, item in items]
        else:
            found.add((json.dumps(path), json.dumps(value)))
    return found


def json_valid(answers: Sequence[str]) -> float:
    """Share of answers that are one JSON object and nothing else."""
    return sum(parse_object(answer) is not None for answer in answers) / max(len(answers), 1)


def json_exact(answers: Sequence[str], references: References) -> float:
    """Share of answers that are the same JSON as a reference, whatever the order of keys and the white space."""
    return JsonExact().score(answers, references)


def is_json_exact(answer: str, references: Sequence[str]) -> bool:
    """Whether one answer is the same JSON object as one of its references."""
    parsed = parse_object(answer)
    return parsed is not None and parsed in [parse_object(reference) for reference in references]


def is_json(references: Rows) -> bool:
    """Whether every reference is a JSON object."""
    return all(parse_object(reference) is not None for row in references for reference in row)


def parse_object(text: str) -> str | None:
    """A JSON object in one canonical form, so that equal ones are equal texts; None where ``text`` is none."""
    value = _object(text)
    return None if value is None else json.dumps(value, sort_keys=True)


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = parse_json(text)
        json.dumps(value)  # what is read can be nested too deeply to be written
        return value if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def parse_json(text: str) -> Any:
    """A JSON value, its numbers of one kind.

    Raises:
        ValueError: it is none.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_float=_number, parse_constant=_refuse)


def _number(text: str) -> int | float:
    """JSON has one kind of number: 1.0 is 1."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
