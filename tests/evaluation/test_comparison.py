"""The evaluator, and base against tuned, end to end on the real small model."""

from __future__ import annotations

import copy
import gc
import io
import json
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from rich.console import Console

from luthier.data.chats import ChatEncoder
from luthier.data.examples import Source, TrainingExample
from luthier.data.render import Renderer, prompt_text
from luthier.errors import UserError
from luthier.evaluation.comparison import compare
from luthier.evaluation.comparison_view import render_comparison
from luthier.evaluation.evaluator import FineTuneEvaluator
from luthier.evaluation.generation import generate_answers
from luthier.evaluation.perplexity import perplexity_of_examples
from luthier.evaluation.question import ask
from luthier.models.loading import load_model

QUESTIONS = ["What is 2 + 2? Answer with one number.", "Say hello.", "Is the sky blue? Answer yes or no."]


@pytest.fixture(scope="module")
def said(base_model, tokenizer) -> list[str]:
    """What the real model says to QUESTIONS, computed by the plain way."""
    prompts = [prompt_text(tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]
    return [a.text for a in generate_answers(base_model, tokenizer, prompts, max_new_tokens=16)]


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def _printed(renderable) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(renderable)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    return "\n".join(lines)


def test_the_evaluator_asks_as_training_did_and_scores(base_model, tokenizer, said):
    evaluator = FineTuneEvaluator(base_model, tokenizer)
    examples = [TrainingExample(q, output=a) for q, a in zip(QUESTIONS, said, strict=True)]
    assert evaluator.generate(QUESTIONS[0], 16) == said[0]
    assert evaluator.generate([{"role": "user", "content": QUESTIONS[0]}], 16) == said[0]
    assert evaluator.generate(examples[0], 16) == said[0]
    assert FineTuneEvaluator(base_model, tokenizer, system="Answer in French.").generate(QUESTIONS[1], 16) != said[1]
    result = evaluator.evaluate_generation([*examples[:2], {"input": QUESTIONS[2], "output": "never"}], max_length=16)
    assert result["exact_match"] == pytest.approx(2 / 3)
    assert 0 < result["bleu"] < 1 and all(2 / 3 <= result[k] < 1 for k in ("rouge1", "rougeL"))


def test_the_evaluator_names_what_is_wrong(base_model, tokenizer):
    evaluator = FineTuneEvaluator(base_model, tokenizer)
    rows = [TrainingExample("a", output="b"), TrainingExample("c", source=Source("test.jsonl", 7))]
    with pytest.raises(UserError, match=r"(?s)no answer.*test\.jsonl:7"):
        evaluator.evaluate_generation(rows)
    with pytest.raises(UserError, match=r"(?s)no answer.*row 1"):
        evaluator.evaluate_generation([{"input": "a", "output": " "}])
    with pytest.raises(UserError, match="no test examples"):
        evaluator.evaluate_generation([])
    with pytest.raises(UserError, match="prompt is empty"):
        evaluator.generate(" ")
    with pytest.raises(UserError, match="prompt must be"):
        evaluator.generate(3)
    with pytest.raises(UserError, match="must be a loaded language model, not 'smollm2'"):
        FineTuneEvaluator("smollm2", tokenizer)
    with pytest.raises(UserError, match="must be a loaded tokenizer"):
        FineTuneEvaluator(base_model, None)


def test_compare_shows_where_the_tuned_model_is_right_and_where_it_is_wrong(base_model, tokenizer, tiny_model, said):
    """A model of random weights stands for the base, the real one for the tuned; it is wrong in the second row."""
    right = [said[0], "something else", said[2]]
    examples = [
        TrainingExample(q, output=a, source=Source("t.jsonl", i))
        for i, (q, a) in enumerate(zip(QUESTIONS, right, strict=True), 1)
    ]
    lone = TrainingExample(messages=[{"role": "assistant", "content": "nobody asked"}], source=Source("t.jsonl", 9))
    encoded = ChatEncoder(Renderer(tokenizer)).encode(examples).examples
    heard: list[tuple[str, int, int]] = []
    comparison = compare(
        [("base", lambda: nullcontext(tiny_model)), ("tuned", lambda: nullcontext(base_model))],
        tokenizer,
        [*examples, lone],
        max_new_tokens=16,
        samples=2,
        encoded=encoded,
        progress=lambda *n: heard.append(n),
    )
    base, tuned = comparison.models
    assert [a.text for a in tuned.answers] == said
    assert base.metrics["exact_match"] == 0 and tuned.metrics["exact_match"] == pytest.approx(2 / 3)
    assert tuned.metrics["perplexity"] == perplexity_of_examples(base_model, encoded).perplexity
    assert tuned.metrics["perplexity"] < base.metrics["perplexity"]
    assert comparison.samples[0] in (0, 2) and comparison.samples[1] == 1
    assert heard == [("base", 3, 3), ("tuned", 3, 3)]
    # Random weights never stop, and the lone row has nothing to ask.
    assert any(n.startswith("base: 3 of 3 answers were cut at 16 tokens") for n in comparison.notes)
    assert any("t.jsonl:9 was left out" in n for n in comparison.notes)
    stored = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert stored["models"]["tuned"]["metrics"]["exact_match"] == pytest.approx(2 / 3)
    assert [r["answers"]["tuned"]["text"] for r in stored["rows"]] == said
    assert [r["references"] for r in stored["rows"]] == [[r] for r in right]
    page = _printed(render_comparison(comparison))
    for text in ("exact match", "+0.667", "t.jsonl:2", "something else", "cut at the limit", "was left out"):
        assert text in page


def test_a_model_is_gone_before_the_next_one_is_loaded(tokenizer, tiny_model_dir):
    loaded = []

    @contextmanager
    def opened():
        gc.collect()
        assert not any(model() for model in loaded)
        model = load_model(tiny_model_dir)
        loaded.append(weakref.ref(model))
        yield model

    compare([("base", opened), ("tuned", opened)], tokenizer, [TrainingExample("hi", output="hello")], max_new_tokens=1)
    assert len(loaded) == 2


def test_a_peft_model_that_changes_nothing_is_noted(tokenizer, tiny_model_dir):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))  # B is zero: the adapter does nothing

    @contextmanager
    def as_base():
        with model.disable_adapter():
            yield model

    opened = [("base", as_base), ("tuned", lambda: nullcontext(model))]
    rows = [TrainingExample("颜色[bold]是什么？", output="红色")]
    comparison = compare(opened, tokenizer, rows, max_new_tokens=4)
    assert any("exactly as base" in n for n in comparison.notes)
    assert any("1 of 1 answer was cut" in n for n in comparison.notes)
    assert "tuned beside base, 1 row " in _printed(render_comparison(comparison))
    assert any("every score is zero" in n for n in comparison.notes)
    assert "tok:zh" in comparison.signatures["bleu"]
    assert "颜色[bold]是什么？" in _printed(render_comparison(comparison))  # not read as rich's markup


def test_empty_answers_and_a_broken_request_are_noted(tokenizer, tiny_model):
    quiet = copy.deepcopy(tiny_model)
    prompt = prompt_text(tokenizer, [{"role": "user", "content": "hi"}])
    first = generate_answers(tiny_model, tokenizer, [prompt], max_new_tokens=1)[0].token_ids[0]
    # In a head of its own, the rows of the first choice and of the end-of-turn change places: it ends at once.
    weight, end = tiny_model.get_output_embeddings().weight.detach().clone(), tokenizer.eos_token_id
    weight[[first, end]] = weight[[end, first]]
    quiet.lm_head.weight = torch.nn.Parameter(weight)
    models = [("base", lambda: nullcontext(tiny_model)), ("tuned", lambda: nullcontext(quiet))]
    rows = [TrainingExample("hi", output="hello")]
    comparison = compare(models, tokenizer, rows, max_new_tokens=4)
    assert any(n.startswith("tuned: every answer is empty") for n in comparison.notes)
    assert "(empty)" in _printed(render_comparison(comparison))
    with pytest.raises(UserError, match="two models or more"):
        compare(models[:1], tokenizer, rows)
    with pytest.raises(UserError, match="no rows"):
        compare(models, tokenizer, [])
    with pytest.raises(UserError, match="no answer"):
        compare(models, tokenizer, [TrainingExample("hi")])


def test_a_broken_model_is_noted_and_still_makes_valid_json(tokenizer, tiny_model):
    broken = copy.deepcopy(tiny_model)
    broken.model.norm.weight.data.fill_(float("nan"))
    rows = [TrainingExample("hi", output="hello")]
    comparison = compare(
        [("base", lambda: nullcontext(tiny_model)), ("tuned", lambda: nullcontext(broken))],
        tokenizer,
        rows,
        max_new_tokens=4,
        encoded=ChatEncoder(Renderer(tokenizer)).encode(rows).examples,
    )
    assert any("tuned: its perplexity is not a finite number" in n for n in comparison.notes)
    assert json.loads(json.dumps(comparison.to_json(), allow_nan=False))["models"]["tuned"]["metrics"]["bleu"] == 0
    assert "nan" in _printed(render_comparison(comparison))


def test_a_tool_call_is_compared_as_the_template_writes_it(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"function": {"name": "weather", "arguments": {"city": "Lyon"}}}
    messages = [
        {"role": "user", "content": "How is the weather in Lyon?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    question = ask(tokenizer, TrainingExample(messages=messages, references=["sunny"]), 1, "Be brief.")
    written = '<call>{"name": "weather", "arguments": {"city": "Lyon"}}</call>'
    assert question.references == [written, "sunny"]
    assert question.prompt.startswith("<|im_start|>system\nBe brief.") and question.prompt.endswith("assistant\n")
    assert question.asked == "How is the weather in Lyon?"
