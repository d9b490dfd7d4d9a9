"""The words that metrics count, in languages with and without spaces between them."""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache

from luthier.data.borders import chinese_words

# Scripts written without spaces between words: Thai to Khmer, kana, Han, and Hangul. A character is a word.
_SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Latin words as rouge-score has them (ASCII letters and digits); words of other alphabets, which it would drop.
_WORD = f"[a-z0-9]+|[{_SINGLE}]|(?:(?![{_SINGLE}])[^\\W\\x00-\\u036f])+"
_CHARACTERS = re.compile(_WORD)
_RUNS = re.compile(f"[{_HAN}]+|{_WORD}")
_CHINESE = re.compile(f"[{_HAN}]")
_MIXED = re.compile(f"[{_SINGLE}]|[^\\s{_SINGLE}]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def words(text: str) -> list[str]:
    """A text in words: those of rouge-score, and each character of Chinese and of other scripts without spaces.

    Chinese is cut so by sacrebleu's ``zh`` too, and by CMRC's evaluation. A segmenter would make its version and its
    dictionary part of the score, and count a word that it cuts in two ways in two sentences as the model's mistake.
    """
    return _CHARACTERS.findall(text.lower())


@lru_cache(maxsize=8192)  # three ROUGE scores ask for the same texts, and jieba is slow
def jieba_words(text: str) -> tuple[str, ...]:
    """As :func:`words`, but with Chinese cut into words by jieba."""
    found: list[str] = []
    for run in _RUNS.findall(text.lower()):
        found += chinese_words(run) if _CHINESE.match(run) else [run]
    return tuple(found)


def is_chinese(text: str) -> bool:
    """Whether more than half of the letters are Chinese characters."""
    return 2 * len(_CHINESE.findall(text)) > sum(map(str.isalpha, text))


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of ``n`` words comes."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def normalized(text: str) -> str:
    """A text in lower case without punctuation and English articles, its white space single.

    As SQuAD's evaluation does it (Rajpurkar et al., 2016, arXiv:1606.05250), and with the punctuation of all scripts,
    as CMRC's for Chinese (Cui et al., 2019, arXiv:1810.07366). Where nothing would remain, the articles stay, and where
    there is nothing else, the punctuation: of the choices A and B, or + and -, none is empty.
    """
    lower = " ".join(text.lower().split())
    bare = " ".join(lower.translate(_punctuation()).split())
    return " ".join(_ARTICLES.sub(" ", bare).split()) or bare or lower


def normalized_words(text: str) -> list[str]:
    """The words of a normalised text; each character of scripts without spaces is one, as in CMRC's evaluation."""
    return _MIXED.findall(normalized(text))


@cache
def _punctuation() -> dict[int, None]:
    """What is left out: ASCII's, as in SQuAD, and all that Unicode calls punctuation."""
    codes = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] == "P"]
    return dict.fromkeys([*map(ord, string.punctuation), *codes])
