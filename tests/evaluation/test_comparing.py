"""Any models on one file: folders, adapters, other templates and endpoints beside each other."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from chat_server import chat_server, said

from luthier.cli import main
from luthier.comparing import Named, compare_models
from luthier.decoding import Decoding
from luthier.endpoint import Endpoint
from luthier.errors import UserError
from luthier.evaluation.contestants import EndpointModel
from luthier.evaluation.metrics.tools import tool_calls
from luthier.evaluation.question import Question
from luthier.models.loading import load_model, load_tokenizer
from luthier.recipe import Recipe
from luthier.tasks import get_task

ROWS = [{"prompt": f"What is {n} + {n}?", "response": f"It is {2 * n}."} for n in range(1, 7)]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"prompt": "", "response": "none asked"}]))
    return path


@pytest.fixture(scope="module")
def other_dir(terse_model_dir, tmp_path_factory):
    """The same model with other weights and another template."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model, tokenizer = load_model(terse_model_dir), copy.deepcopy(load_tokenizer(terse_model_dir))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|>the ")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answer_of(body, number):
    """Right about small numbers."""
    n = int(said(body).split()[2])
    return (200, f"It is {2 * n}.") if n < 4 else (200, "I do not know.")


def test_folders_and_an_endpoint_beside_each_other(terse_model_dir, other_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    with chat_server(answer_of) as server:
        found = compare_models(
            [f"first={terse_model_dir}", str(other_dir), f"served={server.url}#echo"],
            str(rows_file),
            max_new_tokens=8,
            samples=2,
            more_metrics=["chrf++"],
        )
        # A key goes where it is meant to go, and to no address that happens to be compared.
        assert not any("Authorization" in headers for headers in server.headers)
        assert {body["temperature"] for body in server.bodies} == {0.0} and len(server.bodies) == 6
    assert [m.name for m in found.models] == ["first", "model", "served"]
    first, second, served = found.models
    # Numbers 1, 2 and 3 of 6, by exact match; nothing is known of an endpoint's losses and tokens.
    assert served.metrics["exact_match"] == 0.5 and found.judged_by == "exact_match"
    assert "perplexity" not in served.metrics and "answer_tokens" not in served.metrics
    assert found.improved(served) == [0, 1, 2] and found.worsened(served) == []
    gained = served.changes["exact_match"]
    assert (gained.wins, gained.ties, gained.losses) == (3, 3, 0) and gained.value == 0.5
    # Three of six rows are too few to tell: two models of eight that are equal differ so by chance.
    assert 0.2 < gained.p < 0.3 and gained.low < 0 < gained.high
    around = served.intervals["exact_match"]
    assert around.low < 0.2 and around.high > 0.8
    # The second model reads its own template, so that the same weights would have another perplexity.
    assert second.metrics["perplexity"] != first.metrics["perplexity"] and "chrf++" in second.metrics
    stored = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert stored["models"]["served"]["improved"] == [0, 1, 2]
    assert stored["rows"][0]["answers"]["served"]["scores"]["exact_match"] == 1
    assert stored["rows"][3]["answers"]["served"]["scores"]["exact_match"] == 0
    assert any("rows.jsonl:7 was left out" in note for note in found.notes)


def test_a_key_is_sent_where_it_is_named(terse_model_dir, rows_file, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-mine")
    with chat_server(answer_of) as server:
        places = [str(terse_model_dir), f"{server.url}#m"]
        compare_models(places, str(rows_file), max_examples=1, max_new_tokens=2, api_key_env="MY_KEY")
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer sk-mine"]


def test_what_an_endpoint_does_not_answer_is_told_and_counts_as_wrong(terse_model_dir, rows_file):
    def reply(body, number):
        return (400, {"error": {"message": "no such thing"}}) if "5" in said(body) else answer_of(body, number)

    with chat_server(reply) as server:
        found = compare_models([str(terse_model_dir), f"{server.url}#m"], str(rows_file), max_new_tokens=4)
    assert found.models[1].name == "m" and found.models[1].answers[4].text == ""
    assert any(note.startswith("m: 1 of 6 questions was not answered") for note in found.notes)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def test_an_endpoint_is_told_of_tools_and_its_calls_count():
    call = {"id": "a1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    asked = [{"role": "user", "content": "What is 1 + 2?"}]
    turns = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    later = [*turns, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"}]
    said_ = {"name": "add", "arguments": '{"b": 2, "a": 1}'}
    contents = [None, "I add.", "3"]

    def reply(body, number):
        content = contents[number]
        message = {"role": "assistant", "content": content}
        if content != "3":
            message["tool_calls"] = [{"id": "x", "type": "function", "function": said_}] * (2 if number else 1)
        return 200, {"choices": [{"message": message, "finish_reason": "tool_calls"}]}

    with chat_server(reply) as server:
        endpoint = Endpoint(server.url, "m", concurrency=1, cache=False)
        seen = [[*asked], [*asked, {"role": "user", "content": "again"}], later[:-1]]
        questions = [Question("", "", ["3"], "row", messages, TOOLS) for messages in seen]
        model = EndpointModel(endpoint)
        options = {"max_new_tokens": 9, "batch_size": 1, "progress": None}
        texts = [a.text for a in model.answer(questions, decoding=Decoding(), **options)]
        assert texts[0] == '{"name": "add", "arguments": {"b": 2, "a": 1}}' and texts[2] == "3"
        assert tool_calls(texts[0]) == [("add", '{"a": 1, "b": 2}')] and len(tool_calls(texts[1])) == 2
        assert texts[1].startswith("I add.\n<tool_call>") and not model.notes
        assert [body["tools"] for body in server.bodies] == [TOOLS] * 3
        assert server.bodies[2]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1, "b": 2}'
        # Of who offers no tools none is told, and what calls one all the same has no text.
        contents[:] = ["I add."] * 8
        (plain,) = model.answer([Question("", "", ["3"], "row", asked)], decoding=Decoding(), **options)
        assert plain.text == "I add." and "tools" not in server.bodies[-1]


def test_an_endpoint_is_told_how_to_decode(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    with chat_server(lambda body, number: (200, f"{body['temperature']}")) as server:
        model = EndpointModel(Endpoint(server.url, "m"))
        options = {"max_new_tokens": 9, "batch_size": 1, "progress": None}
        question = [Question("", "", ["3"], "row", [{"role": "user", "content": "a"}])]
        sampled = Decoding(do_sample=True, temperature=0.5, top_p=0.9, seed=7)
        assert model.answer(question, decoding=sampled, **options)[0].text == "0.5" and model.kept == 0
        assert {k: server.bodies[0][k] for k in ("temperature", "top_p", "seed")} == {
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 7,
        }
        assert model.answer(question, decoding=sampled, **options)[0].text == "0.5" and model.kept == 1
        assert model.answer(question, decoding=Decoding(), **options)[0].text == "0.0"
        assert "top_p" not in server.bodies[1] and len(server.bodies) == 2
        for refused in (Decoding(num_beams=2), Decoding(do_sample=True, top_k=5), Decoding(no_repeat_ngram_size=3)):
            with pytest.raises(UserError, match="endpoint has no"):
                model.answer(question, decoding=refused, **options)


def test_a_comparison_goes_on_and_says_how_it_was_made(terse_model_dir, other_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    models, options = [f"a={terse_model_dir}", f"b={other_dir}"], {"max_new_tokens": 6}
    sampled = Decoding(do_sample=True, temperature=2.0, seed=1)

    def stop(name, done, total):
        if name == "b":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_models(models, str(rows_file), decoding=sampled, batch_size=2, progress=stop, **options)
    found = compare_models(models, str(rows_file), decoding=sampled, **options)
    assert [m.kept for m in found.models] == [6, 2]
    stored = found.to_json()
    assert stored["models"]["b"]["kept_answers"] == 2
    assert (stored["decoding"]["temperature"], stored["decoding"]["seed"]) == (2.0, 1)
    fresh = compare_models(models, str(rows_file), decoding=sampled, resume=False, **options)
    assert [m.kept for m in fresh.models] == [0, 0]
    assert [m.answers for m in fresh.models] == [m.answers for m in found.models]


def test_the_command_prints_and_writes(terse_model_dir, other_dir, rows_file, tmp_path, monkeypatch, capsys):
    target = tmp_path / "found.json"
    words = ["compare", f"a={terse_model_dir}", f"b={other_dir}", "--data", rows_file, "--max-new-tokens", 4]
    words += ["--num-beams", 2, "--fresh"]
    monkeypatch.setattr(sys, "argv", ["luthier", *map(str, [*words, "-o", target])])
    with pytest.raises(SystemExit) as stop:
        main()
    printed, told = capsys.readouterr()
    assert not stop.value.code, told
    assert "b beside a, 6 rows" in printed and "won/lost" in printed
    stored = json.loads(target.read_text())
    assert set(stored["models"]) == {"a", "b"} and stored["decoding"]["num_beams"] == 2


def test_wrong_names_are_told(terse_model_dir, tiny_encoder_dir, rows_file, tmp_path):
    for models, said_ in (
        ([str(terse_model_dir)], "two models or more"),
        ([str(terse_model_dir), str(terse_model_dir)], "different names"),
        ([str(terse_model_dir), "http://127.0.0.1:9/v1"], "no model of the endpoint"),
        (["http://127.0.0.1:9/v1#a", "http://127.0.0.1:9/v1#b"], "all models are endpoints"),
    ):
        with pytest.raises(UserError, match=said_):
            compare_models(models, str(rows_file), max_new_tokens=4)
    empty = tmp_path / "texts.jsonl"
    empty.write_text('{"text": "nobody asks"}\n')
    with pytest.raises(UserError, match="no row has an answer"):
        compare_models([str(terse_model_dir), f"b={terse_model_dir}"], str(empty))


def test_metrics_of_a_recipe_are_looked_at_before_anything_is_trained(tmp_path, terse_model_dir):
    (tmp_path / "mine.py").write_text("def brief(answer, references):\n    return len(answer) < 40\n")

    def made(metrics, task="causal_lm"):
        content = {"task": task, "model": {"name": str(terse_model_dir)}, "evaluation": {"metrics": metrics}}
        return Recipe.from_dict(content)

    get_task("causal_lm").check(made(["chrf++", f"{tmp_path}/mine.py:brief"]))
    for metrics, message in ((["rouge9"], "no metric 'rouge9'"), ([f"{tmp_path}/mine.py:long"], "no function 'long'")):
        for task in ("causal_lm", "seq_to_seq"):
            with pytest.raises(UserError, match=message) as caught:
                get_task(task).check(made(metrics, task))
            assert caught.value.where == "evaluation.metrics"
    with pytest.raises(UserError, match=r"no use for evaluation\.metrics"):
        get_task("classification").check(made(["bleu"], "classification"))


def test_names():
    assert Named.of("tuned=runs/a/adapter") == Named("tuned", "runs/a/adapter")
    assert Named.of("runs/a/") == Named("a", "runs/a/") and Named.of("smollm2") == Named("smollm2", "smollm2")
    assert Named.of("http://h:1/v1#org/m=2") == Named("org/m=2", "http://h:1/v1#org/m=2")
    assert Named.of("x=http://h:1/v1#m") == Named("x", "http://h:1/v1#m")
