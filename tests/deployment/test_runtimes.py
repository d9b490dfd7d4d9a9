"""The gate for models that another program runs lets right ones go, and none of the wrong ones."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from luthier.deployment import gguf_families, gguf_vocabulary
from luthier.deployment.gguf import RECORD, arithmetic_noise, export_gguf
from luthier.deployment.gguf_writing import write_gguf
from luthier.deployment.llamacpp import LlamaCppRuntime
from luthier.deployment.runtimes import check_runtime
from luthier.deployment.tokens import token_ids
from luthier.errors import UserError
from luthier.models.loading import load_model, load_tokenizer

PROMPTS = ["def tiny(folder):\n    return", "The config of a model is", "import torch\nfrom pathlib import Path\n"]


@pytest.fixture(scope="module")
def reference(terse_model_dir):
    return load_model(terse_model_dir, dtype=torch.float32)


@pytest.fixture(scope="module")
def terse_tokenizer(terse_model_dir):
    return load_tokenizer(terse_model_dir)


def changed(folder, target, change):
    """A copy of a model whose weights were changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def gate(reference, tokenizer, file, kind):
    noise = arithmetic_noise(reference, kind, token_ids(tokenizer, PROMPTS, None))
    with LlamaCppRuntime(file, threads=1) as runtime:
        return check_runtime(reference, runtime, tokenizer, PROMPTS, noise=noise, stops=[2])


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_a_right_file_passes(kind, tmp_path, terse_model_dir, reference, terse_tokenizer):
    # In bfloat16, the weights of this model in float32 lie further off than llama.cpp's arithmetic explains.
    folder = changed(terse_model_dir, tmp_path / "m", lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    rounded = load_model(folder, dtype=torch.float32)
    report = gate(rounded, terse_tokenizer, write_gguf(folder, tmp_path / "a.gguf", kind), kind)
    assert report.passed, report.reasons
    assert report.numbers["answers_same"] > 0


def test_rows_in_another_order_are_refused(tmp_path, terse_model_dir, reference, terse_tokenizer, monkeypatch):
    monkeypatch.setattr(gguf_families, "permute", lambda rows, heads: rows)
    report = gate(reference, terse_tokenizer, write_gguf(terse_model_dir, tmp_path / "a.gguf", "f16"), "f16")
    assert "log-probability" in report.reasons[0]


def test_a_layer_left_out_is_refused(tmp_path, terse_model_dir, reference, terse_tokenizer):
    def leave_out(weights):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.1.{name}.weight"].zero_()

    folder = changed(terse_model_dir, tmp_path / "m", leave_out)
    report = gate(reference, terse_tokenizer, write_gguf(folder, tmp_path / "a.gguf", "f16"), "f16")
    assert "log-probability" in report.reasons[0]


def test_a_scale_a_tenth_short_is_refused(tmp_path, terse_model_dir, reference, terse_tokenizer):
    update = 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def tuned(scale):
        def change(weights):
            weights["model.layers.0.self_attn.q_proj.weight"] += scale * update
            weights["model.layers.1.self_attn.q_proj.weight"] += scale * update

        return changed(terse_model_dir, tmp_path / f"m{scale}", change)

    right = load_model(tuned(1), dtype=torch.float32)
    for scale, passes in ((1, True), (0.9, False)):
        folder = tmp_path / "m1" if scale == 1 else tuned(scale)
        report = gate(right, terse_tokenizer, write_gguf(folder, tmp_path / "a.gguf", "f32"), "f32")
        assert report.passed == passes, report


def test_texts_that_are_cut_otherwise_are_refused(tmp_path, terse_model_dir, reference, terse_tokenizer, monkeypatch):
    for pre in ("qwen2", "llama-bpe"):
        monkeypatch.setattr(gguf_vocabulary, "_split_name", lambda described, where, pre=pre: pre)
        report = gate(reference, terse_tokenizer, write_gguf(terse_model_dir, tmp_path / "a.gguf", "f32"), "f32")
        assert "other tokens" in report.reasons[0]


ENDED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<repo_name>' }}{% endfor %}"


def test_a_lost_stop_token_is_refused(tmp_path, terse_model_dir, monkeypatch):
    folder = tmp_path / "m"
    shutil.copytree(terse_model_dir, folder)
    (folder / "chat_template.jinja").write_text(ENDED + "{% if add_generation_prompt %}assistant: {% endif %}")
    made = export_gguf(folder, tmp_path / "right", kind="f16", prompts=PROMPTS)
    assert 'stop "<repo_name>"' in made.files[-1].read_text()
    monkeypatch.setattr(gguf_vocabulary, "end_of_turn_ids", lambda tokenizer: [])
    with pytest.raises(UserError, match="does not stop at '<repo_name>'"):
        export_gguf(folder, tmp_path / "wrong", kind="f16", prompts=PROMPTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "right"]


def test_a_weight_that_is_not_the_exported_one_is_refused(tmp_path, terse_model_dir, monkeypatch):
    from luthier.deployment import gguf_writing

    def short(family, name, tensor, config):
        right = gguf_families.as_llamacpp(family, name, tensor, config)
        return right * 0.9 if "layers.1.mlp.up" in name else right

    monkeypatch.setattr(gguf_writing, "as_llamacpp", short)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        export_gguf(terse_model_dir, tmp_path / "out", kind="q4_0", prompts=PROMPTS)
    assert not list(tmp_path.iterdir())


def test_an_export_records_what_it_measured(tmp_path, terse_model_dir):
    made = export_gguf(terse_model_dir, tmp_path / "out", kind="q8_0", prompts=PROMPTS)
    told = json.loads((made.folder / RECORD).read_text())
    assert told["passed"] and told["sizes"] == made.sizes and 0 < told["numbers"]["weights_apart"] < 0.015
    assert made.sizes["model-q8_0.gguf"] == (made.folder / "model-q8_0.gguf").stat().st_size
    export_gguf(terse_model_dir, made.folder, kind="f16", prompts=PROMPTS)  # an earlier export is replaced
    assert [file.name for file in made.folder.glob("*.gguf")] == ["model-f16.gguf"]
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        export_gguf(terse_model_dir, tmp_path / "used", kind="f16")


def test_a_lora_leaves_as_a_file_beside_its_base(tmp_path, terse_model_dir, monkeypatch):
    from peft import LoraConfig, get_peft_model

    from luthier.deployment import gguf_writing

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(load_model(terse_model_dir, dtype=torch.float32), config)
    for name, value in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    tuned.save_pretrained(tmp_path / "lora")
    load_tokenizer(terse_model_dir).save_pretrained(tmp_path / "lora")
    made = export_gguf(tmp_path / "lora", tmp_path / "out", kind="q8_0", adapter=True, prompts=PROMPTS)
    assert [file.name for file in made.files] == ["base-q8_0.gguf", "adapter.gguf", "Modelfile"]
    assert "ADAPTER ./adapter.gguf" in made.files[-1].read_text()
    own = gguf_writing._scale
    monkeypatch.setattr(gguf_writing, "_scale", lambda *asked: 0.9 * own(*asked))
    with pytest.raises(UserError, match="log-probability"):
        export_gguf(tmp_path / "lora", tmp_path / "short", kind="q8_0", adapter=True, prompts=PROMPTS)
    assert not (tmp_path / "short").exists()


def test_one_token_is_as_likely_as_among_all(tmp_path, terse_model_dir, terse_tokenizer):
    ids = terse_tokenizer(PROMPTS[0], add_special_tokens=False).input_ids
    with LlamaCppRuntime(write_gguf(terse_model_dir, tmp_path / "a.gguf", "f32"), threads=1) as runtime:
        every = runtime.log_probabilities(ids)
        for token in (int(every.argmax()), int(every.argmin()), 7):
            assert runtime.log_probability(ids, token) == pytest.approx(float(every[token]), abs=1e-4)
