"""The GPU's operations = the plain reference: what of them runs on a CPU here, the rest where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from test_fused import FAMILIES, rows, same, step, tiny, wrapped

from luthier.data.batch import pack
from luthier.training import attention
from luthier.training.cross_entropy import linear_cross_entropy
from luthier.training.fused import cuda, reference, varlen
from luthier.training.fused.flash import Runs, TorchFlash
from luthier.training.loss import LossFunction
from luthier.training.optimiser import MasterAdamW

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU = torch.device("cpu")
SEGMENTS = {
    "one": [[0, 40, 0, 0]],
    "three": [[0, 7, 0, 0], [7, 30, 0, 0], [30, 40, 0, 0]],
    "one prefix": [[0, 9, 0, 0], [9, 20, 0, 9], [20, 21, 0, 9], [21, 40, 0, 9]],
    "two prefixes": [[0, 9, 0, 0], [9, 14, 0, 9], [14, 17, 0, 0], [17, 30, 14, 3], [30, 40, 14, 3], [40, 44, 0, 0]],
    "sharers apart": [[0, 9, 0, 0], [9, 14, 0, 9], [14, 17, 0, 0], [17, 30, 0, 9]],
    "part of a prefix": [[0, 9, 0, 0], [9, 14, 0, 9], [14, 20, 0, 4]],
    "a sharer with nothing of its own": [[0, 9, 0, 0], [9, 9, 0, 9], [9, 20, 0, 9]],
}


class PlainFlash:
    """What variable-length flash attention computes, run by run."""

    name = "plain"

    def _scores(self, q, k, runs, scale, causal, window):
        """By run: rows of queries and keys, and masked scores ``[H, n, m]``."""
        borders = zip(*(zip(b.tolist(), b.tolist()[1:], strict=False) for b in runs[:2]), strict=True)
        for (q0, q1), (k0, k1) in borders:
            keys = k[k0:k1].float().repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = torch.einsum("ihd,jhd->hij", q[q0:q1].float(), keys) * scale
            last = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
            key = torch.arange(k1 - k0)[None]
            if causal:
                scores = scores.masked_fill(key > last, float("-inf"))
            if window is not None:
                scores = scores.masked_fill(key <= last - window, float("-inf"))
            yield slice(q0, q1), slice(k0, k1), scores

    def forward(self, q, k, v, runs, *, scale, causal, window=None):
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
        wide = v.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        for i, j, scores in self._scores(q, k, runs, scale, causal, window):
            out[i] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), wide[j]).to(q.dtype)
            lse[:, i] = scores.logsumexp(-1)
        return out, lse

    def backward(self, grad, q, k, v, out, lse, runs, *, scale, causal, window=None):
        groups = q.shape[1] // k.shape[1]
        dq, dk, dv = torch.zeros(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
        keys, values = (t.float().repeat_interleave(groups, 1) for t in (k, v))
        for i, j, scores in self._scores(q, k, runs, scale, causal, window):
            weights = (scores - lse[:, i, None]).exp()
            row = (grad[i].float() * out[i].float()).sum(-1).t()[..., None]
            inner = weights * (torch.einsum("ihd,jhd->hij", grad[i].float(), values[j]) - row) * scale
            dq[i] = torch.einsum("hij,jhd->ihd", inner, keys[j])
            dk[j] = torch.einsum("hij,ihd->jhd", inner, q[i].float()).unflatten(1, (-1, groups)).sum(2)
            dv[j] = torch.einsum("hij,ihd->jhd", weights, grad[i].float()).unflatten(1, (-1, groups)).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def values_and_gradients(ops, segments, window=None, dtype=torch.float32, device=CPU, d=32):
    segments = torch.tensor(segments, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    count = int(segments[-1, 1])
    shapes = ((count, 4, d), (count, 2, d), (count, 2, d), (count, 4, d))
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    out, lse = ops.attention(q, k, v, segments, scale=0.3, window=window)
    return [out, lse, *ops.attention_backward(grad, q, k, v, out, lse, segments, scale=0.3, window=window)]


def near(ours, theirs, bound):
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape
        a, b = a.float().cpu(), b.float().cpu()
        # A query that sees itself alone has no gradient but rounding's.
        apart = float((a - b).norm() / max(b.norm(), 1.0))
        assert apart <= bound, (number, apart)


# --- attention within segments ---


@pytest.mark.parametrize("window", [None, 1, 2, 6, 12, 1000])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_calls_of_flash_attention_are_attention_within_segments(segments, window):
    ours = values_and_gradients(varlen.SegmentAttention(PlainFlash()), segments, window)
    near(ours, values_and_gradients(reference, segments, window), 1e-5)


def test_merged_halves_are_rounded_once_more_and_no_further():
    segments = SEGMENTS["one prefix"]
    ours = values_and_gradients(varlen.SegmentAttention(PlainFlash()), segments, dtype=torch.bfloat16)
    near(ours, values_and_gradients(reference, segments, dtype=torch.bfloat16), 0.01)


def test_the_layout_is_made_once_a_batch():
    ops = varlen.SegmentAttention(PlainFlash())
    one, other = (torch.tensor(SEGMENTS[name], dtype=torch.int32) for name in ("one", "one prefix"))
    assert ops.layout(one, CPU) is ops.layout(one, CPU)
    assert ops.layout(other, CPU).prefixes is not None
    with pytest.raises(ValueError, match="cover the row"):
        varlen.Layout(torch.tensor([[0, 3, 0, 0], [4, 6, 0, 0]]), CPU)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_flex_attentions_mask_is_the_references(segments, window):
    sees = varlen.segment_mask(torch.tensor(segments, dtype=torch.int32), window, CPU)
    count = segments[-1][1]
    mask = sees(0, 0, torch.arange(count)[:, None], torch.arange(count)[None])
    expected = torch.zeros(count, count, dtype=torch.bool)
    for begin, end, prefix, shared in segments:
        seen = reference._seen(begin, end, shared, window, CPU)
        expected[begin:end, prefix : prefix + shared] |= seen[:, :shared]
        expected[begin:end, begin:end] |= seen[:, shared:]
    assert torch.equal(mask, expected)


def test_pytorchs_flash_attention_takes_what_it_is_given():
    """On tensors without values: arguments, shapes and types, both ways."""
    flash, meta = TorchFlash(), torch.device("meta")
    runs = Runs.of([3, 4], [5, 6], meta)
    q, k = torch.empty(7, 4, 32, device=meta), torch.empty(11, 2, 32, device=meta)
    for causal, window in ((True, None), (True, 5), (False, None)):
        out, lse = flash.forward(q, k, k, runs, scale=0.1, causal=causal, window=window)
        assert out.shape == q.shape and lse.shape == (4, 7) and lse.dtype == torch.float32
        dq, dk, dv = flash.backward(out, q, k, k, out, lse, runs, scale=0.1, causal=causal, window=window)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


def test_on_a_cpu_none_is_chosen_and_each_says_why():
    choice = varlen.choose(CPU, torch.bfloat16)
    assert choice.plain and choice.attention is reference
    for name, _ in varlen._CANDIDATES:
        assert f"not {name}: " in choice.reason
    assert "no backward pass on CPUs" in choice.reason


def test_the_first_that_is_right_is_chosen(monkeypatch):
    class Blind(PlainFlash):
        """Sees what comes later."""

        def forward(self, q, k, v, runs, *, scale, causal, window=None):
            return super().forward(q, k, v, runs, scale=scale, causal=False, window=window)

    class Unscaled(PlainFlash):
        def backward(self, *args, scale, **options):
            return super().backward(*args, scale=1.0, **options)

    def missing(device):
        raise ImportError("No module named 'flash'")

    made = [("a", missing), *((n, lambda device, c=c: varlen.SegmentAttention(c())) for n, c in
                              (("b", Blind), ("c", Unscaled), ("d", PlainFlash)))]  # fmt: skip
    monkeypatch.setattr(varlen, "_CANDIDATES", made)
    choice = varlen.choose.__wrapped__(CPU, torch.bfloat16)
    assert isinstance(choice.attention.flash, PlainFlash) and not choice.plain
    first, *others = choice.reason.split("; ")
    assert first == "d" and others[0] == "not a: No module named 'flash'"
    assert all("away from the reference" in other for other in others[1:])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_the_models_own_layers_take_it_too(family, monkeypatch):
    """Models that are not fused (a 4-bit base) run on their own modules over the registered attention."""
    model = wrapped(tiny(family), "lora")
    examples = rows(alike=20)
    expected = step(model, LossFunction(model), pack(examples))
    ops = varlen.SegmentAttention(PlainFlash())
    called = []

    def variable_length(query):
        called.append(query.shape)
        return ops

    monkeypatch.setattr(attention, "variable_length", variable_length)
    function = LossFunction(model)
    assert function.packed and called, function.reason
    for share in (False, True):
        same(step(model, function, pack(examples, share=share)), expected)


def test_quantised_layers_are_left_to_the_model():
    """As bitsandbytes has them: a linear layer of another type, whose weight is packed in bytes."""

    class Linear4bit(torch.nn.Linear):
        pass

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Linear4bit
    function = LossFunction(model, ops=reference)
    assert function.fused is None and "type Linear4bit" in function.fused_reason
    function = LossFunction(model)
    assert function.fused is None and "the kernels are for" in function.fused_reason


# --- the compiled formulas ---


def formula_results(ops, dtype, device=CPU):
    """Everything that a formula gives, for two lengths; tensors that it changes too."""
    generator = torch.Generator().manual_seed(2)

    def some(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    found = []
    for n in (37, 21):
        x, grad, weight = some(n, 64), some(n, 64), some(64)
        out, inverse = ops.rms_norm(x, weight, 1e-5)
        found += [out, inverse]
        for residual in (None, some(n, 64)):
            for wants in (False, True):
                found += ops.rms_norm_backward(grad, x, weight, inverse, residual, wants_weight=wants)
        heads, cosine, sine = some(n, 4, 32), some(n, 32).float(), some(n, 32).float()
        for back in (False, True):
            turned = heads.clone()
            assert ops.rotate_(turned, cosine, sine, back=back) is turned
            found.append(turned)
        gate, up, dy = some(n, 96), some(n, 96), some(n, 96)
        found.append(ops.swiglu(gate, up))
        ops.swiglu_backward_(dy, gate, up)
        found += [gate, up, dy]
        found += [ops.dropout(x, seed, 0.7) for seed in (3, 2**32 - 5)]
        targets = torch.arange(n, device=device) * 7 % 64
        for gradient in (False, True):
            logits = x.clone()
            found += [ops.cross_entropy_(logits, targets, gradient=gradient), logits]
    return [t for t in found if t is not None]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_formulas_are_the_reference(dtype):
    ops = cuda.Formulas()
    ours = formula_results(ops, dtype)
    assert ops.why_plain == ""
    near(ours, formula_results(reference, dtype), 1e-6 if dtype == torch.float32 else 3e-3)


@torch.no_grad()
def test_formulas_that_cannot_be_compiled_run_as_they_stand(monkeypatch):
    def broken(function, **options):
        def run(*args, **more):
            raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("there is no compiler"), None)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    ops = cuda.Formulas()
    assert ops.why_plain == ""
    near(formula_results(ops, torch.float32), formula_results(reference, torch.float32), 1e-6)
    assert "there is no compiler" in ops.why_plain


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_fused_layers_over_the_gpus_operations(method):
    torch.manual_seed(3)
    model = wrapped(tiny("qwen3"), method)
    own, fused = LossFunction(model), LossFunction(model, ops=cuda.Cuda(varlen.SegmentAttention(PlainFlash())))
    assert fused.fused is not None, fused.fused_reason
    examples = rows(alike=20)
    expected = step(model, own, pack(examples))
    for what in (False, "mlp", True):
        fused.recompute_activations(what)
        same(step(model, fused, pack(examples, share=True)), expected)


# --- on a GPU ---


@gpu
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_on_a_gpu(segments, window, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    choice = varlen.choose(device, dtype)
    assert not choice.plain, choice.reason
    ours = values_and_gradients(choice.attention, segments, window, dtype, device, d=64)
    near(ours, values_and_gradients(reference, segments, window, dtype, device, d=64), 0.02)


@gpu
@pytest.mark.parametrize("make", [m for _, m in varlen._CANDIDATES], ids=[n for n, _ in varlen._CANDIDATES])
def test_every_attention_that_is_installed_on_a_gpu(make):
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        ops = make(device)
    except ImportError as error:
        pytest.skip(str(error))
    for window in (None, 6):
        ours = values_and_gradients(ops, SEGMENTS["one prefix"], window, torch.bfloat16, device, d=64)
        theirs = values_and_gradients(reference, SEGMENTS["one prefix"], window, torch.bfloat16, device, d=64)
        near(ours, theirs, 0.02)


@gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formulas_on_a_gpu(dtype):
    device, ops = torch.device("cuda"), cuda.Formulas()
    ours = formula_results(ops, dtype, device)
    assert ops.why_plain == ""
    near(ours, formula_results(reference, dtype, device), 1e-5 if dtype == torch.float32 else 4e-3)


@gpu
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_on_a_gpu_is_as_exact_as_the_models_own(family, method):
    """Against float32 on the CPU, fused bfloat16 is no further away than transformers' own modules in bfloat16."""
    torch.manual_seed(3)
    rounded = wrapped(tiny(family), method).to("cuda", torch.bfloat16)
    exact = wrapped(tiny(family), method)
    exact.load_state_dict({name: value.float().cpu() for name, value in rounded.state_dict().items()})
    examples = rows(alike=20)
    expected = step(exact, LossFunction(exact), pack(examples))
    function = LossFunction(rounded)
    assert function.fused is not None, function.fused_reason
    device = torch.device("cuda")

    def apart(share: bool) -> float:
        found = step(rounded, function, pack(examples, share=share).to(device))
        return sum(float((found[n].float().cpu() - g).norm() / g.norm()) for n, g in expected.items()) / len(expected)

    fused, shared = apart(False), apart(True)
    function.fused = None
    own = apart(False)
    assert max(fused, shared) <= 1.3 * own


@gpu
def test_fused_in_float32_on_a_gpu_is_the_models_own():
    """Everything but flash attention, which has no float32, exactly."""
    model = wrapped(tiny("qwen3"), "lora").to("cuda")
    ops = cuda.Cuda(reference)
    own, fused = LossFunction(model), LossFunction(model, ops=ops)
    assert fused.fused is not None, fused.fused_reason
    batch = pack(rows(alike=20), share=True).to(torch.device("cuda"))
    same(step(model, fused, batch), step(model, own, batch), 1e-3)


@gpu
def test_the_chunked_loss_on_a_gpu():
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    targets = torch.randint(500, (300,), device="cuda")
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, None, targets), leaves)
    logits = hidden @ weight.t()
    theirs = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), leaves)
    near(ours, theirs, 1e-3)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimiser_on_a_gpu_is_fused_and_the_same(dtype):
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (40, 30), "vector": (30,)}
        drawn = {n: torch.randn(shape, generator=generator).to(device, dtype) for n, shape in shapes.items()}
        parameters = {n: torch.nn.Parameter(t) for n, t in drawn.items()}
        optimiser = MasterAdamW(parameters, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8, one_pass=False)
        assert all(group["fused"] for group in optimiser.adamw.param_groups)
        assert {m.device.type for m in optimiser.masters.values()} == {device}
        for _ in range(3):
            sum((p.float() * torch.arange(30, device=device)).sum() for p in parameters.values()).backward()
            optimiser.clip(1.0)
            optimiser.step(1e-2)
        found.append(list(optimiser.weights().values()))
    near(*found, 1e-5)
