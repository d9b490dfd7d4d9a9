"""The chunked, selective loss is plain cross-entropy, in value and gradient; models that cannot pack are padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from luthier.data.batch import pack, pad
from luthier.data.encode import EncodedExample
from luthier.models.loading import load_model
from luthier.training import cross_entropy
from luthier.training.cross_entropy import linear_cross_entropy
from luthier.training.loss import LossFunction


def rows(vocabulary: int, lengths=(7, 31, 12, 5), seed: int = 0) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        trained = rng.random(length) < 0.6
        trained[0], trained[-1] = False, True
        made.append(EncodedExample(rng.integers(0, vocabulary, length).astype(np.int32), trained, None, 0))
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 5, 128, 129, 400])
def test_chunked_is_plain_cross_entropy(monkeypatch, bias, count):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES_TRAINED_HEAD", 128 * 90 * 4)  # 128 rows of 90 float32 logits
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, 16), torch.randn(90, 16)
    tensors = [hidden, weight, *([torch.randn(90)] if bias else [])]
    ours = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.clone().double().requires_grad_() for t in tensors]
    targets = torch.randint(0, 90, (count,))
    mine = linear_cross_entropy(ours[0], ours[1], ours[2] if bias else None, targets)
    plain = F.cross_entropy(F.linear(*theirs), targets, reduction="sum")
    assert float(mine.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    (mine / 7).backward()
    (plain / 7).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def plain_loss(model, examples):
    """transformers' own loss, one row at a time, weighted by trained tokens."""
    total = 0.0
    for row in examples:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(row.trained)[None], ids, -100)
        total = total + model(input_ids=ids, labels=labels).loss * int(row.trained.sum())
    return total


def test_the_loss_is_transformers_own(tiny_model_dir):
    model = load_model(tiny_model_dir, dtype=torch.float32)
    examples = rows(model.config.vocab_size)
    ours = LossFunction(model)
    assert ours.packed and ours.head
    mine = ours(ours.batch(examples))
    mine.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("eager")
    plain = plain_loss(model, examples)
    plain.backward()
    assert float(mine.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def tiny(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
    options = {
        "llama": small | heads,
        "qwen3": small | heads,
        "gemma2": small | heads | {"sliding_window": 6},
        "mistral": small | heads | {"sliding_window": 6},
        "gpt2": {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "bloom": {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "mamba": small | {"state_size": 8, "intermediate_size": 64},
        "lfm2": small | heads | {"full_attn_idxs": [1], "block_ff_dim": 64},
    }[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **options, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("llama", True),
        ("qwen3", True),
        ("mistral", True),
        ("gemma2", True),
        ("bloom", False),
        ("mamba", False),
        ("lfm2", False),
        ("gpt2", None),
    ],
)
def test_every_kind_of_model_gets_the_same_loss(name, packed):
    """Sliding windows and capped logits included; those that cannot be packed say why and are padded."""
    model = tiny(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    examples = rows(300)
    function = LossFunction(model)
    if packed is not None:
        assert function.packed is packed, function.reason
    assert bool(function.reason) is not function.packed
    with torch.no_grad():
        mine = float(function(function.batch(examples)))
        model.set_attn_implementation("eager")
        plain = float(plain_loss(model, examples))
    assert mine == pytest.approx(plain, rel=1e-4)


def test_padding_has_the_same_targets():
    examples = rows(100)
    packed, padded = pack(examples), pad(examples, 0)
    assert torch.equal(packed.targets, padded.targets)
    flat = padded.input_ids.reshape(-1)
    assert torch.equal(flat[padded.kept + 1], padded.targets)
    assert padded.tokens == packed.tokens == sum(map(len, examples))
    # Every kept position of the packed row stands right before its target, in the target's own example.
    before = [row.input_ids[np.flatnonzero(row.trained) - 1] for row in examples]
    assert packed.input_ids[0][packed.kept].tolist() == np.concatenate(before).tolist()
    position = np.concatenate([np.flatnonzero(row.trained) - 1 for row in examples])
    assert packed.position_ids[0][packed.kept].tolist() == position.tolist()


def test_what_follows_the_last_target_is_left_out():
    examples = rows(100)
    for row in examples:
        row.trained[-3:] = False
    packed = pack(examples)
    last = [max(np.flatnonzero(row.trained), default=0) for row in examples]
    assert packed.computed == sum(last) < packed.tokens


def test_a_model_that_looks_across_borders_is_not_packed(tiny_model_dir, monkeypatch):
    """The probe itself is probed: with attention over the whole row it must refuse."""
    from luthier.training import attention

    model = load_model(tiny_model_dir, dtype=torch.float32)

    def leaky(module, query, key, value, mask, *, cu_seq_lens_q=None, **kwargs):
        return attention.packed_attention(module, query, key, value, mask, **kwargs)

    from transformers import AttentionInterface

    AttentionInterface.register("leaky", leaky)
    monkeypatch.setattr(attention, "register", lambda: "leaky")
    function = LossFunction(model)
    assert not function.packed and "change" in function.reason
