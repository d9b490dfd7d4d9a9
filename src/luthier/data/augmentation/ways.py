"""The augmenters by name, their options, and how each is made from a recipe's step."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from rapidfuzz import process

from luthier.data.augmentation.noise import noise_injection
from luthier.data.augmentation.rewriting import Rewritten, back_translation, paraphrase
from luthier.data.augmentation.synonyms import synonym_replacement
from luthier.data.cleaning.functions import load_function
from luthier.data_options import Step
from luthier.endpoint import Answerer, Endpoint
from luthier.errors import UserError, shorten

Augmenter = Callable[..., str]
"""From a text to a variant of it; may take a :class:`random.Random` second, and ``keep``, the answer."""

On = Literal["prompt", "answer", "all"]

_OF_TEXT: dict[str, Augmenter] = {"synonym_replacement": synonym_replacement, "noise_injection": noise_injection}
_OF_MODEL: dict[str, Callable[..., list[Rewritten]]] = {"back_translation": back_translation, "paraphrase": paraphrase}
# What the pipeline hands over itself.
_GIVEN = {"self", "text", "texts", "rng", "rngs", "answerer", "answers", "keep"}


@dataclass(frozen=True, slots=True)
class AugmenterInfo:
    """An augmenter as the docs list it."""

    name: str
    summary: str
    options: list[tuple[str, str, str]]
    """Name, default and description of each."""
    needs_model: bool


class Way(Protocol):
    """One way to vary texts, as :class:`luthier.data.augmentation.Augmentation` uses it."""

    @property
    def name(self) -> str: ...

    @property
    def on(self) -> On: ...

    def vary(self, texts: Sequence[str], rngs: Sequence[random.Random], answers: Sequence[str]) -> list[Rewritten]:
        """A variant of each text, the text itself where nothing in it can vary, or what went wrong."""


@dataclass(frozen=True)
class _OfText:
    """A function from one text to another."""

    name: str
    on: On
    function: Augmenter
    takes_chance: bool
    takes_keep: bool

    def vary(self, texts: Sequence[str], rngs: Sequence[random.Random], answers: Sequence[str]) -> list[Rewritten]:
        return [self._one(*both) for both in zip(texts, rngs, answers, strict=True)]

    def _one(self, text: str, rng: random.Random, answer: str) -> Rewritten:
        arguments = (text, rng) if self.takes_chance else (text,)
        try:
            varied = self.function(*arguments, **({"keep": answer} if self.takes_keep else {}))
        except Exception as error:  # any function of the user's: whatever it raises is reported with its row
            problem = UserError(f"the augmenter {self.name!r} failed: {type(error).__name__}: {error}")
            problem.__cause__ = error
            return problem
        if not isinstance(varied, str):
            return UserError(f"the augmenter {self.name!r} returned {type(varied).__name__}, not text")
        return varied


@dataclass(frozen=True)
class _OfModel:
    """Rewriting of many texts at once by a model."""

    name: str
    on: On
    function: Callable[..., list[Rewritten]]
    answerer: Answerer = field(repr=False)

    def vary(self, texts: Sequence[str], rngs: Sequence[random.Random], answers: Sequence[str]) -> list[Rewritten]:
        return self.function(texts, rngs, self.answerer, answers=answers)


def augmenters() -> list[AugmenterInfo]:
    """The built-in augmenters, for the docs and for messages."""
    on = ("on", "prompt", "What varies: the prompt, the answer, or all: both.")
    found = []
    for name, function in (*_OF_TEXT.items(), *_OF_MODEL.items()):
        options = [*_described(function), on]
        if name in _OF_MODEL:
            options += [
                ("base_url", "", "The endpoint, up to and with /v1; leave it out for a local model."),
                *_endpoint_options(),
            ]
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        found.append(AugmenterInfo(name, summary, options, name in _OF_MODEL))
    return found


def way_of(
    step: Step | str | Augmenter,
    where: str,
    answerer: Answerer | None = None,
    local: Callable[[str], Answerer] | None = None,
) -> Way:
    """An augmenter that is ready to use.

    Args:
        step: a recipe's step, a built-in's name, ``module:function``, or a function.
        where: the recipe field, for messages.
        answerer: the model of steps that need one and name none.
        local: makes an answerer from the name or folder of a local model.

    Raises:
        UserError: no such augmenter or option, an option out of range, or no model for one that needs it.
    """
    if isinstance(step, str):
        step = Step(name=step)
    if not isinstance(step, Step):
        if not callable(step):
            raise UserError(
                f"an augmenter must be a function from text to text, not {type(step).__name__}",
                where=where,
                remedy="for example DataAugmentor.noise_injection",
            )
        return _of_text(getattr(step, "__name__", "augmenter"), step, {}, where)
    options = dict(step.options)
    if step.name in _OF_MODEL:
        return _of_model(step.name, options, where, answerer, local)
    function = _OF_TEXT.get(step.name) or _own(step.name, where)
    return _of_text(step.name, function, options, where)


def _of_text(name: str, function: Augmenter, options: dict[str, Any], where: str) -> Way:
    on = _on(options, where)
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any:
        _known(name, options, [p for p in parameters if p not in _GIVEN], where)
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    second = positional[1].name if len(positional) > 1 else ""
    # A function of two arguments takes chance second, whatever it calls it; a default is an option of its own.
    takes_chance = second == "rng" or (bool(second) and positional[1].default is inspect.Parameter.empty)
    way = _OfText(name, on, partial(function, **options) if options else function, takes_chance, "keep" in parameters)
    if name in _OF_TEXT:
        try:  # an option out of range is wrong for every row: say so before the first
            function("", random.Random(0), **options)
        except UserError as error:
            raise UserError(error.what, where=where, remedy=error.remedy) from None
        except TypeError as error:
            raise UserError(f"{name}: {error}", where=where) from None
    return way


def _of_model(
    name: str,
    options: dict[str, Any],
    where: str,
    answerer: Answerer | None,
    local: Callable[[str], Answerer] | None,
) -> Way:
    on = _on(options, where)
    function = _OF_MODEL[name]
    own = {o for o, _, _ in _described(function)}
    _known(name, options, [*own, "base_url", *(o for o, _, _ in _endpoint_options())], where)
    asking = {o: options.pop(o) for o in list(options) if o not in own}
    for option in ("shortest", "longest"):
        value = options.get(option, 1)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"{option}={value!r} is no share above 0", where=where)
    if "base_url" in asking:
        try:
            answerer = Endpoint(**asking) if "model" in asking else None
        except UserError as error:
            raise UserError(
                error.what, where=f"{where}: {error.where}" if error.where else where, remedy=error.remedy
            ) from None
        if answerer is None:
            raise UserError(f"{name} names an endpoint and no model", where=where, remedy="add model: its name there")
    elif "model" in asking:
        if local is None:
            raise UserError(f"{name} names no endpoint", where=where, remedy="add base_url, or run it from a recipe")
        rest = sorted(set(asking) - {"model"})
        if rest:
            raise UserError(f"{rest[0]} is for endpoints; a local model has none", where=where, remedy="add base_url")
        answerer = local(str(asking["model"]))
    if answerer is None:
        raise UserError(
            f"{name} needs a model to write with",
            where=where,
            remedy="name one: model: FOLDER for a local one, or base_url: http://…/v1 and model: NAME for an endpoint",
        )
    return _OfModel(name, on, partial(function, **options), answerer)


def _on(options: dict[str, Any], where: str) -> On:
    on = options.pop("on", "prompt")
    if on not in ("prompt", "answer", "all"):
        raise UserError(f"on={on!r}: nothing else can vary", where=where, remedy="use prompt, answer or all")
    return on


def _known(name: str, options: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for option in options:
        if option not in known:
            near = process.extractOne(option, known, score_cutoff=60)
            remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted([*known, 'on']))}"
            raise UserError(f"{name} has no option {option!r}", where=where, remedy=remedy)


def _own(name: str, where: str) -> Augmenter:
    """A function of the user's."""
    if ":" not in name:
        known = [*_OF_TEXT, *_OF_MODEL]
        near = process.extractOne(name, known, score_cutoff=60)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}; your own: MODULE:FUNCTION"
        raise UserError(f"no augmenter is called {shorten(name)}", where=where, remedy=hint)
    return load_function(name, where)


def _described(function: Callable[..., Any]) -> list[tuple[str, str, str]]:
    """Name, default and description of a function's options, the description from its docstring."""
    described = []
    arguments = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE))
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in _GIVEN:
            default = parameter.default
            shown = "" if default is inspect.Parameter.empty else str(default)
            described.append((name, shown, re.sub(r"\s+", " ", texts.get(name, "")).strip()))
    return described


def _endpoint_options() -> list[tuple[str, str, str]]:
    arguments = (inspect.getdoc(Endpoint) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE))
    found = []
    for name, parameter in inspect.signature(Endpoint).parameters.items():
        if name != "base_url":
            default = "" if parameter.default is inspect.Parameter.empty else str(parameter.default)
            found.append((name, default, re.sub(r"\s+", " ", texts.get(name, "")).strip()))
    return found
