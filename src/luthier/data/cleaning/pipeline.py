"""Cleaning: steps in their order over rows, each row one out for one in, and each step's account of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from luthier.data.cleaning.functions import load_function
from luthier.data.cleaning.personal import Masker, mask_personal_data, veil
from luthier.data.cleaning.registry import BUILT_IN, check_options, is_filter, nearest
from luthier.data.cleaning.report import StepReport
from luthier.data.cleaning.rows import Refusal, Text, texts_of, with_texts
from luthier.data.examples import Reject, TrainingExample
from luthier.data_options import Step
from luthier.errors import UserError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scope = Literal["all", "prompt", "answer"]
TextFunction = Callable[[str], str]


@dataclass(slots=True)
class _Ready:
    """A step, ready to run: exactly one of text, row and whole."""

    report: StepReport
    own: bool
    """Whether a user wrote it, so that it may fail."""
    text: TextFunction | None = None
    row: Callable[[Sequence[Text]], Refusal | None] | None = None
    whole: Callable[[TrainingExample], TrainingExample | None] | None = None
    masks: Mapping[str, Any] | None = None
    """Options of mask_personal_data, which remembers values from one text of a row to the next."""


class Cleaning:
    """Cleaners and filters, applied to rows in their order.

    Args:
        steps: names of built-in cleaners, recipe steps (a name and options; ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``
            names your own), or functions: from text to text, or, where the parameter or the result is annotated
            :class:`TrainingExample`, from a row to a row or to None, which refuses it.
        tokenizer: the model's, for the steps that count tokens.
        scope: what steps are applied to that don't say so by their option ``on``: all texts, those of the prompt or
            those of the answer (assistant turns, outputs, references and plain text).

    Raises:
        UserError: a step is unknown, or an option of it.
    """

    def __init__(
        self,
        steps: Sequence[Step | str | Mapping[str, Any] | Callable[..., Any]] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        scope: Scope = "all",
    ) -> None:
        self.tokenizer = tokenizer
        self.scope: Scope = scope
        self._steps: list[_Ready] = []
        self._met = 0
        for step in steps:
            self.add(step)

    def add(self, step: Step | str | Mapping[str, Any] | Callable[..., Any], **options: Any) -> Cleaning:
        """Add a step after those there are.

        Raises:
            UserError: the step is unknown, or an option of it.
        """
        where = f"cleaning step {len(self._steps) + 1}"
        if isinstance(step, str | Mapping):
            step = Step.model_validate(step)
        if isinstance(step, Step):
            options = {**step.options, **options}
            function = self._named(step.name, where)
            name = step.name
        elif callable(step):
            function, name = step, getattr(step, "__name__", type(step).__name__)
        else:
            raise UserError(
                f"a cleaner must be a function from text to text, not {type(step).__name__}",
                where=where,
                remedy="or a built-in one's name, for example 'normalize_whitespace'",
            )
        on = options.pop("on", self.scope)
        if on not in get_args(Scope):
            raise UserError(f"{name}: on={shorten(on)}", where=where, remedy="on is all, prompt or answer")
        built_in = BUILT_IN.get(getattr(function, "__name__", "")) is function
        options = check_options(function, options, where) if built_in else _own_options(function, name, options, where)
        report = StepReport(name, dict(options), on)
        self._steps.append(self._ready(function, options, report, built_in, where))
        return self

    def _named(self, name: str, where: str) -> Callable[..., Any]:
        if name in BUILT_IN:
            return BUILT_IN[name]
        if ":" in name:
            return load_function(name, where)
        near = nearest(name, BUILT_IN)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(
            f"no cleaner is called {name!r}",
            where=where,
            remedy=f"{hint}known: {', '.join(BUILT_IN)}; MODULE:FUNCTION names your own",
        )

    def _ready(
        self, function: Callable[..., Any], options: dict[str, Any], report: StepReport, built_in: bool, where: str
    ) -> _Ready:
        keywords = dict(options)
        tokenizer = inspect.signature(function).parameters.get("tokenizer") if built_in else None
        if tokenizer is not None:
            if self.tokenizer is None and (tokenizer.default is tokenizer.empty or options.get("unit") == "tokens"):
                raise UserError(
                    f"{report.name} counts tokens, and no tokenizer was given",
                    where=where,
                    remedy="give Cleaning(tokenizer=…), or the recipe's model",
                )
            keywords["tokenizer"] = self.tokenizer
        call = partial(function, **keywords) if keywords else function
        if built_in and is_filter(function):
            return _Ready(report, False, row=call)
        if function is mask_personal_data:
            return _Ready(report, False, text=call, masks=options)
        if not built_in and _takes_rows(function):
            if report.on != "all":
                raise UserError(
                    f"{report.name} takes whole rows: on={report.on} says nothing to it",
                    where=where,
                    remedy="leave `on` out",
                )
            return _Ready(report, True, whole=call)
        return _Ready(report, not built_in, text=call)

    @property
    def functions(self) -> list[Callable[..., Any]]:
        """What the steps call, in their order."""
        return [step.text or step.row or step.whole for step in self._steps]  # type: ignore[misc]

    def report(self) -> list[StepReport]:
        """What each step has done since this object was made."""
        return [step.report for step in self._steps]

    def clean_text(self, text: str) -> str:
        """A text after every step that changes texts, without filters, functions of rows and counting.

        Raises:
            UserError: a function of the user's failed or gave back no text.
        """
        for step in self._steps:
            if step.text is not None:
                text = _call(step, step.text, text, None)
        return text

    def apply(self, examples: Iterable[TrainingExample]) -> Iterator[TrainingExample | Reject]:
        """One for each row, in their order: the row cleaned, or why it's refused. The rows given stay as they are.

        A row of which a cleaner leaves nothing in some text is refused as ``emptied``: an empty answer would teach the
        model to say nothing.

        Raises:
            UserError: a function of the user's failed; names the row.
        """
        for example in examples:
            yield self._clean(example)
            self._met += 1

    def _clean(self, example: TrainingExample) -> TrainingExample | Reject:
        texts = texts_of(example)
        touched = False
        for step in self._steps:
            step.report.rows += 1
            if step.whole is not None:
                given = with_texts(example, texts)
                outcome = self._apply_whole(step, given)
                if isinstance(outcome, Reject):
                    return outcome
                if outcome != given or touched:
                    example, touched = outcome, False
                    texts = texts_of(example)
                continue
            seen = texts if step.report.on == "all" else [t for t in texts if t.side == step.report.on]
            if step.row is not None:
                refusal = step.row(seen)
                if refusal is not None:
                    reject = refusal.at(example)
                    step.report.note_refusal(example, self._met, reject)
                    return reject
            else:
                changed, emptied = self._apply_text(step, seen, example)
                touched = touched or changed
                if emptied is not None:
                    reject = emptied.at(example)
                    step.report.note_refusal(example, self._met, reject)
                    return reject
        return with_texts(example, texts) if touched else example

    def _apply_text(self, step: _Ready, texts: Sequence[Text], example: TrainingExample) -> tuple[bool, Refusal | None]:
        """Run a step over the texts, in place; whether one changed, and which it emptied."""
        report = step.report
        masker = Masker(**step.masks) if step.masks is not None else None
        function = masker or step.text
        assert function is not None
        changed = False
        for text in texts:
            before = text.text
            after = _call(step, function, before, example) if step.own else function(before)
            if after is before or after == before:
                continue
            text.text = after
            report.note_change(before, after)
            if before.strip() and not after.strip():
                message = f"{report.name} left nothing of {shorten(before)}"
                return True, Refusal("emptied", message, text.place, shorten(before), "use gentler cleaners")
            if not changed:
                shown = veil(before, masker.kinds) if masker else before
                report.offer(example, self._met, text.place, shown, after)
            changed = True
        if masker:
            report.counts.update(masker.counts)
        report.changed += changed
        return changed, None

    def _apply_whole(self, step: _Ready, given: TrainingExample) -> TrainingExample | Reject:
        """Run a user's function over a row of its own, which it may change."""
        report = step.report
        before = {text.place: text.text for text in texts_of(given)}
        outcome = _call(step, step.whole, deepcopy(given), given)
        if outcome is None:
            first = next(iter(before), "input")
            value = before.get(first, "")
            remedy = f"mend the row, or {report.name}"
            refusal = Refusal("refused_by_cleaner", f"{report.name} refused the row", first, shorten(value), remedy)
            reject = refusal.at(given)
            report.note_refusal(given, self._met, reject)
            return reject
        assert isinstance(outcome, TrainingExample)
        if outcome.source is None:
            outcome = replace(outcome, source=given.source)
        offered = False
        for text in texts_of(outcome):
            old = before.get(text.place, "")
            if old != text.text:
                report.note_change(old, text.text)
                if not offered:
                    report.offer(given, self._met, text.place, old, text.text)
                    offered = True
        report.changed += outcome != given
        return outcome


def _call(step: _Ready, function: Callable[..., Any] | None, given: Any, example: TrainingExample | None) -> Any:
    """Call a cleaner of the user's.

    Raises:
        UserError: it failed, or gave back something else than it should.
    """
    assert function is not None
    if not step.own:
        return function(given)
    name = step.report.name
    where = str(example.source) if example is not None and example.source else f"the row {shorten(given)}"
    try:
        made = function(given)
    except Exception as error:
        what = f"the cleaner {name!r} failed: {type(error).__name__}: {error}"
        raise UserError(what, where=where, remedy="mend the cleaner, or the row") from error
    if step.text is not None and not isinstance(made, str):
        raise UserError(f"the cleaner {name!r} returned {type(made).__name__}, not text", where=where)
    if step.whole is not None and made is not None and not isinstance(made, TrainingExample):
        raise UserError(f"the cleaner {name!r} returned {type(made).__name__}, not a row or None", where=where)
    return made


def _own_options(function: Callable[..., Any], name: str, options: dict[str, Any], where: str) -> dict[str, Any]:
    """The options of a user's function, which must have them as parameters."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in callables have no signature
        return options
    known = [p.name for p in parameters[1:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    unknown = next((option for option in options if option not in known), None)
    if unknown is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        near = nearest(unknown, tuple(known))
        hint = f"; did you mean {near!r}?" if near else ""
        remedy = f"its options are {', '.join(known)}" if known else "it takes no option"
        raise UserError(f"{name} has no option {unknown!r}{hint}", where=where, remedy=remedy)
    missing = [p.name for p in parameters[1:] if p.default is p.empty and p.name in known and p.name not in options]
    if missing:
        raise UserError(f"{name} needs the option {missing[0]!r}", where=where)
    return options


def _takes_rows(function: Callable[..., Any]) -> bool:
    """Whether a function's first parameter or its result is annotated as a row."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    first = next(iter(signature.parameters.values()), None)
    # Annotations may be text (from __future__ import annotations), with or without a module's name.
    noted = [signature.return_annotation, first.annotation if first else None]
    return any("TrainingExample" in (a if isinstance(a, str) else getattr(a, "__name__", str(a))) for a in noted)
