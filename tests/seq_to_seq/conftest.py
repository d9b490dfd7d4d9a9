"""Folders of tiny encoder-decoders, and pairs of texts that they read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from pair_cases import FAMILIES, WORDS, tiny_pair_model, words_tokenizer

from luthier.data.examples import TrainingExample


@pytest.fixture(scope="session")
def pair_dirs(tmp_path_factory) -> dict[str, Path]:
    """A folder of each family's model and tokenizer, as a user has one."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        tiny_pair_model(family).save_pretrained(folders[family])
        words_tokenizer(opens=family == "bart").save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="session")
def pairs() -> list[TrainingExample]:
    """Words and the same words in reverse; of many lengths, on both sides."""
    rng = random.Random(0)
    sources = [rng.choices(WORDS[:12], k=2 + i % 5) for i in range(40)]
    return [TrainingExample(" ".join(s), " ".join(reversed(s)), task_type="seq_to_seq") for s in sources]
