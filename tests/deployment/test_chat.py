"""The terminal chat: it remembers, forgets, streams whole characters, and answers beside the base."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from luthier.deployment.chat import _prompt_ids, _stream, chat
from luthier.errors import UserError
from luthier.evaluation.evaluator import FineTuneEvaluator
from luthier.models.loading import load_model, load_tokenizer


def talk(path, *lines, **options):
    """Say the lines, and return the conversation and what was printed."""
    said = iter(lines)

    def answer(prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    console = Console(file=io.StringIO(), width=100)
    turns = chat(str(path), input_fn=answer, console=console, **options)
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
