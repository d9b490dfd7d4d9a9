"""A tiny random encoder with a vocabulary of its own, as a user has one: a body without a head."""

from __future__ import annotations

from pathlib import Path

import pytest

# Texts of these words stay whole; others are cut into letters.
WORDS = (
    "good nice fine great lovely superb bad awful poor ugly dire grim house tree river stone bread wine paper lamp "
    "chair road cloud bird the a is was and of to in it not very"
)


@pytest.fixture(scope="session")
def tiny_encoder_dir(tmp_path_factory) -> Path:
    """A two-layer BERT body with a WordPiece vocabulary of English words, their beginnings and Chinese characters."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    characters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *map(str, range(10))]
    vocabulary += [
        *characters,
        *(f"##{c}" for c in characters),
        *(f"##{n}" for n in range(10)),
        *"好吃很不快慢餐厅的味道难",
    ]
    vocabulary = list(dict.fromkeys(vocabulary))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    made = BertWordPieceTokenizer(str(folder / "vocab.txt"))
    tokenizer = BertTokenizerFast(tokenizer_object=made._tokenizer, model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return folder
