"""vLLM beside this process: batches requests as they come, on GPUs, each with an adapter of its own."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.deployment.serving.api_error import ApiError
from luthier.deployment.serving.engine import Ask, Piece, Put, Told
from luthier.deployment.vllm import MOST_ADAPTERS, Refused, VllmServer, token_of
from luthier.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase


class VllmEngine:
    """Runs a base and LoRA adapters in a :class:`~luthier.deployment.vllm.VllmServer`.

    Args:
        server: with the base in it.
        tokenizer: the base's.
        context: longest prompt with its answer, in tokens.
        put_on: puts an adapter's folder on the base under a name, and says which tokens end its answers.
        stops: tokens that end the base's answers.
    """

    name = "vllm"
    can_hold_to_schema = True
    can_penalise = True

    def __init__(
        self,
        server: VllmServer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        put_on: Callable[[str, Path], list[int]],
        stops: list[int],
    ) -> None:
        self.context = context
        self._server, self._tokenizer, self._put_on = server, tokenizer, put_on
        # By this server's names, vLLM's and the tokens that end answers. vLLM keeps what it has read by its names, so
        # none is used twice.
        self._models: dict[str | None, tuple[str, list[int]]] = {None: (VllmServer.BASE, stops)}
        self._numbers = itertools.count()
        self._writing: Counter[str | None] = Counter()
        self._changed = threading.Condition()

    def write(self, adapter: str | None, ask: Ask, put: Put) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        try:
            with self._in_use(adapter) as (model, stops):
                for event in self._server.events("/v1/completions", _request(ask, model, stops)):
                    # The last event holds the usage alone. When nobody wants more, the connection closes and it stops.
                    if event["choices"] and put(self._piece(event, ask, stops)):
                        return
        except Refused as error:
            if error.status >= 500:
                raise
            raise ApiError(400, error.what) from None

    @contextmanager
    def _in_use(self, adapter: str | None) -> Iterator[tuple[str, list[int]]]:
        with self._changed:
            if adapter not in self._models:
                raise UserError(f"the adapter {adapter!r} was unloaded", remedy="load it again")
            model = self._models[adapter]
            self._writing[adapter] += 1
        try:
            yield model
        finally:
            with self._changed:
                self._writing[adapter] -= 1
                self._changed.notify_all()

    def healthy(self) -> bool:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        return self._server.healthy

    def add(self, name: str, folder: Path) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        if len(self._models) > MOST_ADAPTERS:
            raise UserError(f"there are {MOST_ADAPTERS} adapters already", remedy="unload one first")
        model = f"lora-{next(self._numbers)}"
        stops = self._put_on(model, folder)
        with self._changed:
            self._models[name] = model, stops

    def remove(self, name: str) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        with self._changed:
            model, _ = self._models.pop(name)
            self._changed.wait_for(lambda: self._writing[name] == 0)
        self._server.unload(model)

    def close(self) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        with self._changed:
            self._changed.wait_for(lambda: not any(self._writing.values()), timeout=60)
        self._server.close()

    def _piece(self, event: dict[str, Any], ask: Ask, stops: list[int]) -> Piece:
        choice = event["choices"][0]
        finish = choice.get("finish_reason")
        told = choice.get("logprobs")
        return Piece(
            choice.get("text") or "",
            [] if told is None or ask.logprobs is None else self._told(told, ask.logprobs, stops),
            finish,
            event["usage"]["completion_tokens"] if finish else 0,
        )

    def _told(self, told: dict[str, Any], top: int, stops: list[int]) -> list[Told]:
        """What ends an answer is no part of it."""
        found = []
        for token, logprob, others in zip(
            told["tokens"], told["token_logprobs"], told["top_logprobs"] or (), strict=True
        ):
            if token_of(token) not in stops:
                # The token that was taken stands among them, and is one too many where it is none of the likeliest.
                likely = sorted(others.items(), key=lambda other: -other[1])[:top]
                told_others = tuple(Told.of(self._tokenizer, token_of(t), float(v)) for t, v in likely)
                found.append(Told.of(self._tokenizer, token_of(token), float(logprob), told_others))
        return found


def _request(ask: Ask, model: str, stops: list[int]) -> dict[str, Any]:
    """In vLLM's words."""
    request: dict[str, Any] = {
        "model": model,
        "prompt": list(ask.ids),
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "frequency_penalty": ask.frequency_penalty,
        "presence_penalty": ask.presence_penalty,
        "seed": ask.seed,
        "stop": list(ask.stop),
        "stop_token_ids": stops,
    }
    if ask.logprobs is not None:
        request |= {"logprobs": ask.logprobs, "return_tokens_as_token_ids": True}
    if ask.logit_bias:
        request["logit_bias"] = {str(token): bias for token, bias in ask.logit_bias}
    if ask.schema is not None:
        request["structured_outputs"] = {"json": ask.schema}
    return request
