"""The parity gate: honest hand-overs pass, and each way in which a model changes on the way is caught."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from luthier.data.render import prompt_text
from luthier.deployment.merge import merge_adapter, merge_model
from luthier.deployment.parity import check_parity, distance, render_parity, require
from luthier.errors import UserError
from luthier.method_options import LoraMethod
from luthier.methods import get_method
from luthier.methods.saved import fingerprint, load_saved, write_record
from luthier.models.loading import add_tokens, load_model, load_tokenizer, set_stop_tokens

QUESTIONS = ("What is the capital of France?", "写一首关于秋天的诗。", "def fib(n): what does it do?", "3 + 4 = ?")


def tuned(folder, dtype, *, size=0.05, tokens=(), **options):
    """A model with a LoRA whose B is filled with noise, as if it had been trained."""
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=dtype)
    ids = add_tokens(model, tokenizer, list(tokens))
    set_stop_tokens(model, tokenizer)
    torch.manual_seed(1)
    model = get_method("lora").wrap(model, LoraMethod(lora_dropout=0.0, **options), ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
            elif parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter) * size)
    return model.eval(), tokenizer


def prompts(tokenizer):
    return [prompt_text(tokenizer, [{"role": "user", "content": q}]) for q in QUESTIONS]


def save(model, tokenizer, folder, name):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_record(folder, model, str(name))
    return folder


@pytest.fixture(scope="module")
def real(smollm2_dir):
    """In bfloat16, whose rounding is what a merge must be told from."""
    return tuned(smollm2_dir, torch.bfloat16, size=0.02)


@pytest.fixture
def small(terse_model_dir):
    """Two layers in float32, where next to nothing is rounded."""
    return tuned(terse_model_dir, torch.float32)


def test_an_honest_merge_of_the_real_model_passes(real, tmp_path, smollm2_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = real
    report = merge_model(model, tokenizer, tmp_path / "merged", prompts=prompts(tokenizer))
    assert report.passed and report.numbers["tuning_mean"] > 5 * report.numbers["candidate_mean"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == model.dtype
    assert merged.model.embed_tokens.weight.data_ptr() == merged.lm_head.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def _scaled(model, factor):
    """The model merged with the update multiplied by ``factor``."""
    broken = copy.deepcopy(model).float()
    for module in broken.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling = {k: v * factor for k, v in module.scaling.items()}
    return broken.merge_and_unload().to(model.dtype)


def _one_layer_unmerged(model, layer=0):
    broken = copy.deepcopy(model).float()
    for name, parameter in broken.named_parameters():
        if "lora_B" in name and f"layers.{layer}.mlp" in name:
            parameter.data.zero_()
    return broken.merge_and_unload().to(model.dtype)


WRONG = {
    "scale doubled": (lambda m: _scaled(m, 2.0), "rounding"),
    "scale a tenth short": (lambda m: _scaled(m, 0.9), "rounding"),
    "adapter lost": (lambda m: _scaled(m, 0.0), "lost in its rounding"),
    "one layer forgotten": (_one_layer_unmerged, "rounding"),
}


def refused(model, tokenizer, name):
    broken, reason = WRONG[name]
    report = check_parity(model, broken(model), tokenizer, prompts(tokenizer), base=model)
    assert not report.passed and any(reason in r for r in report.reasons), report
    with pytest.raises(UserError, match="parity gate refuses"):
        require(report)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_merge_is_refused(small, name):
    refused(*small, name)


@pytest.mark.parametrize("name", ["scale a tenth short", "one layer forgotten"])
def test_a_merge_that_is_hardly_wrong_is_refused_among_the_rounding_of_the_real_model(real, name):
    refused(*real, name)


def test_what_travels_along_is_checked(small, tmp_path):
    model, tokenizer = small
    asked = prompts(tokenizer)
    honest = _scaled(model, 1.0)
    assert check_parity(model, honest, tokenizer, asked, base=model).passed

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = changed.chat_template.replace("assistant\n", "assistant:\n")
    lost = copy.deepcopy(tokenizer)
    lost.chat_template = None
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["capital"])
    for travelled, reason in ((changed, "another text"), (lost, "template was lost"), (grown, "other tokens")):
        report = check_parity(model, honest, tokenizer, asked, candidate_tokenizer=travelled)
        assert not report.passed and reason in report.reasons[0]

    honest.generation_config.eos_token_id = 0
    report = check_parity(model, honest, tokenizer, asked)
    assert not report.passed and "<|im_end|>" in report.reasons[0]


def test_an_adapter_that_does_nothing_is_refused(terse_model_dir, tmp_path):
    model, tokenizer = tuned(terse_model_dir, torch.float32, size=0.0)
    with pytest.raises(UserError, match="does not differ from its base"):
        merge_model(model, tokenizer, tmp_path / "merged", prompts=prompts(tokenizer))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"tokens": ["<call>", "<result>"]},
    ],
    ids=["plain", "embeddings trained", "head adapted", "tokens added"],
)
def test_saved_reloaded_and_merged_are_the_same_model(terse_model_dir, tmp_path, dtype, options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = tuned(terse_model_dir, dtype, **options)
    asked = [*prompts(tokenizer), prompt_text(tokenizer, [{"role": "user", "content": "a <call> b <result>"}])]
    folder = save(model, tokenizer, tmp_path / "adapter", terse_model_dir)
    reloaded = load_saved(folder, dtype=dtype)
    report = check_parity(
        model, reloaded.model, tokenizer, asked, candidate_tokenizer=reloaded.tokenizer, exact=True, name="reloaded"
    )
    require(report)
    assert report.numbers["candidate_max"] == 0

    require(merge_adapter(folder, tmp_path / "merged", dtype=dtype, prompts=asked))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(asked[-1], return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
        with model.disable_adapter():
            base = model(ids).logits.float()
    assert (ours - theirs).abs().mean() < 0.1 * (ours - base).abs().mean()


def test_an_adapter_of_another_base_is_refused(small, terse_model_dir, tmp_path):
    model, tokenizer = small
    folder = save(model, tokenizer, tmp_path / "adapter", terse_model_dir)
    other = load_model(terse_model_dir)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.normal_()
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": f"{tmp_path}/other"}))
    with pytest.raises(UserError, match="another base"):
        load_saved(folder)


def test_a_fingerprint_knows_weights_not_precision_or_adapters(small, terse_model_dir):
    model, _ = small
    plain = load_model(terse_model_dir, dtype=torch.bfloat16)
    assert fingerprint(model) == fingerprint(plain)
    with torch.no_grad():
        plain.model.layers[1].self_attn.q_proj.weight.add_(0.5)
    assert fingerprint(model) != fingerprint(plain)


def test_half_written_folders_are_named(small, terse_model_dir, tmp_path):
    model, tokenizer = small
    folder = save(model, tokenizer, tmp_path / "adapter", terse_model_dir)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        load_saved(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no model and no adapter"):
        load_saved(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"in part|whole model"):
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "config.json").write_text("{")
        load_saved(tmp_path / "half")


def test_a_folder_in_use_is_not_merged_over(small, tmp_path):
    model, tokenizer = small
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        merge_model(model, tokenizer, tmp_path / "mine", prompts=prompts(tokenizer))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    merge_model(model, tokenizer, tmp_path / "merged", prompts=prompts(tokenizer))
    merge_model(model, tokenizer, tmp_path / "merged", prompts=prompts(tokenizer))


def test_the_report_prints(small):
    from rich.console import Console

    model, tokenizer = small
    report = check_parity(model, _scaled(model, 2.0), tokenizer, prompts(tokenizer), name="merged")
    console = Console(record=True, width=120)
    console.print(render_parity(report))
    assert "parity: merged, 4 prompts" in console.export_text() and json.dumps(report.to_dict())


def test_what_was_tuned_finely_is_merged_finely(terse_model_dir, tmp_path):
    """A base that is stored in bfloat16 and was tuned in float32: in bfloat16 a young adapter would be rounded away."""
    stored = tmp_path / "base"
    load_model(terse_model_dir, dtype=torch.bfloat16).save_pretrained(stored)
    load_tokenizer(terse_model_dir).save_pretrained(stored)
    model, tokenizer = tuned(stored, torch.float32, size=1e-4)
    folder = save(model, tokenizer, tmp_path / "adapter", stored)
    assert load_saved(folder).model.dtype == torch.bfloat16
    merge_adapter(folder, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    assert merged.dtype == torch.float32
    ids = tokenizer("What is the answer?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_model_that_finds_all_tokens_alike_is_compared_by_its_likeliest():
    even = torch.zeros(3, 50_000).log_softmax(-1)
    moved = even.clone()
    moved[1, 7] += 0.5
    assert distance([even], [even])["max"] == 0
    assert distance([even], [moved])["max"] == pytest.approx(0.5)
    # Of models that have likely tokens, the others still do not count.
    sure = torch.full((1, 50_000), -20.0)
    sure[0, 3] = -0.0
    other = sure.clone()
    other[0, 5] = -12.0
    assert distance([sure], [other])["max"] == 0
