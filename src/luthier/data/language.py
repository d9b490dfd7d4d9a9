"""Which language a text is in: by its script where that decides, by py3langid where scripts are shared."""

from __future__ import annotations

import functools
import re
from typing import Any

# Enough to decide by; a longer text costs time and changes nothing.
_LOOKED_AT = 1_000
# Below so many letters of a shared script any guess is noise.
_FEWEST_LETTERS = 16
_SURE = 0.7

# Scripts that one language alone, or one beyond all others, is written in.
_SCRIPTS = {
    "zh": r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "ja": r"\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "ko": r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3",
    "th": r"\u0e00-\u0e7f",
    "el": r"\u0370-\u03ff\u1f00-\u1fff",
    "he": r"\u0590-\u05ff",
    "ka": r"\u10a0-\u10ff",
    "hy": r"\u0530-\u058f",
    "ta": r"\u0b80-\u0bff",
    "te": r"\u0c00-\u0c7f",
    "bn": r"\u0980-\u09ff",
}
_BY_SCRIPT = {language: re.compile(f"[{characters}]") for language, characters in _SCRIPTS.items()}
_OWN_SCRIPT = re.compile(f"[{''.join(_SCRIPTS.values())}]+")
_LETTER = re.compile(r"[^\W\d_]")
# Chinese says in one character what takes several letters elsewhere.
_WEIGHT = {"zh": 3, "ja": 2, "ko": 2}

NONE = "none"
"""The text has no letters: numbers, signs."""
UNSURE = "unsure"
"""The text is too short, or too mixed, to tell."""


def language(text: str) -> str:
    """The ISO 639-1 code of a text's main language, ``none`` without letters, ``unsure`` where it can't be told."""
    text = text[:_LOOKED_AT]
    letters = len(_LETTER.findall(text))
    if not letters:
        return NONE
    found = {name: len(pattern.findall(text)) for name, pattern in _BY_SCRIPT.items()} if not text.isascii() else {}
    # Japanese writes its nouns in Chinese characters and everything between them in kana.
    if found and found["ja"] > 0.1 * (found["zh"] + found["ja"]):
        found["ja"], found["zh"] = found["ja"] + found["zh"], 0
    shared = letters - sum(found.values())
    best = max(found, key=lambda name: found[name] * _WEIGHT.get(name, 1)) if found else None
    if best is not None and found[best] * _WEIGHT.get(best, 1) > shared:
        return best
    if shared < _FEWEST_LETTERS:
        return UNSURE
    # The characters counted above would speak for their own language.
    code, sure = _identifier().classify(_OWN_SCRIPT.sub("", text))
    return code if sure >= _SURE else UNSURE


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
