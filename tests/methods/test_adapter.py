"""Bottleneck adapters: the base at the start, the same logits however batched, cached, saved and loaded."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from luthier.data.batch import pack, pad
from luthier.data.encode import EncodedExample
from luthier.data.examples import TrainingExample
from luthier.deployment.merge import merge_model
from luthier.errors import UserError
from luthier.method_options import AdapterMethod
from luthier.methods import get_method
from luthier.methods.base import trainable_parameters
from luthier.methods.saved import fingerprint, load_saved
from luthier.models.virtual import cache_name
from luthier.pipeline import run
from luthier.recipe import Recipe
from luthier.training.fused import reference
from luthier.training.loss import LossFunction
from luthier.training.progress import Silent

COMMON = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": LLAMA | {"sliding_window": 8},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
}
ADAPTER = get_method("adapter")


def tiny(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
    return model.eval()


def wrapped(family, trained=True, **options):
    """With ``up`` filled with noise where it is to count as trained."""
    model = ADAPTER.wrap(tiny(family), AdapterMethod(**options), []).eval()
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bottleneck_up" in name:
                    parameter.normal_(std=0.2)
    return model


def ids(rows=2, length=12):
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def examples():
    made = []
    for row, length in zip(ids(3, 20), (20, 13, 7), strict=True):
        trained = torch.arange(length) % 2 == 1
        made.append(EncodedExample(row[:length].int().numpy(), trained.numpy(), None, 0))
    return made


class Stop(Exception):
    pass


class Stopping(Silent):
    """Stops a run at its third step, after a checkpoint at the second."""

    steps = 0

    def step(self, record):
        self.steps += 1
        if self.steps == 3:
            raise Stop


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_train_save_load(family, placement, tmp_path):
    base = tiny(family)
    base.save_pretrained(tmp_path / "base")
    print_before, before = fingerprint(base), base(ids()).logits
    base.name_or_path = str(tmp_path / "base")
    model = ADAPTER.wrap(base, AdapterMethod(placement=placement, reduction_factor=8), [])
    assert torch.equal(model(ids()).logits, before)
    sites = 2 * (2 if placement == "houlsby" else 1)
    trained = trainable_parameters(model)
    assert len(trained) == 4 * sites and all("bottleneck_" in n for n in trained)
    assert sum(p.numel() for p in trained.values()) == sites * (2 * 64 * 8 + 64 + 8)
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(ids()).logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert fingerprint(model) == print_before
    after = model(ids()).logits
    assert (after - before).abs().max() > 1e-3
    ADAPTER.save(model, tmp_path / "adapter")
    again = ADAPTER.load(tiny(family), tmp_path / "adapter").eval()
    assert torch.equal(again(ids()).logits, after)
    with again.disable_adapter():
        assert torch.equal(again(ids()).logits, before)
    assert torch.equal(again(ids()).logits, after)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_formula(activation):
    model = wrapped("llama", non_linearity=activation)
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(3, 96)
    h = x @ layer.base_layer.weight.T
    down, up = layer.bottleneck_down, layer.bottleneck_up
    inner = getattr(F, activation)(h @ down.weight.T + down.bias)
    torch.testing.assert_close(layer(x), h + inner @ up.weight.T + up.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_the_uncached(family):
    model = wrapped(family)
    out = model.generate(input_ids=ids(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    slow = ids()
    for _ in range(6):
        logits = model(input_ids=slow, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf
        slow = torch.cat([slow, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, slow)
    first = model(input_ids=ids()[:, :7], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for token in ids()[:, 7:].split(1, dim=1):
        steps.append(model(input_ids=token, **{cache_name(model): cache}, use_cache=True).logits)
    torch.testing.assert_close(
        torch.cat(steps, 1), model(input_ids=ids(), use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_packed_padded_and_recomputed_gradients_are_the_same(family):
    model = wrapped(family).train()
    function = LossFunction(model, ops=reference)
    assert function.packed and function.fused is None
    if family != "gemma3_text":
        assert "BottleneckLayer" in function.fused_reason
    found = []
    for way in ("packed", "padded", "recomputed"):
        if way == "padded":
            model.set_attn_implementation("eager")
            own = LossFunction(model, batching="padded")
            batch = pad(examples(), 0)
        else:
            own, batch = LossFunction(model), pack(examples())
        if way == "recomputed":
            own.recompute_activations()
        model.zero_grad()
        own(batch).backward()
        found.append({n: p.grad.clone() for n, p in trainable_parameters(model).items()})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_plain_peft_refuses_the_folder(tmp_path):
    from peft import PeftModel

    wrapped("llama").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["library"] == "luthier"
    with pytest.raises(KeyError, match="BOTTLENECK"):
        PeftModel.from_pretrained(tiny("llama"), str(tmp_path))


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    wrapped("llama").save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="no linear layer"):
        ADAPTER.load(tiny("gpt2"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, said in (
        ({"reduction_factor": 8}, "is \\("),
        ({"target_modules": config["target_modules"][:1]}, "not of"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            ADAPTER.load(tiny("llama"), tmp_path)


def test_places_by_name():
    model = wrapped("llama", target_modules=["v_proj", "layers.1.mlp.up_proj"])
    assert model.bottleneck_config.target_modules == (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    )
    with pytest.raises(UserError, match="down_proj"):
        wrapped("llama", target_modules=["down_prj"])
    odd = tiny("llama")
    odd.model.layers[1].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(UserError, match="1 layers that end an MLP"):
        ADAPTER.wrap(odd, AdapterMethod(), [])


def test_what_cannot_be_is_refused(tmp_path, tokenizer):
    for content, said in (
        ({"deployment": {"merge": True}}, "nonlinearity"),
        ({"model": {"added_tokens": ["<x>"]}}, "added tokens"),
        ({"method": {"name": "adapter", "placement": "pfeiffer", "target_modules": ["o_proj"]}}, "both say"),
        ({"task": "translation"}, "unknown task"),
    ):
        with pytest.raises(UserError, match=said):
            ADAPTER.check(Recipe.from_dict({"method": "adapter"} | content))
    with pytest.raises(UserError, match="nonlinearity"):
        merge_model(wrapped("llama"), tokenizer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_copy_is_its_own():
    model = wrapped("llama")
    twin = copy.deepcopy(model)
    with twin.disable_adapter():
        assert not torch.equal(twin(ids()).logits, model(ids()).logits)


def test_a_run_and_its_resumption(tmp_path, terse_model_dir):
    rows = [{"input": f"What is {i} + {i}?", "output": str(2 * i)} for i in range(8)]

    def recipe(name, **training):
        settings = {"report_to": [], "max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 2}
        return Recipe.from_dict(
            {
                "model": {"name": str(terse_model_dir), "dtype": "float32"},
                "data": {"split": {"validation": 0, "test": 0}},
                "method": {"name": "adapter", "adapter_dropout": 0.1},
                "training": settings | training,
                "evaluation": {"enabled": False},
                "output_dir": str(tmp_path / name),
            }
        )

    given = {"train": [TrainingExample.from_any(r) for r in rows]}
    whole = run(recipe("whole"), given=given)
    loaded = load_saved(whole.run_dir)
    assert loaded.method.name == "adapter"
    question = ids()
    with torch.no_grad():
        tuned = loaded.model.float()(question).logits
        with loaded.as_base() as base:
            assert not torch.equal(base(question).logits, tuned)

    with pytest.raises(Stop):
        run(recipe("cut"), given=given, reporter=Stopping())
    again = run(recipe("cut"), given=given, resume=True)
    for name, parameter in trainable_parameters(whole.model).items():
        assert torch.equal(parameter, dict(again.model.named_parameters())[name]), name
