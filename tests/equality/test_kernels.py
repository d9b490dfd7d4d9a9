"""The fused kernels = their plain reference = autograd, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luthier.training.fused import kernels, reference

HALF = torch.bfloat16
SEGMENTS = {
    "plain": [[0, 5, 0, 0], [5, 230, 0, 0], [230, 300, 0, 0]],
    "shared": [[0, 70, 0, 0], [70, 200, 0, 70], [200, 207, 0, 70], [207, 300, 10, 33]],
    "one row": [[0, 300, 0, 0]],
}


@pytest.fixture(scope="module")
def compiled() -> kernels.Kernels:
    ops = kernels.load()
    if ops is None:
        pytest.skip(kernels.why_not())
    return ops


def half(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(HALF)


def close(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 4e-3) -> None:
    """Relative distance of two tensors; bfloat16 rounds by 2⁻⁹ = 0.002."""
    ours, theirs = ours.double(), theirs.double()
    assert float((ours - theirs).norm()) <= bound * float(theirs.norm()), (ours, theirs)


def plain_attention(q, k, v, segments, scale, window):
    """Masked softmax, segment by segment, for autograd to differentiate."""
    outputs = []
    groups = q.shape[1] // k.shape[1]
    for begin, end, prefix, shared in segments:
        keys, values = (
            torch.cat([t[prefix : prefix + shared], t[begin:end]]).repeat_interleave(groups, 1) for t in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], keys) * scale
        for i in range(end - begin):
            scores[:, i, shared + i + 1 :] = float("-inf")
            if window is not None:
                scores[:, i, : max(0, shared + i + 1 - window)] = float("-inf")
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_reference_attention_is_a_masked_softmax(segments, window):
    torch.manual_seed(0)
    tensors = [torch.randn(300, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    expected = plain_attention(*tensors, segments, 0.25, window)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    q, k, v = (t.detach().float() for t in tensors)
    table = torch.tensor(segments, dtype=torch.int32)
    out, lse = reference.attention(q, k, v, table, scale=0.25, window=window)
    torch.testing.assert_close(out, expected.detach().float(), rtol=1e-4, atol=1e-5)
    gradients = reference.attention_backward(grad.float(), q, k, v, out, lse, table, scale=0.25, window=window)
    for ours, tensor in zip(gradients, tensors, strict=True):
        torch.testing.assert_close(ours, tensor.grad.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("heads", [(9, 3), (4, 4)], ids=["grouped", "all"])
@pytest.mark.parametrize("d", [16, 64, 80, 128])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_attention(compiled, segments, window, d, heads):
    torch.manual_seed(0)
    q, k, v, grad = half(300, heads[0], d), half(300, heads[1], d), half(300, heads[1], d), half(300, heads[0], d)
    options = {"segments": torch.tensor(segments, dtype=torch.int32), "scale": d**-0.5, "window": window}
    out, lse = reference.attention(q, k, v, **options)
    ours, our_lse = compiled.attention(q, k, v, **options)
    close(ours, out)
    close(our_lse, lse, 1e-6)
    for mine, plain in zip(
        compiled.attention_backward(grad, q, k, v, out, lse, **options),
        reference.attention_backward(grad, q, k, v, out, lse, **options),
        strict=True,
    ):
        close(mine, plain)


@pytest.mark.parametrize("window", [None, 300])
def test_attention_of_more_than_one_block(compiled, window):
    """Longer than the blocks of queries and keys (512 and 256), with scores that grow along the row."""
    torch.manual_seed(0)
    q, k, v, grad = half(1300, 2, 32), half(1300, 1, 32), half(1300, 1, 32), half(1300, 2, 32)
    k *= torch.linspace(0.1, 3, 1300).to(HALF)[:, None, None]  # the running maximum moves from block to block
    table = torch.tensor([[0, 530, 0, 0], [530, 1300, 0, 530]], dtype=torch.int32)
    options = {"segments": table, "scale": 32**-0.5, "window": window}
    out, lse = reference.attention(q, k, v, **options)
    ours, our_lse = compiled.attention(q, k, v, **options)
    close(ours, out)
    close(our_lse, lse, 1e-6)
    for mine, plain in zip(
        compiled.attention_backward(grad, q, k, v, out, lse, **options),
        reference.attention_backward(grad, q, k, v, out, lse, **options),
        strict=True,
    ):
        close(mine, plain)


@pytest.mark.parametrize("threads", [1, 2])
def test_attention_repeats_bit_for_bit(compiled, threads):
    """Whatever thread takes which task: the gradient of a shared prefix is a sum over segments in a fixed order."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        q, k, v, grad = half(300, 9, 64), half(300, 3, 64), half(300, 3, 64), half(300, 9, 64)
        table = torch.tensor(SEGMENTS["shared"], dtype=torch.int32)
        out, lse = compiled.attention(q, k, v, table, scale=0.125)
        first, *others = [compiled.attention_backward(grad, q, k, v, out, lse, table, scale=0.125) for _ in range(5)]
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    finally:
        torch.set_num_threads(before)


def test_norm(compiled):
    torch.manual_seed(0)
    x, grad, residual, weight = half(37, 576), half(37, 576), half(37, 576), half(576)
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(wide[0], (576,), wide[1], 1e-5)
    expected.backward(grad.double())
    for ops in (reference, compiled):
        out, inverse = ops.rms_norm(x, weight, 1e-5)
        close(out, expected.detach())
        dx, dweight = ops.rms_norm_backward(grad, x, weight, inverse, residual, wants_weight=True)
        close(dx, wide[0].grad + residual.double())
        close(dweight, wide[1].grad)
        assert ops.rms_norm_backward(grad, x, weight, inverse)[1] is None


@pytest.mark.parametrize("d", [32, 64])
def test_rotation(compiled, d):
    torch.manual_seed(0)
    x, grad = half(21, 3, d), half(21, 3, d)
    angle = torch.rand(21, d) * 6
    cosine, sine = angle.cos(), angle.sin()  # both halves of the angles differ, as with some scaled rotations
    wide = x.double().requires_grad_()
    turned = torch.cat([-wide[..., d // 2 :], wide[..., : d // 2]], -1)
    expected = wide * cosine[:, None].double() + turned * sine[:, None].double()
    expected.backward(grad.double())
    for ops in (reference, compiled):
        close(ops.rotate_(x.clone(), cosine, sine), expected.detach())
        close(ops.rotate_(grad.clone(), cosine, sine, back=True), wide.grad)


def test_swiglu(compiled):
    torch.manual_seed(0)
    gate, up, grad = half(13, 96) * 3, half(13, 96), half(13, 96)
    wide = [t.double().requires_grad_() for t in (gate, up)]
    expected = F.silu(wide[0]) * wide[1]
    expected.backward(grad.double())
    for ops in (reference, compiled):
        close(ops.swiglu(gate, up), expected.detach())
        a, b, c = gate.clone(), up.clone(), grad.clone()
        ops.swiglu_backward_(c, a, b)
        close(a, wide[0].grad)
        close(b, wide[1].grad)
        close(c, expected.detach())


def test_reference_changes_float32_in_place_rightly():
    """Of float32 tensors `.float()` is the tensor itself: nothing may be written before everything is read."""
    gate, up, grad = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)
    wide = [t.clone().requires_grad_() for t in (gate, up)]
    (F.silu(wide[0]) * wide[1]).backward(grad)
    reference.swiglu_backward_(grad, gate, up)
    torch.testing.assert_close(gate, wide[0].grad)
    torch.testing.assert_close(up, wide[1].grad)


def test_dropout(compiled):
    x = half(64, 512)
    ours, theirs = compiled.dropout(x, 2**32 - 5, 0.9), reference.dropout(x, 2**32 - 5, 0.9)
    assert torch.equal(ours, theirs)
    kept = ours != 0
    assert 0.89 < float(kept.float().mean()) < 0.91
    close(ours[kept], x[kept].double() / 0.9)
    other = compiled.dropout(x, 7, 0.9) != 0
    assert 0.80 < float((kept & other).float().mean()) < 0.82  # independent: 0.9 · 0.9


@pytest.mark.parametrize("vocabulary", [49152, 1003])
def test_cross_entropy(compiled, vocabulary):
    torch.manual_seed(0)
    logits, targets = half(9, vocabulary) * 3, torch.randint(0, vocabulary, (9,))
    targets[0] = vocabulary - 1
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none")
    expected.sum().backward()
    for ops in (reference, compiled):
        copy = logits.clone()
        close(ops.cross_entropy_(copy, targets, gradient=False), expected.detach(), 1e-5)
        assert torch.equal(copy, logits)
        ops.cross_entropy_(copy, targets, gradient=True)
        close(copy, wide.grad)
