"""A mixture with a prefix: what is trained, at which rate, and who finds it on disk loads all of it or none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from card_code import code_of, said_by
from conftest import FAMILIES, tiny
from huggingface_hub import ModelCard
from peft import PeftModel
from rich.console import Console
from test_virtual_tokens import PowerCut, trained_a_little

from luthier.deployment.adapters import AdapterSet
from luthier.deployment.chat import chat
from luthier.deployment.merge import merge_adapter, merge_model
from luthier.errors import UserError
from luthier.finished import combine_saved, evaluate_run, merge_saved
from luthier.method_options import MixedMethod
from luthier.methods import method_of
from luthier.methods.base import trainable_parameters
from luthier.methods.mixed import MIXED_WITH_PREFIX
from luthier.methods.saved import load_saved
from luthier.models.loading import load_model, load_tokenizer
from luthier.models.virtual import VirtualTokens, own_logits
from luthier.pipeline import run
from luthier.recipe import Recipe
from luthier.training.optimiser import MasterAdamW
from luthier.tuners import MixedTuner

IDS = torch.arange(5, 25)[None]
DOCS = Path(__file__).parents[2] / "docs"


def recipe(folder: Path, base: Path, *, method: dict | None = None, **sections) -> Recipe:
    return Recipe.from_dict(
        {
            "model": {"name": str(base), "dtype": "float32"} | sections.pop("model", {}),
            "method": {"name": "mixed", "num_virtual_tokens": 18} | (method or {}),
            "training": {"report_to": [], "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4},
            "evaluation": {"max_new_tokens": 4},
            "output_dir": str(folder),
        }
        | sections
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, terse_model_dir) -> Path:
    """The folder of a run whose rows came from files."""
    folder = tmp_path_factory.mktemp("finished")
    rows = [{"input": f"Name the colour {w}.", "output": f"It is like {w * 3}."} for w in "abcdefghijkl"]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    data = {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")}
    run(recipe(folder / "run", terse_model_dir, data=data))
    return folder / "run"


def test_its_card_stands_above_both_parts_and_loads_both(finished, terse_model_dir):
    adapter = finished / "adapter"
    assert [str(card.relative_to(adapter)) for card in sorted(adapter.rglob("README.md"))] == ["README.md"]
    card = ModelCard.load(adapter / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["luthier", "mixed", "transformers"]
    for file in ("lora/adapter_config.json", "prefix/adapter_config.json", "luthier_base.json"):
        assert file in card.text and str(terse_model_dir) in (adapter / file).read_text()
    assert str(terse_model_dir.parent) not in card.content
    row = json.loads((finished / "evaluation" / "comparison.json").read_text())["rows"][0]
    code = code_of(card).replace('"QUESTION"', repr(row["asked"]))
    tokens = row["answers"]["tuned"]["token_ids"]
    tokenizer = load_tokenizer(terse_model_dir)
    right = tokenizer.decode(tokens, skip_special_tokens=True)
    assert said_by(code, base=terse_model_dir, adapter=adapter) == right + "\n"
    assert right != tokenizer.decode(row["answers"]["base"]["token_ids"], skip_special_tokens=True)


def test_it_trains_what_it_says_at_its_rates():
    options = MixedMethod(
        num_virtual_tokens=4, layers_to_transform="first 1", modules_to_save=["layers.1.mlp"], loraplus_lr_ratio=4
    )
    method = method_of(options)
    model = method.wrap(tiny("qwen3"), options, [])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameters = trainable_parameters(model)
    expected = {"lora_A": 1, "lora_B": 4, "modules_to_save": 0.1, "prompt_encoder": 5}
    kinds = {name: next(kind for kind in expected if kind in name) for name in parameters}
    assert set(kinds.values()) == set(expected)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if kinds[name] == "lora_B":  # whose zeros would leave A without a gradient
                before[name] = parameter.normal_(std=0.1).clone()
    rates = method.rates(parameters, options)
    optimiser = MasterAdamW(parameters, lr=1.0, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-12, rates=rates)
    virtual = VirtualTokens(model)
    virtual.reader(IDS, labels=IDS, **virtual.begun(1)).loss.backward()
    optimiser.step(1e-4)
    optimiser.close()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    assert not any(distance for name, distance in moved.items() if name not in parameters)
    # Adam's first step moves every number by its learning rate.
    for name, kind in kinds.items():
        assert moved[name] == pytest.approx(1e-4 * expected[kind], rel=0.02), name
    assert options.modules_to_save_lr_ratio == 0.1 and options.prefix_lr_ratio == 5
    plain = MixedMethod()
    assert method_of(plain).name == "mixed" and method_of(plain).merges and not method_of(plain).virtual_tokens(plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_hidden_size": 8}, "encoder_hidden_size changes nothing where num_virtual_tokens is 0"),
        ({"prefix_projection": False}, "prefix_projection changes nothing"),
        ({"prefix_lr_ratio": 2}, "prefix_lr_ratio changes nothing"),
        ({"num_virtual_tokens": -1}, "greater than or equal to 0"),
    ],
    ids=str,
)
def test_what_changes_nothing_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Recipe.from_dict({"method": {"name": "mixed"} | options})
    Recipe.from_dict({"method": {"name": "mixed"} | options | {"num_virtual_tokens": 4}})


def test_plain_peft_loads_it_in_another_process_by_the_recipe_of_the_documentation(family_dirs, tmp_path):
    jobs, expected = [], {}
    for family in FAMILIES:
        options = MixedMethod(num_virtual_tokens=7, lora_dropout=0.0, modules_to_save=["all-norms", "embed_tokens|wte"])
        model = method_of(options).wrap(load_model(family_dirs[family], dtype=torch.float32), options, [])
        trained_a_little(model)
        model.eval()
        model.set_attn_implementation("sdpa")
        MIXED_WITH_PREFIX.save(model, tmp_path / family / "adapter")
        jobs.append([str(family_dirs[family]), str(tmp_path / family)])
        with torch.no_grad():
            expected[family] = own_logits(model, IDS)
    lines = [line for page in ("methods.md", "zh/methods.md") for line in _recipe_of(DOCS / page)]
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :] and len(lines) == 6
    steps = "\n        ".join(lines[: len(lines) // 2])
    subprocess.run([sys.executable, "-c", _FRESH.replace("STEPS", steps), json.dumps(jobs), str(tmp_path)], check=True)
    for family, logits in zip(FAMILIES, torch.load(tmp_path / "logits.pt"), strict=True):
        assert torch.equal(logits, expected[family]), family


def _recipe_of(page: Path) -> list[str]:
    """The lines that load a mixture with a prefix."""
    text = page.read_text(encoding="utf-8")
    block = next(b for b in text.split("```") if b.startswith("python") and "adapter/prefix" in b)
    return [line for line in block.splitlines() if line.startswith("model = ")]


_FRESH = """
import json, os, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

found = []
with torch.no_grad():
    for base, run in json.loads(sys.argv[1]):
        os.chdir(run)
        os.symlink(".", "RUN")
        STEPS
        found.append(model.eval()(input_ids=torch.arange(5, 25)[None]).logits)
torch.save(found, sys.argv[2] + "/logits.pt")
"""


def test_half_precision_comes_back_bit_for_bit(tmp_path):
    options = MixedMethod(num_virtual_tokens=7)
    model = method_of(options).wrap(tiny("qwen3").bfloat16(), options, []).eval()
    MIXED_WITH_PREFIX.save(model, tmp_path)
    again = MIXED_WITH_PREFIX.load(tiny("qwen3").bfloat16(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(own_logits(model, IDS), own_logits(again, IDS))


def test_a_run_with_all_that_lora_has_resumes_bit_for_bit(tmp_path, terse_model_dir):
    rows = [{"input": f"Name the colour {w}.", "output": f"It is like {w * 3}."} for w in "abcdefghijkl"]
    given = {"train": rows[:8], "validation": rows[8:]}

    def made(folder: str) -> Recipe:
        method = {"init_lora_weights": "pissa", "use_dora": True, "layers_to_transform": "0-0", "loraplus_lr_ratio": 2}
        return recipe(
            tmp_path / folder, terse_model_dir, method=method, model={"added_tokens": ["<call>"]}, task="instruction"
        )

    whole = run(made("whole"), given=given)
    with pytest.raises(RuntimeError, match="power cut"):
        run(made("cut"), given=given, reporter=PowerCut())
    resumed = run(made("cut"), given=given, resume=True)
    parameters, again = (trainable_parameters(r.model) for r in (whole, resumed))
    for kind in ("lora_A", "modules_to_save", "trainable_tokens", "prompt_encoder", ".parametrizations."):
        assert any(kind in name for name in parameters), kind
    assert parameters.keys() == again.keys()
    assert all(torch.equal(parameter, again[name]) for name, parameter in parameters.items())
    saved = load_saved(tmp_path / "whole")
    with torch.no_grad():
        ours = own_logits(whole.model, IDS)
        assert torch.equal(ours, own_logits(saved.model, IDS))
        with saved.as_base() as base:
            assert not torch.allclose(ours, own_logits(base, IDS))


def test_the_run_says_what_it_trains_and_does_not_merge(finished, terse_model_dir):
    facts = json.loads((finished / "preflight.json").read_text())["facts"]
    assert facts["method"] == {
        "name": "mixed with a prefix",
        "trains": "low-rank matrices beside frozen weights, other modules whole, and keys and values before every "
        "text, in every layer",
        "merges": False,
    }
    saved = load_saved(finished)
    assert facts["parameters"]["trained"] > sum(p.numel() for p in saved.model.prompt_encoder.parameters())
    with pytest.raises(UserError, match="cannot be merged") as refused:
        merge_saved(finished)
    assert "num_virtual_tokens=0" in str(refused.value)
    with pytest.raises(UserError, match="cannot be merged"):
        merge_adapter(finished / "adapter", finished.parent / "merged")
    with pytest.raises(UserError, match="cannot become part of weights"):
        merge_model(saved.model, saved.tokenizer, finished.parent / "merged")
    assert not (finished.parent / "merged").exists()


def test_every_way_into_luthier_takes_both_parts_or_says_why_not(finished, terse_model_dir, tmp_path):
    saved = load_saved(finished / "adapter")
    with torch.no_grad():
        ours = own_logits(saved.model, IDS)
        matrices = own_logits(by_peft_parts(terse_model_dir, finished / "adapter", "lora"), IDS)
        assert not torch.allclose(ours, matrices, atol=1e-3)
        both = by_peft_parts(terse_model_dir, finished / "adapter", "lora", "prefix")
        assert torch.equal(ours, own_logits(both, IDS))
        with saved.as_base() as base:
            assert torch.equal(own_logits(base, IDS), own_logits(load_model(terse_model_dir), IDS))
    first = json.loads((finished / "evaluation/comparison.json").read_text())["models"]
    base, tuned = evaluate_run(finished, console=Console(quiet=True)).models
    assert base.metrics == first["base"]["metrics"] and tuned.metrics == first["tuned"]["metrics"]
    assert base.metrics["perplexity"] != tuned.metrics["perplexity"]
    turns = iter(["Name the colour a.", "/exit"])
    talk = chat(str(finished), max_new_tokens=3, console=Console(quiet=True), input_fn=lambda _: next(turns))
    assert [turn["role"] for turn in talk] == ["user", "assistant"]

    for read in (
        lambda: AdapterSet.load({"a": finished}),
        lambda: combine_saved([finished, shutil.copytree(finished, tmp_path / "twin")], [1, 1], tmp_path / "both"),
    ):
        with pytest.raises(UserError, match="stands alone") as refused:
            read()
        assert "num_virtual_tokens=0" in str(refused.value)
    # What knows of no parts finds no adapter, where it would answer without the prefix.
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(load_model(terse_model_dir), finished / "adapter")


def by_peft_parts(base: Path, folder: Path, *parts: str):
    model = load_model(base)
    for part in parts:
        model = PeftModel.from_pretrained(model, folder / part)
    return model.eval()


def test_half_of_one_and_another_base_are_refused(finished, terse_model_dir, tmp_path):
    folder = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    (folder / "prefix/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="saved in part"):
        load_saved(folder)
    shutil.rmtree(folder / "prefix")
    with pytest.raises(UserError, match="holds no model and no adapter"):
        load_saved(folder)
    other = load_model(terse_model_dir)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.normal_()
    other.save_pretrained(tmp_path / "other")
    folder = shutil.copytree(finished / "adapter", tmp_path / "moved")
    config = json.loads((folder / "lora/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "other")
    (folder / "lora/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="trained on another base"):
        load_saved(folder)


def test_from_python(tmp_path, terse_model_dir):
    rows = [{"input": f"Name the colour {w}.", "output": f"It is like {w * 3}."} for w in "abcdefgh"]
    tuner = MixedTuner(str(terse_model_dir), dtype="float32")
    training = {"max_steps": 1, "report_to": [], "num_virtual_tokens": 5, "prefix_lr_ratio": 2}
    tuner.train(rows, output_dir=tmp_path / "run", quiet=True, **training)
    with pytest.raises(UserError, match="mixed with a prefix cannot be merged"):
        tuner.merge_and_save(tmp_path / "merged")
    tuner.model.save_pretrained(tmp_path / "again")
    again = by_peft_parts(terse_model_dir, tmp_path / "again", "lora", "prefix")
    with torch.no_grad():
        assert torch.equal(own_logits(tuner.model, IDS), own_logits(again, IDS))
