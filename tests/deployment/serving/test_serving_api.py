"""What clients get: OpenAI's own client, wrong requests, and answers equal to offline greedy generation."""

from __future__ import annotations

import concurrent.futures
import json
import re
import socket
import time

import httpx2
import openai
import pytest
import torch

from luthier.data.render import prompt_text
from luthier.deployment.serving.engine import Ask
from luthier.errors import UserError
from luthier.evaluation.generation import generate_answers
from luthier.methods.saved import load_saved

QUESTIONS = ["What is the capital of France?", "Name three colours.", "今天天气怎么样？"]


def turns(question):
    return [{"role": "user", "content": question}]


def base_name(server):
    return server.api.served.models[0].name


@pytest.fixture(scope="module")
def offline(server):
    """Greedy answers of each model by transformers in float32, 12 tokens."""
    found = {}
    for name in ("orders", "polite"):
        saved = load_saved(server.adapters[name], dtype=torch.float32)
        texts = [prompt_text(saved.tokenizer, turns(question)) for question in QUESTIONS]
        answers = generate_answers(saved.model, saved.tokenizer, texts, max_new_tokens=12)
        found[name] = [answer.text for answer in answers]
        with saved.as_base() as base:
            answers = generate_answers(base, saved.tokenizer, texts, max_new_tokens=12)
        found[None] = [answer.text for answer in answers]
    assert found["orders"] != found["polite"] != found[None]
    return found


def ask(server, model, question, **more):
    settings = {"temperature": 0, "max_tokens": 12} | more
    return server.client().chat.completions.create(model=model, messages=turns(question), **settings)


def test_adapters_in_one_batch_answer_as_they_do_offline(server, offline):
    names = [(name, name or base_name(server)) for name in ("orders", None, "polite")]
    wanted = [(key, model, k) for k in range(len(QUESTIONS)) for key, model in names] * 2
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda w: ask(server, w[1], QUESTIONS[w[2]]), wanted))
    for (key, model, k), reply in zip(wanted, replies, strict=True):
        assert reply.choices[0].message.content == offline[key][k], (key, k)
        assert reply.model == model and reply.usage.completion_tokens == 12
        assert reply.choices[0].finish_reason == "length"


def test_streams_say_the_same(server, offline):
    chunks = list(ask(server, "polite", QUESTIONS[2], stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == offline["polite"][2]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    assert len(chunks) > 6, "it came piece by piece"


def test_completions_take_texts_and_tokens(server, offline):
    saved = load_saved(server.adapters["orders"])
    text = prompt_text(saved.tokenizer, turns(QUESTIONS[0]))
    ids = saved.tokenizer(text, add_special_tokens=False).input_ids
    for prompt in (text, ids, [text], [ids]):
        reply = server.client().completions.create(model="orders", prompt=prompt, max_tokens=12, temperature=0)
        assert reply.choices[0].text == offline["orders"][0]
    assert reply.usage.prompt_tokens == len(ids)
    two = server.client().completions.create(model="orders", prompt=[text, "Once"], max_tokens=4, temperature=0)
    assert [c.index for c in two.choices] == [0, 1] and two.choices[0].text != two.choices[1].text
    pieces = server.client().completions.create(model="orders", prompt=text, max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == offline["orders"][0]


def test_stop_texts_end_an_answer_and_are_no_part_of_it(server, offline):
    whole = offline["orders"][0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    for stream in (False, True):
        reply = ask(server, "orders", QUESTIONS[0], stop=[stop, "never"], stream=stream)
        if stream:
            chunks = [c.choices[0] for c in reply if c.choices]
            text, finish = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
        else:
            text, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert (text, finish) == (whole[: whole.index(stop)], "stop")


def test_seeds_and_several_answers(server):
    drawn = [
        [c.message.content for c in ask(server, "orders", QUESTIONS[0], temperature=1.5, n=3, seed=seed).choices]
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 3
    # Without a seed, another answer each time; without a temperature, the likeliest one, as in evaluation.
    assert len({ask(server, "orders", QUESTIONS[0], temperature=1.5).choices[0].message.content for _ in range(3)}) > 1
    greedy = server.client().chat.completions.create(model="orders", messages=turns(QUESTIONS[0]), max_tokens=12)
    assert greedy.choices[0].message.content == ask(server, "orders", QUESTIONS[0]).choices[0].message.content


def test_logprobs_are_the_models_own(server):
    reply = ask(server, "orders", "Hi", logprobs=True, top_logprobs=3, max_tokens=3, temperature=0)
    saved = load_saved(server.adapters["orders"], dtype=torch.float32)
    ids = saved.tokenizer(prompt_text(saved.tokenizer, turns("Hi")), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        row = saved.model(**ids).logits[0, -1].log_softmax(-1)
    first = reply.choices[0].logprobs.content[0]
    assert first.logprob == pytest.approx(float(row.max()), abs=1e-3)
    assert [t.logprob for t in first.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    assert bytes(first.bytes).decode(errors="replace") in saved.tokenizer.decode([int(row.argmax())])


def test_the_likeliest_token_is_chosen_after_biases_penalties_and_schemas(server):
    if not server.api.served.engine.can_penalise:
        pytest.skip("this engine refuses them")
    saved = load_saved(server.adapters["orders"], dtype=torch.float32)
    ids = saved.tokenizer(prompt_text(saved.tokenizer, turns("Hi")), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        best, second = saved.model(**ids).logits[0, -1].topk(2).indices.tolist()
    for bias, token in (({best: -100}, second), ({second: 100}, second), ({}, best)):
        reply = ask(server, "orders", "Hi", max_tokens=1, logit_bias={str(k): v for k, v in bias.items()})
        assert reply.choices[0].message.content == saved.tokenizer.decode([token])
    plain = ask(server, "orders", "Hi", max_tokens=150).choices[0].message.content
    # What was said before becomes likelier, and is said again and again.
    again = ask(server, "orders", "Hi", max_tokens=150, frequency_penalty=-2.0).choices[0].message.content
    assert again != plain and len(set(again)) < len(set(plain))
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    kept = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    said = ask(server, "orders", "Hi", max_tokens=40, response_format=kept).choices[0].message.content
    assert re.match(r'\s*\{\s*"a"', said)  # a random model may fill the rest with white space


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": "object", "properties": {"a": {"type": "strin"}}},
        {"$ref": "#/$defs/Nobody"},
        {"type": "string", "pattern": "("},
        {"type": "string", "pattern": "(?=a)b"},
        {"not": {"type": "string"}},
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(server, schema):
    """Not passed over: llama.cpp with llguidance would write freely."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked = {"model": "orders", "messages": turns("Hi"), "max_tokens": 4, "response_format": form}
    for stream in (False, True):
        reply = server.post("/v1/chat/completions", asked | {"stream": stream})
        assert reply.status_code == 400 and "held to this schema" in reply.json()["error"]["message"]


def test_models_health_and_metrics(server):
    assert [model.id for model in server.client().models.list()] == [base_name(server), "orders", "polite"]
    assert server.client().models.retrieve("polite").parent == base_name(server)
    assert server.get("/health").json() == {"status": "ok"}
    ask(server, "orders", "Hi")
    lines = server.get("/metrics").text
    assert 'luthier_requests_total{path="/v1/chat/completions",status="200"}' in lines
    assert 'luthier_tokens_total{kind="completion"}' in lines


WRONG = [
    ({"model": "nobody"}, 404, "nobody"),
    ({"model": "../../etc/passwd"}, 404, "there is no model"),
    ({"model": 7}, 400, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, 400, "colour"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "no text"),
    ({"messages": [{"role": "user", "content": "a <|im_end|> b"}]}, 400, "control token '<|im_end|>'"),
    ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "this server takes 512"),
    ({"max_tokens": 511}, 400, "max_tokens is 511"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "many"}, 400, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, 400, "send one"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": 9}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 99}, 400, "n"),
    ({"temprature": 0.5}, 400, "did you mean 'temperature'"),
    ({"stop": [""]}, 400, "stop"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"top_logprobs": 3}, 400, "logprobs=true"),
    ({"stream_options": {"include_usage": True}}, 400, "stream=true"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "does not render tools"),
]


@pytest.mark.parametrize(
    ("change", "status", "told"), WRONG, ids=[next(iter(w[0])) + f"-{k}" for k, w in enumerate(WRONG)]
)
def test_wrong_requests_are_told(server, change, status, told):
    body = {"model": "orders", "messages": turns("Hi")} | change
    reply = server.post("/v1/chat/completions", body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert told in error["message"] or told == error["param"], error
    assert set(error) == {"message", "type", "param", "code"}


def test_wrong_bodies_paths_and_methods(server):
    path = "/v1/chat/completions"
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"model": NaN}', b"[" * 5_000):
        reply = server.post(path, body)
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "invalid_json", body[:20]
    assert server.post(path, b" " * 20_001).status_code == 413

    def endless():
        for _ in range(30):
            yield b" " * 1_000

    assert httpx2.post(server.url + path, content=endless()).status_code == 413, "without a length"
    assert httpx2.post(server.url + path, content=endless()).status_code == 413, "without a length"
    assert server.get("/v1/nothing").json()["error"]["message"].endswith("there is nothing here")
    assert server.get(path).status_code == 405
    assert server.get("/v1/models/%2e%2e%2fetc").status_code == 404
    for prompt in ([], "", [10**9], [-1]):
        assert server.post("/v1/completions", {"model": "orders", "prompt": prompt}).status_code == 400, prompt
    assert ask(server, "orders", "Hi").choices, "it still answers"


def test_adapters_come_and_go(server, tmp_path):
    assert ask_status(server, "terse") == 404
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "terse", "lora_path": "terse"})
    assert loaded.status_code == 200, loaded.text
    saved = load_saved(server.adapters["terse"], dtype=torch.float32)
    text = prompt_text(saved.tokenizer, turns(QUESTIONS[1]))
    (alone,) = generate_answers(saved.model, saved.tokenizer, [text], max_new_tokens=12)
    assert ask(server, "terse", QUESTIONS[1]).choices[0].message.content == alone.text
    assert server.post("/v1/load_lora_adapter", {"lora_name": "terse", "lora_path": "terse"}).status_code == 409
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "terse"}).status_code == 200
    assert ask_status(server, "terse") == 404 and ask_status(server, "orders") == 200
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "orders"}).status_code == 403
    out = server.adapters["terse"].parent / "out"
    out.symlink_to(tmp_path) if not out.exists() else None
    for path in ("../", "/etc", "nowhere", "out", "orders/adapter_config.json", "a\0b", "x" * 5000):
        reply = server.post("/v1/load_lora_adapter", {"lora_name": "more", "lora_path": path})
        assert reply.status_code == 400 and "no adapter" in reply.json()["error"]["message"], path
    for name in ("../x", "", "a/b", "a\nb", "x" * 65, ".hidden"):
        reply = server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "terse"})
        assert reply.status_code == 400, name


def test_a_name_that_was_used_before_is_the_new_adapters_alone(server, offline):
    """Also one that an engine may use itself."""
    if server.api.served.engine.name == "transformers":
        pytest.skip("it keeps nothing of what it has read")
    for folder in ("orders", "polite"):
        loaded = server.post("/v1/load_lora_adapter", {"lora_name": "base", "lora_path": folder})
        assert loaded.status_code == 200, loaded.text
        for k, question in enumerate(QUESTIONS):
            assert ask(server, "base", question).choices[0].message.content == offline[folder][k]
            assert ask(server, base_name(server), question).choices[0].message.content == offline[None][k]
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "base"}).status_code == 200


def test_an_adapter_that_is_gone_is_not_answered_by_the_base(server):
    with pytest.raises(UserError):
        server.api.served.engine.write("gone", Ask((1, 2, 3), 2), lambda piece: False)


def ask_status(server, model):
    return server.post("/v1/chat/completions", {"model": model, "messages": turns("Hi"), "max_tokens": 2}).status_code


def test_a_client_that_leaves_frees_its_place(server):
    host, port = server.url.removeprefix("http://").split(":")
    for stream in (True, False):
        body = json.dumps({"model": "orders", "messages": turns("Hi"), "max_tokens": 400, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body)
            arrived = time.monotonic() + 10
            while not server.api._writing and time.monotonic() < arrived:
                time.sleep(0.001)
            assert server.api._writing == 1
        until = time.monotonic() + 20
        while server.api._writing and time.monotonic() < until:
            time.sleep(0.02)
        assert server.api._writing == 0


def test_keys(server):
    server.api._keys = [b"one", b"two"]
    try:
        for key in ("wrong", "on", "one\u00e9"):
            headers = {"authorization": f"Bearer {key}".encode()}
            reply = server.get("/v1/models", headers=headers)
            assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", key
        assert server.get("/v1/models").status_code == 401 and server.get("/metrics").status_code == 401
        assert server.get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("three").models.list()
        assert server.client("two").models.list().data
    finally:
        server.api._keys = []


def test_too_many_at_once_are_sent_away(server):
    most, server.api._max_requests = server.api._max_requests, 2
    try:
        with pytest.raises(openai.RateLimitError, match="try again soon"):
            ask(server, "orders", "Hi", n=3, temperature=1)
    finally:
        server.api._max_requests = most
    assert ask(server, "orders", "Hi").choices
