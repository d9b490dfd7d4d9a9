"""Tiny random encoder-decoders of three families, and a tokenizer of words made on the spot."""

from __future__ import annotations

from typing import Any

import torch

WORDS = ("amber", "birch", "cedar", "dune", "ember", "fern", "grove", "heath", "iris", "kelp", "larch", "moss", "read:")


def words_tokenizer(**around: Any) -> Any:
    """Words, each a token; ``</s>`` at the end, as T5 has it.

    Args:
        around: ``opens=True`` puts ``<s>`` before every text, as BART has it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ("<pad>", "</s>", "<unk>", "<s>", *WORDS)
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if around.get("opens") else "$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )


def tiny_pair_model(family: str) -> Any:
    """A random model of two layers on each side, in float32, with dropout: t5, t5-unscaled, bart or m2m."""
    import transformers

    vocabulary = 4 + len(WORDS)
    common = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3, "d_model": 32}
    torch.manual_seed(5)
    if family.startswith("t5"):
        config = transformers.T5Config(
            **common,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            initializer_factor=2.0 if family == "t5" else 0.3,
            **({"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"} if family == "t5-unscaled" else {}),
        )
        return transformers.T5ForConditionalGeneration(config).eval()
    sides = {
        f"{side}_{what}": value
        for side in ("encoder", "decoder")
        for what, value in (("layers", 2), ("ffn_dim", 48), ("attention_heads", 4))
    }
    common |= sides | {"max_position_embeddings": 64, "init_std": 0.2, "decoder_start_token_id": 1}
    if family == "m2m":
        return transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**common)).eval()
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**common)).eval()
    # Zero as it is made; Marian's and fine-tuned models' is not.
    model.final_logits_bias += torch.randn(1, vocabulary)
    return model


FAMILIES = ("t5", "t5-unscaled", "bart", "m2m")
