"""PiSSA and mixtures: what is trained, at which rate, from which start, and a whole run of both together."""

from __future__ import annotations

import re

import pytest
import torch
from families import tiny

from luthier.data.examples import TrainingExample
from luthier.errors import UserError
from luthier.method_options import FullMethod, LoraMethod, MixedMethod
from luthier.methods import get_method
from luthier.methods.base import trainable_parameters
from luthier.methods.saved import fingerprint, load_saved
from luthier.models.loading import load_model
from luthier.pipeline import run
from luthier.recipe import Recipe
from luthier.training.progress import Silent
from luthier.tuners import MixedTuner

IDS = torch.arange(5, 25)[None]


def steps(model, count=4):
    """Some AdamW steps on the model's own loss."""
    optimiser = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(count):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_is_that_of_peft_but_for_the_base_it_leaves_alone(family):
    from peft import LoraConfig, get_peft_model

    # Bare, so that the matrices are PEFT's own whatever the pattern says; rsLoRA's scale is rounded differently.
    options = LoraMethod(
        init_lora_weights="pissa", r=4, rank_pattern={"c_proj|o_proj": 6}, alpha_pattern={"(h|layers).1.*": 8}
    )
    ours = get_method("lora").wrap(tiny(family), options, [])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=32,
        init_lora_weights="pissa",
        target_modules="all-linear",
        rank_pattern=options.rank_pattern,
        alpha_pattern=options.alpha_pattern,
    )
    theirs = get_peft_model(tiny(family), config)
    for _ in range(2):
        mine = {
            n.replace(".parametrizations.weight.original", ".weight"): p for n, p in trainable_parameters(ours).items()
        }
        peft = trainable_parameters(theirs)
        assert mine.keys() == peft.keys() and len(mine) >= 16
        for name, parameter in peft.items():
            torch.testing.assert_close(mine[name], parameter, rtol=1e-3, atol=1e-4, msg=name)
        steps(ours)
        steps(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-3, atol=1e-3)
        with ours.disable_adapter():
            assert torch.equal(ours(IDS).logits, tiny(family)(IDS).logits)
        with theirs.disable_adapter():
            assert not torch.allclose(theirs(IDS).logits, tiny(family)(IDS).logits, atol=0.1)


def test_pissa_begins_as_the_base_in_bfloat16_too():
    wanted = tiny("qwen3").bfloat16()
    model = get_method("lora").wrap(tiny("qwen3").bfloat16(), LoraMethod(init_lora_weights="pissa"), []).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, wanted(IDS).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, "lora_dropout must be 0"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"modules_to_save": ["("]}, "no regular expression"),
        ({"layers_to_transform": "20-"}, "no range of layers"),
        ({"name": "mixed", "modules_to_save": []}, "at least 1 item"),
    ],
    ids=str,
)
def test_what_is_written_wrongly_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(UserError, match=message):
        Recipe.from_dict({"method": {"name": "lora"} | options})


def test_pissa_and_quantised_weights_are_refused():
    with pytest.raises(UserError, match=r"use method\.name=lora"):
        get_method("qlora").check(Recipe.from_dict({"method": {"name": "qlora", "init_lora_weights": "pissa"}}))


def test_a_mixture_trains_what_it_names_at_its_rates():
    options = MixedMethod(layers_to_transform="first 1", modules_to_save=["layers.1.mlp", "norm"], loraplus_lr_ratio=4)
    method = get_method("mixed")
    model = method.wrap(tiny("qwen3"), options, [])
    names = trainable_parameters(model)
    whole = {re.search(r"base_model\.model\.(\S+)\.modules_to_save", n)[1] for n in names if "lora" not in n}
    # PEFT alone would take q_norm, k_norm and the two norms of every layer for `norm` as well.
    assert whole == {"model.norm"} | {f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")}
    assert {re.search(r"layers\.(\d)", n)[1] for n in names if "lora" in n} == {"0"}
    rates = method.rates(names, options)
    assert {rates.get(n, 1) for n in names if "lora_A" in n} == {1}
    assert {rates[n] for n in names if "lora_B" in n} == {4}
    assert {rates[n] for n in names if "modules_to_save" in n} == {0.1}
    # What begins at random has farther to go than a norm that was trained before.
    rates = method.rates(names, options, fresh=["model.norm"])
    assert {n for n in names if "modules_to_save" in n and n not in rates} == {n for n in names if "model.norm." in n}


def test_frozen_parts_stay_and_the_rest_is_trained():
    model = get_method("full").wrap(tiny("qwen3"), FullMethod(frozen_layers=[0], frozen_modules=["embed_tokens"]), [])
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {n for n, _ in model.named_parameters() if ".layers.0." in n or "embed_tokens" in n}
    with pytest.raises(UserError, match="added tokens would stay"):
        get_method("full").wrap(tiny("llama"), FullMethod(frozen_modules=["lm_head"]), [7])


class PowerCut(Silent):
    """Fails after the third step."""

    def step(self, record) -> None:
        if record["step"] == 3:
            raise RuntimeError("power cut")


def test_a_run_from_end_to_end_and_resumed(tmp_path, tiny_model_dir):
    rows = [TrainingExample(f"Name the colour {w}.", f"It is like {w * 3}.") for w in "abcdefghijkl"]
    given = {"train": rows[:8], "validation": rows[8:10], "test": rows[10:]}

    def recipe(folder: str):
        return Recipe.from_dict(
            {
                "model": {"name": str(tiny_model_dir), "dtype": "float32"},
                "method": {
                    "name": "mixed",
                    "init_lora_weights": "pissa",
                    "layers_to_transform": "0-0",
                    "modules_to_save": ["all-norms", "layers.1.mlp"],
                },
                "training": {"report_to": [], "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4},
                "evaluation": {"enabled": folder == "whole", "max_new_tokens": 4},
                "deployment": {"merge": folder == "whole"},
                "output_dir": str(tmp_path / folder),
            }
        )

    whole = run(recipe("whole"), given=given)
    base, tuned = whole.comparison.models
    assert (base.name, tuned.name) == ("base", "tuned")
    assert base.metrics["perplexity"] != tuned.metrics["perplexity"]
    with pytest.raises(RuntimeError, match="power cut"):
        run(recipe("cut"), given=given, reporter=PowerCut())
    resumed = run(recipe("cut"), given=given, resume=True)
    weights = trainable_parameters(resumed.model)
    assert any(".parametrizations." in n for n in weights) and any(".modules_to_save." in n for n in weights)
    assert all(torch.equal(p, weights[n]) for n, p in trainable_parameters(whole.model).items())
    base, saved = load_model(tiny_model_dir), load_saved(tmp_path / "whole")
    assert f'"{fingerprint(base)}"' in (tmp_path / "whole/adapter/luthier_base.json").read_text()
    merged = load_model(tmp_path / "whole/merged")
    with torch.no_grad():
        ours = whole.model(IDS).logits
        assert torch.equal(ours, saved.model(IDS).logits)
        torch.testing.assert_close(ours, merged(IDS).logits, rtol=1e-3, atol=1e-3)
        for tuned in (whole.model, saved.model):
            with tuned.disable_adapter():
                assert torch.equal(tuned(IDS).logits, base(IDS).logits)


def test_from_python():
    options = {"r": 4, "modules_to_save": ["norm"], "layers_to_transform": "last 4"}
    made = MixedTuner("smollm2")._recipe("out", options).method
    assert made.model_dump(include=options.keys()) == options and made.name == "mixed"
