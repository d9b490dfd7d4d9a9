"""Answers that must call a tool, in the form of the model's own template."""

from __future__ import annotations

import json

import openai
import pytest
from live import VLLM, VLLM_ARGUMENTS, running
from rich.console import Console
from template_families import family
from tiny_models import tiny_llama

from luthier.data.render import end_of_turn, prompt_text, template_text
from luthier.deployment.serving.api_error import ApiError
from luthier.deployment.serving.forced_calls import forced_call
from luthier.deployment.serving.prepare import Sources, serve_llamacpp, serve_transformers
from luthier.deployment.serving.prepare_vllm import serve_vllm
from luthier.deployment.serving.requests import Limits
from luthier.deployment.vllm import find_vllm
from luthier.evaluation.metrics.tools import written_calls

ASKED = [{"role": "user", "content": "How is the weather in Oslo?"}]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "It tells.", "parameters": parameters}}


TOOLS = [
    tool("weather", city={"enum": ["Oslo", "Rome"]}, days={"type": "integer", "minimum": 1, "maximum": 9}),
    tool("clock", zone={"enum": ["UTC", "CET"]}),
]


def written(tokenizer, name, arguments):
    """What the template writes for a call, up to its end of turn."""
    call = {"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    whole = template_text(tokenizer, [*ASKED, turn], TOOLS, add_generation_prompt=False)
    text = whole.removeprefix(prompt_text(tokenizer, ASKED, TOOLS)).rstrip()
    return text.removesuffix(end_of_turn(tokenizer))


@pytest.mark.parametrize("name", ["hermes", "qwen3", "llama3", "mistral", "deepseek_v31", "glm4"])
def test_a_call_is_written_as_the_template_writes_it(tokenizer, name):
    model = family(tokenizer, name)
    arguments = {"city": "Oslo", "days": 3}
    forced = forced_call(model, ASKED, TOOLS, "weather")
    whole = "name" in forced.schema["properties"]
    key = list(forced.schema["properties"])[-1]
    value = {"name": "weather", key: arguments} if whole else arguments
    text = forced.said + json.dumps(value) + forced.closing
    assert written_calls(text) == [("weather", json.dumps(arguments))]
    if name != "mistral":  # whose calls have an id besides
        assert text == written(model, "weather", arguments)


def test_one_of_several_is_chosen_where_a_call_is_one_object(tokenizer):
    forced = forced_call(family(tokenizer, "hermes"), ASKED, TOOLS, None)
    assert [each["properties"]["name"]["const"] for each in forced.schema["anyOf"]] == ["weather", "clock"]
    with pytest.raises(ApiError, match="name one function"):
        forced_call(family(tokenizer, "glm4"), ASKED, TOOLS, None)


@pytest.mark.parametrize(
    ("template", "tools", "name", "told"),
    [
        ("glm45", TOOLS, "weather", "'auto'"),
        ("chatml", TOOLS, "weather", "a form of its own"),
        ("hermes", TOOLS, "map", "none of tools"),
        ("hermes", [TOOLS[0], TOOLS[0]], None, "name of its own"),
        ("hermes", [{"type": "function"}], None, "name of its own"),
        ("hermes", [{"type": "function", "function": {"name": "f", "parameters": []}}], None, "JSON schema"),
    ],
)
def test_what_cannot_be_forced_is_told(tokenizer, template, tools, name, told):
    with pytest.raises(ApiError, match=told):
        forced_call(family(tokenizer, template), ASKED, tools, name)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A random model that knows tools by its template, with heads of 32, the smallest that vLLM computes."""
    return tiny_llama(tmp_path_factory.mktemp("tools"), family(tokenizer, "hermes"), hidden=128)


@pytest.fixture(scope="module", params=["llamacpp", "vllm"])
def server(request, folder):
    found, limits, console = Sources.of(str(folder), {}, "caller"), Limits(1024), Console(quiet=True)
    if request.param == "vllm":
        if find_vllm(VLLM) is None:
            pytest.skip("vLLM is not installed")
        served = serve_vllm(
            found, limits, None, program=VLLM, arguments=VLLM_ARGUMENTS, kind="f32", slots=4, console=console
        )
    else:
        served = serve_llamacpp(found, limits, None, kind="f32", slots=4, threads=1, console=console)
    with running(served) as live:
        yield live


def ask(server, **more):
    settings = {"model": "caller", "messages": ASKED, "tools": TOOLS, "max_tokens": 200} | more
    return server.client().chat.completions.create(**settings)


def test_an_answer_must_call_a_tool(server):
    plain = ask(server, tool_choice="auto").choices[0].message
    assert not plain.tool_calls  # a random model would never
    tokenizer = server.api.served.models[0].tokenizer
    for wanted in ("weather", "clock"):
        likely = {str(token): 50 for token in tokenizer(wanted).input_ids}
        reply = ask(server, tool_choice="required", temperature=1.5, seed=3, logit_bias=likely)
        (call,) = reply.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert reply.choices[0].finish_reason == "tool_calls" and reply.choices[0].message.content is None
        assert call.function.name == wanted
        if wanted == "weather":
            assert arguments["city"] in ("Oslo", "Rome") and 1 <= arguments["days"] <= 9
        else:
            assert arguments["zone"] in ("UTC", "CET")


def test_an_answer_must_call_the_tool_that_is_named(server):
    for tool_name in ("weather", "clock"):
        chosen = {"type": "function", "function": {"name": tool_name}}
        whole = ask(server, tool_choice=chosen, temperature=0).choices[0].message.tool_calls[0].function
        chunks = list(ask(server, tool_choice=chosen, temperature=0, stream=True))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert whole.name == tool_name
        assert [(c.function.name, c.function.arguments) for c in calls] == [(whole.name, whole.arguments)]


def test_parameters_may_refer_to_definitions(server):
    """As pydantic writes nested models; two functions may have different ones of the same name."""
    tools = []
    for name, places in (("fly", ["Oslo"]), ("ride", ["Rome"])):
        made = tool(name, to={"$ref": "#/$defs/Place"}, via={"type": "array", "items": {"$ref": "#/$defs/Place"}})
        made["function"]["parameters"]["properties"]["via"] |= {"minItems": 1, "maxItems": 2}
        made["function"]["parameters"]["$defs"] = {"Place": {"enum": places}}
        tools.append(made)
    for name, place in (("fly", "Oslo"), ("ride", "Rome")):
        for chosen in ({"type": "function", "function": {"name": name}}, "required"):
            reply = ask(server, tools=tools, tool_choice=chosen, temperature=1.5, seed=len(name))
            call = reply.choices[0].message.tool_calls[0].function
            wanted = place if chosen != "required" else {"fly": "Oslo", "ride": "Rome"}[call.name]
            arguments = json.loads(call.arguments)
            assert arguments["to"] == wanted and set(arguments["via"]) == {wanted}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "tree"}}])
def test_parameters_may_refer_to_themselves(server, choice):
    """As pydantic writes a model that holds its like: the root is a reference, or is referred to."""
    leaf = {"type": "object", "properties": {"leaf": {"enum": ["a", "b"]}}, "required": ["leaf"]}
    leaf["additionalProperties"] = False
    inner = {"type": "object", "properties": {"left": {"anyOf": [{"$ref": "#"}, leaf]}}, "required": ["left"]}
    named = {"$ref": "#/$defs/Node", "$defs": {"Node": leaf}}
    for parameters in (inner, named):
        made = {"type": "function", "function": {"name": "tree", "parameters": parameters}}
        bias = {str(token): 20 for token in server.api.served.models[0].tokenizer("leaf").input_ids}
        reply = ask(server, tools=[made, TOOLS[1]], tool_choice=choice, temperature=1, seed=1, logit_bias=bias)
        call = reply.choices[0].message.tool_calls[0].function
        arguments = json.loads(call.arguments)
        while call.name == "tree" and "left" in arguments:
            arguments = arguments["left"]
        assert arguments.get("leaf") in ("a", "b") or call.name == "clock"


def test_an_answer_that_was_cut_calls_nothing(server):
    reply = ask(server, tool_choice="required", max_tokens=2).choices[0]
    assert reply.finish_reason == "length" and not reply.message.tool_calls
    assert reply.message.content.startswith("<tool_call>")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tools": None, "tool_choice": "required"}, "no tools"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": {"type": "function", "function": {"name": "map"}}}, "'map'"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": [tool("f", a={"type": "strin"})], "tool_choice": "required"}, "held to this schema"),
    ],
)
def test_wrong_choices_are_told(server, change, told):
    with pytest.raises(openai.BadRequestError, match=told):
        ask(server, **{key: openai.NOT_GIVEN if value is None else value for key, value in change.items()})


def test_an_engine_that_holds_to_no_schema_says_so(folder):
    found = Sources.of(str(folder), {}, "caller")
    with (
        running(serve_transformers(found, Limits(1024), None)) as live,
        pytest.raises(openai.BadRequestError, match="no tool_choice"),
    ):
        ask(live, tool_choice="required")
