"""What is written as GGUF is computed by llama.cpp as transformers computes it, in every family that is exported."""

from __future__ import annotations

import pytest
import torch

from luthier.deployment.gguf import stored_model
from luthier.deployment.gguf_writing import KINDS, write_adapter_gguf, write_gguf
from luthier.deployment.llamacpp import LlamaCppRuntime
from luthier.deployment.parity import distance, log_probabilities
from luthier.errors import UserError
from luthier.models.loading import load_model, load_tokenizer

TEXT = "def tiny_llama(folder: Path, tokenizer) -> Path:\n    return 12345 + folder  # it's real\n"
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
)
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
