"""The server's HTTP side."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from luthier.deployment.serving.api_error import ApiError
from luthier.deployment.serving.engine import Ask, Piece
from luthier.deployment.serving.metrics import Metrics
from luthier.deployment.serving.replies import Reply, event
from luthier.deployment.serving.requests import (
    ChatRequest,
    CompletionRequest,
    Strict,
    chat_asks,
    completion_asks,
    read,
)
from luthier.deployment.serving.served import Served, ServedModel
from luthier.errors import UserError

_log = logging.getLogger("luthier.serve")


class LoadAdapter(Strict):
    """``POST /v1/load_lora_adapter``, as vLLM has it."""

    lora_name: str
    lora_path: str


class UnloadAdapter(Strict):
    """``POST /v1/unload_lora_adapter``"""

    lora_name: str = Field(min_length=1)


class Api:
    """Answers requests.

    Args:
        served: the models.
        keys: one of them must come with every request but ``/health``; empty: none is asked for.
        max_body: longest request, in bytes.
        max_requests: answers that are written or wait at once; more are refused with status 429.
    """

    def __init__(
        self, served: Served, *, keys: Sequence[str] = (), max_body: int = 2**20, max_requests: int = 256
    ) -> None:
        self.served = served
        self._keys = [key.encode() for key in keys]
        self._max_body, self._max_requests = max_body, max_requests
        self._writing = 0
        self._threads = ThreadPoolExecutor(max_requests, thread_name_prefix="answer")
        self.metrics = Metrics()
        self.stopping = False

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/health", self._open(self.health), methods=["GET"]),
            Route("/metrics", self._guarded(self.show_metrics), methods=["GET"]),
            Route("/v1/models", self._guarded(self.list_models), methods=["GET"]),
            Route("/v1/models/{name:path}", self._guarded(self.one_model), methods=["GET"]),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self.complete), methods=["POST"]),
            Route("/v1/load_lora_adapter", self._guarded(self.load_adapter), methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._guarded(self.unload_adapter), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_route})

    def _open(self, handle: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """What every answer goes through: a refusal in OpenAI's form, never a traceback, and a count."""

        async def handled(request: Request) -> Response:
            begun = time.monotonic()
            try:
                response: Response = await handle(request)
            except ApiError as error:
                response = JSONResponse(error.to_json(), error.status, _headers(error))
            except UserError as error:
                response = JSONResponse(ApiError(500, error.what).to_json(), 500)
            except (ClientDisconnect, asyncio.CancelledError):
                self.metrics.gone()
                return Response(status_code=499)
            except Exception:
                _log.exception("%s failed", request.url.path)
                response = JSONResponse(ApiError(500, "the server failed; its log says how").to_json(), 500)
            self.metrics.answered(request.url.path, response.status_code, time.monotonic() - begun)
            return response

        return handled

    def _guarded(self, handle: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def checked(request: Request) -> Response:
            self._require_key(request)
            response: Response = await handle(request)
            return response

        return self._open(checked)

    def _require_key(self, request: Request) -> None:
        if not self._keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if scheme.lower() == "bearer" else b""
        # All are compared, each in constant time: how long it takes says nothing of any.
        if not sum(hmac.compare_digest(given, known) for known in self._keys):
            raise ApiError(401, "the API key is missing or wrong: send 'Authorization: Bearer KEY'", code="wrong_key")

    async def _body(self, request: Request) -> bytes:
        """The request's body, no more of it than is allowed.

        Raises:
            ApiError: it is longer.
        """
        said = request.headers.get("content-length", "0")
        body = bytearray()
        if not said.isdigit() or int(said) <= self._max_body:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._max_body:
                    break
            else:
                return bytes(body)
        raise ApiError(413, f"the request is longer than {self._max_body:,} bytes", code="too_large")

    async def health(self, request: Request) -> Response:
        """Whether requests are answered."""
        if self.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        well = await asyncio.to_thread(self.served.engine.healthy)
        return JSONResponse({"status": "ok" if well else "failed"}, 200 if well else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus's format."""
        text, kind = self.metrics.exposed(self._writing)
        return Response(text, media_type=kind)

    async def list_models(self, request: Request) -> Response:
        """All names that requests can choose."""
        return JSONResponse({"object": "list", "data": [model.to_json() for model in self.served.models]})

    async def one_model(self, request: Request) -> Response:
        """One of them."""
        return JSONResponse(self.served.find(request.path_params["name"]).to_json())

    async def load_adapter(self, request: Request) -> Response:
        """Put an adapter on the base."""
        wanted = read(LoadAdapter, await self._body(request))
        added = await asyncio.to_thread(self.served.add, wanted.lora_name, wanted.lora_path)
        return JSONResponse(added.to_json())

    async def unload_adapter(self, request: Request) -> Response:
        """Take one away."""
        wanted = read(UnloadAdapter, await self._body(request))
        await asyncio.to_thread(self.served.remove, wanted.lora_name)
        return JSONResponse({"id": wanted.lora_name, "object": "model", "deleted": True})

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        asked: ChatRequest = read(ChatRequest, await self._body(request))
        model = self.served.find(asked.model)
        asks = await asyncio.to_thread(chat_asks, asked, model.tokenizer, self.served.limits)
        tools = bool(asked.tools) and asked.tool_choice != "none"
        return await self._answer(request, asked, model, Reply("chat", model.name, asks, tools))

    async def complete(self, request: Request) -> Response:
        """Go on with a text."""
        asked: CompletionRequest = read(CompletionRequest, await self._body(request))
        model = self.served.find(asked.model)
        asks = await asyncio.to_thread(completion_asks, asked, model.tokenizer, self.served.limits)
        return await self._answer(request, asked, model, Reply("text", model.name, asks))

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, model: ServedModel, reply: Reply
    ) -> Response:
        self._require_able(reply.asks)
        if self._writing + len(reply.asks) > self._max_requests:
            raise ApiError(429, f"{self._writing} answers are being written; try again soon", code="too_many_requests")
        pieces = self._pieces(model, reply.asks)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(
                self._events(pieces, reply, usage),
                media_type="text/event-stream",
                headers={"cache-control": "no-store"},
            )
        whole = asyncio.ensure_future(_collect(pieces, reply))
        left = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            await whole
        finally:
            left.cancel()
            whole.cancel()
        self.metrics.wrote(reply.usage())
        return JSONResponse(reply.whole())

    def _require_able(self, asks: list[Ask]) -> None:
        engine = self.served.engine
        if not engine.can_hold_to_schema and any(ask.schema is not None for ask in asks):
            raise ApiError(
                400, f"the engine {engine.name} holds no answer to a schema: no response_format, no tool_choice"
            )
        bent = any(ask.frequency_penalty or ask.presence_penalty or ask.logit_bias for ask in asks)
        if bent and not engine.can_penalise:
            raise ApiError(400, f"the engine {engine.name} takes no penalties and no logit_bias")

    async def _events(
        self, pieces: AsyncIterator[tuple[int, Piece]], reply: Reply, usage: bool
    ) -> AsyncIterator[bytes]:
        try:
            for chunk in reply.opening():
                yield event(chunk)
            async for index, piece in pieces:
                reply.take(index, piece)
                for chunk in reply.chunks(index, piece):
                    yield event(chunk)
            if usage:
                yield event(reply.closing())
            yield event("[DONE]")
        except ApiError as error:
            yield event(error.to_json())
        except UserError as error:
            yield event(ApiError(500, error.what).to_json())
        except Exception:
            _log.exception("a stream failed")
            yield event(ApiError(500, "the server failed; its log says how").to_json())
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]  # a generator
            self.metrics.wrote(reply.usage())

    async def _pieces(self, model: ServedModel, asks: list[Ask]) -> AsyncIterator[tuple[int, Piece]]:
        """What the engine writes of all answers, as it comes; who stops reading stops the writing."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()
        unwanted = threading.Event()

        def tell(index: int, what: Piece | BaseException | None) -> bool:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, (index, what))
            return unwanted.is_set()

        def work(index: int, ask: Ask) -> None:
            try:
                if not unwanted.is_set():
                    self.served.engine.write(model.adapter, ask, lambda piece: tell(index, piece))
            except BaseException as error:
                tell(index, error)
            finally:
                tell(index, None)

        self._writing += len(asks)
        running = [loop.run_in_executor(self._threads, work, index, ask) for index, ask in enumerate(asks)]
        for future in running:
            future.add_done_callback(self._freed)
        try:
            left = len(asks)
            while left:
                index, what = await queue.get()
                if isinstance(what, BaseException):
                    raise what
                if what is None:
                    left -= 1
                else:
                    yield index, what
        finally:
            unwanted.set()

    def _freed(self, _: Any) -> None:
        self._writing -= 1

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=True, cancel_futures=True)


async def _collect(pieces: AsyncIterator[tuple[int, Piece]], reply: Reply) -> None:
    try:
        async for index, piece in pieces:
            reply.take(index, piece)
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]  # a generator


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _headers(error: ApiError) -> dict[str, str]:
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    return {"retry-after": "1"} if error.status == 429 else {}


async def _no_route(request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 404)
    what = f"{request.method} {request.url.path}: "
    told = ApiError(status, what + ("there is nothing here" if status == 404 else "this method is not served"))
    return Response(json.dumps(told.to_json()), status, media_type="application/json")
