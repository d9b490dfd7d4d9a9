"""The Modelfile's Go template says what the model's own template says, or is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from luthier.data.render import template_text
from luthier.deployment.ollama import modelfile, turns_of

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
_ACTION = re.compile(r'(\s*)\{\{(-?)\s*((?:"(?:[^"\\]|\\.)*"|[^"}])*?)\s*\}\}')


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that are used: a literal, a field, a variable, if, range."""
    tokens, place = [], 0
    for found in _ACTION.finditer(template):
        before = template[place : found.start()] + ("" if found[2] else found[1])
        tokens += [("text", before)] if before else []
        tokens.append(("do", found[3]))
        place = found.end()
    tokens.append(("text", template[place:]))
    inside = tokens.index(("do", "range .Messages"))
    variables: dict[str, str] = {}

    def value(word: str, message: dict[str, str]) -> str:
        if word.startswith('"'):
            return json.loads(word)
        return variables[word] if word.startswith("$") else message[word.removeprefix(".").lower()]

    def holds(condition: str, message: dict[str, str]) -> bool:
        pairs = re.findall(r'(eq|ne) (\S+) ("[^"]*")', condition)
        return all((value(a, message) == value(b, message)) == (verb == "eq") for verb, a, b in pairs)

    def run(part: list[tuple[str, str]], message: dict[str, str]) -> str:
        said, live, taken = "", [True], [True]
        for kind, what in part:
            if kind == "text":
                said += what if live[-1] else ""
            elif what.startswith("if "):
                live.append(live[-1] and holds(what, message))
                taken.append(live[-1])
            elif what.startswith("else if "):
                live[-1] = live[-2] and not taken[-1] and holds(what, message)
                taken[-1] = taken[-1] or live[-1]
            elif what == "end":
                live.pop(), taken.pop()
            elif live[-1] and (given := re.fullmatch(r"(\$\w+) :?= (\S+)", what)):
                variables[given[1]] = value(given[2], message)
            elif live[-1]:
                said += value(what, message)
        return said

    depth, close = 1, inside
    while depth:
        close += 1
        kind, what = tokens[close]
        depth += kind == "do" and what.startswith(("if ", "range "))
        depth -= kind == "do" and what == "end"
    said = run(tokens[:inside], {})
    for message in messages:
        said += run(tokens[inside + 1 : close], message)
    return said + run(tokens[close + 1 :], {})


def conversation(*said: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(said)]


@pytest.mark.parametrize("name", ["smollm2", "chatml", "llama2"])
def test_go_renders_what_the_model_s_template_renders(name, tokenizer):
    from copy import deepcopy

    own = deepcopy(tokenizer)
    if name != "smollm2":
        own.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    turns = turns_of(own, adds_bos=False)
    assert turns is not None
    system = [{"role": "system", "content": 'Say {{ little }} "now".'}]
    asked = conversation("Who?", "I.\n\n  是 🙂", "Why \\n?", "So.", "And?")
    for messages in (asked[:1], asked[:3], asked, system + asked[:1], system + asked):
        assert go(turns.go_template(), messages) == template_text(own, messages, add_generation_prompt=True)
    # An answer that has begun is left open.
    assert go(turns.go_template(), asked[:2]).endswith(asked[1]["content"])


def test_a_template_that_does_more_is_left_out_and_told(tokenizer):
    from copy import deepcopy

    own = deepcopy(tokenizer)
    own.chat_template = "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    text = modelfile("a.gguf", own, ["<|im_end|>"], adds_bos=False, adapter="b.gguf")
    assert "TEMPLATE" not in text.replace("TEMPLATEs", "") and "does more" in text
    assert text.startswith("FROM ./a.gguf\nADAPTER ./b.gguf\n")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')


def test_a_beginning_that_the_tokenizer_adds_is_not_written_twice(tokenizer):
    from copy import deepcopy

    own = deepcopy(tokenizer)
    own.chat_template = "<|im_start|>" + (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    twice, once = (turns_of(own, adds_bos=adds) for adds in (False, True))
    assert twice.before["", "system"] == "<|im_start|>" + once.before["", "system"]
