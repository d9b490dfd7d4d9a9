"""Encoders: packed = padded = each text alone, by logits, losses and gradients; what is not so is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from test_gpu import PlainFlash

from luthier.data.batch import pack_whole, pad
from luthier.data.classes import ClassNames
from luthier.data.encode import EncodedExample
from luthier.data.examples import TaskType
from luthier.data.masked import Masking
from luthier.method_options import options_of
from luthier.methods import METHODS
from luthier.methods.base import trainable_parameters
from luthier.models.heads import Head
from luthier.models.loading import load_model
from luthier.models.quantized import Quantization
from luthier.training import attention, encoder_attention, encoder_loss
from luthier.training.class_loss import ClassLoss
from luthier.training.encoder_attention import PaddedRows, two_way_attention
from luthier.training.encoder_loss import EncoderLoss
from luthier.training.fused import varlen
from luthier.training.masked_loss import MaskedLoss

VOCABULARY, CLASSES = 200, 3
RULE = Masking(4, np.arange(5, VOCABULARY), seed=3)
FAMILIES = {
    "bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra", "modernbert": "ModernBert",
    "albert": "Albert",
}  # fmt: skip
TASKS = ["single", "multi", "masked"]


def encoder(family: str, task: str, **options):
    """A tiny random encoder with the task's head; its positions end at 64, so that a packed row is longer."""
    common = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 1,
    }  # fmt: skip
    own = {
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
        "electra": {"embedding_size": 16},
        "albert": {"embedding_size": 16},
        "modernbert": {"local_attention": 8, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
                       "sep_token_id": 3},
    }.get(family, {})  # fmt: skip
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**common | own | options, num_labels=CLASSES)
    torch.manual_seed(0)
    kind = "MaskedLM" if task == "masked" else "SequenceClassification"
    return getattr(transformers, f"{FAMILIES[family]}For{kind}")(config).eval()


def wrapped(model, method: str, task: str):
    """Under a method, whose parameters are moved away from where they do nothing."""
    kind = TaskType.MASKED_LM if task == "masked" else TaskType.CLASSIFICATION
    if task != "masked":
        # As after loading: what is not the body is new.
        heads = (n for n, m in model.named_children() if n != model.base_model_prefix and list(m.parameters()))
        model.fresh_modules = list(heads)
    model = METHODS[method].wrap(model, options_of(method)(), [], kind).eval()
    if method != "full":
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def loss_of(model, task: str, **options):
    options = {"pad_token_id": 1} | options
    if task == "masked":
        return MaskedLoss(model, masking=RULE, **options)
    return ClassLoss(model, classes=CLASSES, multi_label=task == "multi", **options)


def rows_of(task: str, lengths=(7, 40, 3, 23)) -> list[EncodedExample]:
    draw = np.random.default_rng(1)
    rows = []
    for number, length in enumerate(lengths):
        ids = draw.integers(5, VOCABULARY, length).astype(np.int32)
        trained = (np.arange(length) > 0) & (np.arange(length) < length - 1)
        extra = {"single": (number % 3,), "multi": ((), (0, 2), (1,))[number % 3]}.get(
            task, tuple(range(1, length - 1))
        )
        rows.append(EncodedExample(ids, trained, None, number, extra=extra))
    return rows


def step(loss, parts) -> list[torch.Tensor]:
    """Logits, summed loss and gradients of rows, part by part."""
    parameters = trainable_parameters(loss.model)
    logits, total = [], torch.zeros(())
    for part in parts:
        batch = loss.batch(part, draw=5)
        logits.append(loss.logits(batch))
        total = total + loss(batch)
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return [torch.cat(logits).detach(), total.detach(), *gradients]


def same(found, expected, names=()) -> None:
    for a, b, name in itertools.zip_longest(found, expected, ["logits", "loss", *names]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1.0, float(b.abs().max())), msg=name)


def check(make, task: str) -> None:
    rows = rows_of(task)
    packed, padded = loss_of(make(), task), loss_of(make(), task, batching="padded")
    assert packed.packed and not padded.packed, packed.reason
    batch = packed.batch(rows)
    assert batch.computed == batch.tokens == 73 < padded.batch(rows).computed == 160
    alone = step(padded, [[row] for row in rows])
    names = trainable_parameters(packed.model)
    same(step(packed, [rows]), alone, names)
    same(step(padded, [rows]), alone, names)
    assert float(alone[1]) == pytest.approx(sum(float(padded.own_loss(row).detach()) for row in rows), rel=1e-4) or (
        task == "masked"  # its own loss is that of another draw
    )
    assert max(float(gradient.abs().max()) for gradient in alone[2:]) > 1e-3


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_packed_is_padded_is_each_alone(family, task, method):
    check(lambda: wrapped(encoder(family, task), method, task), task)


@pytest.mark.parametrize("method", ["ia3", "adapter"])
@pytest.mark.parametrize("task", ["single", "masked"])
def test_other_methods_too(task, method):
    check(lambda: wrapped(encoder("bert", task), method, task), task)


def test_a_quantised_base_too(tiny_encoder_dir):
    pytest.importorskip("bitsandbytes")

    def make():
        torch.manual_seed(0)
        head = Head(TaskType.CLASSIFICATION, ClassNames(("a", "b", "c")))
        base = load_model(tiny_encoder_dir, dtype=torch.float32, quantization=Quantization(), head=head)
        return wrapped(base, "qlora", "single")

    rows = [replace(row, input_ids=row.input_ids % 90 + 1) for row in rows_of("single")]
    packed, padded = loss_of(make(), "single", pad_token_id=0), loss_of(make(), "single", batching="padded")
    assert packed.packed, packed.reason
    same(step(packed, [rows]), step(padded, [[row] for row in rows]))


def test_a_head_that_reads_every_token_gets_them_all():
    check(lambda: encoder("modernbert", "single", classifier_pooling="mean"), "single")


def test_layers_that_are_computed_again_give_the_same():
    first, again = (loss_of(encoder("bert", "single").train(), "single") for _ in range(2))
    for module in (*first.model.modules(), *again.model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert again.recompute_activations() == ""
    same(step(again, [rows_of("single")]), step(first, [rows_of("single")]))


@pytest.mark.parametrize("task", ["single", "masked"])
def test_dropout_leaves_a_text_to_itself(task):
    loss = loss_of(encoder("bert", task), task)
    loss.model.train()
    rows = rows_of(task)
    other = [replace(rows[0], input_ids=rows[0].input_ids[::-1].copy()), *rows[1:]]
    drawn = []
    for seed, given in ((0, rows), (0, other), (1, rows)):
        torch.manual_seed(seed)
        drawn.append(loss.logits(loss.batch(given)).detach())
    first = len(loss.batch(rows[:1]).targets)
    assert torch.equal(drawn[0][first:], drawn[1][first:])
    assert not torch.allclose(drawn[0][first:], drawn[2][first:], atol=1e-3)


# --- what must be refused ---


def across_borders(patch):
    def leaking(*given, segments=None, **options):
        return right(*given, segments=None, **options)

    right = two_way_attention
    patch.setattr(encoder_attention, "two_way_attention", leaking)


def a_later_text(patch):
    """The last text but one sees the last one as well, but not the other way round."""

    def leaking(module, query, key, value, mask, *, segments=None, **options):
        out, _ = right(module, query, key, value, mask, segments=segments, **options)
        if segments is not None:
            begin, middle = segments[-2, 0], segments[-2, 1]
            both = (t[:, :, begin:] for t in (query, key, value))
            more, _ = right(module, *both, None, **options)
            out = torch.cat([out[:, :begin], more[:, : middle - begin], out[:, middle:]], 1)
        return out, None

    right = two_way_attention
    patch.setattr(encoder_attention, "two_way_attention", leaking)


def running_positions(patch):
    patch.setattr(encoder_loss, "pack_whole", running)


def running(rows):
    batch = pack_whole(rows)
    return replace(batch, position_ids=torch.arange(batch.tokens)[None])


def no_offset(patch):
    patch.setattr(EncoderLoss, "_positions", lambda self: (0, 64))


def a_short_window(patch):
    def narrow(*given, sliding_window=None, segments=None, **options):
        if segments is not None and sliding_window is not None:
            sliding_window -= 1
        return right(*given, sliding_window=sliding_window, segments=segments, **options)

    right = two_way_attention
    patch.setattr(encoder_attention, "two_way_attention", narrow)


@pytest.mark.parametrize("task", ["single", "masked"])
@pytest.mark.parametrize(
    ("wrong", "family"),
    [(across_borders, "bert"), (a_later_text, "bert"), (running_positions, "bert"), (no_offset, "roberta"),
     (a_short_window, "modernbert")],
)  # fmt: skip
def test_what_is_wrong_is_noticed(wrong, family, task, monkeypatch):
    options = {"local_attention": 40} if family == "modernbert" else {}  # wider than the short rows
    if task == "single":
        monkeypatch.setattr(
            "luthier.training.class_loss.pack_whole", running if wrong is running_positions else pack_whole
        )
    wrong(monkeypatch)
    loss = loss_of(encoder(family, task, **options), task)
    monkeypatch.undo()
    encoder_attention.register()
    assert not loss.packed, "it was not noticed"
    assert ("states" if wrong is a_short_window else "logits") in loss.reason
    rows = rows_of(task)
    right = step(loss_of(encoder(family, task, **options), task, batching="padded"), [[row] for row in rows])
    same(step(loss, [rows]), right)


def test_a_model_that_takes_no_packed_rows_is_padded_with_a_reason():
    # Its pooler is two modules, of which the body's forward calls the second.
    loss = loss_of(encoder("albert", "single"), "single")
    assert not loss.packed and loss.reason
    assert loss.model.config._attn_implementation != encoder_attention.NAME
    same(step(loss, [rows_of("single")]), step(loss, [[row] for row in rows_of("single")]))
    assert loss_of(encoder("albert", "masked"), "masked").packed


def test_a_padding_token_inside_a_text_is_read_as_the_model_reads_it():
    """RoBERTa counts positions past it."""
    loss = loss_of(encoder("roberta", "single"), "single")
    rows = rows_of("single")
    rows[1].input_ids[9] = 1
    assert loss.packed and loss.batch(rows[:1]).packed and not loss.batch(rows).packed
    same(
        step(loss, [rows]),
        step(loss_of(encoder("roberta", "single"), "single", batching="padded"), [[r] for r in rows]),
    )


# --- attention ---

SEGMENTS = torch.tensor([[0, 6, 0, 0], [6, 17, 0, 0], [17, 18, 0, 0]], dtype=torch.int32)


class Both(torch.nn.Module):
    is_causal = False


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("way", ["texts", "flash", "padded"])
def test_every_way_is_a_softmax_over_the_own_text(way, window, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(1, h, 18, 8, generator=generator) for h in (4, 2, 2, 4))
    found = []
    for ours in (True, False):
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        if not ours:
            wide = [t.repeat_interleave(4 // t.shape[1], 1)[0] for t in given]
            place = torch.arange(18)
            seen = torch.zeros(18, 18, dtype=torch.bool)
            for begin, end, _, _ in SEGMENTS.tolist():
                seen[begin:end, begin:end] = True
            seen &= (place[:, None] - place).abs() < (window or 18)
            scores = (wide[0] @ wide[1].transpose(1, 2) * 0.3).masked_fill(~seen, float("-inf"))
            out = (scores.softmax(-1) @ wide[2]).transpose(0, 1)[None]
        elif way == "padded":
            wide = [t.repeat_interleave(4 // t.shape[1], 1)[0] for t in given]
            out = encoder_attention._in_padded_rows(*wide, SEGMENTS, 0.3, 0.0, window)
        else:
            if way == "flash":
                monkeypatch.setattr(attention, "variable_length", lambda query: varlen.SegmentAttention(PlainFlash()))
            out, _ = two_way_attention(Both(), *given, None, scaling=0.3, sliding_window=window, segments=SEGMENTS)
        found.append([out, *torch.autograd.grad(out, given, grad.transpose(1, 2))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_are_laid_out_once_a_batch():
    rows = PaddedRows.of(SEGMENTS, torch.device("cpu"))
    assert rows is PaddedRows.of(SEGMENTS, torch.device("cpu"))
    assert rows.mask.sum(1).tolist() == [6, 11, 1]
    tokens = torch.randn(18, 3)
    assert torch.equal(rows.taken(rows.laid(tokens)), tokens)
    assert rows is not PaddedRows.of(SEGMENTS.clone(), torch.device("cpu"))


def test_what_it_does_not_do_it_refuses():
    q = torch.randn(1, 2, 4, 8)
    for module, options in ((torch.nn.Module(), {}), (Both(), {"softcap": 5.0}), (Both(), {"is_causal": True})):
        with pytest.raises(ValueError, match="does not do"):
            two_way_attention(module, q, q, q, None, segments=None, **options)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_model_left_with_it_reads_padded_rows(family):
    model = encoder(family, "single")
    batch = pad(rows_of("single"), 1)
    for given in (
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
        {"input_ids": batch.input_ids},
    ):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            expected = model(**given).logits
            assert loss_of(model, "single").packed
            assert model.config._attn_implementation == encoder_attention.NAME
            torch.testing.assert_close(model(**given).logits, expected, rtol=1e-4, atol=1e-5)
