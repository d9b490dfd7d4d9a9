"""Beams and chance: the same whatever the batch, and what transformers makes of the same settings."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, MambaConfig, MambaForCausalLM

from luthier.decoding import Decoding
from luthier.errors import UserError
from luthier.evaluation import growing
from luthier.evaluation.choice import Choice
from luthier.evaluation.generation import generate_answers
from luthier.models.loading import load_tokenizer

TEXTS = [
    "hello",
    "what is the capital of France",
    "a b c d",
    "what is the capital of Spain",
    "one two three",
    "x y z w",
]
SAMPLED = Decoding(do_sample=True, temperature=1.5, top_k=50, top_p=0.95, seed=3)
BEAMS = Decoding(num_beams=3, length_penalty=0.3, no_repeat_ngram_size=2)


@pytest.fixture
def tiny(terse_model_dir):
    return AutoModelForCausalLM.from_pretrained(terse_model_dir).eval(), load_tokenizer(terse_model_dir)


def ids_of(model, tokenizer, texts, decoding, **more):
    options = {"max_new_tokens": 12} | more
    return [a.token_ids for a in generate_answers(model, tokenizer, texts, decoding=decoding, **options)]


def test_a_sampled_answer_depends_on_seed_and_prompt_alone(tiny):
    model, tokenizer = tiny
    alone = ids_of(model, tokenizer, TEXTS, SAMPLED, batch_size=1)
    assert ids_of(model, tokenizer, TEXTS, SAMPLED, batch_size=6) == alone
    assert ids_of(model, tokenizer, TEXTS[::-1], SAMPLED, batch_size=4)[::-1] == alone
    assert ids_of(model, tokenizer, TEXTS[2:3], SAMPLED) == alone[2:3]
    # A row that leaves early takes no one's chance away.
    stop = alone[0][2]
    short = ids_of(model, tokenizer, TEXTS, SAMPLED, batch_size=6, stop_token_ids=[stop])
    assert len(short[0]) <= 3 and max(map(len, short)) == 12
    assert all(row == whole[: len(row)] for row, whole in zip(short, alone, strict=True))
    other = Decoding(do_sample=True, temperature=1.5, top_k=50, top_p=0.95, seed=4)
    assert all(a != b for a, b in zip(ids_of(model, tokenizer, TEXTS, other), alone, strict=True))


def test_the_real_model_samples_alike_in_any_batch(base_model, tokenizer):
    prompts = ["The capital of France is", "Once upon a", "Two and two"]
    decoding = Decoding(do_sample=True, seed=1)
    alone = ids_of(base_model, tokenizer, prompts, decoding, max_new_tokens=6, batch_size=1)
    assert ids_of(base_model, tokenizer, prompts, decoding, max_new_tokens=6, batch_size=3) == alone
    assert alone != ids_of(base_model, tokenizer, prompts, Decoding(), max_new_tokens=6)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0, 2.5]])
    prompts = [[n] for n in range(4000)]
    for decoding, kept in (
        (Decoding(do_sample=True), [0, 1, 2, 3, 4]),
        (Decoding(do_sample=True, temperature=2.0, top_k=3), [0, 2, 4]),
        (Decoding(do_sample=True, top_p=0.7), [0, 4]),
    ):
        drawn = Choice(decoding, prompts)(logits.expand(4000, -1), range(4000), [[] for _ in prompts])
        wanted = torch.full((5,), float("-inf"))
        wanted[kept] = logits[0, kept] / decoding.temperature
        counts = Counter(drawn.tolist())
        assert set(counts) <= set(kept)
        for token, share in enumerate(wanted.softmax(0).tolist()):
            assert abs(counts[token] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5 + 1e-9


@pytest.mark.parametrize("decoding", [Decoding(num_beams=2), BEAMS, Decoding(num_beams=4, length_penalty=-1.0)])
def test_beams_are_those_of_transformers_one_row_at_a_time(tiny, decoding):
    model, tokenizer = tiny
    texts = TEXTS + TEXTS[:1]
    never = ids_of(model, tokenizer, texts, decoding, stop_token_ids=[])
    stops = [token for token, _ in Counter(token for row in never for token in row).most_common(20)]
    ours = ids_of(model, tokenizer, texts, decoding, stop_token_ids=stops, batch_size=12)
    assert ours == ids_of(model, tokenizer, texts, decoding, stop_token_ids=stops, batch_size=1)
    assert {row[-1] in stops for row in ours} == {True, False} or len({len(row) for row in ours}) > 1
    assert ours == [theirs(model, tokenizer(text)["input_ids"], decoding, stops) for text in texts]
    # What the model's own config says is not asked.
    model.generation_config.repetition_penalty = 9.0
    assert ids_of(model, tokenizer, texts, decoding, stop_token_ids=stops) == ours
    assert model.generation_config.repetition_penalty == 9.0


def theirs(model, prompt, decoding, stops, limit=12):
    """New tokens of one prompt by transformers, all that follows the first stop token left out."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=limit,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        no_repeat_ngram_size=decoding.no_repeat_ngram_size,
        eos_token_id=stops or None,
        pad_token_id=0,
    )
    found = model.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :].tolist()
    return found[: next((at for at, token in enumerate(found) if token in stops), limit) + 1]


def test_the_real_models_beams(base_model, tokenizer):
    prompts = ["The capital of France is", "The colour of grass is"]
    decoding, encoded = Decoding(num_beams=2, no_repeat_ngram_size=3), tokenizer(prompts)["input_ids"]
    assert len(encoded[0]) == len(encoded[1])
    ours = ids_of(base_model, tokenizer, prompts, decoding, max_new_tokens=5, batch_size=4)
    assert ours == [theirs(base_model, ids, decoding, [tokenizer.eos_token_id], 5) for ids in encoded]


def test_no_ngram_comes_twice(tiny):
    model, tokenizer = tiny
    decoding = Decoding(no_repeat_ngram_size=1)
    ours = ids_of(model, tokenizer, TEXTS, decoding, stop_token_ids=[])
    assert ours == [theirs(model, tokenizer(t)["input_ids"], decoding, []) for t in TEXTS]
    assert ours != ids_of(model, tokenizer, TEXTS, Decoding(), stop_token_ids=[])


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, LoraConfig])
def test_adapters_answer_by_chance_and_by_beams(tiny, config):
    model, tokenizer = tiny
    plain = ids_of(model, tokenizer, TEXTS, SAMPLED)
    lora = config is LoraConfig
    options = {"init_lora_weights": False} if lora else {"num_virtual_tokens": 3}
    tuned = get_peft_model(model, config(task_type="CAUSAL_LM", **options)).eval()
    for decoding in (SAMPLED, Decoding(num_beams=2)):
        alone = ids_of(tuned, tokenizer, TEXTS, decoding, batch_size=1)
        assert ids_of(tuned, tokenizer, TEXTS, decoding, batch_size=6) == alone != plain
    if not lora:
        with pytest.raises(UserError, match="virtual tokens"):
            ids_of(tuned, tokenizer, TEXTS, BEAMS)
    with tuned.disable_adapter():
        assert ids_of(tuned, tokenizer, TEXTS, SAMPLED) == plain


def test_a_model_of_states_answers_by_chance_and_by_beams(tiny):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=600, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.5)
    model = MambaForCausalLM(config).eval()
    for decoding in (SAMPLED, Decoding(num_beams=2)):
        alone = ids_of(model, tiny[1], TEXTS, decoding, batch_size=1)
        assert ids_of(model, tiny[1], TEXTS, decoding, batch_size=6) == alone
        assert len(set(map(tuple, alone))) == len(TEXTS)


def test_what_cannot_be_is_told():
    for options, said in (
        ({"num_beams": 0}, "num_beams=0"),
        ({"do_sample": True, "temperature": 0}, "do_sample=False"),
        ({"do_sample": True, "top_p": 1.5}, "top_p=1.5"),
        ({"do_sample": True, "num_beams": 2}, "exclude each other"),
        ({"temperature": 0.7}, "changes nothing"),
        ({"length_penalty": 2.0}, "num_beams=2 or more"),
        ({"seed": -1}, "seed=-1"),
        ({"do_sample": 1}, "neither True nor False"),
        ({"top_p": float("nan"), "do_sample": True}, "not a number"),
    ):
        with pytest.raises(UserError, match=said):
            Decoding(**options)


@pytest.mark.parametrize("room", [1, 3, 64])
def test_a_cache_with_room_holds_what_transformers_cache_holds(tiny, monkeypatch, room):
    model, tokenizer = tiny
    # A long prompt, among the first rows of the batch: those behind it move up.
    stop = generate_answers(model, tokenizer, TEXTS[1:2], max_new_tokens=5)[0].token_ids[-1]
    caches: list[list[torch.Tensor]] = []

    def keys():
        caches.append([])
        handle = model.register_forward_hook(
            lambda module, args, out: caches[-1].extend(
                [*(x.clone() for x in (out.past_key_values.layers[1].keys, out.logits))]
            )
        )
        ours = ids_of(model, tokenizer, TEXTS, Decoding(), max_new_tokens=10, stop_token_ids=[stop], batch_size=6)
        handle.remove()
        return ours

    monkeypatch.setattr(growing, "_ROOM", room)
    ours = keys()
    assert len({len(row) for row in ours}) > 1
    monkeypatch.setattr(growing, "grow", lambda cache: None)
    assert keys() == ours
    assert len(caches[0]) == len(caches[1]) == 20
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
