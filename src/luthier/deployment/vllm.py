"""vLLM, as a process of its own behind a socket that only this user can open.

Its releases pin the versions of torch and transformers that they were built with, so it mostly lives in an environment
of its own, and it is asked over HTTP, the interface that stays from release to release.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import torch

from luthier.deployment.gguf_writing import require_plain_lora, require_unquantised
from luthier.deployment.serving.engine import MOST_STOPS
from luthier.deployment.unix_http import SocketConnection
from luthier.errors import UserError
from luthier.methods.saved import AdapterFolder
from luthier.runfolder import cache_root
from luthier.training.processes import ending_with_parent

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
"""vLLM's names of the kinds of weights that it serves."""
_TOLD = 10_000
"""Likeliest tokens that the gate asks for: no more can have 1e-4 each, and it looks at those."""
_SURELY = 100.0
"""The greatest bias on a logit that vLLM takes."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_PATIENCE = 60.0
"""Seconds in which vLLM may end by itself."""
MOST_ADAPTERS = 256
"""That are held in memory. vLLM would read one more from its folder when it is asked, whatever lies there then."""
_OURS = ("uds", "host", "port", "grpc", "headless", "served-model-name", "api-key", "enable-lora", "lora-modules")
"""Arguments of ``vllm serve`` by which nobody but this object could reach it, or others could."""
_ERROR = re.compile(r"\b(?:\w+(?:Error|Exception)|error): (?!Engine core init|.*See root cause above)(.+)")


def find_vllm(command: str | None = None) -> str | None:
    """The program ``vllm``: the one that is named, else this environment's, else the first of PATH; None: there is
    none."""
    if command is not None:
        return shutil.which(str(Path(command).expanduser()))
    return shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")


def require_vllm(command: str | None = None) -> str:
    """The program ``vllm``.

    Raises:
        UserError: there is none.
    """
    found = find_vllm(command)
    if found is None:
        raise UserError(
            "there is no program vllm" if command is None else f"{command!r} is no program that can be run",
            where="--engine vllm" if command is None else "--vllm",
            remedy="pip install vllm, in an environment of its own if it asks for other versions than this one has, "
            "and name it: --vllm ENVIRONMENT/bin/vllm; or use --engine llamacpp",
        )
    return found


class Refused(UserError):
    """vLLM has answered a request with an error.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"vLLM refuses: {said}", remedy="change the request" if status < 500 else "see vLLM's log")
        self.status = status


def require_arguments(arguments: Sequence[str]) -> None:
    """Refuse further arguments of ``vllm serve`` that are Luthier's to give.

    Raises:
        UserError: one is.
    """
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name[2:].replace("_", "-") in _OURS:
            raise UserError(
                f"{name} is Luthier's to give",
                where="--vllm-args",
                remedy="leave it out; what clients reach is set by luthier serve's own options",
            )


def lora_rank(adapter: AdapterFolder) -> int:
    """The rank of an adapter that vLLM can hold beside its base.

    Raises:
        UserError: it is no plain LoRA of one rank and one scale.
    """
    require_unquantised(adapter, "vLLM")
    require_plain_lora(adapter)
    for pattern in ("rank_pattern", "alpha_pattern"):
        if adapter.config.get(pattern):
            raise UserError(
                f"its layers differ in rank or scale ({pattern}), which vLLM does not heed",
                where=str(adapter.folder),
                remedy="merge it (`luthier merge`) and serve the merged folder",
            )
    return int(adapter.config["r"])


def room_for_rank(rank: int) -> int:
    """vLLM makes room for adapters of certain ranks: the least that fits."""
    return next((size for size in _RANKS if size >= rank), rank)


class VllmServer:
    """``vllm serve`` with one base, ready when this returns.

    Nothing of it is reached but through this object: it listens on a socket in a folder of this user's alone. It ends
    with this process, however that ends, and reports no usage to its makers.

    Args:
        program: see :func:`require_vllm`.
        model: folder of the base.
        dtype: of weights and arithmetic: ``bfloat16``, ``float16``, ``float32``.
        context: longest prompt with its answer, in tokens.
        rank: largest rank of the adapters that it may hold; 0: none.
        adapters: how many of them one batch may use.
        slots: answers that are written at once; None: as many as vLLM thinks fit.
        arguments: further ones of ``vllm serve``.

    Raises:
        UserError: vLLM ends instead of getting ready; the message holds its last error, and names its log.
    """

    BASE = "base"
    """Its own name of the base."""

    def __init__(
        self,
        program: str,
        model: Path,
        *,
        dtype: str,
        context: int,
        rank: int = 0,
        adapters: int = 1,
        slots: int | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="luthier-"))  # of this user alone (mode 0700)
        self._socket, self._log = self._folder / "vllm.sock", self._folder / "vllm.log"
        wanted = {"uds": self._socket, "served-model-name": self.BASE, "dtype": dtype, "max-model-len": context}
        # What a model's makers advise for chance is no part of a request, and the gate asks for more tokens than users.
        wanted |= {"generation-config": "vllm", "max-logprobs": _TOLD}
        if slots is not None:
            wanted["max-num-seqs"] = slots
        # llguidance heeds how templates write JSON; others let a model write white space without end.
        wanted |= {"api-server-count": 1, "structured-outputs-config.backend": "guidance"}
        if rank:
            wanted |= {"max-lora-rank": room_for_rank(rank), "max-loras": adapters, "max-cpu-loras": MOST_ADAPTERS}
        command = [program, "serve", str(model), "--disable-uvicorn-access-log", *(["--enable-lora"] if rank else [])]
        command += [part for name, value in wanted.items() for part in (f"--{name}", str(value))]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(adapters=bool(rank)),
                    start_new_session=True,  # Ctrl-C is for this process, which lets answers under way end first
                    preexec_fn=ending_with_parent() if sys.platform.startswith("linux") else None,
                )
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise UserError(f"it does not run: {error.strerror}", where=program, remedy="name vLLM's own") from None
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        while not self._ready():
            if self._process.poll() is not None:
                raise self._ended("it could start")
            time.sleep(0.1)

    def _ready(self) -> bool:
        connection = SocketConnection(self._socket)
        with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def _ended(self, before: str) -> UserError:
        errors = _ERROR.findall(self._log.read_text(encoding="utf-8", errors="replace"))
        code = self._process.poll()
        said = errors[-1].strip() if errors else "its connection broke" if code is None else f"exit code {code}"
        return UserError(f"vLLM ended before {before}: {said}", remedy=f"its log says more: {self._kept_log()}")

    def _kept_log(self) -> Path:
        """The log where it outlives this object."""
        kept = cache_root() / "serving" / "vllm.log"
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._log, kept)
        return kept

    @property
    def healthy(self) -> bool:
        """Whether it can answer."""
        return self._process.poll() is None and self._ready()

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE)
        # What is left of its workers: it began a session, so they are its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def asked(self, path: str, body: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        """What it answers, open; who leaves the block early ends the answer.

        Raises:
            Refused: it refuses; the message holds its own words.
            UserError: it has ended.
        """
        with contextlib.closing(SocketConnection(self._socket)) as connection:
            try:
                if body is None:
                    connection.request("GET", path)
                else:
                    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                if response.status >= 500:
                    self._kept_log()
                if response.status != 200:
                    raise Refused(response.status, _reason(response.read()))
                yield response
            except (OSError, HTTPException):
                # Its socket closes a little before it has ended.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)
                raise self._ended("it had answered") from None

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Its whole answer, where that is JSON; else its text.

        Raises:
            UserError: see :meth:`asked`.
        """
        with self.asked(path, body) as response:
            told = response.read()
        with contextlib.suppress(ValueError):
            return json.loads(told)
        return told.decode("utf-8", "replace")

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Its answer in pieces, as they come.

        Raises:
            UserError: see :meth:`asked`; or it breaks off.
        """
        with self.asked(path, body) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                content = line.removeprefix(b"data:").strip()
                if content == b"[DONE]":
                    return
                event = json.loads(content)
                if "error" in event:
                    raise Refused(int(event["error"].get("code") or 500), _reason(content))
                yield event
        raise self._ended("it had answered")

    @property
    def version(self) -> str:
        """vLLM's."""
        return str(self.ask("/version")["version"])

    def load(self, name: str, folder: Path) -> None:
        """Put a LoRA on the base.

        Raises:
            UserError: it does not fit.
        """
        try:
            self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        except Refused as error:
            raise UserError(error.what, where=str(folder), remedy="merge it and serve the merged folder") from None

    def unload(self, name: str) -> None:
        """Take it away."""
        self.ask("/v1/unload_lora_adapter", {"lora_name": name})


def _environment(*, adapters: bool) -> dict[str, str]:
    """This process's, without what would change how vLLM is asked."""
    kept = {key: value for key, value in os.environ.items() if key not in ("VLLM_API_KEY", "VLLM_USE_RUST_FRONTEND")}
    kept |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_MAX_STOP_STRINGS": str(MOST_STOPS)}
    return kept | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if adapters else {})


def _reason(told: bytes) -> str:
    """The words of an error in OpenAI's form."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        content = json.loads(told)
        return str(content.get("error", content)["message"])
    return told.decode("utf-8", "replace")[:500]


class VllmRuntime:
    """One model of a :class:`VllmServer`; a :class:`~luthier.deployment.runtimes.Runtime`.

    Args:
        server: holds it.
        model: its name there.
        vocabulary: rows of its logits.
        stops: ids that end an answer.
    """

    name = "vLLM"

    def __init__(self, server: VllmServer, model: str, *, vocabulary: int, stops: Sequence[int]) -> None:
        self._server, self._model, self._vocabulary, self._stops = server, model, vocabulary, list(stops)

    def tokens(self, text: str) -> list[int]:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        asked = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return [int(token) for token in self._server.ask("/tokenize", asked)["tokens"]]

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        told = self._complete(
            ids, 1, logprobs=min(_TOLD, self._vocabulary), return_tokens_as_token_ids=True, ignore_eos=True
        )
        row = torch.full((self._vocabulary,), -torch.inf)
        for token, logprob in told["logprobs"]["top_logprobs"][0].items():
            row[token_of(token)] = logprob
        return row

    def greedy(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        told = self._complete(ids, max_new_tokens, stop_token_ids=self._stops)
        answer = [int(token) for token in told["token_ids"]]
        return answer[:-1] if answer and answer[-1] in self._stops else answer

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends at a token: it is made the likeliest one, and must be the last."""
        told = self._complete([token], 2, stop_token_ids=self._stops, logit_bias={str(token): _SURELY})
        return bool(told["finish_reason"] == "stop") and len(told["token_ids"]) == 1

    def _complete(self, ids: Sequence[int], count: int, **settings: Any) -> dict[str, Any]:
        asked = {"model": self._model, "prompt": list(ids), "max_tokens": count, "temperature": 0}
        told = self._server.ask("/v1/completions", asked | {"return_token_ids": True} | settings)
        choice: dict[str, Any] = told["choices"][0]
        return choice


def token_of(told: str) -> int:
    """The id in vLLM's ``token_id:5``."""
    return int(told.rpartition(":")[2])
