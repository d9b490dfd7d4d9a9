"""A user's own function as a metric."""

from __future__ import annotations

import importlib
import importlib.util
import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from luthier.errors import UserError, shorten
from luthier.evaluation.metrics.base import MeanMetric, Rows

RowFunction = Callable[[str, list[str]], float | bool]
"""``f(answer, references)``: how good one answer is."""


class FunctionMetric(MeanMetric):
    """The mean of a function's numbers over rows.

    Args:
        function: takes an answer and its references.
        name: where it is not the function's own.
        better: which numbers are good.
    """

    def __init__(
        self,
        function: RowFunction,
        name: str | None = None,
        better: Literal["higher", "lower"] | None = "higher",
    ) -> None:
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.label = self.name.replace("_", " ")
        self.better = better
        self._function = function

    def rows(self, answers: Sequence[str], references: Rows) -> np.ndarray:
        """As for every metric.

        Raises:
            UserError: the function raises something, or gives what is no finite number; the row is named.
        """
        found: list[float] = []
        for number, (answer, row) in enumerate(zip(answers, references, strict=True), 1):
            try:
                value = self.row(answer, row)
            except Exception as error:
                raise UserError(
                    f"the metric {self.name} raised {type(error).__name__}: {shorten(str(error), 200)}",
                    where=f"row {number}, answer {shorten(answer)}",
                    remedy="it is called with the answer, a text, and the row's references, a list of texts",
                ) from error
            if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
                raise UserError(
                    f"the metric {self.name} gave {shorten(value)}, which is no finite number",
                    where=f"row {number}, answer {shorten(answer)}",
                    remedy="return a number, or True or False",
                )
            found.append(float(value))
        return np.array(found, dtype=np.float64)

    def row(self, answer: str, references: Sequence[str]) -> float:
        return self._function(answer, list(references))


def load_function(place: str) -> RowFunction:
    """The function at ``package.module.function`` or ``file.py:function``.

    Raises:
        UserError: there is none, or its module cannot be imported.
    """
    file, _, name = place.rpartition(":")
    if not file:
        file, _, name = place.rpartition(".")
    if not file or not name.isidentifier():
        raise UserError(
            f"{place!r} names no function", remedy="write package.module.function, or path/to/file.py:function"
        )
    if file.endswith(".py") and not Path(file).is_file():
        raise UserError(f"there is no file {file}", where=place, remedy="give its path from where the command runs")
    try:
        module = _module_of(Path(file)) if file.endswith(".py") else importlib.import_module(file)
    except Exception as error:
        raise UserError(
            f"{file} cannot be imported: {type(error).__name__}: {shorten(str(error), 200)}", where=place
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(
            f"{file} has no function {name!r}" if function is None else f"{name!r} of {file} is no function",
            where=place,
            remedy=f"it has {', '.join(functions[:8]) or 'none'}",
        )
    return function


def _module_of(path: Path) -> Any:
    """A file as a module of its own, under no name that another could have."""
    spec = importlib.util.spec_from_file_location(f"_metric_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
