"""All metrics by name, and the scores of a set of answers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from luthier.errors import UserError, shorten
from luthier.evaluation.metrics.base import Metric, References, Rows, check_rows
from luthier.evaluation.metrics.contains import ContainsAnswer
from luthier.evaluation.metrics.corpus import Bleu, Chrf
from luthier.evaluation.metrics.functions import FunctionMetric, RowFunction, load_function
from luthier.evaluation.metrics.numeric import NumericMatch
from luthier.evaluation.metrics.overlap import ROUGE, ExactMatch, ExactMatchNormalized, Rouge, TokenF1
from luthier.evaluation.metrics.records import JsonExact, JsonFieldF1, JsonValid
from luthier.evaluation.metrics.tools import ToolCallMatch
from luthier.evaluation.metrics.variety import AnswerCharacters, Distinct, Repetition
from luthier.evaluation.metrics.words import jieba_words

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Bleu(),
        Chrf(),
        *map(Rouge, ROUGE),
        ExactMatch(),
        ExactMatchNormalized(),
        TokenF1(),
        NumericMatch(),
        JsonValid(),
        JsonExact(),
        JsonFieldF1(),
        ToolCallMatch(),
        Distinct(1),
        Distinct(2),
        Repetition(),
        AnswerCharacters(),
    )
}
"""Those that are computed wherever they apply, in the order of tables."""

ON_REQUEST: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Chrf(word_order=2),
        *(Rouge(kind, jieba_words, name=f"{kind}_jieba") for kind in ROUGE),
        ContainsAnswer(),
    )
}
"""Variants, computed where they are asked for."""


def metric_of(what: str | RowFunction | Metric) -> Metric:
    """A metric from a name of :data:`METRICS` or :data:`ON_REQUEST`, from a function, or from where a function is.

    Args:
        what: ``"chrf++"``; a function ``f(answer, references)`` that gives a number or a truth; ``"file.py:function"``
            or ``"package.module.function"``.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(what, Metric):
        return what
    if callable(what):
        return FunctionMetric(what)
    if not isinstance(what, str):
        raise UserError(f"a metric is a name or a function, not {shorten(what)}")
    known = METRICS | ON_REQUEST
    if what in known:
        return known[what]
    if "." in what or ":" in what:
        return FunctionMetric(load_function(what))
    near = difflib.get_close_matches(what, known, n=1)
    raise UserError(
        f"there is no metric {shorten(what)}",
        remedy=f"did you mean {near[0]}?" if near else f"take one of {', '.join(known)}, or file.py:function",
    )


def require_metrics(names: Sequence[str], where: str = "evaluation.metrics") -> None:
    """Look at metrics that are asked for by name, before anything long is done.

    Args:
        names: of the recipe.
        where: its field.

    Raises:
        UserError: as :func:`metric_of`; the field is named.
    """
    for name in names:
        try:
            metric_of(name)
        except UserError as error:
            raise UserError(error.what, where=where, remedy=error.remedy) from None


def metrics_for(references: Rows, more: Sequence[str | RowFunction | Metric] = ()) -> list[Metric]:
    """The metrics of :data:`METRICS` that apply to rows with these right answers, and then others.

    Raises:
        UserError: one of the others is no metric, does not apply, or has the name of another.
    """
    found = {name: metric for name, metric in METRICS.items() if metric.applies(references)}
    for metric in map(metric_of, more):
        if not metric.applies(references):
            raise UserError(f"{metric.name} wants {metric.wants}", remedy="leave it out, or give such rows")
        if found.setdefault(metric.name, metric) is not metric:
            raise UserError(f"there are two metrics of the name {metric.name}", remedy="rename the function")
    return list(found.values())


def score(
    answers: Sequence[str], references: References, more: Sequence[str | RowFunction | Metric] = ()
) -> dict[str, float]:
    """Every metric that applies, by name: see :data:`METRICS`.

    Those of numbers, JSON and tool calls apply where the references hold such; the others always. All are from 0 to 1
    but ``answer_characters``. An empty answer scores 0.

    Args:
        answers: what the model said.
        references: the right answer of each row, or several.
        more: metrics beside: see :func:`metric_of`.

    Raises:
        UserError: as :func:`~luthier.evaluation.metrics.base.check_rows` and :func:`metrics_for`.
    """
    rows = check_rows(answers, references)
    return {metric.name: metric.score(answers, rows) for metric in metrics_for(rows, more)}
