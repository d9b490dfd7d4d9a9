"""QLoRA: the base in 4 or 8 bits learns as the whole one does, and what is saved and merged is what was trained."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil

import pytest
import torch

from luthier.data.render import prompt_text
from luthier.deployment.merge import _on_stored_base as on_stored_base
from luthier.deployment.merge import merge_adapter, merge_model
from luthier.deployment.parity import ParityReport, render_parity
from luthier.deployment.quantized_merge import weigh_merge
from luthier.errors import UserError
from luthier.methods import get_method
from luthier.methods.base import parameter_counts, trainable_parameters
from luthier.methods.saved import fingerprint, load_saved, write_record
from luthier.models.loading import add_tokens, load_model, load_tokenizer, set_stop_tokens
from luthier.models.quantized import Quantization, held_bytes, is_quantized, quantized_from
from luthier.recipe import Recipe

bnb = pytest.importorskip("bitsandbytes")

QUESTIONS = ("What is the capital of France?", "def fib(n): what does it do?", "3 + 4 = ?")
ROWS = [
    {"input": f"Which tree has number {i}?", "output": f"Number {i} is the {t}."}
    for i, t in enumerate(
        (
            "amber oak",
            "silver birch",
            "red cedar",
            "black alder",
            "white willow",
            "copper beech",
            "wych elm",
            "grey poplar",
        )
    )
]


def recipe(method="qlora", **options):
    return Recipe.from_dict({"method": {"name": method, "lora_dropout": 0.0, **options}})


def wrapped(folder, made, *, tokens=(), dtype=torch.float32):
    """The model of a recipe in train mode, its tokenizer, and the method."""
    method = get_method(made.method.name)
    model = load_model(folder, dtype=dtype, quantization=method.quantization(made.method))
    tokenizer = load_tokenizer(folder)
    ids = add_tokens(model, tokenizer, list(tokens))
    set_stop_tokens(model, tokenizer)
    torch.manual_seed(1)
    return method.wrap(model, made.method, ids).train(), tokenizer, method


def batches(vocabulary, count, size=(4, 24)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, size, generator=generator) for _ in range(count)]


def steps(model, inputs, rate=5e-3, between=None):
    """Losses of one AdamW step a batch."""
    optimiser = torch.optim.AdamW(trainable_parameters(model).values(), lr=rate, weight_decay=0.0)
    losses = []
    for ids in inputs:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        if between is not None:
            between()
    return losses


def save(model, tokenizer, method, folder, name, made):
    method.save(model, folder)
    tokenizer.save_pretrained(folder)
    write_record(folder, model, str(name), method=method, recipe=made)
    return folder


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids).logits


def prompts(tokenizer):
    return [prompt_text(tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "gpt2"])
def shape(request, tmp_path_factory, tokenizer):
    """A tiny random model of a family, as a folder; 300 tokens."""
    import transformers

    common = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
              "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": request.param == "gemma3"}  # fmt: skip
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, common),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, common),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, common),
        "gpt2": (
            transformers.GPT2Config,
            transformers.GPT2LMHeadModel,
            {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2,
             "bos_token_id": 1, "eos_token_id": 2},
        ),
    }  # fmt: skip
    config, kind, options = kinds[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    kind(config(**options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_each_family_trains_saves_and_loads(shape, tmp_path, bits):
    """Only the matrices train, the head is never quantised, and other tools load the adapter on either base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = recipe(bits=bits)
    model, tokenizer, method = wrapped(shape, made)
    base = model.get_base_model()
    assert all("lora_" in name for name in trainable_parameters(model))
    assert (
        not is_quantized(base.get_output_embeddings().weight) and base.get_input_embeddings().weight.is_floating_point()
    )
    assert sum(is_quantized(p) for p in base.parameters()) == len(trainable_parameters(model)) // 2
    assert parameter_counts(model)[1] == parameter_counts(wrapped(shape, recipe("lora"))[0])[1]

    (ids,) = batches(300, 1)
    losses = steps(model, [ids] * 5)
    assert losses[-1] < losses[0] - 0.05
    tuned = logits(model, ids)
    with model.disable_adapter():
        assert not torch.equal(logits(model, ids), tuned)
    folder = save(model, tokenizer, method, tmp_path / "adapter", shape, made)
    reloaded = load_saved(folder, dtype=torch.float32)
    assert reloaded.method is method and torch.equal(logits(reloaded.model, ids), tuned)

    # Plain PEFT and transformers, without a line of ours.
    config = made.method and method.quantization(made.method).config(torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(
        shape, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    beside = logits(PeftModel.from_pretrained(plain, str(folder)), ids)
    if bits == 4 and bnb.functional.has_avx512bf16():
        # There bitsandbytes multiplies in bfloat16, whatever it was told.
        assert float((beside - tuned).abs().mean()) < 0.1 * float(tuned.std())
    else:
        assert torch.equal(beside, tuned)
    full = AutoModelForCausalLM.from_pretrained(shape, dtype=torch.float32)
    untuned = logits(full, ids)
    on_full = logits(PeftModel.from_pretrained(full, str(folder)), ids)
    assert (on_full - tuned).abs().mean() < (untuned - tuned).abs().mean()

    # A cache changes nothing.
    with torch.no_grad():
        first = model(input_ids=ids[:, :12], use_cache=True)
        rest = model(input_ids=ids[:, 12:], past_key_values=first.past_key_values, use_cache=True)
    # 8 bits round the inputs of a product by the columns that stand out in the batch.
    close = {"atol": 1e-3, "rtol": 1e-3} if bits == 4 else {"atol": 0.2, "rtol": 0.1}
    torch.testing.assert_close(rest.logits, tuned[:, 12:], **close)


def test_training_after_an_evaluation_learns_as_without_one(terse_model_dir, monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights in an evaluation; here one is feigned."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    inputs = batches(600, 1) * 4

    def run(between):
        model, _, _ = wrapped(terse_model_dir, recipe())
        flags = [m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert len(flags) == 14 and not any(flags)

        def evaluate():
            logits(model, inputs[0])
            model.train()

        return steps(model, inputs, between=evaluate if between else None)

    with_one, without = run(True), run(False)
    assert with_one == without and without[-1] < without[0]


def learn(folder, count, rate):
    """A model tuned in 4 and 8 bits and as it is, on the same rows: ``bits → (model, tokenizer, losses)``."""
    found = {}
    for key, made in {"lora": recipe("lora"), "4": recipe(), "8": recipe(bits=8)}.items():
        model, tokenizer, _ = wrapped(folder, made)
        texts = [f"{row['input']} {row['output']}" for row in ROWS[:4]]
        ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").input_ids
        found[key] = (model, tokenizer, steps(model, [ids] * count, rate=rate))
    return found


@pytest.fixture(scope="module")
def learnt(terse_model_dir):
    return learn(terse_model_dir, 20, 1e-2)


@pytest.fixture(scope="module")
def really_learnt(smollm2_dir):
    return learn(smollm2_dir, 6, 1e-3)


def learns_as_lora(learnt, bits):
    whole, quantized = learnt["lora"][2], learnt[bits][2]
    assert whole[-1] < 0.75 * whole[0]
    # The quantised base starts a little worse, and what is learnt makes up for it.
    assert quantized[-1] == pytest.approx(whole[-1], rel=0.15 if bits == "4" else 0.05)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_it_learns_as_lora_does(learnt, bits):
    learns_as_lora(learnt, bits)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4", "8"])
def test_the_real_model_learns_as_with_lora(really_learnt, bits):
    learns_as_lora(really_learnt, bits)


def test_weights_take_less_memory(learnt):
    whole, four, eight = (learnt[k][0] for k in ("lora", "4", "8"))
    head = whole.get_input_embeddings().weight.nbytes
    linear = sum(p.nbytes for n, p in whole.named_parameters() if p.ndim == 2 and "layers" in n and "lora_" not in n)
    for model, bits in ((four, 4.2), (eight, 8.1)):
        saved = held_bytes(whole) - held_bytes(model)
        assert linear * (1 - bits / 32) < saved < linear * (1 - (bits - 0.2) / 32) and head < held_bytes(model)


@pytest.mark.slow
def test_merging_goes_into_the_stored_weights(really_learnt, tmp_path):
    """The real model: what is added is what was learnt, and what each way costs is measured and printed."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM

    model, tokenizer = really_learnt["4"][:2]
    report = merge_model(model, tokenizer, tmp_path / "merged", prompts=prompts(tokenizer))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    assert [p for p in (tmp_path / "merged").iterdir() if p.is_dir()] == []
    numbers = report.numbers
    assert numbers["change_apart"] < 1e-3 and numbers["change_share"] == pytest.approx(1, abs=1e-3)
    assert numbers["candidate_mean"] < 0.2 * numbers["tuning_mean"]
    assert all(numbers[f"loss_{n}"] > 0 for n in ("trained", "merged", "merged_quantized", "stored_base"))
    console = Console(record=True, width=120)
    console.print(render_parity(report))
    assert "loss merged quantized" in console.export_text()
    assert "loss_merged" in (tmp_path / "merged" / "luthier_merge.json").read_text()


def unpacked(layer):
    """``[out, in]`` of a linear layer, whatever it is held in."""
    weight = layer.weight
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state) if is_quantized(weight) else weight.float()


@pytest.mark.parametrize("way", ["memory", "disk"])
@pytest.mark.parametrize("stored_as", [torch.float32, torch.bfloat16])
def test_merging_into_four_bits_would_lose_the_tuning(terse_model_dir, tmp_path, way, stored_as):
    """The update is in the merged weights to their rounding; PEFT's merge into the 4-bit ones loses most of it."""
    made, folder = recipe(), tmp_path / "base"
    load_model(terse_model_dir, dtype=stored_as).save_pretrained(folder)
    load_tokenizer(terse_model_dir).save_pretrained(folder)
    model, tokenizer, method = wrapped(folder, made)
    asked = prompts(tokenizer)
    steps(model, [tokenizer(asked[0], return_tensors="pt").input_ids] * 4, rate=5e-4)
    model.eval()
    if way == "memory":
        report = merge_model(model, tokenizer, tmp_path / "merged", prompts=asked)
    else:
        saved = save(model, tokenizer, method, tmp_path / "adapter", folder, made)
        report = merge_adapter(saved, tmp_path / "merged", prompts=asked)
    assert report.numbers["loss_trained"] > 0
    assert report.numbers["change_apart"] < 5e-3
    merged, stored = load_model(tmp_path / "merged"), load_model(folder)
    assert merged.dtype == torch.float32 and stored.dtype == stored_as
    into_four_bits = copy.deepcopy(model).merge_and_unload()

    def lost(after, before):
        """Share of the update that is not in the weights."""
        shares = []
        for name, layer in model.get_base_model().named_modules():
            if hasattr(layer, "get_delta_weight"):
                delta = layer.get_delta_weight("default").detach()
                moved = unpacked(after.get_submodule(name)) - unpacked(before.get_submodule(name))
                shares.append(((moved - delta).norm() / delta.norm()).item())
        return max(shares)

    assert lost(merged, stored) < 1e-4
    quantized = load_model(folder, dtype=torch.float32, quantization=Quantization())
    assert lost(into_four_bits, quantized) > 0.5


@pytest.fixture(
    scope="module", params=[(4, 3), (4, 30), (8, 3)], ids=["4 bits, young", "4 bits, grown", "8 bits, young"]
)
def merging(request, terse_model_dir, tmp_path_factory):
    """A trained model, and its adapter on the stored base."""
    bits, count = request.param
    model, tokenizer, _ = wrapped(terse_model_dir, recipe(bits=bits))
    steps(model, [tokenizer(QUESTIONS[0], return_tensors="pt").input_ids] * count, rate=1e-3)
    model.eval()
    whole = on_stored_base(model, quantized_from(model), tmp_path_factory.mktemp("merging") / "adapter")
    return model, tokenizer, whole


def weighed(merging, factor, layers=""):
    """The report of a merge whose update is ``factor`` times what it should be in layers of this name."""
    model, tokenizer, whole = merging
    broken = copy.deepcopy(whole)
    with torch.no_grad():
        for name, parameter in broken.named_parameters():
            if "lora_B" in name and layers in name:
                parameter.mul_(factor)
    merged = broken.merge_and_unload()
    report = ParityReport("merged", True, [])
    weigh_merge(report, model, whole, merged, merged, tokenizer, prompts(tokenizer))
    return report


def test_a_right_merge_is_the_trained_change(merging):
    """Also of a young adapter, whose change is small beside what quantising did to the base."""
    report = weighed(merging, 1.0)
    assert report.passed, report
    assert report.numbers["change_share"] == pytest.approx(1, abs=2e-3) and report.numbers["change_apart"] < 5e-3


@pytest.mark.parametrize(
    ("factor", "layers"),
    [(0.0, ""), (0.5, ""), (0.9, ""), (1.1, ""), (-1.0, ""), (0.0, "layers.0."), (0.0, "layers.1.self_attn.v_proj")],
    ids=[
        "nothing merged",
        "half",
        "a tenth short",
        "a tenth over",
        "wrong sign",
        "a layer left out",
        "a matrix left out",
    ],
)
def test_a_wrong_merge_is_refused(merging, factor, layers):
    report = weighed(merging, factor, layers)
    assert not report.passed and "not the trained one" in report.reasons[0]
    share = report.numbers["change_share"]
    assert share < 0.95 if factor < 0.9 and not layers else share < 1.2
    assert factor >= 0 or share < 0


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]}, {"tokens": ["<call>"]}],
    ids=["plain", "embeddings trained", "head adapted", "tokens added"],
)
def test_what_trains_beside_is_saved_and_merged(terse_model_dir, tmp_path, options):
    tokens = options.pop("tokens", ()) if "tokens" in options else ()
    made = recipe(r=4, **options)
    model, tokenizer, method = wrapped(terse_model_dir, made, tokens=tokens)
    asked = [*prompts(tokenizer), prompt_text(tokenizer, [{"role": "user", "content": "a <call> b"}])]
    ids = tokenizer(asked[-1], return_tensors="pt").input_ids
    steps(model, [ids] * 4, rate=2e-2)
    folder = save(model, tokenizer, method, tmp_path / "adapter", terse_model_dir, made)
    reloaded = load_saved(folder, dtype=torch.float32)
    assert torch.equal(logits(reloaded.model, ids), logits(model, ids))
    report = merge_model(reloaded.model, tokenizer, tmp_path / "merged", prompts=asked)
    assert report.passed


def test_what_is_quantised_is_not_trained_whole(terse_model_dir):
    for name in ("q_proj", "mlp"):
        with pytest.raises(UserError, match=f"{name}.*' is quantised"):
            wrapped(terse_model_dir, recipe(modules_to_save=[name]))


def test_the_fingerprint_is_that_of_the_stored_base(terse_model_dir, tmp_path):
    made = recipe()
    model, tokenizer, method = wrapped(terse_model_dir, made)
    plain = load_model(terse_model_dir)
    assert fingerprint(model) == fingerprint(plain)
    folder = save(model, tokenizer, method, tmp_path / "adapter", terse_model_dir, made)
    record = json.loads((folder / "luthier_base.json").read_text())
    assert record["fingerprint"] == fingerprint(plain)
    assert record["quantization"] == {"bits": 4, "quant_type": "nf4", "double_quant": True}
    with torch.no_grad():
        plain.model.layers[0].mlp.up_proj.weight.normal_()
    plain.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": f"{tmp_path}/other"}))
    with pytest.raises(UserError, match="another base"):
        load_saved(folder)


def test_what_cannot_work_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    from luthier.preparation import prepare_run

    nowhere = {"model": {"name": str(tmp_path / "nowhere")}, "method": "qlora", "output_dir": str(tmp_path / "run")}
    divided = Recipe.from_dict(nowhere | {"training": {"sharding": "full", "report_to": []}})
    with pytest.raises(UserError, match="divided among processes"):
        prepare_run(divided)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a))
    with pytest.raises(UserError, match="pip install 'luthier\\[qlora\\]'"):
        prepare_run(Recipe.from_dict(nowhere))
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed"):
        prepare_run(Recipe.from_dict(nowhere))


def test_bases_that_cannot_be_quantised_are_refused(terse_model_dir, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="GGUF"):
        load_model(gguf, quantization=Quantization())
    load_model(terse_model_dir, quantization=Quantization()).save_pretrained(tmp_path / "packed")
    with pytest.raises(UserError, match="quantised already"):
        load_model(tmp_path / "packed", quantization=Quantization())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_resumes_bit_for_bit_and_merges(terse_model_dir, tmp_path, bits):
    """The whole job: training with evaluations, the parity gate, the merge, and the same again with a break."""
    from luthier.pipeline import run

    def made(name, **training):
        return Recipe.from_dict(
            {
                "model": {"name": str(terse_model_dir), "dtype": "float32"},
                "method": {"name": "qlora", "bits": bits},
                "training": {"max_steps": 3, "save_steps": 1, "eval_steps": 1, "per_device_train_batch_size": 2,
                             "learning_rate": 1e-3, "report_to": [], **training},
                "deployment": {"merge": name == "whole"},
                "evaluation": {"enabled": False},
                "output_dir": str(tmp_path / name),
            }
        )  # fmt: skip

    given = {"train": ROWS[:6], "validation": ROWS[6:]}
    whole = run(made("whole"), given=given)
    manifest = json.loads((whole.run_dir / "manifest.json").read_text())
    assert [p["passed"] for p in manifest["parity"]] == [True, True]
    assert manifest["parity"][0]["numbers"]["candidate_max"] == 0
    predicted = json.loads((whole.run_dir / "preflight.json").read_text())["facts"]
    stored = sum(p.numel() for p in load_model(terse_model_dir).parameters())
    assert predicted["parameters"]["all"] > stored and predicted["predicted_bytes"]["weights"] < 3 * stored
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for folder in ("adapter", "merged", "checkpoints/step-2", "checkpoints/step-3"):
        shutil.rmtree(tmp_path / "broken" / folder, ignore_errors=True)
    resumed = run(made("broken"), given=given, resume=True)
    ours, theirs = (trainable_parameters(r.model) for r in (whole, resumed))
    assert resumed.outcome.state.step == 3 and len(ours) == 28
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
