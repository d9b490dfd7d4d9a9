"""Several adapters on one base: each answers as it does alone, what is combined is saved and merged as it is."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from saved_adapters import tuned

from luthier import AdapterSet
from luthier.errors import UserError
from luthier.methods.saved import load_saved
from luthier.models.loading import load_model, load_tokenizer

TEXT = "What is the capital of France?"


@pytest.fixture(scope="module")
def two(terse_model_dir, tmp_path_factory):
    """Folders of two LoRAs that differ in all that they may."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "orders": tuned(folder / "orders", terse_model_dir, seed=1, r=8),
        "polite": tuned(
            folder / "polite", terse_model_dir, seed=2, r=4, use_rslora=True, target_modules=["q_proj", "up_proj"]
        ),
    }


@torch.no_grad()
def logits(model, tokenizer):
    return model(**tokenizer(TEXT, return_tensors="pt")).logits.float()


def alone(folder):
    saved = load_saved(folder)
    return logits(saved.model, saved.tokenizer)


def test_each_answers_as_it_does_alone(two, terse_model_dir, tmp_path):
    more = {
        # Names that begin as another does, or that PEFT has parts of; layers that are trained whole; a DoRA.
        "order": tuned(tmp_path / "c", terse_model_dir, seed=3, modules_to_save=["embed_tokens"]),
        "default": tuned(tmp_path / "d", terse_model_dir, seed=4, use_dora=True),
        "a": tuned(tmp_path / "a", terse_model_dir, seed=5),
    }
    adapters = AdapterSet.load(two)
    for name, folder in more.items():
        adapters.add(name, folder)
    assert adapters.names == ("orders", "polite", "order", "default", "a") and adapters.active == "orders"
    base = logits(load_model(terse_model_dir), adapters.tokenizer)
    for name, folder in (two | more).items():
        with adapters.use(name) as model:
            assert adapters.active == name
            assert torch.equal(logits(model, adapters.tokenizer), alone(folder)), name
            with adapters.base() as untouched:
                assert adapters.active is None and torch.equal(logits(untouched, adapters.tokenizer), base), name
                with pytest.raises(UserError, match="off here"):
                    adapters.switch("polite")
        assert adapters.active == "orders"
        adapters.save(name, tmp_path / f"again-{name}")
        assert torch.equal(alone(tmp_path / f"again-{name}"), alone(folder)), name
    assert not any(p.requires_grad for p in adapters.model.parameters())
    with pytest.raises(UserError, match="'orders' is on"):
        adapters.remove("orders")
    adapters.switch("polite")
    adapters.remove("orders")
    assert "orders" not in adapters.names
    assert torch.equal(logits(adapters.model, adapters.tokenizer), alone(two["polite"]))


@pytest.mark.parametrize("method", ["ia3", "prompt", "prefix"])
def test_other_methods_are_switched_too(method, terse_model_dir, tmp_path):
    options = {} if method == "ia3" else {"num_virtual_tokens": 4}
    folders = {name: tuned(tmp_path / name, terse_model_dir, method=method, seed=ord(name), **options) for name in "pq"}
    adapters = AdapterSet.load(folders)
    for name, folder in folders.items():
        with adapters.use(name) as model:
            assert torch.equal(logits(model, adapters.tokenizer), alone(folder))
    with adapters.base() as model:
        assert torch.equal(logits(model, adapters.tokenizer), logits(load_model(terse_model_dir), adapters.tokenizer))
    adapters.save("q", tmp_path / "again")
    assert torch.equal(alone(tmp_path / "again"), alone(folders["q"]))
    with pytest.raises(UserError, match="only updates"):
        adapters.weigh({"p": 1, "q": 1})


def test_adapters_with_the_same_added_tokens_are_switched(terse_model_dir, tmp_path):
    folders = {n: tuned(tmp_path / n, terse_model_dir, seed=ord(n), tokens=["<call>", "capital"]) for n in "pq"}
    adapters = AdapterSet.load(folders)
    for name, folder in folders.items():
        with adapters.use(name) as model:
            assert "capital" in adapters.tokenizer.tokenize(TEXT)
            assert torch.equal(logits(model, adapters.tokenizer), alone(folder))
    with pytest.raises(UserError, match="embeddings of tokens"):
        adapters.weigh({"p": 1, "q": 1})


def test_a_combination_is_saved_and_merged_as_it_is(two, terse_model_dir, tmp_path):
    from peft import PeftModel

    adapters = AdapterSet.load(two)
    combined = adapters.weigh({"orders": 0.7, "polite": -0.3})
    assert combined.name == "orders+polite" and combined.ranks == (8, 12) and combined.lost < 1e-6
    assert adapters.active == "orders"
    with adapters.use(combined.name) as model:
        wanted = logits(model, adapters.tokenizer)
    assert adapters.save(combined.name, tmp_path / "adapter").numbers["candidate_max"] == 0
    plain = PeftModel.from_pretrained(load_model(terse_model_dir), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain, adapters.tokenizer), wanted)
    again = AdapterSet.load({"both": tmp_path / "adapter", **two})
    assert torch.equal(logits(again.model, again.tokenizer), wanted)
    assert again.tokenizer.chat_template == adapters.tokenizer.chat_template

    ties = adapters.weigh({"orders": 1, "polite": 1}, "ties", name="ties", rank="full")
    assert ties.lost == 0 and ties.ranks == (32, 64)
    for name in (combined.name, "ties"):
        assert adapters.merge(name, tmp_path / f"merged-{name}").passed
        with adapters.use(name) as model:
            torch.testing.assert_close(
                logits(load_model(tmp_path / f"merged-{name}"), adapters.tokenizer),
                logits(model, adapters.tokenizer),
                rtol=1e-3,
                atol=1e-3,
            )
    assert 0 < adapters.distance(combined.name, "orders") < adapters.distance(combined.name)
    assert adapters.distance("ties", "ties") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "merged-orders+polite", "merged-ties"]


def test_what_cannot_live_together_is_refused(two, terse_model_dir, tmp_path):
    base = load_model(terse_model_dir)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.normal_()
    base.save_pretrained(tmp_path / "other-base")
    load_tokenizer(terse_model_dir).save_pretrained(tmp_path / "other-base")
    other = tuned(tmp_path / "other", tmp_path / "other-base")
    adapters = AdapterSet.load(two)
    with pytest.raises(
        UserError, match=f"'new' was trained on another base, '{tmp_path}/other-base'.*{terse_model_dir}"
    ):
        adapters.add("new", other)
    # Plain PEFT's folders have no fingerprint: that of the base they name counts.
    (other / "luthier_base.json").unlink()
    with pytest.raises(UserError, match="another base"):
        adapters.add("new", other)
    for method in ("prompt", "ia3"):
        with pytest.raises(UserError, match=rf"tuned by method {method} .* and 'orders' by lora"):
            adapters.add("new", tuned(tmp_path / method, terse_model_dir, method=method))
    with pytest.raises(UserError, match="stand alone"):
        adapters.add("new", tuned(tmp_path / "adapter", terse_model_dir, method="adapter"))
    with pytest.raises(UserError, match="tokens were added in training"):
        adapters.add("new", tuned(tmp_path / "tokens", terse_model_dir, tokens=["<call>"]))
    classes = tuned(tmp_path / "classes", terse_model_dir)
    record = json.loads((classes / "luthier_base.json").read_text())
    record |= {"task": "classification", "labels": ["good", "bad"]}
    (classes / "luthier_base.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="another head than 'orders'"):
        adapters.add("new", classes)
    quantized = tuned(tmp_path / "quantized", terse_model_dir)
    record = json.loads((quantized / "luthier_base.json").read_text())
    record["quantization"] = {"bits": 4, "quant_type": "nf4", "double_quant": True}
    (quantized / "luthier_base.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"in 4 bits \(nf4\), and 'orders' beside one as it is stored"):
        adapters.add("new", quantized)
    config = json.loads((quantized / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    (quantized / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="began as pissa"):
        adapters.add("new", quantized)
    with pytest.raises(UserError, match="there is an adapter 'polite'"):
        adapters.add("polite", two["polite"])
    for name in ("", "q_proj", "a.b", "a/b", "lora_A", "weight"):
        with pytest.raises(UserError, match="cannot be an adapter's name"):
            adapters.add(name, two["polite"])
    for path, message in (("nowhere", "there is no folder"), (terse_model_dir, "holds no adapter")):
        with pytest.raises(UserError, match=message):
            adapters.add("new", path)
    with pytest.raises(UserError, match="no adapter is named"):
        AdapterSet.load({})
    assert adapters.names == ("orders", "polite") and adapters.active == "orders"
    with adapters.use("polite") as model:
        assert torch.equal(logits(model, adapters.tokenizer), alone(two["polite"]))


def test_what_cannot_be_combined_is_refused(two, terse_model_dir, tmp_path):
    adapters = AdapterSet.load(two)
    template = adapters.tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    adapters.add("template", tuned(tmp_path / "template", terse_model_dir, template=template))
    assert adapters.tokenizer.chat_template != template
    with adapters.use("template"):
        assert adapters.tokenizer.chat_template == template
    with pytest.raises(UserError, match="'orders' and 'template' cannot be combined: the chat template"):
        adapters.weigh({"orders": 0.5, "template": 0.5})
    adapters.add("whole", tuned(tmp_path / "whole", terse_model_dir, modules_to_save=["norm"]))
    with pytest.raises(UserError, match="'whole' cannot be combined"):
        adapters.weigh({"orders": 0.5, "whole": 0.5})
    for weights, name, message in (
        ({"orders": 1, "pilote": 1}, None, "there is no adapter 'pilote'"),
        ({"orders": 1, "polite": 1}, "polite", "there is an adapter 'polite'"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.weigh(weights, name=name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        adapters.save("orders", tmp_path / "mine")
    assert adapters.names == ("orders", "polite", "template", "whole")


def luthier(monkeypatch, *words):
    from luthier.cli import main

    monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_the_command_line_combines(two, tmp_path, monkeypatch, capsys):
    runs, out = two.values(), tmp_path / "both"
    assert luthier(monkeypatch, "combine", *runs, "--weights", "0.7,0.3", "-o", out) == 0
    said = capsys.readouterr().out
    assert "ranks 8 to 12: 0.00% of the combined update is lost" in said and "passed" in said
    told = json.loads((out / "luthier_combine.json").read_text())
    assert told["weights"] == {"1-orders": 0.7, "2-polite": 0.3} and set(told["answers"]) == {*told["weights"], "base"}
    by_hand = AdapterSet.load(two)
    by_hand.switch(by_hand.weigh({"orders": 0.7, "polite": 0.3}).name)
    assert torch.equal(alone(out), logits(by_hand.model, by_hand.tokenizer))

    asked = ("combine", *runs, "--weights", "1,-1", "--method", "dare_ties", "--density", "0.3", "--seed", "7")
    assert luthier(monkeypatch, *asked, "-o", tmp_path / "small") == 0
    assert "a higher --rank loses less" in capsys.readouterr().out
    assert luthier(monkeypatch, *asked, "-o", tmp_path / "model", "--merge") == 0
    assert "0.00% of the combined update is lost" in capsys.readouterr().out
    by_hand.weigh({"orders": 1, "polite": -1}, "dare_ties", name="dare", density=0.3, seed=7, rank="full")
    by_hand.switch("dare")
    merged = logits(load_model(tmp_path / "model"), by_hand.tokenizer)
    torch.testing.assert_close(merged, logits(by_hand.model, by_hand.tokenizer), rtol=1e-3, atol=1e-3)

    one = two["orders"]
    for words, message in (
        ((one, "--weights", "1"), "one adapter alone"),
        ((*runs, "--weights", "1"), "2 adapters have 1 weights"),
        ((*runs, "--weights", "1,x"), "are no numbers"),
        ((one, one, "--weights", "1,1"), "named twice"),
        ((*runs, "--weights", "1,1", "--method", "mean"), "unknown combination 'mean'"),
    ):
        assert luthier(monkeypatch, "combine", *words, "-o", tmp_path / "none") == 2
        assert message in capsys.readouterr().err
    assert luthier(monkeypatch, "combine", *runs, "--weights", "1,1", "-o", out) == 2
    assert "is not empty" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.fixture(params=[0, 4, 5])
def experts(request, tokenizer, tmp_path):
    """A LoRA on fused experts in bfloat16. By the first two seeds rounding the merged weights sends a token to other
    experts and the gate's own measure of rounding does not; by the last one it is the other way round."""
    import transformers

    torch.manual_seed(request.param)
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tuned(tmp_path / "adapter", tmp_path / "base", r=4, lora_dropout=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_on_fused_experts_is_merged(experts, dtype, tokenizer, tmp_path):
    from luthier.deployment.merge import merge_adapter

    report = merge_adapter(experts, tmp_path / "merged", dtype=dtype)
    assert report.numbers["tuning_mean"] > 0.1
    assert report.numbers["candidate_mean"] < 1.3 * max(report.numbers["rounding_mean"], 1e-4)
    if dtype == torch.float32:
        unmerged = load_saved(experts, dtype=torch.float32).model
        merged = load_model(tmp_path / "merged")
        assert torch.allclose(logits(merged, tokenizer), logits(unmerged, tokenizer), atol=1e-3)


def test_a_lora_on_fused_experts_is_merged_shard_by_shard(experts, tmp_path):
    from luthier.deployment.merge import merge_adapter

    report = merge_adapter(experts, tmp_path / "merged", dtype=torch.bfloat16, shard_by_shard=True)
    assert {"candidate_rerouted", "rounding_rerouted"} <= report.numbers.keys()
    assert report.numbers["candidate_mean"] < 1.3 * report.numbers["rounding_mean"]


@pytest.mark.parametrize("lost", ["one expert", "the router"])
def test_a_wrong_merge_of_experts_is_refused(experts, lost, tokenizer):
    from luthier.deployment.parity import check_parity

    unmerged = load_saved(experts, dtype=torch.bfloat16)
    base = load_model(unmerged.base_name, dtype=torch.bfloat16)
    merged = copy.deepcopy(unmerged.model).float().merge_and_unload().to(torch.bfloat16)
    prompts = ["The capital of France is", "def add(a, b):\n    return"]
    asked = (unmerged.model, merged, tokenizer, prompts)
    assert check_parity(*asked, base=base).passed
    with torch.no_grad():
        if lost == "one expert":
            for ours, theirs in zip(merged.model.layers, base.model.layers, strict=True):
                ours.mlp.experts.gate_up_proj[1] = theirs.mlp.experts.gate_up_proj[1]
        else:
            merged.model.layers[1].mlp.gate.weight.mul_(-1)
    assert not check_parity(*asked, base=base).passed
