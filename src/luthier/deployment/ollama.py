"""A Modelfile for Ollama: where the weights are, how a conversation becomes a prompt, and where an answer ends.

Ollama does not run the Jinja template in a GGUF file. When a model is created, it looks whether that text is close to
one of those it has a Go template for, and takes bare text otherwise. So the template is written down here, in Go's
language, as what the model's own says: what stands before a message of each role, given the one before it. It is held
against the model's own on conversations; one that cannot be said so is left out, and the reader is told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.data.render import RenderError, template_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.data.examples import Message

_TURNS = {"system": "⟦s⟧", "user": "⟦u⟧", "assistant": "⟦a⟧"}


@dataclass(frozen=True, slots=True)
class Turns:
    """A chat template as the texts between messages."""

    before: dict[tuple[str, str], str]
    """What stands before a message, by the roles of the one before it (none: "") and of itself."""
    opening: str
    """What stands between the last user's message and the answer."""

    def text(self, messages: Sequence[Message]) -> str:
        """A conversation, up to where its answer begins."""
        said, last = "", ""
        for message in messages:
            said += self.before.get((last, message["role"]), "") + str(message["content"])
            last = message["role"]
        return said + self.opening

    def go_template(self) -> str:
        """The same in the language of Go's text/template, with Ollama's variables.

        All text stands in quoted literals, so that no white space is added or lost.
        """
        parts = ['{{- $last := "" }}', "{{- range .Messages }}"]
        for number, ((before, role), text) in enumerate(self.before.items()):
            verb = "else if" if number else "if"
            parts.append(f'{{{{- {verb} and (eq .Role "{role}") (eq $last "{before}") }}}}{_literal(text)}')
        parts += ["{{- end }}{{ .Content }}{{- $last = .Role }}", "{{- end }}"]
        # An answer that has begun is continued, as Ollama's own templates do.
        parts.append(f'{{{{- if ne $last "assistant" }}}}{_literal(self.opening)}{{{{- end }}}}')
        return "\n".join(parts)


def _literal(text: str) -> str:
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def turns_of(tokenizer: PreTrainedTokenizerBase, *, adds_bos: bool) -> Turns | None:
    """What a chat template writes between messages; None: it does more than that.

    Args:
        tokenizer: with the template.
        adds_bos: the tokenizer puts a beginning-of-text token before each text by itself, so the template must not.
    """
    bos = tokenizer.bos_token if adds_bos else None
    try:
        whole = _between(_rendered(tokenizer, ["system", "user", "assistant", "user"], bos))
        alone = _between(_rendered(tokenizer, ["user"], bos))
        if whole is None or alone is None:
            return None
        system, first, answer, again, opening = whole
        before = {
            ("", "system"): system,
            ("", "user"): alone[0],
            ("system", "user"): first,
            ("user", "assistant"): answer,
            ("assistant", "user"): again,
        }
        turns = Turns(before, opening)
        for conversation in _conversations():
            if turns.text(conversation) != _without(
                bos, template_text(tokenizer, conversation, add_generation_prompt=True)
            ):
                return None
    except RenderError:
        return None
    return turns


def _rendered(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], bos: str | None) -> str:
    messages: list[Message] = [{"role": role, "content": _TURNS[role]} for role in roles]
    return _without(bos, template_text(tokenizer, messages, add_generation_prompt=True))


def _without(bos: str | None, text: str) -> str:
    return text.removeprefix(bos) if bos else text


def _between(text: str) -> list[str] | None:
    """What stands before, between and behind the contents."""
    for mark in _TURNS.values():
        text = text.replace(mark, "\0")
    parts = text.split("\0")
    return parts if len(parts) > 1 else None


def _conversations() -> list[list[Message]]:
    """Such as tell a template that only writes texts between messages from others."""
    hello: list[Message] = [
        {"role": "user", "content": "Hello, who are you?"},
        {"role": "assistant", "content": "I am a model.\n\nAsk me."},
        {"role": "user", "content": "是的 🙂 {{ .System }}"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "Why?"},
    ]
    system: Message = {"role": "system", "content": "Answer in one word."}
    return [hello[:1], hello[:3], hello, [system, *hello[:1]], [system, *hello]]


def modelfile(
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[str],
    *,
    adds_bos: bool,
    adapter: str | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        weights: the GGUF file's name, beside the Modelfile.
        tokenizer: with the chat template.
        stops: texts of the tokens that end an answer.
        adds_bos: see :func:`turns_of`.
        adapter: the GGUF adapter's name, beside the Modelfile.
    """
    lines = [f"FROM ./{weights}"] + ([f"ADAPTER ./{adapter}"] if adapter else [])
    turns = turns_of(tokenizer, adds_bos=adds_bos)
    if turns is None:
        lines += [
            "# This model's chat template does more than to write texts between messages, so it is not written here",
            "# as an Ollama template. Ollama knows some models' templates by the one in the GGUF file; check it with",
            "# `ollama show --template`, or serve the file with llama-server, which runs the model's own template.",
        ]
    else:
        lines += [f'TEMPLATE """{turns.go_template()}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"
