"""llama.cpp in this process: batches requests as they come, and takes an adapter for each."""

from __future__ import annotations

import contextlib
import random
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.deployment.llamacpp import require_llamacpp
from luthier.deployment.serving.api_error import ApiError
from luthier.deployment.serving.engine import Ask, Piece, Put, Told
from luthier.errors import UserError


@dataclass(slots=True)
class _Loaded:
    """One llama.cpp with the adapters that it began with; it cannot take others later."""

    server: Any
    numbers: Mapping[str, int]
    writing: int = 0
    idle: threading.Condition = field(default_factory=threading.Condition)


class LlamaCppEngine:
    """Runs a GGUF file and LoRA adapters as GGUF.

    An adapter comes or goes by loading the weights once more, from the same mapped file, with the new list; answers
    that are being written go on where they began.

    Args:
        model: the base as GGUF.
        adapters: files of the first adapters, by name.
        context: longest prompt with its answer, in tokens.
        slots: answers that are written at once; more wait.
        threads: of computing; None: one a core.
        convert: makes the GGUF of an adapter's folder that is added later.

    Raises:
        UserError: ``xllamacpp`` is not installed, or llama.cpp cannot load the files.
    """

    name = "llama.cpp"
    can_hold_to_schema = True
    can_penalise = True

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path],
        *,
        context: int,
        slots: int,
        threads: int | None = None,
        convert: Callable[[Path], Path],
    ) -> None:
        self.context = context
        self._model, self._slots, self._threads, self._convert = model, slots, threads, convert
        self._files = dict(adapters)
        require_llamacpp()
        self._folder = Path(tempfile.mkdtemp(prefix="luthier-"))  # of this user alone (mode 0700)
        self._changing = threading.Lock()
        self._swap = threading.Lock()
        self._loaded = self._load(self._files)

    def _load(self, files: Mapping[str, Path]) -> _Loaded:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(self._model)
        params.n_ctx = self.context * self._slots
        params.n_parallel = self._slots
        params.kv_unified = False  # each answer has its whole context, whatever the others take
        params.cache_ram_mib = 0  # prompts are kept in their slots alone: memory stays flat
        params.verbosity = 0
        if self._threads:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.hostnames = [str(self._folder / f"{secrets.token_hex(4)}.sock")]  # see luthier.deployment.llamacpp
        params.ui = params.endpoint_slots = params.fit_params = params.warmup = False
        params.lora_init_without_apply = True
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(file), 0.0) for file in files.values()]
        try:
            return _Loaded(xllamacpp.Server(params), {name: k for k, name in enumerate(files)})
        except Exception as error:
            raise UserError(
                f"llama.cpp cannot load {self._model.name}: {error}",
                where=str(self._model),
                remedy="name a smaller --max-model-len or --slots if memory is short, or use --engine transformers",
            ) from None

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[_Loaded]:
        with self._swap:
            loaded = self._loaded
            with loaded.idle:
                loaded.writing += 1
        try:
            yield loaded
        finally:
            with loaded.idle:
                loaded.writing -= 1
                loaded.idle.notify_all()

    def write(self, adapter: str | None, ask: Ask, put: Put) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        with self._in_use() as loaded:
            if adapter is not None and adapter not in loaded.numbers:
                raise UserError(f"the adapter {adapter!r} was unloaded", remedy="load it again")
            # All are named: of those that are not, llama.cpp takes what the last answer in the same place had.
            chosen = [{"id": k, "scale": float(name == adapter)} for name, k in loaded.numbers.items()]
            failure: list[dict[str, Any]] = []

            def take(chunk: dict[str, Any]) -> bool:
                if "error" in chunk:
                    failure.append(chunk["error"])
                    return True
                return put(_piece(chunk, ask))

            answer = loaded.server.handle_completions(_request(ask, chosen), take)
            if isinstance(answer, dict) and "error" in answer:
                failure.append(answer["error"])
            if failure:
                said = f"llama.cpp cannot answer: {failure[0].get('message', failure[0])}"
                if 400 <= int(failure[0].get("code", 500)) < 500:
                    raise ApiError(400, said)
                raise UserError(said, remedy="change the request")

    def healthy(self) -> bool:
        """See :class:`~luthier.deployment.serving.engine.Engine`: it is part of this process."""
        return True

    def add(self, name: str, folder: Path) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        with self._changing:
            self._change(self._files | {name: self._convert(folder)})

    def remove(self, name: str) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        with self._changing:
            self._change({other: file for other, file in self._files.items() if other != name})

    def _change(self, files: dict[str, Path]) -> None:
        loaded = self._load(files)
        with self._swap:
            before, self._loaded, self._files = self._loaded, loaded, files
        with before.idle:
            before.idle.wait_for(lambda: before.writing == 0)

    def close(self) -> None:
        """See :class:`~luthier.deployment.serving.engine.Engine`."""
        with self._loaded.idle:
            self._loaded.idle.wait_for(lambda: self._loaded.writing == 0, timeout=60)
        shutil.rmtree(self._folder, ignore_errors=True)


def _request(ask: Ask, lora: list[dict[str, Any]]) -> dict[str, Any]:
    """In llama.cpp's words. Its own defaults cut unlikely tokens away: all of them are named and off. The likeliest
    token alone is found in one pass over the vocabulary."""
    greedy = ask.temperature == 0
    request: dict[str, Any] = {
        "prompt": list(ask.ids),
        "max_tokens": ask.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_prompt": True,
        "lora": lora,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": 1 if greedy else 0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "frequency_penalty": ask.frequency_penalty,
        "presence_penalty": ask.presence_penalty,
        "samplers": ["penalties", "top_k"] if greedy else ["penalties", "temperature", "top_p"],
        "seed": random.getrandbits(32) if ask.seed is None else ask.seed % 2**32,
        "stop": list(ask.stop),
    }
    if ask.logprobs is not None:
        request["n_probs"] = max(ask.logprobs, 1)
    if ask.logit_bias:
        request["logit_bias"] = [[token, bias] for token, bias in ask.logit_bias]
    if ask.schema is not None:
        request["json_schema"] = ask.schema
    return request


def _piece(chunk: dict[str, Any], ask: Ask) -> Piece:
    choice = chunk["choices"][0]
    told = [_told(token, ask.logprobs or 0) for token in ((choice.get("logprobs") or {}).get("content") or ())]
    finish = choice.get("finish_reason")
    written = chunk["usage"]["completion_tokens"] if finish else 0
    return Piece(choice.get("text") or "", told if ask.logprobs is not None else [], finish, written)


def _told(token: dict[str, Any], top: int) -> Told:
    others = tuple(_told(other, 0) for other in token.get("top_logprobs", ())[:top]) if top else ()
    return Told(token["token"], tuple(token["bytes"]), float(token["logprob"]), others)
