"""The fused layers = the model's own modules, in loss and in every gradient."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.data.batch import pack
from luthier.data.chats import ChatEncoder
from luthier.data.encode import EncodedExample
from luthier.data.examples import TrainingExample
from luthier.data.render import Renderer
from luthier.method_options import LoraMethod
from luthier.methods import get_method
from luthier.models.loading import load_model
from luthier.training.fused import kernels, reference
from luthier.training.loss import LossFunction

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


def tiny(name: str, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = SMALL | FAMILIES.get(name, {}) | more
    config = AutoConfig.for_model(name.split()[0], **options, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def wrapped(model, method: str, **options):
    if method == "full":
        return model.requires_grad_(True)
    model = get_method("lora").wrap(model, LoraMethod(**{"lora_dropout": 0.0} | options), [])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def rows(lengths=(17, 31, 12, 25), alike: int = 0, seed: int = 0) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, 300, alike)
    made = []
    for length in lengths:
        ids = np.concatenate([beginning, rng.integers(0, 300, length)]).astype(np.int32)
        trained = rng.random(len(ids)) < 0.6
        trained[0], trained[-2] = False, True
        made.append(EncodedExample(ids, trained, None, 0))
    return made


def step(model, function: LossFunction, batch) -> dict[str, torch.Tensor]:
    """The loss and all gradients."""
    model.zero_grad(set_to_none=True)
    loss = function(batch) / batch.trained_tokens
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients | {"loss": loss.detach()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        apart = float((ours[name] - value).norm())
        assert apart <= bound * float(value.norm()) + 1e-9, (name, apart, float(value.norm()))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_is_the_models_own(family, method):
    torch.manual_seed(3)
    model = wrapped(tiny(family), method)
    own, fused = LossFunction(model), LossFunction(model, ops=reference)
    assert own.fused is None
    assert fused.fused is not None, fused.fused_reason
    examples = rows(alike=20)
    expected = step(model, own, pack(examples))
    assert len(expected) > 20
    same(step(model, fused, pack(examples)), expected)
    same(step(model, fused, pack(examples, share=True)), expected)
    for what in ("mlp", True):
        assert not fused.recompute_activations(what)
        same(step(model, fused, pack(examples, share=True)), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_shared_beginnings_change_nothing_in_the_models_own_layers(family):
    model = wrapped(tiny(family), "full")
    function = LossFunction(model)
    examples = rows(alike=20)
    shared = pack(examples, share=True)
    assert shared.shares and shared.computed == pack(examples).computed - 3 * 20
    same(step(model, function, shared), step(model, function, pack(examples)))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"use_rslora": True, "r": 3},
        {"modules_to_save": ["embed_tokens"]},
        {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"layers.1.*": 8}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "pissa", "modules_to_save": ["all-norms", "layers.0.mlp"]},
    ],
    ids=str,
)
def test_every_kind_of_lora(options):
    model = wrapped(tiny("llama biased"), "lora", **options)
    own, fused = LossFunction(model), LossFunction(model, ops=reference)
    assert fused.fused is not None, fused.fused_reason
    same(step(model, fused, pack(rows())), step(model, own, pack(rows())))


def test_a_switched_off_adapter_is_off():
    model = wrapped(tiny("llama"), "lora")
    fused = LossFunction(model, ops=reference)
    batch = pack(rows())
    with torch.no_grad():
        on = float(fused(batch))
        with model.disable_adapter():
            off = float(fused(batch))
            fused.fused = None
            plain = float(fused(batch))
    assert off == pytest.approx(plain, rel=1e-5)
    assert abs(on - off) > 1e-3 * abs(off)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma2", "no plain linear head"),
        ("gemma", "activation"),
        ("phi3", "other parts"),
        ("llama gelu", "activation"),
        ("llama dropout", "dropout"),
        ("llama odd", "multiple of 32"),
    ],
)
def test_what_the_kernels_do_not_compute_is_left_to_the_model(family, reason):
    more = {
        "llama gelu": {"hidden_act": "gelu"},
        "llama dropout": {"attention_dropout": 0.1},
        "llama odd": {"head_dim": 24},
    }.get(family, {})
    function = LossFunction(tiny(family, **more), ops=reference)
    assert function.fused is None
    assert reason in function.fused_reason


def test_dora_is_left_to_peft():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear", use_dora=True))
    assert "another kind" in LossFunction(model, ops=reference).fused_reason


def test_a_kernel_that_computes_something_else_is_refused():
    """The probe itself is probed: layers that change the logits must not train."""

    class Wrong:
        def __getattr__(self, name):
            return getattr(reference, name)

        def swiglu(self, gate, up):
            return reference.swiglu(up, gate)

    assert "change its logits" in LossFunction(tiny("llama"), ops=Wrong()).fused_reason


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_kernel_with_another_gradient_is_refused(method):
    class Wrong:
        def __getattr__(self, name):
            return getattr(reference, name)

        def rotate_(self, x, cosine, sine, *, back=False):
            return reference.rotate_(x, cosine, sine)

    assert "change the gradient" in LossFunction(wrapped(tiny("llama"), method), ops=Wrong()).fused_reason


def test_dropout_is_the_same_forward_and_backward():
    """Gradients under dropout = differences of the loss under the same masks; and the masks follow from the seed."""
    model = wrapped(tiny("llama"), "lora", lora_dropout=0.4)
    function = LossFunction(model, ops=reference)
    batch = pack(rows())
    model.train()

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return function(batch) / batch.trained_tokens

    first = loss()
    first.backward()
    assert float(first.detach()) == float(loss().detach())
    torch.manual_seed(6)
    assert float(first.detach()) != float(function(batch).detach() / batch.trained_tokens)
    named = dict(model.named_parameters())
    for name in ("q_proj.lora_A", "o_proj.lora_A", "up_proj.lora_B", "down_proj.lora_A"):
        parameter = named[
            f"base_model.model.model.layers.0.{'self_attn' if name[0] in 'qo' else 'mlp'}.{name}.default.weight"
        ]
        direction = torch.randn_like(parameter)
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            parameter += 1e-3 * direction
            above = float(loss())
            parameter -= 2e-3 * direction
            below = float(loss())
            parameter += 1e-3 * direction
        assert slope == pytest.approx((above - below) / 2e-3, rel=0.05, abs=2e-3), name
    gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    for what in ("mlp", True):
        model.zero_grad(set_to_none=True)
        function.recompute_activations(what)
        loss().backward()
        same({n: p.grad for n, p in named.items() if p.grad is not None}, gradients, 1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_compiled_layers_are_as_exact_as_the_models_own(smollm2_dir, tokenizer, method):
    """On the real model: against float32, fused bfloat16 is no further away than transformers' bfloat16."""
    if kernels.load() is None:
        pytest.skip(kernels.why_not())
    torch.manual_seed(0)
    rounded = wrapped(load_model(smollm2_dir, dtype=torch.float32), method).to(torch.bfloat16)
    exact = wrapped(load_model(smollm2_dir, dtype=torch.float32), method)
    exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})
    lines = (Path(__file__).parents[2] / "examples/records/train.jsonl").read_text(encoding="utf-8").splitlines()
    made = [TrainingExample(row["prompt"], row["response"]) for row in map(json.loads, lines[:8])]
    examples = ChatEncoder(Renderer(tokenizer)).encode(made).examples

    expected = step(exact, LossFunction(exact), pack(examples))
    function = LossFunction(rounded)
    assert function.fused is not None, function.fused_reason
    fused = step(rounded, function, pack(examples, share=True))
    function.fused = None
    own = step(rounded, function, pack(examples))

    def apart(gradients: dict[str, torch.Tensor]) -> float:
        return float(np.mean([float((gradients[n].float() - g).norm() / g.norm()) for n, g in expected.items()]))

    # Both are one draw of rounding's noise; a wrong scale or a lost term would be many times as far away.
    assert apart(fused) <= 1.3 * apart(own) < 0.3
    assert abs(float(fused["loss"]) - float(expected["loss"])) < 0.02 * float(expected["loss"])


def test_a_young_adapter_is_not_rounded_away(smollm2_dir, tokenizer):
    """What matrices of the size of a first step do to the loss is what they do in float32.

    Added to values that are rounded to bfloat16 already, most of it would vanish.
    """
    if kernels.load() is None:
        pytest.skip(kernels.why_not())
    torch.manual_seed(0)
    text = "The quick brown fox jumps over the lazy dog and runs along the river until the sun goes down."
    examples = ChatEncoder(Renderer(tokenizer)).encode([TrainingExample("Tell me a story.", text)]).examples
    rounded = get_method("lora").wrap(load_model(smollm2_dir, dtype=torch.float32), LoraMethod(lora_dropout=0.0), [])
    rounded = rounded.to(torch.bfloat16)
    function = LossFunction(rounded)
    assert function.fused is not None, function.fused_reason
    # One step down the gradient's signs, as Adam's first one.
    gradients = step(rounded, function, pack(examples))
    matrices = {n: p for n, p in rounded.named_parameters() if "lora_B" in n}
    with torch.no_grad():
        for name, parameter in matrices.items():
            parameter -= 2e-4 * gradients[name].sign()
    exact = get_method("lora").wrap(load_model(smollm2_dir, dtype=torch.float32), LoraMethod(lora_dropout=0.0), [])
    exact.load_state_dict({name: value.float() for name, value in rounded.state_dict().items()})

    def gain(model, own: bool) -> float:
        measure = LossFunction(model)
        if own:
            measure.fused = None
        batch = pack(examples)
        with torch.no_grad():
            tuned = float(measure(batch))
            with model.disable_adapter():
                return (float(measure(batch)) - tuned) / batch.trained_tokens

    expected = gain(exact, own=True)
    assert expected > 0.02
    assert gain(rounded, own=False) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("family", ["llama biased", "qwen3"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_layers_keep_is_what_is_predicted(family, method):
    model = wrapped(tiny(family), method, r=5, target_modules=["q_proj", "down_proj"])
    function = LossFunction(model, ops=reference)
    assert function.fused is not None, function.fused_reason
    batch = pack(rows())
    for recompute in (False, "mlp", True):
        function.recompute_activations(recompute)
        kept = bytes_kept(function(batch))
        assert len(kept) == SMALL["num_hidden_layers"]
        # The last layer keeps what follows its attention at the trained positions alone.
        assert sorted(kept)[1:] == [batch.computed * function.fused.kept_bytes(recompute)] * (len(kept) - 1)


def bytes_kept(loss: torch.Tensor) -> list[int]:
    """Bytes that each fused layer behind a loss keeps, its weights left out."""
    found, todo = [], [loss.grad_fn]
    while todo:
        node = todo.pop()
        if type(node).__name__ == "LayerBackward":
            tensors = [node.saved_tensors[0]]
            for field in () if node.kept is None else dataclasses.fields(node.kept):
                value = getattr(node.kept, field.name)
                parts = value if isinstance(value, tuple) else (value,)
                tensors += [t for t in parts if t is not None]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            found.append(sum(storages.values()))
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    return found
