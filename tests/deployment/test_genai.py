"""What onnxruntime-genai makes of an exported folder is what transformers makes of the model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved_adapters import tuned

from luthier.deployment import genai
from luthier.deployment.genai import GenaiRuntime, check_genai, export_genai
from luthier.deployment.gguf import export_gguf
from luthier.deployment.merge import PROMPTS
from luthier.deployment.onnx_weights import stored_model
from luthier.deployment.parity import log_probabilities
from luthier.errors import UserError
from luthier.models.loading import load_model, load_tokenizer

FAMILIES = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama with a head of its own": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
}


def small(folder, source, architecture="LlamaForCausalLM", options=None):
    """A random model of an architecture, as a folder."""
    import transformers

    tokenizer, made = load_tokenizer(source), getattr(transformers, architecture)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = made.config_class(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, **sizes, **ids, **(options or {})
    )
    model = made(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value += 0.3 * torch.randn_like(value)
            else:
                value *= 4.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["f32", "int4"])
def test_each_family_is_computed_as_transformers_does(name, kind, terse_model_dir, tmp_path):
    model = small(tmp_path / "model", terse_model_dir, *FAMILIES[name])
    made = export_genai(model, tmp_path / "out", kind=kind)
    numbers = made.report.numbers
    reference = load_model(model, dtype=torch.float32)
    if kind == "int4":
        stored, reasons, worst = stored_model(tmp_path / "out", reference)
        assert not reasons and 0.05 < worst == numbers["weights_apart"] < 0.15
        whole = torch.equal(stored.model.embed_tokens.weight, reference.model.embed_tokens.weight)
        assert whole is not reference.config.tie_word_embeddings
        assert numbers["precision_mean"] > 10 * 2e-4
        reference = stored
    else:
        assert numbers["candidate_mean"] < 2e-5 and numbers["answers_same"] == 1
    tokenizer, runtime = load_tokenizer(model), GenaiRuntime(tmp_path / "out")
    ids = tokenizer("def tiny_llama(folder):\n    return 1").input_ids
    for text in (ids, [*ids, tokenizer.pad_token_id], [*ids, tokenizer.eos_token_id]):
        ours, theirs = log_probabilities(reference, text)[-1], runtime.log_probabilities(text)
        assert float((ours - theirs).abs().mean()) < (2e-5 if kind == "f32" else 0.05)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_an_adapter_is_merged_first(terse_model_dir, tmp_path):
    adapter = tuned(tmp_path / "adapter", terse_model_dir, size=0.1, lora_dropout=0.0)
    made = export_genai(adapter, tmp_path / "out")
    assert made.report.numbers["tuning_mean"] > 100 * made.report.numbers["candidate_mean"]
    record = json.loads((tmp_path / "out" / "luthier_genai.json").read_text())
    assert record["kind"] == "f32" and record["passed"] and record["base"] == str(terse_model_dir)
    export_genai(adapter, tmp_path / "out")  # over an earlier one
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    with pytest.raises(UserError, match="not empty"):
        export_genai(adapter, tmp_path / "full")


@pytest.mark.parametrize("export", [export_genai, export_gguf])
def test_tokens_that_were_added_come_along(export, terse_model_dir, tmp_path):
    pytest.importorskip("xllamacpp" if export is export_gguf else "onnxruntime_genai")
    adapter = tuned(tmp_path / "adapter", terse_model_dir, size=0.1, tokens=["<new>", "<two>"], lora_dropout=0.0)
    made = export(adapter, tmp_path / "out", kind="f32", prompts=["A <new> thing", "and <two>"])
    assert made.report.numbers["tuning_mean"] > 100 * made.report.numbers["candidate_mean"]


def test_a_model_without_a_template_gets_the_one_that_it_is_tuned_with(terse_model_dir, tmp_path):
    model = small(tmp_path / "model", terse_model_dir)
    (model / "chat_template.jinja").unlink()
    assert export_genai(model, tmp_path / "out").report.passed
    template = (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == load_tokenizer(model).chat_template


def test_modules_of_the_working_folder_are_not_imported(terse_model_dir, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    for name in ("builders", "torch", "quantization"):
        (tmp_path / "here" / f"{name}.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path / "here")
    assert export_genai(terse_model_dir, tmp_path / "out").report.passed


@pytest.mark.parametrize("kind", ["f32", "int4"])
def test_wrong_folders_are_refused(kind, terse_model_dir, tmp_path):
    model = small(tmp_path / "model", terse_model_dir)
    export_genai(model, tmp_path / "out", kind=kind)
    reference, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    assert check_genai(tmp_path / "out", kind, reference, tokenizer, PROMPTS).passed
    with torch.no_grad():
        reference.model.layers[1].mlp.down_proj.weight.zero_()
    assert not check_genai(tmp_path / "out", kind, reference, tokenizer, PROMPTS).passed
    reference = load_model(model, dtype=torch.float32)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"
    report = check_genai(tmp_path / "out", kind, reference, tokenizer, PROMPTS)
    assert ["otherwise than the chat template" in reason for reason in report.reasons] == [True]


def test_every_stop_token_ends_an_answer(terse_model_dir, tmp_path):
    model = small(tmp_path / "model", terse_model_dir)
    export_genai(model, tmp_path / "out")
    reference, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    ids = tokenizer(PROMPTS[1]).input_ids
    answer = GenaiRuntime(tmp_path / "out").greedy(ids, 24)
    genai._complete(tmp_path / "out", [answer[3]], tokenizer)
    cut = GenaiRuntime(tmp_path / "out").greedy(ids, 24)
    assert cut == answer[: answer.index(answer[3])]
    genai._complete(tmp_path / "out", [tokenizer.convert_tokens_to_ids("a")], tokenizer)
    reference.generation_config.eos_token_id = answer[3]
    reasons = check_genai(tmp_path / "out", "f32", reference, tokenizer, [PROMPTS[1]]).reasons
    assert any("does not stop at" in reason for reason in reasons)


def test_the_page_s_code_answers_as_the_model(terse_model_dir, tmp_path):
    export_genai(small(tmp_path / "model", terse_model_dir), tmp_path / "out")
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    code = re.search(r"<!-- run: genai -->\n```python\n(.*?)```", page, re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(tmp_path / "model")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = GenaiRuntime(tmp_path / "out").greedy(tokenizer(prompt, add_special_tokens=False).input_ids, 64)
    # A random model writes bytes that are no characters, which the two decoders replace otherwise.
    said, right = (t.split("\ufffd")[0] for t in (done.stdout, tokenizer.decode(ids, skip_special_tokens=True)))
    assert len(right) > 20 and said.strip() == right.strip()


def test_mistakes_are_named_and_leave_nothing(terse_model_dir, tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(UserError, match="'q8_0'"):
        export_genai(terse_model_dir, tmp_path / "out", kind="q8_0")
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(terse_model_dir).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="not currently supported"):
        export_genai(tmp_path / "gpt2", tmp_path / "out")
    with pytest.raises(UserError, match="nowhere"):
        export_genai(tmp_path / "nowhere", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(UserError, match=r"not installed.*onnxruntime_genai"):
        export_genai(terse_model_dir, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]
