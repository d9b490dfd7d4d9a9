"""Tiny random models in the shapes of four families, which all methods are tried on."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 300


def tiny(family: str) -> Any:
    """A random two-layer model of a family, in float32."""
    import transformers

    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = common | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, tie_word_embeddings=True))
    elif family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**llama))
    elif family == "gemma3":
        config = transformers.Gemma3TextConfig(
            **llama, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        )
        model = transformers.Gemma3ForCausalLM(config)
    else:
        assert family == "gpt2"
        config = transformers.GPT2Config(
            **common, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2
        )
        model = transformers.GPT2LMHeadModel(config)
    return model.eval()


FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")
