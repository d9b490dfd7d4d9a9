"""Every method on every family: it trains what it says, learns, comes back from disk, merges, and resumes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from luthier.errors import UserError
from luthier.method_options import options_of
from luthier.methods import METHODS, get_method
from luthier.methods.base import trainable_parameters
from luthier.models.loading import load_model
from luthier.recipe import Recipe
from luthier.training.loss import LossFunction
from luthier.training.optimiser import MasterAdamW

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")

CASES = {
    "full": {},
    "full-frozen": {"frozen_layers": "first 1", "frozen_modules": ["embed_tokens|wte"]},
    "lora": {},
    "lora-named": {"target_modules": ["c_attn", "q_proj", "v_proj"]},
    "lora-rslora": {"use_rslora": True, "r": 16},
    "lora-dora": {"use_dora": True},
    "lora-plus": {"loraplus_lr_ratio": 8},
    "lora-patterns": {"rank_pattern": {"k_proj|c_proj": 4}, "alpha_pattern": {"(layers|h).1.*": 8.0}},
    "lora-layers": {"layers_to_transform": [1]},
    "lora-pissa": {"init_lora_weights": "pissa", "rank_pattern": {"k_proj|c_proj": 4}},
    "lora-pissa-all": {
        "init_lora_weights": "pissa",
        "use_rslora": True,
        "use_dora": True,
        "alpha_pattern": {"(layers|h).1.*": 8.0},
        "modules_to_save": ["lm_head"],
    },
    "mixed": {},
    "mixed-layers": {"layers_to_transform": "first 1", "modules_to_save": ["(layers|h).1", "embed_tokens|wte"]},
    "ia3": {},
}
# What these add beside others is the same everywhere but for tied embeddings and Conv1D, which two families have.
FEW = {"full-frozen", "lora-pissa", "lora-pissa-all", "mixed-layers"}
PAIRS = [(case, family) for case in CASES for family in (("llama", "gpt2") if case in FEW else FAMILIES)]
# A tenth of what these random models want; the defaults are for real ones.
RATES = {"full": 3e-3, "ia3": 5e-2}


def made(case, folder):
    """The method of a case, its options, and the model in float32 wrapped by it."""
    method = get_method(case.partition("-")[0])
    options = options_of(method.name)(
        **({"lora_dropout": 0.0} if method.name in ("lora", "mixed") else {}), **CASES[case]
    )
    torch.manual_seed(0)
    return method, options, method.wrap(load_model(folder, dtype=torch.float32), options, [])


def trained(case, folder, rows, steps=12):
    """What :func:`made` gives after some steps, and the loss before and after them."""
    method, options, model = made(case, folder)
    loss_function = LossFunction(model)
    parameters = trainable_parameters(model)
    optimiser = MasterAdamW(
        parameters,
        lr=1.0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        rates=method.rates(parameters, options),
    )
    batch = loss_function.batch(rows)
    losses = []
    for _ in range(steps + 1):
        loss = loss_function(batch) / batch.trained_tokens
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.clip(1.0)
        optimiser.step(RATES.get(method.name, 5e-3))
    optimiser.close()
    model.set_attn_implementation("sdpa")
    return method, model.eval(), losses


@torch.no_grad()
def logits(model, rows):
    return [model(input_ids=torch.tensor([row.input_ids.tolist()])).logits[0] for row in rows]


def test_every_method_has_its_cases():
    assert {case.partition("-")[0] for case in CASES} <= set(METHODS)
    assert {"full", "lora", "ia3"} <= {case.partition("-")[0] for case in CASES}


@pytest.mark.parametrize(("case", "family"), PAIRS)
def test_it_starts_as_the_base_and_learns(case, family, family_dirs, rows):
    _, _, fresh = made(case, family_dirs[family])
    base = load_model(family_dirs[family], dtype=torch.float32)
    for a, b in zip(logits(fresh.eval(), rows), logits(base, rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    _, _, losses = trained(case, family_dirs[family], rows)
    assert losses[-1] < losses[0] - (0.02 if case == "ia3" else 0.3), losses


def test_what_comes_back_in_another_process_is_what_was_trained(family_dirs, rows, tmp_path):
    """Plain transformers and PEFT load it, and its answers with a cache are those of the trained model without."""
    jobs, expected = [], {}
    for case, family in PAIRS:
        base_dir = family_dirs[family]
        method, model, _ = trained(case, base_dir, rows, steps=3)
        folder = tmp_path / f"{case}-{family}"
        method.save(model, folder)
        jobs.append({"folder": str(folder), "base": str(base_dir), "adapter": method.adapter})
        expected[str(folder)] = logits(model, rows)
        own = method.load(load_model(base_dir, dtype=torch.float32), folder).eval() if method.adapter else None
        if own is not None:
            for ours, theirs in zip(logits(own, rows), expected[str(folder)], strict=True):
                assert torch.equal(ours, theirs), (case, family)
        untouched = logits(load_model(base_dir, dtype=torch.float32), rows)
        assert float((untouched[0] - expected[str(folder)][0]).abs().max()) > 1e-3, (case, family)
    ids = [row.input_ids.tolist() for row in rows]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs, "rows": ids}))
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path)], check=True)
    for folder, (first, cached) in torch.load(tmp_path / "logits.pt").items():
        for ours, theirs, steps in zip(expected[folder], first, cached, strict=True):
            assert torch.equal(ours, theirs), folder
            torch.testing.assert_close(ours, steps, rtol=1e-4, atol=1e-4, msg=folder)


_FRESH = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

given = json.loads((Path(sys.argv[1]) / "jobs.json").read_text())
found = {}
with torch.no_grad():
    for job in given["jobs"]:
        model = AutoModelForCausalLM.from_pretrained(job["base"] if job["adapter"] else job["folder"])
        if job["adapter"]:
            model = PeftModel.from_pretrained(model, job["folder"])
        model.eval()
        whole, cached = [], []
        for row in given["rows"]:
            ids = torch.tensor([row])
            whole.append(model(input_ids=ids).logits[0])
            out, steps = model(input_ids=ids[:, :4], use_cache=True), []
            steps.append(out.logits[0])
            for at in range(4, len(row)):
                out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits[0])
            cached.append(torch.cat(steps))
        found[job["folder"]] = (whole, cached)
torch.save(found, Path(sys.argv[1]) / "logits.pt")
"""


@pytest.mark.parametrize(("case", "family"), [pair for pair in PAIRS if METHODS[pair[0].partition("-")[0]].merges])
def test_merged_is_unmerged(case, family, family_dirs, rows):
    _, model, _ = trained(case, family_dirs[family], rows, steps=3)
    wanted = logits(model, rows)
    merged = model.merge_and_unload()
    assert not any("lora" in name or "ia3" in name for name, _ in merged.named_parameters())
    for ours, theirs in zip(logits(merged, rows), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_options_reach_the_layers_they_name(family, family_dirs):
    _, _, model = made("lora-layers", family_dirs[family])
    numbers = {re.search(r"\.(?:layers|h)\.(\d+)\.", name)[1] for name in trainable_parameters(model)}
    assert numbers == {"1"}
    _, _, model = made("lora-patterns", family_dirs[family])
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    ranks = {name.rpartition(".")[2]: module.r["default"] for name, module in adapted.items()}
    assert {name for name, rank in ranks.items() if rank == 4} == ({"c_proj"} if family == "gpt2" else {"k_proj"})
    for name, module in adapted.items():
        assert module.scaling["default"] == (8 if ".1." in name else 32) / module.r["default"]
    _, _, model = made("ia3", family_dirs[family])
    assert all("ia3_l" in name for name in trainable_parameters(model))


def test_lora_plus_moves_b_so_many_times_farther(family_dirs, rows):
    """Adam's first step moves every number by the learning rate, whatever its gradient."""
    moved = {}
    for case in ("lora", "lora-plus"):
        method, options, model = made(case, family_dirs["llama"])
        parameters = trainable_parameters(model)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        # Without the zeros of B, A would have no gradient yet.
        with torch.no_grad():
            for name, p in parameters.items():
                if "lora_B" in name:
                    before[name] = p.normal_(std=0.1).clone()
        optimiser = MasterAdamW(
            parameters, lr=1.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-12, rates=method.rates(parameters, options)
        )
        loss_function = LossFunction(model)
        loss_function(loss_function.batch(rows)).backward()
        optimiser.step(1e-4)
        moved[case] = {
            kind: max(float((p.detach() - before[name]).abs().max()) for name, p in parameters.items() if kind in name)
            for kind in ("lora_A", "lora_B")
        }
    assert moved["lora"]["lora_A"] == pytest.approx(1e-4, rel=0.01)
    assert moved["lora"]["lora_B"] == pytest.approx(1e-4, rel=0.01)
    assert moved["lora-plus"]["lora_A"] == pytest.approx(1e-4, rel=0.01)
    assert moved["lora-plus"]["lora_B"] == pytest.approx(8e-4, rel=0.01)


def wrong(method, **options):
    return options_of(method)(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (wrong("lora", rank_pattern={"o_prj": 4}), "no layer with matrices is named 'o_prj'"),
        (wrong("lora", alpha_pattern={"layers.2.*": 4}), "no layer with matrices is named"),
        (wrong("lora", layers_to_transform=[0, 2]), "layers 0 to 1, not 2"),
        (wrong("lora", layers_to_transform="1-2"), "layers 0 to 1, not 2"),
        (wrong("mixed", layers_to_transform="last 3"), "layers 0 to 1, not -1"),
        (wrong("mixed", modules_to_save=["embed_token"]), "did you mean 'embed_tokens'?"),
        (wrong("lora", modules_to_save=["layers.1.mpl"]), "did you mean 'layers.1.mlp'?"),
        (wrong("full", frozen_modules=["lm_haed"]), "did you mean 'lm_head'?"),
        (wrong("full", frozen_layers="1-2"), "layers 0 to 1, not 2"),
        (wrong("full", frozen_layers="first 2", frozen_modules=["embed_tokens", "norm"]), "nothing is left to train"),
        (wrong("lora", init_lora_weights="pissa", r=65), "fewer than the rank 65"),
        (wrong("lora", init_lora_weights="pissa", target_modules=["embed_tokens"]), "PiSSA"),
        (wrong("lora", layers_to_transform=[]), "no layer is named"),
        (wrong("lora", target_modules=["q_prj"]), "LoRA does not fit this model"),
        (wrong("ia3", target_modules=["q_prj"]), "IA3 does not fit this model"),
    ],
)
def test_what_no_layer_answers_to_is_refused(options, message, family_dirs):
    with pytest.raises(UserError, match=re.escape(message)):
        get_method(options.name).wrap(load_model(family_dirs["llama"], dtype=torch.float32), options, [])


def test_methods_refuse_what_they_cannot_do():
    with pytest.raises(UserError, match="feedforward_modules names 'down_proj'"):
        Recipe.from_dict(
            {"method": {"name": "ia3", "target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}}
        )
    for pattern, message in (({"(": 4}, "no regular expression"), ({"q_proj": 0}, "greater than or equal to 1")):
        with pytest.raises(UserError, match=message):
            Recipe.from_dict({"method": {"name": "lora", "rank_pattern": pattern}})
    asked = {
        "merges": {"deployment": {"merge": True}},
        "embeds": {"model": {"added_tokens": ["<new>"]}},
        "divides": {"training": {"sharding": "full"}},
    }
    for name, method in METHODS.items():
        method.check(Recipe.from_dict({"method": name}))
        for able, section in asked.items():
            recipe = Recipe.from_dict({"method": name, **section})
            if getattr(method, able):
                method.check(recipe)
            else:
                words = {"merges": "merge", "embeds": "added tokens", "divides": "divided among processes"}
                with pytest.raises(UserError, match=words[able]):
                    method.check(recipe)
    for able, refused in (("merges", "prompt"), ("embeds", "ia3"), ("divides", "qlora")):
        assert getattr(METHODS["lora"], able) and not getattr(METHODS[refused], able)
