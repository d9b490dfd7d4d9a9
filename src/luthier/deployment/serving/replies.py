"""What an engine writes, in OpenAI's form: whole or in chunks, as chat or as completion."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from luthier.deployment.serving.engine import Ask, Piece, Told
from luthier.evaluation.metrics.tools import Call, written_calls


@dataclass(slots=True)
class Reply:
    """The answers of one request."""

    kind: str
    """``chat`` or ``text``"""
    model: str
    asks: list[Ask]
    tools: bool = False
    """Whether calls of tools are looked for; then an answer comes in one piece."""
    id: str = ""
    created: int = 0
    written: list[_Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.written = [_Answer(ask.said) for ask in self.asks]

    def take(self, index: int, piece: Piece) -> None:
        """What was written of answer ``index``."""
        self.written[index].take(piece)
        if piece.finish == "stop":
            self.written[index].text += self.asks[index].closing

    def whole(self) -> dict[str, Any]:
        """The response."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        choices = [self._choice(index, answer) for index, answer in enumerate(self.written)]
        return self._frame(name) | {"choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before any text."""
        if self.kind == "text":
            return []
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self.asks))]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A piece of answer ``index`` as chunks; take it first."""
        answer = self.written[index]
        if self.tools:
            if piece.finish is None:
                return []
            message, finish = self._message(answer)
            calls = [call | {"index": k} for k, call in enumerate(message.get("tool_calls", ()))]
            delta: Any = {"tool_calls": calls} if calls else {"content": message["content"]}
            told = self._logprobs(answer.told, self.asks[index], 0)
            return [self._chunk(index, delta, told), self._chunk(index, {}, finish=finish)]
        found = []
        if piece.text or piece.told:
            told = self._logprobs(piece.told, self.asks[index], len(answer.text) - len(piece.text))
            delta = {"content": piece.text} if self.kind == "chat" else piece.text
            found.append(self._chunk(index, delta, told))
        if piece.finish is not None:
            found.append(self._chunk(index, {} if self.kind == "chat" else "", finish=piece.finish))
        return found

    def closing(self) -> dict[str, Any]:
        """The chunk with the usage, where it is asked for."""
        return self._frame(self._chunk_name) | {"choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens read and written; a prompt that is answered several times counts once."""
        prompts = sum(len(ids) for ids in dict.fromkeys(ask.ids for ask in self.asks))
        written = sum(answer.tokens for answer in self.written)
        return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}

    @property
    def _chunk_name(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat" else "text_completion"

    def _frame(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _chunk(self, index: int, said: Any, told: Any = None, finish: str | None = None) -> dict[str, Any]:
        key = "delta" if self.kind == "chat" else "text"
        choice = {"index": index, key: said, "logprobs": told, "finish_reason": finish}
        return self._frame(self._chunk_name) | {"choices": [choice]}

    def _choice(self, index: int, answer: _Answer) -> dict[str, Any]:
        told = self._logprobs(answer.told, self.asks[index], 0)
        if self.kind == "text":
            return {"index": index, "text": answer.text, "logprobs": told, "finish_reason": answer.finish}
        message, finish = self._message(answer)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": finish}

    def _message(self, answer: _Answer) -> tuple[dict[str, Any], str | None]:
        calls = written_calls(answer.text) if self.tools else None
        if not calls:
            return {"role": "assistant", "content": answer.text}, answer.finish
        message = {"role": "assistant", "content": None, "tool_calls": [_call(call) for call in calls]}
        return message, "tool_calls" if answer.finish == "stop" else answer.finish

    def _logprobs(self, told: list[Told], ask: Ask, offset: int) -> dict[str, Any] | None:
        if ask.logprobs is None:
            return None
        if self.kind == "chat":
            return {"content": [_told(t) | {"top_logprobs": [_told(o) for o in t.top]} for t in told], "refusal": None}
        offsets = []
        for token in told:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [t.text for t in told],
            "token_logprobs": [t.logprob for t in told],
            "top_logprobs": [{o.text: o.logprob for o in t.top} for t in told],
            "text_offset": offsets,
        }


@dataclass(slots=True)
class _Answer:
    text: str = ""
    told: list[Told] = field(default_factory=list)
    finish: str | None = None
    tokens: int = 0

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.told += piece.told
        self.finish = piece.finish
        self.tokens += piece.written


def _told(token: Told) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.bytes), "logprob": token.logprob}


def _call(call: Call) -> dict[str, Any]:
    name, arguments = call
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def event(content: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {data}\n\n".encode()
