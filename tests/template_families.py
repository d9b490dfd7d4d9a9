"""Chat templates of well-known families, on the small model's tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path

TEMPLATES = Path(__file__).parent / "data" / "templates"
FAMILIES = json.loads((TEMPLATES / "tokens.json").read_text(encoding="utf-8"))
# Digits and line breaks are split as Llama 3, Qwen, DeepSeek and GLM split them. The small model's own splitting joins
# two line breaks at a text's end and not before a word, so that no prompt that ends in two has the row's ids.
WORDS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def family(tokenizer, name):
    """The small model's tokenizer with a family's control tokens and template."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokens = FAMILIES[name]
    made = copy.deepcopy(tokenizer)
    words = [Split(Regex(WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    made.backend_tokenizer.pre_tokenizer = Sequence(words)
    made.add_tokens(tokens["added"])
    named = {k: tokens[k] for k in ("bos_token", "eos_token") if tokens[k]}
    made.add_special_tokens({**named, "additional_special_tokens": tokens["special"]})
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return made
