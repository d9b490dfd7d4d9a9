"""Packed = one by one: logits, losses and gradients, against transformers' own attention on each row alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.data.batch import pack, pad
from luthier.data.encode import EncodedExample
from luthier.training import attention
from luthier.training.loss import LossFunction


def rows_of(lengths: list[int], vocabulary: int = 49152, seed: int = 1) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        trained = rng.random(length) < 0.6
        trained[0], trained[-1] = False, True
        rows.append(EncodedExample(rng.integers(0, vocabulary, length).astype(np.int32), trained, None, 0))
    return rows


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_by_one(model, rows) -> torch.Tensor:
    """Summed cross-entropy by the model's own forward on each row alone, shifted by hand."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0].float()
        at = np.flatnonzero(row.trained)
        total = total + torch.nn.functional.cross_entropy(logits[at - 1], ids[0, at], reduction="sum")
    return total


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("lengths", [[7, 3, 19, 2], [1100, 40]], ids=["short", "beyond the plain limit"])
def test_packed_equals_one_by_one(tiny_model_dir, implementation, lengths):
    rows = rows_of(lengths)
    reference = load(tiny_model_dir)
    reference.set_attn_implementation(implementation)
    expected = one_by_one(reference, rows)
    expected.backward()

    model = load(tiny_model_dir)
    loss_function = LossFunction(model)
    assert loss_function.packed, loss_function.reason
    assert loss_function.head
    loss = loss_function(pack(rows))
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = gradients(model), gradients(reference)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=2e-4 * float(gradient.abs().max()), msg=name)


def test_packed_equals_one_by_one_on_the_real_model(smollm2_dir, base_model):
    rows = rows_of([31, 5, 60])
    model = load(smollm2_dir)
    loss_function = LossFunction(model)
    assert loss_function.packed
    with torch.no_grad():
        logits = loss_function.logits(pack(rows))
        alone = []
        for row in rows:
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            alone.append(base_model(input_ids=ids).logits[0][np.flatnonzero(row.trained) - 1])
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-3, atol=2e-3)


def test_padded_gives_the_same_loss_and_gradients(tiny_model_dir):
    rows = rows_of([7, 3, 19, 2])
    packed_model, padded_model = load(tiny_model_dir), load(tiny_model_dir)
    packed, padded = LossFunction(packed_model), LossFunction(padded_model, batching="padded")
    assert packed.packed
    assert not padded.packed
    assert "padded was asked for" in padded.reason
    first, second = packed(pack(rows)), padded(pad(rows, 0))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-4)
    first.backward()
    second.backward()
    theirs = gradients(padded_model)
    for name, gradient in gradients(packed_model).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=2e-4 * float(gradient.abs().max()))


def test_cross_talk_is_noticed(tiny_model_dir, monkeypatch):
    """The probe must refuse an attention that sees across borders, and fall back to padding."""

    def leaking(*args, cu_seq_lens_q=None, **kwargs):
        return right(*args, cu_seq_lens_q=None, **kwargs)

    right = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", leaking)
    loss_function = LossFunction(load(tiny_model_dir))
    monkeypatch.undo()
    attention.register()
    assert not loss_function.packed
    assert "logits" in loss_function.reason
    rows = rows_of([7, 3])
    loss = loss_function(loss_function.batch(rows))
    torch.testing.assert_close(loss, one_by_one(load(tiny_model_dir), rows), rtol=1e-5, atol=1e-4)


def test_window_and_softcap_equal_a_masked_softmax():
    """Sliding windows and soft caps (Gemma) against a softmax written out position by position."""
    torch.manual_seed(0)
    heads, kv_heads, dim, borders = 4, 2, 8, [0, 6, 17]
    q, k, v = (torch.randn(1, h, 17, dim) for h in (heads, kv_heads, kv_heads))
    module = torch.nn.Module()
    for window, cap in [(None, None), (4, None), (None, 5.0), (3, 2.0)]:
        out, _ = attention.packed_attention(
            module, q, k, v, None, sliding_window=window, softcap=cap, cu_seq_lens_q=torch.tensor(borders)
        )
        for begin, end in itertools.pairwise(borders):
            for i in range(begin, end):
                first = begin if window is None else max(begin, i - window + 1)
                for h in range(heads):
                    scores = q[0, h, i] @ k[0, h // 2, first : i + 1].T * dim**-0.5
                    scores = scores if cap is None else cap * torch.tanh(scores / cap)
                    expected = scores.softmax(-1) @ v[0, h // 2, first : i + 1]
                    torch.testing.assert_close(out[0, i, h], expected)
