"""A conversation filled into a template's skeleton reads as transformers renders it, whatever is in it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.chat_template import ChatTemplate, RenderError

TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
# What templates ask of a content, and what they trim.
ASKED = ["</think>", "<think>", "<tool_response>x</tool_response>", "\n", " ", '"', '\ue0000,"\ue001', "{{ x }}", "好"]
CONTENT = st.lists(st.sampled_from(ASKED) | st.text(max_size=5), max_size=5).map("".join)
# Each looks into a content in another way; none may be filled from a skeleton that does not know it.
CURIOUS = {
    "length": "{% for m in messages %}{% if m.content | length > 3 %}long {% endif %}{{ m.content }}{% endfor %}",
    "upper": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "joined": "{% for m in messages %}{% set x = 'a' ~ m.content %}{% if 'ab' in x %}!{% endif %}{{ x }}{% endfor %}",
    "json": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "first": "{% for m in messages %}{{ m.content[0] }}{{ m.content }}{% endfor %}",
    "truth": "{% for m in messages %}{% if m.content %}[{{ m.content }}]{% endif %}{% endfor %}",
    "equal": "{% for m in messages %}{% if m.content == 'b' %}b!{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "among": "{% for m in messages %}{{ m.content in ['b', 'c'] }}{{ m.content }}{% endfor %}",
    "within": "{% for m in messages %}{% if 'b' in m.content %}b!{% endif %}{{ m.content.lstrip() }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.content.lstrip('b').rstrip() }}{% endfor %}",
    "sum": "{% for m in messages %}{{ ('b' + m.content + ' ').strip() }}{% endfor %}",
    "macro": "{% macro say(x) %}{{ x | trim }}{% endmacro %}{% for m in messages %}{{ say(m.content) }}{% endfor %}",
    "block": "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x | length }}{% endfor %}",
    "format": "{% for m in messages %}{{ '%s' % m.content }}{{ '{}'.format(m.content) }}{% endfor %}",
    "replace": "{% for m in messages %}{{ m.content.replace('b', 'c') }}{% endfor %}",
    "split": "{% for m in messages %}{{ m.content.split('b') | last }}{% endfor %}",
    "held": "{% for m in messages %}{{ 'abc'.startswith(m.content) }}{% endfor %}",
    "loop": "{% for m in messages %}{% for c in m.content %}{{ c }}.{% endfor %}{% endfor %}",
    "group": "{% for m in messages %}{{ [m.content, 'b'] | join('-') }}{% endfor %}",
}


@pytest.fixture(scope="module")
def templates(tokenizer):
    def made(source):
        other = copy.copy(tokenizer)
        other.chat_template = source
        return other, ChatTemplate(other)

    read = {name: (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n") for name in FAMILIES}
    return {name: made(source) for name, source in {**read, **CURIOUS}.items()}


def transformers_text(tokenizer, messages, add):
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add)
    except jinja2.TemplateError:
        return None


def our_text(template, messages, add):
    try:
        return template.write(messages, None, add_generation_prompt=add)
    except RenderError:
        return None


@settings(max_examples=40, deadline=None)
@given(contents=st.lists(CONTENT, min_size=1, max_size=4), system=st.booleans(), add=st.booleans())
def test_filling_is_rendering(templates, contents, system, add):
    roles = ["system"] * system + ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    for name, (tokenizer, template) in templates.items():
        assert our_text(template, messages, add) == transformers_text(tokenizer, messages, add), name


@pytest.mark.parametrize("name", CURIOUS)
@pytest.mark.parametrize("content", ["b", "abc", "", " b ", "bb\n"])
def test_a_template_that_looks_into_contents_is_rendered(templates, name, content):
    tokenizer, template = templates[name]
    for text in ("x", content):
        messages = [{"role": "user", "content": text}]
        assert our_text(template, messages, False) == transformers_text(tokenizer, messages, False)


def test_well_known_families_are_filled(templates):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name in FAMILIES:
        template = templates[name][1]
        template.write(turns, None, add_generation_prompt=False)
        assert any(template._skeletons.values()), name
