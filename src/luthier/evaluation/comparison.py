"""Models on the same questions: their scores, how sure those are, which rows improved, and what looks wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.data.encode import EncodedExample
from luthier.data.examples import TrainingExample
from luthier.data.pairs import PairEncoder
from luthier.decoding import BATCH_SIZE, Decoding
from luthier.errors import UserError, counted
from luthier.evaluation import measures, metrics
from luthier.evaluation.contestants import Contestant, LocalModel, Models
from luthier.evaluation.generation import Answer
from luthier.evaluation.judge import Judge, judge_models
from luthier.evaluation.judged import Judging
from luthier.evaluation.measures import Measure, finite, how_sure, result_json
from luthier.evaluation.metrics.functions import RowFunction
from luthier.evaluation.question import Question, ask, ask_source
from luthier.evaluation.statistics import Change, Interval
from luthier.evaluation.suspicions import suspicions

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

# What says whether a row is right, the first that applies; rougeL where none does, or no model is right in any row.
_RIGHT = ("tool_call_match", "json_exact", "numeric_match", "exact_match")


@dataclass(slots=True)
class ModelResult:
    """One model's part."""

    name: str
    measures: dict[str, Measure]
    answers: list[Answer]
    seconds: float
    """Time taken by the answers."""
    intervals: dict[str, Interval]
    """Each measure's value and its 95% confidence interval"""
    changes: dict[str, Change]
    """Against the first model, where that has the measure too; empty for the first itself."""
    kept: int = 0
    """How many of the answers an earlier evaluation had kept"""

    @property
    def metrics(self) -> dict[str, float]:
        """The values by name: those of :func:`luthier.evaluation.metrics.score`; ``perplexity`` of the right answers;
        ``ended``, the share of answers that a stop token ended; ``answer_tokens``, their mean length."""
        return {name: found.value for name, found in self.intervals.items()}


@dataclass(slots=True)
class Comparison:
    """What :func:`compare` found. The first model is the base."""

    questions: list[Question]
    models: list[ModelResult]
    samples: list[int]
    """Rows chosen to be shown, by index into ``questions``."""
    judged_by: str
    """The measure that says which rows improved and which got worse."""
    signatures: dict[str, str]
    """What to give with a score that is published, by measure."""
    notes: list[str] = field(default_factory=list)
    """What looks wrong, in words."""
    decoding: Decoding = field(default_factory=Decoding)
    """How the answers were made."""
    judging: Judging | None = None
    """Which answers a judge prefers; None: nobody was asked."""

    def improved(self, model: ModelResult) -> list[int]:
        """Rows on which a model is better than the first one, the largest gain first."""
        return self._apart(model, 1)

    def worsened(self, model: ModelResult) -> list[int]:
        """Rows on which a model is worse than the first one, the largest loss first."""
        return self._apart(model, -1)

    def _apart(self, model: ModelResult, sign: int) -> list[int]:
        before, after = (m.measures[self.judged_by] for m in (self.models[0], model))
        gains = sign * (after.rows - before.rows)
        return [int(row) for row in (-gains).argsort(kind="stable") if gains[row] > 0]

    def require_judged(self) -> None:
        """Nothing where no judge was asked, or it has judged to the end.

        Raises:
            UserError: why it gave up.
        """
        if self.judging is not None and self.judging.error is not None:
            raise self.judging.error

    def render(self) -> RenderableType:
        """See :func:`luthier.evaluation.comparison_view.render_comparison`."""
        from luthier.evaluation.comparison_view import render_comparison

        return render_comparison(self)

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes: scores by model, notes, and each row with every answer."""
        rows = []
        for i, question in enumerate(self.questions):
            answers = {
                m.name: asdict(m.answers[i]) | {"scores": _row_scores(m, i)} | self._verdict(m, i) for m in self.models
            }
            rows.append(asdict(question) | {"answers": answers})
        models = {}
        for model in self.models:
            found = result_json(model.metrics, model.intervals, model.changes, model.seconds)
            found["kept_answers"] = model.kept
            if model is not self.models[0]:
                found |= {"improved": self.improved(model), "worsened": self.worsened(model)}
            models[model.name] = found
        return {
            "models": models,
            "measures": {name: m.describe() for model in self.models for name, m in model.measures.items()},
            "decoding": self.decoding.describe(),
            "judged_by": self.judged_by,
            "notes": self.notes,
            "signatures": self.signatures,
            "samples": self.samples,
            **({} if self.judging is None else {"judge": self.judging.to_json()}),
            "rows": rows,
        }

    def _verdict(self, model: ModelResult, row: int) -> dict[str, Any]:
        """What the judge said of one row, where it was asked."""
        judged = None if self.judging is None else self.judging.models.get(model.name)
        return {} if judged is None or row >= len(judged.verdicts) else {"judge": judged.verdicts[row].to_json()}


def _row_scores(model: ModelResult, row: int) -> dict[str, float | None]:
    count = len(model.answers)
    return {name: finite(float(m.rows[row])) for name, m in model.measures.items() if len(m.rows) == count}


def compare(
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample],
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = BATCH_SIZE,
    samples: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
    encoded: Sequence[EncodedExample] | None = None,
    pairs: PairEncoder | None = None,
    more_metrics: Sequence[str | RowFunction | metrics.Metric] = (),
    seed: int = 42,
    decoding: Decoding | None = None,
    resume: bool = True,
    judge: Judge | None = None,
) -> Comparison:
    """Ask every model the same questions and score the answers.

    Args:
        models: names and context managers, the base first, then the tuned one, then any others.
        tokenizer: of those whose context gives no :class:`Contestant`.
        examples: rows with answers.
        system: a system message for rows that have none, as in training.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        samples: rows to choose for showing.
        progress: told ``(name, done, total)``.
        encoded: the rows encoded as in training, to compute perplexity from.
        pairs: how sources and targets of encoder-decoder models were encoded for training; None: prompts are rendered.
        more_metrics: metrics beside those that apply: see :func:`luthier.evaluation.metrics.metric_of`.
        seed: of the resamples that intervals and significance come from.
        decoding: how answers are made; None: greedily.
        resume: whether answers that an interrupted evaluation has kept are taken up.
        judge: says which answers it prefers; where it gives up, the comparison's ``judging`` says why.

    Raises:
        UserError: fewer than two models, names given twice, no row that can be asked, or a metric that does not apply.
    """
    decoding = Decoding() if decoding is None else decoding
    names = [name for name, _ in models]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"a comparison wants two models or more, of different names, not {names}")
    questions, notes = questions_of(tokenizer, examples, system, pairs)
    references = [q.references for q in questions]
    wanted = metrics.metrics_for(references, more_metrics)
    results: list[ModelResult] = []
    for name, opened in models:
        with opened() as given:
            contestant = (
                given
                if isinstance(given, Contestant)
                else LocalModel(given, tokenizer, encoded=encoded, pairs=pairs, resume=resume)
            )
            begin = time.perf_counter()
            answers = contestant.answer(
                questions,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                decoding=decoding,
                progress=None if progress is None else _named(progress, name),
            )
            seconds = time.perf_counter() - begin
            losses = contestant.losses()
            notes += [f"{name}: {note}" for note in contestant.notes]
            own = getattr(contestant, "tokenizer", None) if pairs is None else None
            notes += suspicions(name, questions, answers, own)
            kept = contestant.kept
        # Else it would stay in memory until the next one is there.
        del given, contestant
        texts = [a.text for a in answers]
        found = [measures.of_metric(metric, texts, references) for metric in wanted]
        found += [] if losses is None else measures.of_losses(losses)
        found += measures.of_answers(answers)
        result = _result(name, {m.name: m for m in found}, answers, seconds, results[:1], seed)
        result.kept = kept
        results.append(result)
    signatures = {m.name: text for m in wanted if (text := m.signature(references)) is not None}
    judged_by = next((n for n in _RIGHT if any(m.metrics.get(n) for m in results)), "rougeL")
    notes += _suspicions(results, references, max_new_tokens)
    chosen = _choose(results[0].measures, results[1].measures, judged_by, samples)
    judging = None
    if judge is not None:
        said = [(result.name, [answer.text for answer in result.answers]) for result in results]
        judging = judge_models(judge, questions, said, progress=progress)
        notes += judging.notes()
    return Comparison(questions, results, chosen, judged_by, signatures, notes, decoding, judging)


def _result(
    name: str,
    found: dict[str, Measure],
    answers: list[Answer],
    seconds: float,
    base: Sequence[ModelResult],
    seed: int,
) -> ModelResult:
    intervals, changes = how_sure(found, base[0].measures if base else None, seed)
    return ModelResult(name, found, answers, seconds, intervals, changes)


def _named(progress: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def questions_of(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample],
    system: str | None,
    pairs: PairEncoder | None,
) -> tuple[list[Question], list[str]]:
    """The rows that can be asked, and a note for each that cannot: one bad row must not cost a whole run's result."""
    questions, notes = [], []
    refused: UserError | None = None
    for number, example in enumerate(examples, 1):
        try:
            questions.append(
                ask(tokenizer, example, number, system) if pairs is None else ask_source(pairs, example, number)
            )
        except UserError as error:
            refused = error
            notes.append(f"{error.where} was left out: {error.what}")
    if not questions:
        raise refused or UserError("there are no rows to compare on", remedy="give at least one with an answer")
    return questions, notes


def _suspicions(results: list[ModelResult], references: list[list[str]], limit: int) -> list[str]:
    """What a careful reader would ask about before believing the numbers."""
    notes = []
    for result in results:
        count = len(result.answers)
        empty = sum(not a.text.strip() for a in result.answers)
        cut = sum(not a.stopped for a in result.answers)
        if empty == count:
            notes.append(f"{result.name}: every answer is empty; is the end-of-turn all that was trained?")
        elif 2 * empty > count:
            notes.append(f"{result.name}: {empty} of {count} answers are empty")
        if 2 * cut > count and empty < count:
            were = "was" if cut == 1 else "were"
            notes.append(
                f"{result.name}: {cut} of {counted(count, 'answer')} {were} cut at {limit} tokens, so their scores "
                "are those of fragments; raise max_new_tokens, or see whether the model has learnt to stop"
            )
        values = result.metrics
        if not math.isfinite(values.get("perplexity", 0.0)):
            notes.append(f"{result.name}: its perplexity is not a finite number; its weights may be broken")
        if not any(values[m] for m in ("bleu", *metrics.ROUGE, "exact_match")) and empty < count:
            notes.append(f"{result.name}: every score is zero; do the references fit the questions?")
    base = results[0]
    for result in results[1:2]:
        if [a.text for a in result.answers] == [a.text for a in base.answers]:
            notes.append(f"{result.name} answers every question exactly as {base.name}: has training changed anything?")
    if not any(r.metrics["bleu"] > 1e-4 for r in results) and all(
        len(r.split()) < 4 for row in references for r in row
    ):
        notes.append("BLEU counts runs of four words and these answers are shorter: judge by exact_match")
    return notes


def _choose(base: dict[str, Measure], tuned: dict[str, Measure], judged_by: str, count: int) -> list[int]:
    """Rows to show: where tuning helped most, and, to be honest, the worst one where the tuned model is wrong."""
    main, near = ((m[judged_by].rows, m["rougeL"].rows) for m in (base, tuned))
    gains = {i: (near[0][i] - main[0][i], near[1][i] - main[1][i]) for i in range(len(main[0]))}
    wrong = [i for i in gains if near[0][i] < 1]
    ranked = sorted(gains, key=lambda i: gains[i], reverse=True)
    chosen = ranked[:count]
    if count > 1 and wrong and not any(i in wrong and gains[i] <= (0, 0.0) for i in chosen):
        worst = min(wrong, key=lambda i: gains[i])
        chosen = [*[i for i in ranked if i != worst][: count - 1], worst]
    return chosen
