"""Any models on the same rows: bases, runs, merged and quantised folders, and endpoints."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.chats import ChatEncoder
from luthier.data.examples import Reject, TrainingExample
from luthier.data.render import Renderer
from luthier.data.sources import read_examples
from luthier.data_options import Columns, Source
from luthier.decoding import BATCH_SIZE, Decoding
from luthier.endpoint import Endpoint
from luthier.errors import UserError, counted
from luthier.evaluation.comparison import Comparison, compare
from luthier.evaluation.contestants import EndpointModel, LocalModel
from luthier.evaluation.judge import MAX_TOKENS, Judge
from luthier.methods.answering import load_to_answer
from luthier.methods.saved import SavedModel
from luthier.models.loading import load_tokenizer


@dataclass(frozen=True, slots=True)
class Named:
    """A model to compare, by the name that tables have for it."""

    name: str
    place: str
    """A run, adapter or model folder, an embedded name, a hub id, or ``URL#MODEL`` of an endpoint."""

    @classmethod
    def of(cls, text: str) -> Named:
        """From ``NAME=PLACE``, or from a place, which names itself by its last part."""
        found = re.fullmatch(r"([^=/#:]+)=(.+)", text)
        if found:
            return cls(found[1].strip(), found[2])
        own = text.rpartition("#")[2] if _is_endpoint(text) else text.rstrip("/").rpartition("/")[2]
        return cls(own or text, text)


def _is_endpoint(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def compare_models(
    models: Sequence[str],
    data: str,
    *,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    max_examples: int | None = 200,
    max_new_tokens: int = 256,
    batch_size: int = BATCH_SIZE,
    samples: int = 3,
    more_metrics: Sequence[str] = (),
    decoding: Decoding | None = None,
    resume: bool = True,
    api_key_env: str | None = None,
    judge: Judge | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Ask any models the questions of a file.

    Each renders them by its own template. Weights are loaded one model at a time.

    Args:
        models: two or more, the first is the one that others are held against: see :class:`Named`.
        data: a file of rows with answers.
        columns: of the file, by what they are.
        system: a system message for rows that have none.
        max_examples: of the file's first rows; None: all.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.
        samples: rows to choose for showing.
        more_metrics: see :func:`luthier.evaluation.metrics.metric_of`.
        decoding: how answers are made; None: greedily.
        resume: whether answers that an interrupted comparison has kept are taken up.
        api_key_env: the environment variable that holds the endpoints' key; None: no key is sent to any.
        judge: says which answers it prefers: see :func:`judge_at`. Where it gives up, the comparison is there all the
            same, and its ``judging`` says why.
        progress: told ``(name, done, total)``.

    Raises:
        UserError: a model cannot be loaded or does not write, no row has an answer, or a row cannot be read.
    """
    named = [Named.of(text) for text in models]
    examples, notes = _rows(data, columns, max_examples)
    # Whatever is wrong with a name shows before anything is asked.
    local = [n for n in named if not _is_endpoint(n.place)]
    if not local:
        raise UserError(
            "all models are endpoints, so no template says how rows with tool calls are written",
            remedy="name a local model as well: its answers are the ones that others are held against",
        )
    tokenizer = load_tokenizer(_tokenizer_of(local[0].place))
    opened: list[tuple[str, Callable[[], Any]]] = []
    for model in named:
        if _is_endpoint(model.place):
            contestant = EndpointModel(_endpoint(model.place, max_new_tokens, resume, api_key_env))
            opened.append((model.name, functools.partial(contextlib.nullcontext, contestant)))
        else:
            opened.append((model.name, functools.partial(_loaded, model.place, examples, system, resume)))
    comparison = compare(
        opened,
        tokenizer,
        examples,
        system=system,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        samples=samples,
        more_metrics=more_metrics,
        decoding=decoding,
        resume=resume,
        judge=judge,
        progress=progress,
    )
    comparison.notes[:0] = notes
    own = None if judge is None else f"{judge.endpoint.base_url}#{judge.endpoint.model}"
    for model in named:
        if model.place == own:
            comparison.notes.append(
                f"judge: it is {model.name} itself, and models prefer their own answers: name another as judge"
            )
    return comparison


def judge_at(
    place: str,
    models: Sequence[str] = (),
    *,
    prompt: str | Path | None = None,
    examples: int | None = None,
    max_tokens: int = MAX_TOKENS,
    resume: bool = True,
    api_key_env: str | None = None,
    models_key_env: str | None = None,
) -> Judge:
    """A judge of a comparison.

    Args:
        place: ``URL#MODEL`` of an endpoint.
        models: what is compared: see :func:`compare_models`.
        prompt: see :meth:`Judge.at`, as for examples, max_tokens and resume.
        examples: see there.
        max_tokens: see there.
        resume: see there.
        api_key_env: the environment variable that holds the judge's key.
        models_key_env: that of the compared endpoints' key. It is the judge's too where none of them is elsewhere:
            a key of one service goes to no other.

    Raises:
        UserError: the judge cannot be used.
    """
    if not _is_endpoint(place):
        raise UserError(
            f"the judge {place!r} is no endpoint",
            where="--judge",
            remedy="write URL#MODEL, for example http://localhost:8000/v1#my-model; a server runs a local model",
        )
    url, model = _parted(place)
    others = {_parted(named.place)[0] for named in map(Named.of, models) if _is_endpoint(named.place)}
    if api_key_env is None and others <= {url}:
        api_key_env = models_key_env
    return Judge.at(
        url,
        model,
        api_key_env=api_key_env,
        prompt=prompt,
        examples=examples,
        max_tokens=max_tokens,
        resume=resume,
    )


def _rows(data: str, columns: Mapping[str, str] | None, most: int | None) -> tuple[list[TrainingExample], list[str]]:
    """The rows that can be asked, and notes on those that cannot."""
    found: list[TrainingExample] = []
    notes: list[str] = []
    for row in read_examples(Source(path=data), Columns(**columns) if columns else None):
        if isinstance(row, Reject):
            notes.append(f"{row.file}:{row.line} was left out: {row.message}")
        elif not row.is_plain_text:
            found.append(row)
        if most is not None and len(found) == most:
            break
    if not found:
        raise UserError("no row has an answer to compare with", where=data, remedy="name a file of rows with answers")
    return found, notes


def _endpoint(place: str, max_new_tokens: int, resume: bool, api_key_env: str | None) -> Endpoint:
    url, model = _parted(place)
    return Endpoint(url, model, api_key_env=api_key_env, max_tokens=max_new_tokens, cache=None if resume else False)


def _parted(place: str) -> tuple[str, str]:
    """An endpoint's address, and the model there."""
    url, _, model = place.rpartition("#")
    if not url or not model:
        raise UserError(
            f"{place!r} names no model of the endpoint",
            remedy="write URL#MODEL, for example http://localhost:8000/v1#my-model",
        )
    return url.rstrip("/"), model


def _tokenizer_of(place: str) -> str | Path:
    """Where a place's tokenizer lies."""
    folder = Path(place).expanduser()
    inner = next((folder / n for n in ("adapter", "model") if (folder / n / "tokenizer_config.json").is_file()), None)
    return inner or (folder if folder.is_dir() else place)


@contextlib.contextmanager
def _loaded(place: str, examples: Sequence[TrainingExample], system: str | None, resume: bool) -> Iterator[LocalModel]:
    """A model of this machine for as long as it is asked."""
    saved = load_to_answer(place)
    _require_writing(saved, place)
    # What cannot be encoded has no perplexity; it is asked all the same.
    encoder = ChatEncoder(Renderer(saved.tokenizer, system=system, train_on="last_answer", allow_special_tokens=True))
    encoded = encoder.encode(examples)
    model = LocalModel(saved.model, saved.tokenizer, encoded=encoded.examples, renders=True, resume=resume)
    if encoded.rejects:
        lost = counted(len(encoded.rejects), "right answer")
        model.notes.append(f"no perplexity of {lost}: {encoded.rejects[0].message}")
    yield model


def _require_writing(saved: SavedModel, place: str) -> None:
    if not saved.head.writes:
        raise UserError(
            f"{place!r} does not answer prompts of a chat template",
            remedy="use `luthier evaluate RUN`, which judges each task in its own way",
        )
