"""Transformers' own ``generate``: slow, one answer at a time, and what the parity gate holds other engines against."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.deployment.adapters import AdapterSet
from luthier.deployment.serving.engine import Ask, Piece, Put, Told
from luthier.errors import UserError
from luthier.evaluation.generation import stop_tokens
from luthier.methods.saved import SavedModel
from luthier.models.virtual import VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TransformersEngine:
    """Runs whatever Luthier can load.

    Args:
        models: a set of adapters that share one base, or one saved model, whose adapter (if it has one) is ``name``.
        name: see above.
        context: longest prompt with its answer, in tokens.
    """

    name = "transformers"
    can_hold_to_schema = False
    can_penalise = False

    def __init__(self, models: AdapterSet | SavedModel, name: str | None, *, context: int) -> None:
        self.context = context
        self._models, self._name = models, name
        self._one_at_a_time = threading.Lock()

    def write(self, adapter: str | None, ask: Ask, put: Put) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        with self._one_at_a_time, self._on(adapter) as (model, tokenizer):
            _write(model, tokenizer, ask, put)

    @contextlib.contextmanager
    def _on(self, adapter: str | None) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
        models = self._models
        if isinstance(models, AdapterSet):
            with models.base() if adapter is None else models.use(adapter) as model:
                yield model, models.tokenizer
        elif adapter is None and models.kind == "adapter":
            with models.as_base() as model:
                yield model, models.tokenizer
        else:
            yield models.model, models.tokenizer

    def healthy(self) -> bool:
        """See :class:`~luthier.deployment.serving.engine.Engine`: it is part of this process."""
        return True

    def add(self, name: str, folder: Path) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        if not isinstance(self._models, AdapterSet):
            raise UserError(
                "this server holds one model, which takes no adapters", remedy="start it with adapters of one base"
            )
        with self._one_at_a_time:
            self._models.add(name, folder)

    def remove(self, name: str) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        assert isinstance(self._models, AdapterSet), "only a set has adapters that came later"
        with self._one_at_a_time:
            if self._models.active == name:
                self._models.switch(next(other for other in self._models.names if other != name))
            self._models.remove(name)

    def close(self) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        with self._one_at_a_time:
            return


def _write(model: Any, tokenizer: PreTrainedTokenizerBase, ask: Ask, put: Put) -> None:
    """One answer, by ``generate``; the pieces go out from its streamer."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    writer = _Writer(tokenizer, ask, put, stop_tokens(model, tokenizer))
    drawn = ask.temperature > 0
    config = GenerationConfig(
        max_new_tokens=ask.max_tokens,
        do_sample=drawn,
        **({"temperature": ask.temperature, "top_p": ask.top_p, "top_k": 0} if drawn else {}),
        eos_token_id=writer.stops,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else writer.stops[0],
    )
    virtual = VirtualTokens(model)
    device = next(model.parameters()).device
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(random.getrandbits(32) if ask.seed is None else ask.seed)
        virtual.reader.generate(
            **virtual.generation_inputs(torch.tensor([ask.ids], device=device)),
            generation_config=config,
            streamer=writer,
            logits_processor=LogitsProcessorList([writer.look] if ask.logprobs is not None else []),
            stopping_criteria=StoppingCriteriaList([writer.over]),
        )
    writer.finish()


class _Writer:
    """Takes tokens one by one, gives whole characters on, and knows when to stop."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ask: Ask, put: Put, stops: list[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self.tokenizer, self.ask, self.send, self.stops = tokenizer, ask, put, stops
        self._decoded = DecodeStream(skip_special_tokens=True)
        self._begun = False
        self._held = ""  # what may be the beginning of a stop text
        self._told: list[Told] = []
        self._scores: torch.Tensor | None = None
        self.written = 0
        self.ended: str | None = None
        self.unwanted = False

    def look(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor that changes nothing and remembers."""
        self._scores = scores[0].float().log_softmax(-1)
        return scores

    def over(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion. ``generate`` asks it before it hands the token to the streamer, which is too early to
        know; so an answer that a text ends, ends with the token after."""
        stop = self.ended is not None or self.unwanted
        return torch.full((input_ids.shape[0],), stop, device=input_ids.device)

    def put(self, value: torch.Tensor) -> None:
        """A streamer's: first the prompt, then each token."""
        if not self._begun:
            self._begun = True
            return
        if self.ended is not None or self.unwanted:
            return
        token = int(value.flatten()[0])
        self.written += 1
        if token in self.stops:
            self.ended = "stop"
            return
        if self._scores is not None:
            self._told.append(self._tell(token, self._scores))
        text = self._held + (self._decoded.step(self.tokenizer._tokenizer, token) or "")
        cut = min((at for at in (text.find(stop) for stop in self.ask.stop) if at >= 0), default=None)
        if cut is not None:
            self.ended, self._held = "stop", text[:cut]
            return
        keep = _open_end(text, self.ask.stop)
        self._held = text[len(text) - keep :] if keep else ""
        self._out(text[: len(text) - keep] if keep else text)

    def end(self) -> None:
        """A streamer's; :meth:`finish` does the rest."""

    def finish(self) -> None:
        """The last piece."""
        if not self.unwanted:
            self.send(Piece(self._held, self._told, self.ended or "length", self.written))

    def _out(self, text: str) -> None:
        if text or self._told:
            self.unwanted = self.send(Piece(text, self._told))
            self._told = []

    def _tell(self, token: int, scores: torch.Tensor) -> Told:
        assert self.ask.logprobs is not None
        likely = scores.topk(self.ask.logprobs) if self.ask.logprobs else None
        top = [] if likely is None else zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        others = tuple(Told.of(self.tokenizer, i, v) for i, v in top)
        return Told.of(self.tokenizer, token, float(scores[token]), others)


def _open_end(text: str, stops: tuple[str, ...]) -> int:
    """How many of the last characters may begin a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
