"""Fixtures that the rooms' tests share: the real small model, loaded once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_models import tiny_llama

# The suite must pass with no network: a test that would ask a hub fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of this session's own, but for the models and kernels that take long to make."""
    from luthier.runfolder import cache_root

    kept, own = cache_root(), tmp_path_factory.mktemp("cache")
    for name in ("models", "kernels"):
        (kept / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(kept / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_CACHE", str(own))
        yield own


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that want it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is not there")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in bfloat16, as an ordinary folder."""
    from luthier.models.catalogue import embedded_model_folder

    return embedded_model_folder("smollm2")


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="session")
def base_model(smollm2_dir):
    """SmolLM2 in float32, in eval mode. Never change it."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tokenizer) -> Path:
    """A random two-layer Llama with SmolLM2's tokenizer: loads in milliseconds."""
    return tiny_llama(tmp_path_factory.mktemp("tiny-llama"), tokenizer)


@pytest.fixture(scope="session")
def terse_model_dir(tmp_path_factory, tokenizer) -> Path:
    """The same with a vocabulary of 600: nine tenths of a tiny model's step are its 49,152 logits."""
    # Whatever text it is learnt from, another one would make another model.
    texts = [Path(__file__).with_name("terse_vocabulary.txt").read_text(encoding="utf-8")]
    return tiny_llama(tmp_path_factory.mktemp("terse-llama"), tokenizer.train_new_from_iterator(texts, 600))


# Texts of these words stay whole; others are cut into letters.
_WORDS = (
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
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS.split(), *map(str, range(10))]
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
