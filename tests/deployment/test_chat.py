"""The terminal chat: it remembers, forgets, streams whole characters, and answers beside the base."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from luthier.cli.serving import _named
from luthier.deployment.chat import _prompt_ids, _stream, chat
from luthier.errors import UserError
from luthier.evaluation.evaluator import FineTuneEvaluator
from luthier.method_options import LoraMethod
from luthier.methods import get_method
from luthier.methods.saved import load_saved, write_record
from luthier.models.loading import load_model, load_tokenizer


def talk(path, *lines, **options):
    """Say the lines, and return the conversation and what was printed."""
    said = iter(lines)

    def answer(prompt: str) -> str:
        console.print(prompt, markup=False)
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    console = Console(file=io.StringIO(), width=100)
    turns = chat(None if path is None else str(path), input_fn=answer, console=console, **options)
    return turns, console.file.getvalue()


def test_it_answers_as_the_evaluator_does(smollm2_dir, base_model, tokenizer):
    question = "What is the capital of France?"
    turns, shown = talk(smollm2_dir, question, max_new_tokens=16)
    expected = FineTuneEvaluator(load_model(smollm2_dir), tokenizer).generate(question, max_new_tokens=16)
    assert [t["role"] for t in turns] == ["user", "assistant"]
    assert turns[1]["content"].strip() == expected.strip() and "Paris" in shown


def test_commands(tiny_model_dir):
    turns, shown = talk(
        tiny_model_dir, "one", "/reset", "", "/dance", "/system Be brief.", "two", "/exit", "never", max_new_tokens=4
    )
    assert [t["content"] for t in turns if t["role"] == "user"] == ["two"]
    for wanted in ("forgotten", "unknown command /dance", "system message set"):
        assert wanted in shown


def test_the_oldest_turns_go_when_the_context_is_full(tiny_model_dir):
    tokenizer, model = load_tokenizer(tiny_model_dir), load_model(tiny_model_dir)
    model.config.max_position_embeddings = 120
    turns = [
        {"role": role, "content": f"{role} {i} " + "word " * 10} for i in range(8) for role in ("user", "assistant")
    ]
    turns.append({"role": "user", "content": "last"})
    console = Console(file=io.StringIO())
    ids = _prompt_ids(tokenizer, model, turns, "Be brief.", 20, console)
    text = tokenizer.decode(ids)
    assert len(ids) + 20 <= 120 and "Be brief." in text and "last" in text and "user 0" not in text
    assert turns[0]["role"] == "user" and "no longer fit" in console.file.getvalue()


def test_comparing_needs_a_known_base(tiny_model_dir):
    with pytest.raises(UserError, match="tuned from"):
        talk(tiny_model_dir, "hello", compare=True)


def test_an_interrupted_answer_keeps_what_was_said(tiny_model_dir):
    tokenizer, model = load_tokenizer(tiny_model_dir), load_model(tiny_model_dir)
    model.generation_config.eos_token_id = None

    class Impatient(Console):
        pieces = 0

        def print(self, *objects, **options):
            super().print(*objects, **options)
            self.pieces += 1
            if self.pieces == 3:
                raise KeyboardInterrupt

    console = Impatient(file=io.StringIO())
    ids = tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).input_ids
    said = _stream(model, tokenizer, ids, 400, 0.0, console)
    assert said and "(stopped)" in console.file.getvalue()


@pytest.fixture(scope="module")
def two(terse_model_dir, tmp_path_factory):
    """Two adapters of one base that answer differently, the second with a template of its own."""
    made = {}
    for number, name in enumerate(("orders", "polite")):
        folder = tmp_path_factory.mktemp(name)
        tokenizer, model = load_tokenizer(terse_model_dir), load_model(terse_model_dir)
        torch.manual_seed(number)
        model = get_method("lora").wrap(model, LoraMethod(lora_dropout=0.0), [])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
        if name == "polite":
            tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
        get_method("lora").save(model, folder)
        tokenizer.save_pretrained(folder)
        write_record(folder, model, str(terse_model_dir))
        made[name] = str(folder)
    return made


def test_adapters_are_switched_in_one_conversation(two, terse_model_dir):
    lines = (
        "one",
        "/adapter polite",
        "two",
        "/base",
        "three",
        "/adapter",
        "/adapter nobody",
        "/adapter orders",
        "four",
    )
    turns, shown = talk(None, *lines, adapters=two, max_new_tokens=6)
    assert [t["content"] for t in turns if t["role"] == "user"] == ["one", "two", "three", "four"]
    answers = [t["content"] for t in turns if t["role"] == "assistant"]
    # Each answer is that of the one who was on, to the whole conversation before, read by its own template.
    for number, who in enumerate((two["orders"], two["polite"], None, two["orders"])):
        before = turns[: 2 * number + 1]
        tokenizer = load_tokenizer(who or two["polite"])
        model = load_saved(who).model if who else load_model(terse_model_dir)
        ids = _prompt_ids(tokenizer, model, before, None, 6, Console(file=io.StringIO()))
        assert answers[number] == _stream(model, tokenizer, ids, 6, 0.0, Console(file=io.StringIO())), number
    for wanted in (
        "you (orders)>",
        "you (polite)>",
        "you (base)>",
        "polite> ",
        "* base\n",
        "there is no adapter 'nobody'",
    ):
        assert wanted in shown, wanted


def test_comparing_asks_the_base_before_the_adapter_that_is_on(two, terse_model_dir):
    turns, shown = talk(None, "/adapter polite", "one", "/base", "two", adapters=two, compare=True, max_new_tokens=6)
    assert shown.count("base> ") == 2 and shown.count("polite> ") == 1
    tokenizer = load_tokenizer(two["polite"])
    ids = _prompt_ids(tokenizer, load_model(terse_model_dir), turns[:1], None, 6, Console(file=io.StringIO()))
    said = _stream(load_model(terse_model_dir), tokenizer, ids, 6, 0.0, Console(file=io.StringIO()))
    assert shown.index(f"base> {said}") < shown.index("polite> ")


def test_one_adapter_has_its_base_at_hand(two, terse_model_dir):
    turns, shown = talk(two["orders"], "/base", "one", "/adapter", "/adapter polite", max_new_tokens=6)
    assert "the base answers" in shown and "no adapters were named" in shown and "no adapters to switch" in shown
    tokenizer, model = load_tokenizer(two["orders"]), load_model(terse_model_dir)
    ids = _prompt_ids(tokenizer, model, turns[:1], None, 6, Console(file=io.StringIO()))
    assert turns[1]["content"] == _stream(model, tokenizer, ids, 6, 0.0, Console(file=io.StringIO()))
    _, shown = talk(terse_model_dir, "/base", max_new_tokens=6)
    assert "only adapters have their base" in shown


def test_a_model_or_adapters_are_named(two, terse_model_dir):
    for path, adapters in ((None, None), (terse_model_dir, two)):
        with pytest.raises(UserError, match="name a model, or adapters"):
            talk(path, adapters=adapters)
    with pytest.raises(UserError, match="holds no adapter"):
        talk(None, adapters={"x": str(terse_model_dir)})
    for wrong in (["orders"], ["=x"], ["a=x", "a=y"]):
        with pytest.raises(UserError, match=r"no NAME=FOLDER|two adapters"):
            _named(wrong)
