"""Greedy answers on the real small model."""

from __future__ import annotations

import json

import pytest
import torch

from luthier.data.render import prompt_text
from luthier.decoding import Decoding
from luthier.errors import UserError
from luthier.evaluation.generation import generate_answers, stop_tokens
from luthier.evaluation.room import rows_that_fit
from luthier.evaluation.until import Until
from luthier.models.loading import load_model
from luthier.models.memory import free_memory

QUESTIONS = [
    "What is 2 + 2? Answer with one number.",
    "Say hello.",
    "Name three colours, with commas between them, and nothing else at all, please, not a word more than that.",
    "Is the sky blue? Answer yes or no.",
]


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[str]:
    return [prompt_text(tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]


def test_batch_of_one_and_of_eight_give_the_same_answers(base_model, tokenizer, prompts, shared_data):
    rows = (shared_data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:5]
    real = [prompt_text(tokenizer, [{"role": "user", "content": json.loads(r)["question"]}]) for r in rows]
    mixed = [p for pair in zip(real, [*prompts, prompts[0]], strict=True) for p in pair][:8]
    alone = generate_answers(base_model, tokenizer, mixed, max_new_tokens=12, batch_size=1)
    together = generate_answers(base_model, tokenizer, mixed, max_new_tokens=12, batch_size=8)
    assert together == alone
    # Rows must have retired at different times for this to say anything.
    assert len({len(a.token_ids) for a in together}) > 2
    assert {a.stopped for a in together} == {True, False}


def test_answers_are_those_of_transformers_generate(base_model, tokenizer, prompts):
    ours = generate_answers(base_model, tokenizer, prompts[:3], max_new_tokens=12)
    batch = tokenizer(prompts[:3], return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    theirs = base_model.generate(**batch, do_sample=False, max_new_tokens=12)[:, batch.input_ids.shape[1] :]
    for answer, ids in zip(ours, theirs.tolist(), strict=True):
        assert ids[: len(answer.token_ids)] == answer.token_ids
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_an_answer_stops_at_the_end_of_turn_and_holds_nothing_of_the_prompt(base_model, tokenizer, prompts):
    heard: list[tuple[int, int]] = []
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers = generate_answers(
        base_model, tokenizer, prompts, max_new_tokens=20, batch_size=3, progress=lambda *n: heard.append(n)
    )
    assert heard == [(3, 4), (4, 4)]
    for answer, prompt, question in zip(answers, prompts, QUESTIONS, strict=True):
        assert answer.stopped == (answer.token_ids[-1] == end)
        assert end not in answer.token_ids[:-1]
        assert "<|im" not in answer.text and question not in answer.text
        assert answer.prompt_tokens == len(tokenizer(prompt, add_special_tokens=False).input_ids)
    assert answers[0].stopped and "4" in answers[0].text
    never = generate_answers(base_model, tokenizer, prompts[:1], max_new_tokens=20, stop_token_ids=[])[0]
    assert not never.stopped and len(never.token_ids) == 20
    assert never.token_ids[: len(answers[0].token_ids)] == answers[0].token_ids


def test_a_peft_model_answers_as_itself_and_comes_back_as_it_was(tiny_model_dir, tokenizer, prompts):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from luthier.training import attention

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5))
    tuned.train()
    tuned.base_model.model.model.layers[0].eval()  # a frozen part, say
    before = [m.training for m in tuned.modules()]
    tuned.set_attn_implementation(attention.register())
    changed = generate_answers(tuned, tokenizer, prompts, max_new_tokens=8)
    assert changed == generate_answers(tuned, tokenizer, prompts, max_new_tokens=8, batch_size=1)  # no dropout
    assert changed != plain
    assert [m.training for m in tuned.modules()] == before
    assert tuned.config._attn_implementation == attention.NAME
    assert torch.is_grad_enabled()
    with tuned.disable_adapter():
        assert generate_answers(tuned, tokenizer, prompts, max_new_tokens=8) == plain


def test_the_models_own_sampling_and_stop_tokens(tiny_model_dir, tokenizer, prompts):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    plain = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.eos_token_id = [plain[0].token_ids[3]]
    again = generate_answers(model, tokenizer, prompts, max_new_tokens=8)
    assert stop_tokens(model, tokenizer) == [plain[0].token_ids[3], tokenizer.eos_token_id]
    assert again[0].stopped
    for before, after in zip(plain, again, strict=True):
        assert before.token_ids[: len(after.token_ids)] == after.token_ids


def test_an_answer_ends_with_the_models_context(tiny_model_dir, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.config.max_position_embeddings = 20
    short, long = "hello", "hello" + " hello" * 15
    answers = generate_answers(model, tokenizer, [short, long], max_new_tokens=8, stop_token_ids=[])
    assert [a.prompt_tokens + len(a.token_ids) for a in answers] == [9, 20]
    with pytest.raises(UserError, match=r"(?s)the prompt has 22 tokens.*context 20.*prompt 2"):
        generate_answers(model, tokenizer, [short, "hello" + " hello" * 21])


def test_what_cannot_be_asked_is_named(base_model, tokenizer):
    assert generate_answers(base_model, tokenizer, []) == []
    with pytest.raises(UserError, match=r"(?s)prompt is empty.*prompt 2"):
        generate_answers(base_model, tokenizer, ["a", ""])
    with pytest.raises(UserError, match="batch_size=0"):
        generate_answers(base_model, tokenizer, ["a"], batch_size=0)
    with pytest.raises(UserError, match="one text"):
        generate_answers(base_model, tokenizer, "a")


def test_a_model_of_states_answers_as_without_a_cache(tokenizer):
    """A recurrent state takes up padding and drops no rows: each prompt is answered alone."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.5
    )
    model = MambaForCausalLM(config).eval()
    model.generation_config.repetition_penalty = 9.0
    prompts = ["hello", "what is the capital of France", "a b c d"]
    expected = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        begin = len(ids)
        with torch.no_grad():
            while len(ids) < begin + 8:
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(ids[begin:])
    stop = expected[1][3]
    assert [len(set(e)) > 4 for e in expected] == [True] * 3
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=8, stop_token_ids=[stop])
    for answer, ids in zip(answers, expected, strict=True):
        end = ids.index(stop) + 1 if stop in ids else 8
        assert answer.token_ids == ids[:end]
        assert answer.stopped == (stop in ids)
    assert model.generation_config.repetition_penalty == 9.0


def test_as_many_rows_as_memory_holds_of_their_keys_and_values(base_model):
    with torch.no_grad():
        out = base_model(input_ids=torch.ones(1, 64, dtype=torch.long), use_cache=True, logits_to_keep=1)
    a_token = sum(t.nbytes for layer in out.cache.layers for t in (layer.keys, layer.values)) / 64
    rows, free = rows_that_fit(base_model, 1, 2_000), free_memory(torch.device("cpu"))
    assert rows * 2_000 * a_token == pytest.approx(0.5 * free, rel=0.3)
    assert rows_that_fit(base_model, 8_000, 256) < rows_that_fit(base_model, 800, 256) / 10
    assert rows_that_fit(base_model, 10**7, 256) == 1


def test_an_answer_ends_before_the_first_of_some_texts(tiny_model_dir, tokenizer):
    """Whichever way it is made, and whether prompts are texts or token ids."""
    model = load_model(tiny_model_dir, dtype=torch.float32)
    prompts = ["One two three", "And a longer beginning than that"]
    whole = generate_answers(model, tokenizer, prompts, max_new_tokens=16, stop_token_ids=[])
    until = [answer.text[9:13] for answer in whole]
    assert all(stop and answer.text.find(stop) == 9 for stop, answer in zip(until, whole, strict=True))
    ended = generate_answers(model, tokenizer, prompts, max_new_tokens=16, stop_token_ids=[], until=["", *until])
    assert [a.text for a in ended] == [a.text[:9] for a in whole]
    assert all(a.stopped and len(a.token_ids) < 16 for a in ended)
    ids = tokenizer(prompts, add_special_tokens=False).input_ids
    assert generate_answers(model, tokenizer, ids, max_new_tokens=16, stop_token_ids=[], until=until) == ended
    beams = {"max_new_tokens": 16, "stop_token_ids": [], "decoding": Decoding(num_beams=2)}
    found = generate_answers(model, tokenizer, prompts[:1], **beams)[0].text
    cut = generate_answers(model, tokenizer, prompts[:1], until=[found[5:8]], **beams)[0]
    assert cut.text == found[: found.find(found[5:8])] and cut.stopped


def test_a_control_token_can_be_such_a_text(tokenizer):
    ids = tokenizer("It is four.<|im_end|>", add_special_tokens=False).input_ids
    end = Until(tokenizer, ["", "<|im_end|>"])
    assert end.reached(ids) and not end.reached(ids[:-1])
    assert not Until(tokenizer, [""]).reached(ids)
    assert Until(tokenizer, ["five", "four", "is"]).cut("It is four.") == "It "
