"""Base against tuned: the same questions to each model, the scores, and some answers side by side."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.encode import EncodedExample
from luthier.data.examples import TrainingExample
from luthier.data.pairs import PairEncoder
from luthier.errors import UserError
from luthier.evaluation import metrics
from luthier.evaluation.generation import Answer, generate_answers
from luthier.evaluation.perplexity import perplexity_of_examples
from luthier.evaluation.question import Question, ask, ask_source

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

Models = Sequence[tuple[str, Callable[[], AbstractContextManager[Any]]]]
"""Names, and what gives each model for as long as it is asked: one PEFT model can so be base and tuned."""

# Characters of a text that the side-by-side view shows.
_SHOWN = 700


@dataclass(slots=True)
class ModelResult:
    """One model's part."""

    name: str
    metrics: dict[str, float]
    """Those of :func:`luthier.evaluation.metrics.score`; ``perplexity`` of the right answers; ``ended``, the share of
    answers that a stop token ended; ``answer_tokens``, their mean length."""
    answers: list[Answer]
    seconds: float
    """Time taken by the answers."""


@dataclass(slots=True)
class Comparison:
    """What :func:`compare` found. The first model is the base."""

    questions: list[Question]
    models: list[ModelResult]
    samples: list[int]
    """Rows chosen to be shown, by index into ``questions``."""
    bleu_signature: str
    notes: list[str] = field(default_factory=list)
    """What looks wrong, in words."""

    def render(self) -> RenderableType:
        """See :func:`render_comparison`."""
        return render_comparison(self)

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes: metrics by model, notes, and each row with every answer."""
        rows = []
        for i, question in enumerate(self.questions):
            answers = {m.name: asdict(m.answers[i]) for m in self.models}
            rows.append(asdict(question) | {"answers": answers})
        models = {}
        for model in self.models:
            # JSON has no NaN and no infinity.
            values = {k: v if math.isfinite(v) else None for k, v in model.metrics.items()}
            models[model.name] = {"metrics": values, "seconds": round(model.seconds, 3)}
        return {
            "models": models,
            "notes": self.notes,
            "bleu_signature": self.bleu_signature,
            "samples": self.samples,
            "rows": rows,
        }


def compare(
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample],
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    samples: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
    encoded: Sequence[EncodedExample] | None = None,
    pairs: PairEncoder | None = None,
) -> Comparison:
    """Ask every model the same questions, greedily, and score the answers.

    Args:
        models: names and context managers, the base first, then the tuned one.
        tokenizer: one for all of them.
        examples: rows with answers.
        system: a system message for rows that have none, as in training.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        samples: rows to choose for showing.
        progress: told ``(name, done, total)``.
        encoded: the rows encoded as in training, to compute perplexity from.
        pairs: how sources and targets of encoder-decoder models were encoded for training; None: prompts are rendered.

    Raises:
        UserError: fewer than two models, names given twice, or no row that can be asked.
    """
    names = [name for name, _ in models]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"a comparison wants two models or more, of different names, not {names}")
    questions, notes = _questions(tokenizer, examples, system, pairs)
    references = [q.references for q in questions]
    results = []
    for name, opened in models:
        with opened() as model:
            begin = time.perf_counter()
            answers = generate_answers(
                model,
                tokenizer,
                [q.prompt for q in questions],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                max_source_length=None if pairs is None else pairs.max_length,
                progress=None if progress is None else _named(progress, name),
            )
            seconds = time.perf_counter() - begin
            values = metrics.score([a.text for a in answers], references)
            if encoded:
                values["perplexity"] = perplexity_of_examples(model, encoded).perplexity
        values["ended"] = sum(a.stopped for a in answers) / len(answers)
        values["answer_tokens"] = sum(len(a.token_ids) for a in answers) / len(answers)
        results.append(ModelResult(name, values, answers, seconds))
    signature = metrics.METRICS["bleu"].signature(references) or ""
    notes += _suspicions(results, references, max_new_tokens)
    chosen = _choose(questions, results[0].answers, results[1].answers, samples)
    return Comparison(questions, results, chosen, signature, notes)


def _named(progress: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _questions(
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
        if 2 * cut > count:
            notes.append(
                f"{result.name}: {cut} of {count} answers were cut at {limit} tokens, so their scores are those of "
                "fragments; raise evaluation.max_new_tokens, or see whether the model has learnt to stop"
            )
        if not math.isfinite(result.metrics.get("perplexity", 0.0)):
            notes.append(f"{result.name}: its perplexity is not a finite number; its weights may be broken")
        if not any(result.metrics[m] for m in ("bleu", *metrics.ROUGE, "exact_match")) and empty < count:
            notes.append(f"{result.name}: every score is zero; do the references fit the questions?")
    base = results[0]
    for result in results[1:2]:
        if [a.token_ids for a in result.answers] == [a.token_ids for a in base.answers]:
            notes.append(f"{result.name} answers every question exactly as {base.name}: has training changed anything?")
    if not any(r.metrics["bleu"] > 1e-4 for r in results) and all(
        len(r.split()) < 4 for row in references for r in row
    ):
        notes.append("BLEU counts runs of four words and these answers are shorter: judge by exact_match")
    return notes


def _choose(questions: list[Question], base: list[Answer], tuned: list[Answer], count: int) -> list[int]:
    """Rows to show: where tuning helped most, and, to be honest, the worst one where the tuned model is wrong."""
    gains, wrong = {}, []
    for i, question in enumerate(questions):
        before, after = (_quality(answers[i].text, question.references) for answers in (base, tuned))
        gains[i] = ((after[0] - before[0]), after[1] - before[1])
        if not after[0]:
            wrong.append(i)
    ranked = sorted(gains, key=lambda i: gains[i], reverse=True)
    chosen = ranked[:count]
    if count > 1 and wrong and not any(i in wrong and gains[i] <= (0, 0.0) for i in chosen):
        worst = min(wrong, key=lambda i: gains[i])
        chosen = [*[i for i in ranked if i != worst][: count - 1], worst]
    return chosen


def _quality(answer: str, references: list[str]) -> tuple[bool, float]:
    """Whether an answer is right, and how near it is."""
    right = metrics.is_exact(answer, references) or metrics.is_json_exact(answer, references)
    return right, metrics.rouge_l(answer, references)


def render_comparison(comparison: Comparison) -> RenderableType:
    """A table of the metrics, the notes, and the chosen rows side by side, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_table(comparison)]
    parts += [Text(f"! {note}", style="yellow") for note in comparison.notes]
    parts += [_sample(comparison, i) for i in comparison.samples]
    if comparison.samples:
        parts.append(Text("underlined: not in the right answer", style="dim"))
    return Group(*parts)


def _table(comparison: Comparison) -> RenderableType:
    from rich.table import Table

    base, tuned = comparison.models[:2]
    table = Table(title=f"{len(comparison.questions)} rows", title_justify="left")
    table.add_column("")
    for model in comparison.models:
        table.add_column(model.name, justify="right")
    table.add_column("change", justify="right")
    for name in base.metrics:
        label, better, share, digits = _column(name)
        change = tuned.metrics[name] - base.metrics[name]
        style = ""
        if better and change:
            style = "green" if (change > 0) == (better == "higher") else "red"
        # Shares of the rows read as per cent; BLEU and ROUGE are no shares, and perplexity and lengths are themselves.
        times, places, unit = (100, 1, "%") if share else (1, digits, "")
        shown = f"{change * times:+.{places}f}"
        table.add_row(
            label,
            *[f"{m.metrics[name] * times:.{places}f}{unit}" for m in comparison.models],
            f"[{style}]{shown}[/]" if style else shown,
        )
    return table


# Label, what is better, whether it is a share, and digits of what is no metric of answers and references. Neither how
# long answers are nor how many end by themselves is better or worse as such.
_OTHERS: dict[str, tuple[str, str | None, bool, int]] = {
    "perplexity": ("perplexity (lower is better)", "lower", False, 3),
    "ended": ("answers that end by themselves", None, True, 1),
    "answer_tokens": ("tokens in an answer", None, False, 1),
}


def _column(name: str) -> tuple[str, str | None, bool, int]:
    """How a score is shown: its label, what is better, whether it is a share, and digits."""
    if name in _OTHERS:
        return _OTHERS[name]
    metric = metrics.METRICS[name]
    return metric.label, metric.better, metric.share, metric.digits


def _nearer(where: str) -> str:
    """A place as one would type it here: relative where it lies under the working directory."""
    return where.removeprefix(str(Path.cwd()) + os.sep)


def _sample(comparison: Comparison, index: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    question = comparison.questions[index]
    reference = question.references[0]
    table = Table(show_header=False, title=_nearer(question.where), title_justify="left", show_lines=True, expand=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(ratio=1, overflow="fold")
    table.add_row("asked", Text(_visible(question.asked)))
    table.add_row("right", Text(_visible(reference)))
    answers = Table.grid(expand=True, padding=(0, 2))
    shown = comparison.models[:2]
    for _ in shown:
        answers.add_column(ratio=1, overflow="fold")
    answers.add_row(*[Text(m.name, style="bold") for m in shown])
    answers.add_row(*[_marked(m.answers[index], reference) for m in shown])
    table.add_row("said", answers)
    return table


def _marked(answer: Answer, reference: str) -> Text:
    """An answer with what is not in the reference underlined."""
    from rich.text import Text

    if not answer.text.strip():
        return Text("(empty)", style="dim")
    said, right = _pieces(_visible(answer.text)), _pieces(reference)
    text = Text()
    for kind, begin, end, _, _ in SequenceMatcher(None, said, right, autojunk=False).get_opcodes():
        text.append("".join(said[begin:end]), style="green" if kind == "equal" else "underline red")
    if not answer.stopped:
        text.append(" (cut at the limit)", style="dim")
    return text


def _pieces(text: str) -> list[str]:
    """Words, single Chinese characters, runs of white space and other characters, which joined give the text."""
    return re.findall(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|(?:(?![\u2e80-\u9fff\uac00-\ud7af])\w)+|\s+|.", text)


def _visible(text: str) -> str:
    """At most ``_SHOWN`` characters, without the escape character, which a terminal would obey."""
    text = text.replace("\x1b", "␛").strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text) - _SHOWN:,} more characters)"
