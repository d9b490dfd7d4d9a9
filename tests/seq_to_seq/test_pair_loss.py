"""The loss of encoder-decoders is transformers' own, however it is computed and however a step is divided."""

from __future__ import annotations

import pytest
import torch
from pair_cases import FAMILIES, words_tokenizer

from luthier.data.batch import source_length
from luthier.data.pairs import PairEncoder
from luthier.method_options import options_of
from luthier.methods import get_method
from luthier.methods.base import trainable_parameters
from luthier.models.fingerprint import fingerprint
from luthier.models.loading import load_model
from luthier.training.pair_loss import PairLoss


@pytest.fixture(scope="module")
def rows(pairs):
    return PairEncoder(words_tokenizer(opens=True)).encode(pairs[:8]).examples


def loss_of(folder, method="full", dtype=torch.float32):
    torch.manual_seed(0)
    options = options_of(method)()
    model = get_method(method).wrap(load_model(folder, dtype=dtype), options, [], "seq_to_seq")
    return PairLoss(model.eval())


def gradients(loss_function, batches, count):
    for batch in batches:
        (loss_function(batch) / count).backward()
    found = {n: p.grad.clone() for n, p in trainable_parameters(loss_function.model).items() if p.grad is not None}
    loss_function.model.zero_grad()
    return found


def assert_alike(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert float((grad - theirs[name]).norm()) <= 1e-4 * float(theirs[name].norm()) + 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_labels_padded_for_transformers(family, pair_dirs, rows):
    loss_function = loss_of(pair_dirs[family])
    assert loss_function.head
    assert not loss_function.packed
    batch = loss_function.batch(rows)
    sources = [torch.from_numpy(r.input_ids[: source_length(r)]).long() for r in rows]
    targets = [torch.from_numpy(r.input_ids[source_length(r) :]).long() for r in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    given = {
        "input_ids": pad(sources, batch_first=True, padding_value=0),
        "attention_mask": pad([torch.ones_like(s) for s in sources], batch_first=True),
        "labels": pad(targets, batch_first=True, padding_value=-100),
    }
    own = loss_function.model(**given).loss
    own.backward()
    theirs = {n: p.grad.clone() for n, p in loss_function.model.named_parameters() if p.grad is not None}
    loss_function.model.zero_grad()
    ours = loss_function(batch) / batch.trained_tokens
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
    assert_alike(gradients(loss_function, [batch], batch.trained_tokens), theirs)
    loss_function.head = False
    torch.testing.assert_close(loss_function(batch) / batch.trained_tokens, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_is_its_rows_one_by_one(family, pair_dirs, rows):
    loss_function = loss_of(pair_dirs[family], "lora")
    for name, parameter in trainable_parameters(loss_function.model).items():
        if "lora_B" in name:  # zero at first, where the other matrix has no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    whole = loss_function.batch(rows)
    alone = [loss_function.batch([row]) for row in rows]
    assert whole.trained_tokens == sum(batch.trained_tokens for batch in alone)
    count = whole.trained_tokens
    assert_alike(gradients(loss_function, [whole], count), gradients(loss_function, alone, count))
    apart = [
        float((loss_function.own_loss(row) - loss_function(one)).detach()) for row, one in zip(rows, alone, strict=True)
    ]
    assert max(map(abs, apart)) < 1e-3


def test_a_coarse_model_proves_its_head_too(pair_dirs):
    assert loss_of(pair_dirs["t5"], dtype=torch.bfloat16).head
    assert loss_of(pair_dirs["bart"], dtype=torch.bfloat16).head


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_has_one_fingerprint_whatever_is_added_to_it(family, pair_dirs):
    base = load_model(pair_dirs[family])
    before = fingerprint(base)
    for method in ("lora", "adapter", "ia3"):
        wrapped = get_method(method).wrap(load_model(pair_dirs[family]), options_of(method)(), [], "seq_to_seq")
        assert fingerprint(wrapped) == before
    with torch.no_grad():
        next(p for n, p in base.named_parameters() if "decoder" in n and p.ndim == 2).mul_(2)
    assert fingerprint(base) != before
