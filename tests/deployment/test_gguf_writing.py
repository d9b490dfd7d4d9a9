"""What is written as GGUF is computed by llama.cpp as transformers computes it, in every family that is exported."""

from __future__ import annotations

import pytest
import torch

from luthier.deployment.gguf import export_gguf, stored_model
from luthier.deployment.gguf_writing import WRITTEN, write_adapter_gguf, write_gguf
from luthier.deployment.llamacpp import LlamaCppRuntime
from luthier.deployment.parity import distance, log_probabilities
from luthier.errors import UserError
from luthier.models.loading import load_model, load_tokenizer

TEXT = "def tiny_llama(folder: Path, tokenizer) -> Path:\n    return 12345 + folder  # it's real\n"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
SCALED = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = SCALED | {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = SCALED | {"rope_type": "yarn", "original_max_position_embeddings": 128}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama with a head of its own": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama with biases and wide heads": ("LlamaForCausalLM", {"attention_bias": True, "head_dim": 32}),
    "llama 3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama, linear": ("LlamaForCausalLM", {"rope_parameters": SCALED | {"rope_type": "linear"}}),
    "llama, yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma 3": (
        "Gemma3ForCausalLM",
        {"num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    ),
}


def tiny(folder, tokenizer, architecture: str, options: dict):
    """A random model of an architecture, as a folder; its biases and norms are random as well."""
    import transformers

    made = getattr(transformers, architecture)
    torch.manual_seed(0)
    config = made.config_class(
        **SIZES
        | {
            "vocab_size": len(tokenizer) + 8,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | options
    )
    model = made(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value += 0.3 * torch.randn_like(value)
            elif "embed" not in name and "lm_head" not in name:
                value *= 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def next_tokens(runtime, ids, count=4):
    """``[count, V]`` at the text's last positions."""
    rows = [runtime.log_probabilities(ids[: len(ids) - back]) for back in reversed(range(count))]
    return torch.stack(rows)


@pytest.fixture(scope="module")
def terse_tokenizer(terse_model_dir):
    return load_tokenizer(terse_model_dir)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_each_family_as_transformers_does(name, tmp_path, terse_tokenizer):
    folder = tiny(tmp_path / name, terse_tokenizer, *FAMILIES[name])
    file = write_gguf(folder, tmp_path / "model.gguf", "f32")
    ids = terse_tokenizer(TEXT).input_ids
    assert len(ids) > 24  # beyond Gemma's window
    model = load_model(folder, dtype=torch.float32)
    ours = log_probabilities(model, ids)[-4:]
    with LlamaCppRuntime(file, threads=1) as runtime:
        assert runtime.tokens(TEXT) == ids
        theirs = next_tokens(runtime, ids)
    # llama.cpp looks Gemma's activation up in a table of float16.
    assert torch.allclose(theirs, ours, atol=5e-3 if name == "gemma 3" else 5e-4)
    # Flat answers would be alike whatever the weights.
    assert ours.max() > -3
    # transformers' own reader takes the file for the same model.
    written = stored_model(file, folder).state_dict()
    for key, value in model.state_dict().items():
        assert torch.allclose(written[key], value, atol=1e-6), key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"v_proj": 6}, "alpha_pattern": {"layers.1.mlp.down_proj": 16}},
    ],
)
def test_a_lora_beside_its_base_answers_as_in_peft(options, tmp_path, terse_model_dir, terse_tokenizer):
    tuned = tuned_lora(terse_model_dir, tmp_path / "adapter", **options)
    base = write_gguf(terse_model_dir, tmp_path / "base.gguf", "f32")
    lora = write_adapter_gguf(tmp_path / "adapter", tmp_path / "lora.gguf")
    ids = terse_tokenizer(TEXT).input_ids
    ours = log_probabilities(tuned, ids)[-4:]
    with tuned.disable_adapter():
        moved = distance([log_probabilities(tuned, ids)[-4:]], [ours])["mean"]
    with LlamaCppRuntime(base, adapter=lora, threads=1) as runtime:
        theirs = next_tokens(runtime, ids)
    assert distance([ours], [theirs])["mean"] < 1e-3 < 0.05 < moved


def tuned_lora(base, folder, **options):
    """A PEFT model with random matrices, saved as an adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_model(base, dtype=torch.float32), config).eval()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"bias": "lora_only"}, "biases"),
    ],
)
def test_adapters_that_llama_cpp_has_no_place_for_are_refused(options, named, tmp_path, terse_model_dir):
    tuned_lora(terse_model_dir, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=named) as refused:
        write_adapter_gguf(tmp_path / "adapter", tmp_path / "lora.gguf")
    assert "merge it first" in str(refused.value)
    assert not list(tmp_path.glob("*.gguf*"))


def test_each_kind_is_smaller_and_coarser_than_the_one_before(tmp_path, terse_model_dir):
    weight = load_model(terse_model_dir, dtype=torch.float32).state_dict()["model.layers.0.mlp.up_proj.weight"]
    sizes, apart = [], []
    for kind in WRITTEN:
        file = write_gguf(terse_model_dir, tmp_path / f"{kind}.gguf", kind)
        read = stored_model(file, terse_model_dir).state_dict()["model.layers.0.mlp.up_proj.weight"]
        sizes.append(file.stat().st_size)
        apart.append(float((read - weight).norm() / weight.norm()))
    f32, bf16, f16, q8_0, q4_0 = sizes
    assert f32 > bf16 == f16 > q8_0 > q4_0
    assert apart[0] == 0
    assert apart[2] < apart[1] < apart[3] < apart[4] < 0.12


def test_what_cannot_be_written_is_refused_by_name(tmp_path, terse_model_dir, terse_tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(UserError, match="'q4_k'") as refused:
        write_gguf(terse_model_dir, tmp_path / "a.gguf", "q4_k")
    assert "q8_0" in str(refused.value)
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2"):
        write_gguf(tmp_path / "gpt2", tmp_path / "a.gguf", "f16")
    sliding = tiny(tmp_path / "w", terse_tokenizer, "Qwen2ForCausalLM", {"use_sliding_window": True})
    with pytest.raises(UserError, match="sliding"):
        write_gguf(sliding, tmp_path / "a.gguf", "f16")
    dynamic = tiny(
        tmp_path / "d", terse_tokenizer, "LlamaForCausalLM", {"rope_parameters": SCALED | {"rope_type": "dynamic"}}
    )
    with pytest.raises(UserError, match="dynamic"):
        write_gguf(dynamic, tmp_path / "a.gguf", "f16")
    (dynamic / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="weights cannot be read"):
        write_gguf(dynamic, tmp_path / "a.gguf", "f16")
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*.gguf*"))


def test_a_model_that_is_not_there_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        export_gguf(tmp_path / "none", tmp_path / "none" / "gguf")
    assert not (tmp_path / "none").exists()
