"""Which language a text is in: by its script first, by a statistical model where the script leaves it open."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# Letters by script; the language where a script has but one of wide use.
_SCRIPTS = {
    "han": "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]",
    "kana": "[\u3041-\u30fa\u30fc\uff66-\uff9d]",
    "ko": "[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]",
    "latin": "[A-Za-z\u00c0-\u024f\u1e00-\u1eff]",
    "cyrillic": "[\u0400-\u052f]",
    "arabic": "[\u0620-\u06d3\u0750-\u077f]",
    "devanagari": "[\u0900-\u0963]",
    "th": "[\u0e01-\u0e30\u0e40-\u0e46]",
    "el": "[\u0370-\u03ff]",
    "he": "[\u05d0-\u05ea]",
}
_RUNS = {script: re.compile(f"{letters}+") for script, letters in _SCRIPTS.items()}
# A character of these says about as much as three letters of the others.
_DENSE = ("han", "kana", "ko")
# Below this many letters (three of them to a Chinese character) a text says too little.
_LEAST = {"script": 12, "model": 40}
_LEAST_WORDS = 8
_NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+|<[^<>\n]{1,200}>|\\[A-Za-z]+", re.DOTALL)
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]{2,}")
# Words with the marks that letters carry and the signs within them (l'été, well-known).
_WORDS = {
    script: re.compile(f"{letters}(?:{letters}|[\u0300-\u036f\u0900-\u0963\u064b-\u065f'’-])*")
    for script, letters in _SCRIPTS.items()
}
# So many characters say it.
_ENOUGH = 600


def detect_language(text: str) -> tuple[str, float] | None:
    """The language as an ISO 639-1 code and how sure that is, 0 to 1; None where the text is too short to say.

    Chinese, Japanese, Korean, Thai, Greek and Hebrew are told by their script; a text that mixes Chinese with English
    terms is Chinese. Texts in Latin, Cyrillic, Arabic or Devanagari letters are told by py3langid (langid.py, Lui and
    Baldwin, 2012), their code and addresses left out.
    """
    chinese = sum(map(len, _RUNS["han"].findall(text)))
    if chinese and chinese * 3 >= _LEAST["script"] and not _RUNS["kana"].search(text):
        # The quick way for most Chinese texts: were all else letters, it would still be Chinese.
        sure = chinese * 3 / (len(text) + 2 * chinese)
        if sure > 0.9:
            return "zh", sure
    if text.isascii():
        weights = {"latin": 1}
    else:
        weights = {
            script: sum(map(len, runs.findall(text))) * (3 if script in _DENSE else 1) for script, runs in _RUNS.items()
        }
    # Japanese is written in both.
    weights["zh"], weights["ja"] = weights.pop("han", 0), 0
    kana = weights.pop("kana", 0)
    if kana * 9 >= weights["zh"]:
        weights["ja"], weights["zh"] = weights["zh"] + kana, 0
    # Chinese full of English terms is Chinese.
    weights["latin"] -= min(weights["latin"], 2 * weights["zh"])
    script = max(weights, key=lambda s: weights[s])
    if script in ("zh", "ja", "ko", "th", "el", "he"):
        return (script, weights[script] / sum(weights.values())) if weights[script] >= _LEAST["script"] else None
    prose = _NOT_PROSE.sub(" ", text[:_ENOUGH])
    letters = sum(map(len, _RUNS[script].findall(prose)))
    if letters < _LEAST["model"] or (script == "latin" and len(_LATIN_WORD.findall(prose)) < _LEAST_WORDS):
        return None
    # In small letters: the model takes acronyms and names in capitals for other languages.
    words = " ".join(_WORDS[script].findall(prose)).lower()
    language, confidence = _identifier().classify(words)
    return str(language), float(confidence)


def known_languages() -> list[str]:
    """The codes that detect_language tells apart."""
    return sorted(_identifier().labels)


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
