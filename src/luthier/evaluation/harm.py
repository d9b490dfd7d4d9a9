"""What tuning has cost: knowledge forgotten, training rows memorised, refusals, answers in another language."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.data.chats import ChatEncoder
from luthier.data.examples import TrainingExample
from luthier.data.render import Renderer
from luthier.decoding import BATCH_SIZE, Decoding
from luthier.errors import UserError
from luthier.evaluation import memorisation
from luthier.evaluation.contestants import LocalModel, Models
from luthier.evaluation.general import general_set
from luthier.evaluation.generation import Answer
from luthier.evaluation.harm_checks import LEAKS_READ, Asked, Check, drifting, forgotten, leaking, memorised, refusing
from luthier.evaluation.question import Question, ask

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

GENERAL = "general"
GENERAL_TOKENS = 32
"""Of an answer to the general set: one sentence."""

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class HarmReport:
    """What :func:`measure_harm` found."""

    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    """What could not be measured, in words."""
    seconds: float = 0.0

    @property
    def harmed(self) -> list[Check]:
        """The checks that found harm."""
        return [check for check in self.checks if check.harm]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def render(self) -> RenderableType:
        """See :func:`luthier.evaluation.harm_view.render_harm`."""
        from luthier.evaluation.harm_view import render_harm

        return render_harm(self)

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes."""
        return {
            "checks": [check.to_json() for check in self.checks],
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
        }


def forgetting(
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample] | None = None,
    *,
    name: str = GENERAL,
    system: str | None = None,
    max_new_tokens: int = GENERAL_TOKENS,
    batch_size: int = BATCH_SIZE,
    seed: int = 42,
    resume: bool = True,
    progress: Progress | None = None,
) -> list[Check]:
    """Whether a tuned model answers what its base can.

    Args:
        models: the base and the tuned model.
        tokenizer: theirs.
        examples: rows with answers; ``topic`` and ``language`` of their metadata divide them; None: the set that comes
            with the package (:mod:`luthier.evaluation.general`).
        name: of the set.
        system: a system message for rows that have none.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        seed: of the resamples.
        resume: whether answers that an interrupted evaluation has kept are taken up.
        progress: told ``(what, done, total)``.

    Returns:
        how many answers hold a right one (ROUGE-L where right answers are long), and the perplexity of right answers.

    Raises:
        UserError: there are not two models, or no row that can be asked.
    """
    _require_two(models)
    rows = general_set() if examples is None else examples
    asked, notes = _questions(tokenizer, rows, name, max_new_tokens, system, losses=True)
    if not asked.questions:
        raise UserError(
            f"{name}: no row can be asked", where=notes[0] if notes else None, remedy="give rows with answers"
        )
    _answer(models, tokenizer, [asked], batch_size, progress, resume)
    return forgotten(asked, seed)


def measure_harm(
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    *,
    training: Sequence[TrainingExample] = (),
    held_out: Sequence[TrainingExample] = (),
    answered: tuple[list[Question], list[Answer], list[Answer]] | None = None,
    more: Mapping[str, Sequence[TrainingExample]] | None = None,
    general: Sequence[TrainingExample] | None = None,
    system: str | None = None,
    rows: int = 50,
    max_new_tokens: int = 256,
    batch_size: int = BATCH_SIZE,
    seed: int = 42,
    resume: bool = True,
    progress: Progress | None = None,
) -> HarmReport:
    """Ask base and tuned what neither was tuned for, what the tuned one was, and what it was not.

    Args:
        models: the base and the tuned model.
        tokenizer: theirs.
        training: what the tuned model was trained on; a sample is asked.
        held_out: rows of the same kind that it was not trained on.
        answered: held-out questions with the answers of base and tuned, where there are some already; else a sample of
            ``held_out`` is asked.
        more: sets of rows by name that should not be forgotten either.
        general: in place of the set that comes with the package.
        system: a system message for rows that have none, as in training.
        rows: training rows and held-out rows to ask at most.
        max_new_tokens: longest answer, of the general set's :data:`GENERAL_TOKENS`.
        batch_size: prompts answered at once.
        seed: of the samples and the resamples.
        resume: see :func:`forgetting`.
        progress: told ``(what, done, total)``.

    Raises:
        UserError: there are not two models.
    """
    _require_two(models)
    begin = time.perf_counter()
    notes: list[str] = []
    sets = [(GENERAL, general_set() if general is None else general, min(GENERAL_TOKENS, max_new_tokens))]
    sets += [(name, examples, max_new_tokens) for name, examples in (more or {}).items()]
    asked = {}
    for name, examples, most in sets:
        asked[name], refused = _questions(tokenizer, examples, name, most, system, losses=True)
        notes += refused
    rng = random.Random(seed)
    trained = _sample(training, rows, rng)
    unseen = _sample(held_out, rows, rng)
    limit = _longest(tokenizer, [*trained, *unseen], max_new_tokens)
    trained_asked, _ = _questions(tokenizer, [e for e in trained if not e.is_plain_text], "training", limit, system)
    unseen_asked, _ = _questions(tokenizer, [e for e in unseen if not e.is_plain_text], "held-out", limit, system)
    held = unseen_asked
    if answered is not None:
        held = Asked("held-out", answered[0], max_new_tokens, answers=[answered[1], answered[2]])
        chosen = [i for i, q in enumerate(held.questions) if memorisation.long_enough(q.references[0])][:rows]
        unseen_asked = Asked(
            "held-out", [held.questions[i] for i in chosen], 0, answers=[[a[i] for i in chosen] for a in held.answers]
        )
    renderer = Renderer(tokenizer, system=system, train_on="last_answer", allow_special_tokens=True)
    begun = {name: _begun(renderer, part, name) for name, part in (("training", trained), ("held-out", unseen))}
    parts = [*asked.values(), trained_asked, unseen_asked, *begun.values()]
    wanted = [part for part in parts if part.questions and not part.answers]
    _answer(models, tokenizer, wanted, batch_size, progress, resume)

    checks = [check for name, _, _ in sets if asked[name].questions for check in forgotten(asked[name], seed)]
    if trained:
        checks += memorised(trained_asked, unseen_asked, begun, seed)
    elif not training:
        notes.append("no training rows are at hand, so memorisation was not measured")
    else:
        notes.append(
            f"no training row has an answer of {memorisation.LEAST_WORDS} words: shorter ones are no evidence of "
            "memorisation, which was not measured"
        )
    judged = [part for part in (asked[GENERAL], held) if part.questions and part.answers]
    if training and judged:
        checks.append(leaking(judged, training, seed))
        if len(training) > LEAKS_READ:
            notes.append(f"answers were searched for those of the first {LEAKS_READ:,} training rows alone")
    if judged:
        checks.append(refusing(judged, seed))
        checks += drifting(judged, seed, notes)
    return HarmReport(checks, notes, time.perf_counter() - begin)


def _require_two(models: Models) -> None:
    if len(models) != 2:
        raise UserError(f"harm is measured between a base and a tuned model, not {len(models)} models")


def _questions(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[TrainingExample],
    name: str,
    most: int,
    system: str | None,
    *,
    losses: bool = False,
) -> tuple[Asked, list[str]]:
    """Rows as questions, and a note for each that cannot be asked."""
    asked, notes = Asked(name, [], most), []
    for number, example in enumerate(examples, 1):
        try:
            asked.questions.append(ask(tokenizer, example, number, system))
            asked.examples.append(example)
        except UserError as error:
            notes.append(f"{name}: {error.where} was left out: {error.what}")
    if losses and asked.examples:
        encoder = ChatEncoder(Renderer(tokenizer, system=system, train_on="last_answer", allow_special_tokens=True))
        asked.encoded = list(encoder.encode(asked.examples).examples)
    return asked, notes


def _sample(examples: Sequence[TrainingExample], rows: int, rng: random.Random) -> list[TrainingExample]:
    """Some rows with long answers, or long texts, in their own order; each answer once."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    found: dict[str, int] = {}
    for index in order:
        example = examples[index]
        answer = example.input if example.is_plain_text else example.answer
        if memorisation.long_enough(answer):
            found.setdefault(str(answer), index)
        if len(found) == rows:
            break
    return [examples[index] for index in sorted(found.values())]


def _longest(tokenizer: PreTrainedTokenizerBase, examples: Sequence[TrainingExample], most: int) -> int:
    """Tokens that the longest right answer needs with its end, at most ``most``."""
    answers = [example.answer or "" for example in examples]
    if not answers:
        return most
    encoded = tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
    return min(most, max(map(len, encoded)) + 8)


def _begun(renderer: Renderer, examples: Sequence[TrainingExample], name: str) -> Asked:
    """Rows with the beginning of their answers given."""
    found = [memorisation.opened(renderer, example, number) for number, example in enumerate(examples, 1)]
    return Asked(f"{name}, begun", [f.question for f in found if f is not None], memorisation.CONTINUED_TOKENS + 8)


def _answer(
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Asked],
    batch_size: int,
    progress: Progress | None,
    resume: bool,
) -> None:
    """Ask each model everything while it is there."""
    for name, given in models:
        with given() as model:
            contestant = LocalModel(model, tokenizer, resume=resume)
            for part in parts:
                contestant.encoded = part.encoded or None
                told = None if progress is None else _named(progress, f"{name}, {part.name}")
                part.answers.append(
                    contestant.answer(
                        part.questions,
                        max_new_tokens=part.most,
                        batch_size=batch_size,
                        decoding=Decoding(),
                        progress=told,
                    )
                )
                losses = contestant.losses()
                if losses is not None:
                    part.losses.append(losses)


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)
