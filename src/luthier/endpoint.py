"""An OpenAI-compatible endpoint as a function from conversations to answers: concurrent, retried, cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.errors import UserError, shorten
from luthier.runfolder import cache_root

if TYPE_CHECKING:
    import httpx2

Conversation = list[dict[str, Any]]

# So many requests in a row that failed after all their tries mean that the endpoint is down, not that rows are bad.
_FAILURES_IN_A_ROW = 10
_LONGEST_WAIT = 60.0  # seconds


class Answerer(Protocol):
    """Something that answers conversations: an :class:`Endpoint`, or a local model.

    Gives one answer for each conversation, in order; a :class:`UserError` in an answer's place says why there is none.
    ``seeds`` holds a number for each conversation, from which chance may come; the same one gives the same answer
    where the model can.
    """

    def __call__(self, conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str | UserError]: ...


@dataclass(slots=True)
class Usage:
    """What was asked so far."""

    requests: int = 0
    """Requests sent, tries after a failure included."""
    retries: int = 0
    cached: int = 0
    """Answers found on disk, or asked for twice at one time."""


class Endpoint:
    """A chat model behind an OpenAI-compatible ``/chat/completions`` (a hosted service, vLLM, Ollama, llama.cpp).

    Answers are kept on disk as they come, under a hash of the endpoint, model, conversation, parameters and seed: a
    job that was interrupted goes on where it stopped, and the same job again costs nothing. Busy (429), broken (5xx)
    and unreachable endpoints are tried again after waits that double, or after what ``Retry-After`` says. The key is
    read from the environment, sent to this endpoint alone and written nowhere.

    Args:
        base_url: up to and with ``/v1``; ``/chat/completions`` follows.
        model: the model's name there.
        api_key_env: the environment variable that holds the key; None: no key is sent.
        temperature: None leaves it to the endpoint.
        max_tokens: longest answer; None leaves it to the endpoint. An answer cut there counts as none.
        send_seed: whether ``seed`` is sent; some services refuse it.
        parameters: further fields of the request, such as ``top_p``.
        concurrency: requests under way at one time.
        timeout: seconds that one request may take.
        retries: further tries of a request that failed in a way that may pass.
        backoff: seconds before the first of them.
        cache: the file that answers are kept in; None: ``answers.sqlite`` in Luthier's cache; False: none.

    Raises:
        UserError: an option is out of range, or the environment variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        temperature: float | None = 0.7,
        max_tokens: int | None = 1024,
        send_seed: bool = True,
        parameters: Mapping[str, Any] | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
        cache: str | Path | bool | None = None,
    ) -> None:
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url={base_url!r} is no web address", remedy="for example http://localhost:8000/v1")
        if not isinstance(model, str) or not model:
            raise UserError(f"model={model!r} is no model's name", remedy="name the model as the endpoint does")
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} is not a whole number of at least {least}")
        for name, number in (("timeout", timeout), ("backoff", backoff)):
            if not isinstance(number, int | float) or number < 0 or (name == "timeout" and number == 0):
                raise UserError(f"{name}={number!r} is no number of seconds")
        self.base_url, self.model = base_url.rstrip("/"), model
        self.parameters: dict[str, Any] = dict(parameters or {})
        if temperature is not None:
            self.parameters.setdefault("temperature", temperature)
        if max_tokens is not None and "max_completion_tokens" not in self.parameters:
            self.parameters.setdefault("max_tokens", max_tokens)
        self.send_seed, self.concurrency, self.timeout = send_seed, concurrency, timeout
        self.retries, self.backoff = retries, backoff
        self.usage = Usage()
        self._key = _key_from(api_key_env)
        self._key_env = api_key_env
        self._cache = None
        if cache is not False:
            default = cache_root() / "answers.sqlite"
            self._cache = _Cache(default if cache is None or cache is True else Path(cache).expanduser())
        self._lock = threading.Lock()
        self._failures = 0
        self._stopping = threading.Event()

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"

    def __call__(
        self,
        conversations: Sequence[Conversation],
        seeds: Sequence[int],
        *,
        tools: Sequence[list[dict[str, Any]] | None] | None = None,
        parameters: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[str | UserError]:
        """Answers in the order of the conversations, or in an answer's place why there is none.

        Args:
            conversations: see :class:`Answerer`.
            seeds: see there.
            tools: for each conversation the tools that it offers. Calls are written as JSON, one a line; behind a text,
                each in ``<tool_call>``.
            parameters: further fields of these requests, before those of the endpoint.
            progress: told how many conversations of all are done, those found on disk among them.

        Raises:
            UserError: the endpoint refuses the key, does not know the model or the address, or answers nothing.
        """
        offered = [None] * len(conversations) if tools is None else tools
        more = dict(parameters or {})
        bodies = [
            self._body(conversation, seed, more | ({"tools": own} if own else {}))
            for conversation, seed, own in zip(conversations, seeds, offered, strict=True)
        ]
        keys = [self._hash(body) for body in bodies]
        found: dict[str, str | UserError] = dict(self._cache.get(keys)) if self._cache else {}
        wanted = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        there = len(bodies) - len(wanted)
        self.usage.cached += there
        if there and progress is not None:
            progress(there, len(bodies))
        if wanted:
            found |= self._ask(wanted, None if progress is None else lambda done: progress(there + done, len(bodies)))
        return [found[key] for key in keys]

    @cached_property
    def _client(self) -> httpx2.Client:
        """One client for all requests: its connections are kept, and its certificates are read once."""
        import httpx2

        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx2.Client(timeout=self.timeout, limits=limits, headers=headers)

    def _body(self, conversation: Conversation, seed: int, more: dict[str, Any]) -> dict[str, Any]:
        body = {**self.parameters, **more, "model": self.model, "messages": conversation}
        # A seed makes another request even where it isn't sent: the cache must not answer five times alike.
        return {**body, "seed": seed}

    def _hash(self, body: dict[str, Any]) -> str:
        text = json.dumps([self.base_url, body], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _ask(
        self, wanted: dict[str, dict[str, Any]], progress: Callable[[int], None] | None
    ) -> dict[str, str | UserError]:
        """Ask for every body, each answer kept as it comes."""
        self._stopping.clear()
        _ = self._client  # made before the threads ask for it
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        futures: dict[str, Future[str | UserError]] = {}
        try:
            for key, body in wanted.items():
                futures[key] = pool.submit(self._answer, key, body)
            for done, future in enumerate(as_completed(futures.values()), 1):
                future.result()  # raises what no request can get past
                if progress is not None:
                    progress(done)
            return {key: future.result() for key, future in futures.items()}
        finally:  # at an error and at Ctrl-C: what has not begun does not begin, and no one waits for a retry
            self._stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _answer(self, key: str, body: dict[str, Any]) -> str | UserError:
        """One answer, after as many tries as it takes, or what is wrong with this request alone.

        Raises:
            UserError: no request to this endpoint can succeed.
        """
        import httpx2

        problem = "it was stopped"
        sent = body if self.send_seed else {k: v for k, v in body.items() if k != "seed"}
        for attempt in range(self.retries + 1):
            if self._stopping.is_set():
                return UserError(problem, where=self.base_url)
            self._count(retry=attempt > 0)
            pause = self.backoff * 2**attempt * (0.75 + random.random() / 2)  # apart, so that not all come back at once
            try:
                response = self._client.post(f"{self.base_url}/chat/completions", json=sent)
            except httpx2.TimeoutException:
                problem = f"no answer within {self.timeout:g} s"
            except httpx2.HTTPError as error:
                problem = f"cannot be reached: {type(error).__name__}: {self._without_key(str(error))}"
            else:
                status = response.status_code
                if status == 200:
                    content, problem = _content(response.content, calls="tools" in body)
                    if content is not None:
                        self._done(key, content)
                        return content
                    if problem == _CUT:
                        return UserError(problem, where=self.base_url, remedy="raise max_tokens")
                else:
                    problem = f"HTTP {status}: {shorten(self._without_key(_message(response.text)), 200)}"
                    if status in (401, 403, 404):
                        self._stopping.set()  # here, before this thread takes the next request
                        raise self._refused(status, problem)
                    if 400 <= status < 500 and status not in (408, 409, 425, 429):
                        self._failed(problem)
                        return UserError(f"the endpoint refused this request: {problem}", where=self.base_url)
                    pause = _retry_after(response.headers.get("Retry-After")) or pause
            if attempt < self.retries:
                self._stopping.wait(min(pause, _LONGEST_WAIT))
        self._failed(problem)
        return UserError(f"no answer after {self.retries + 1} tries: {problem}", where=self.base_url)

    def _count(self, retry: bool) -> None:
        with self._lock:
            self.usage.requests += 1
            self.usage.retries += retry

    def _done(self, key: str, content: str) -> None:
        with self._lock:
            self._failures = 0
        if self._cache:
            self._cache.put(key, content)

    def _failed(self, problem: str) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= _FAILURES_IN_A_ROW:
                self._stopping.set()
                raise UserError(
                    f"{self._failures} requests in a row failed, the last with: {problem}",
                    where=self.base_url,
                    remedy="see whether the endpoint runs; what was answered is kept, and the job goes on from there",
                )

    def _refused(self, status: int, problem: str) -> UserError:
        key = f"the key in {self._key_env}" if self._key_env else "api_key_env, which names no key"
        remedy = f"check base_url and model={self.model!r}" if status == 404 else f"check {key}"
        return UserError(f"the endpoint refuses every request: {problem}", where=self.base_url, remedy=remedy)

    def _without_key(self, text: str) -> str:
        """A message without the key, which some services repeat."""
        return text.replace(self._key, "***") if self._key else text


class _Cache:
    """Answers by the hash of what was asked, in one SQLite file that several threads and processes may share."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=60)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            remedy = "name another file as cache, or set cache: false"
            raise UserError(f"answers cannot be kept: {error}", where=str(path), remedy=remedy) from error

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for at in range(0, len(keys), 500):
            some = keys[at : at + 500]
            marks = ",".join("?" * len(some))
            with self._lock:
                found |= dict(self._base.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some))
        return found

    def put(self, key: str, answer: str) -> None:
        with self._lock:
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))


_CUT = "the answer was cut at max_tokens"


def _content(body: bytes, *, calls: bool) -> tuple[str | None, str]:
    """An answer's text, with the tools that it calls where it may; or what is wrong with it."""
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        content = _with_calls(message) if calls and message.get("tool_calls") else message["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None, f"not the answer of a chat model: {shorten(body[:200].decode('utf-8', 'replace'))}"
    if choice.get("finish_reason") == "length":
        return None, _CUT
    if not isinstance(content, str) or not content.strip():
        return None, "an empty answer"
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        return None, "an answer with half a character"
    return content, ""


def _with_calls(message: dict[str, Any]) -> str:
    """A message's text and calls, as ``evaluation.metrics.tools`` reads them.

    Raises:
        KeyError, TypeError: the calls have not OpenAI's form.
    """
    written = []
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        with contextlib.suppress(ValueError):  # what nothing could run stays as it was said
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        written.append(json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False))
    text = str(message.get("content") or "").strip()
    return "\n".join([text, *(f"<tool_call>{call}</tool_call>" for call in written)] if text else written)


def _message(text: str) -> str:
    """What an error's body says, where it has OpenAI's form."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text


def _retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks to wait: a number or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def _key_from(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"the environment variable {variable} is not set",
            where="api_key_env",
            remedy=f"export {variable}=… (the key itself belongs in no recipe)",
        )
    return key
