"""Perplexity against a plain float64 loop over full logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.data.encode import EncodedExample
from luthier.errors import UserError
from luthier.evaluation.perplexity import (
    calculate_perplexity,
    likelihoods_of_examples,
    perplexity_of_examples,
)

TEXT = "The luthier takes the spruce, listens to it, and shaves a little more from the back of the belly. " * 3


def _nll(model, ids: list[int]) -> torch.Tensor:
    """``[n - 1] float64``: of each token but the first, from full logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return -logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def test_a_text_that_fits(base_model, tokenizer):
    ids = tokenizer(TEXT).input_ids
    expected = math.exp(float(_nll(base_model, ids).mean()))
    assert calculate_perplexity(base_model, tokenizer, TEXT) == pytest.approx(expected, rel=1e-4)
    assert base_model.config._attn_implementation == "sdpa"


@pytest.fixture(scope="module")
def small_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.mark.parametrize(("max_length", "stride"), [(16, None), (16, 15), (13, 5), (2, 1)])
def test_a_longer_text_is_read_through_a_window_and_every_token_counts_once(small_model, tokenizer, max_length, stride):
    ids = tokenizer(TEXT).input_ids[:34]
    text = tokenizer.decode(ids)
    assert tokenizer(text).input_ids == ids
    total, predicted = 0.0, 1
    for begin in range(0, len(ids), stride or max_length // 2):
        end = min(begin + max_length, len(ids))
        total += float(_nll(small_model, ids[begin:end])[predicted - begin - 1 :].sum())
        predicted = end
        if end == len(ids):
            break
    expected = math.exp(total / (len(ids) - 1))
    ours = calculate_perplexity(small_model, tokenizer, text, max_length=max_length, stride=stride)
    assert ours == pytest.approx(expected, rel=1e-4)


def test_answers_alone_count_weighted_by_token(base_model, tokenizer):
    examples, total, tokens = [], 0.0, 0
    for text, kept in (("One two three four five six", [3, 4]), (TEXT, list(range(20, 60))), ("Say no", [1])):
        ids = tokenizer(text).input_ids
        trained = np.zeros(len(ids), dtype=bool)
        trained[kept] = True
        examples.append(EncodedExample(np.array(ids, dtype=np.int32), trained, None, 0))
        total += float(_nll(base_model, ids)[torch.tensor(kept) - 1].sum())
        tokens += len(kept)
    examples.append(EncodedExample(np.array([1, 2], dtype=np.int32), np.zeros(2, dtype=bool), None, 0))
    ours = perplexity_of_examples(base_model, examples)
    assert ours.tokens == tokens == 43
    assert ours.nll_per_token == pytest.approx(total / tokens, rel=1e-4)
    assert ours.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    with pytest.raises(UserError, match="no example has a token to predict"):
        perplexity_of_examples(base_model, examples[-1:])


def test_likelihoods_of_answers_on_one_context(small_model, tokenizer):
    """Packed and behind shared beginnings, as each row alone; rows keep their order."""
    context = tokenizer(TEXT).input_ids
    with torch.no_grad():
        likeliest = int(small_model(torch.tensor([context])).logits[0, -1].argmax())
    answers = [[likeliest], *(tokenizer(text).input_ids for text in (" a b c", " x", " never"))]
    rows = [context + answer for answer in answers] + [tokenizer("short").input_ids * 2 + answers[1]]
    lengths = [len(answer) for answer in answers] + [len(answers[1])]
    examples = [
        EncodedExample(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= len(ids) - n, None, 0)
        for ids, n in zip(rows, lengths, strict=True)
    ]
    heard: list[tuple[int, int]] = []
    found = likelihoods_of_examples(small_model, examples, progress=lambda *n: heard.append(n))
    expected = [-float(_nll(small_model, ids)[-n:].sum()) for ids, n in zip(rows, lengths, strict=True)]
    assert found[:, 0] == pytest.approx(expected, rel=1e-4)
    assert found[:, 1].tolist() == [1, 0, 0, 0, 0]
    assert heard[-1] == (5, 5)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "empty"),
        ("a", {}, "single token"),
        (None, {}, "must be a string"),
        (TEXT, {"max_length": 8, "stride": 8}, "stride=8"),
        (TEXT, {"max_length": 10**6}, "context of 2048"),
    ],
)
def test_what_has_no_perplexity(tiny_model_dir, tokenizer, text, options, message):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(UserError, match=message):
        calculate_perplexity(model, tokenizer, text, **options)
