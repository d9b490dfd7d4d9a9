"""Answers in another language than their question."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from luthier.data.cleaning.language import detect_language

# A text of few Latin words is English where two of them are these; py3langid wants longer texts.
_ENGLISH = re.compile(
    "the|a|an|is|are|was|were|am|do|does|did|of|to|in|on|at|and|or|not|it|this|that|what|which|who|how|when|where|why|"
    "you|your|i|my|we|he|she|they|there|have|has|be|can|will|would|for|with|from|by|as|if|please|give|one"
)
# Words of these stand in other languages too.
_SHARED = re.compile("a|an|i|on|am|me|he|we|do|in|as|at|by|or|has")
_LEAST_WORDS = 4
_SURE = 0.9
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|\S+@\S+", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?")
_OTHER_LETTER = re.compile(r"[^\W\d_a-zA-Z]")
# A program: lines that end or begin as no sentence does.
_PROGRAM = re.compile(
    r"^\s*(?:def |class |import |from \w+ import|return\b|#include|function |SELECT |<\w+|[{}])", re.M
)
_LANGUAGES = (
    "english|chinese|mandarin|french|german|spanish|italian|japanese|korean|russian|portuguese|arabic|hindi|latin|"
    "dutch|polish|turkish|vietnamese|thai"
)
_CHINESE_NAMES = "英|汉|中|法|德|日|俄|韩|西班牙|葡萄牙|意大利|阿拉伯|泰|越南|拉丁|粤"
_TRANSLATION = re.compile(
    rf"\btranslat(?:e|es|ed|ing|ion)\b|\b(?:in|into|to|using) (?:{_LANGUAGES})\b"
    rf"|\b(?:{_LANGUAGES}) (?:word|for|version)\b"
    rf"|翻译|译[成为作]|(?:用|以|写|说|改)成?(?:{_CHINESE_NAMES})(?:语|文)|(?:{_CHINESE_NAMES})(?:语|文)(?:怎么|如何|版|回答)",
    re.IGNORECASE,
)


def language_of(text: str) -> str | None:
    """The language of a text as an ISO 639-1 code; None where it says too little.

    Code, addresses and JSON are no language, numbers and names are too little. Beside what
    :func:`~luthier.data.cleaning.language.detect_language` tells, with 0.9 of certainty, four Latin words of which two
    are such as "the" and "is" are English.
    """
    text = _CODE.sub(" ", text).strip()
    if _is_json(text) or _PROGRAM.search(text):
        return None
    found = detect_language(text)
    if found is not None:
        language, sure = found
        return language if sure >= _SURE or language in ("zh", "ja", "ko") else None
    words = [word.lower() for word in _WORD.findall(text)]
    known = set(filter(_ENGLISH.fullmatch, words))
    own = [word for word in known if not _SHARED.fullmatch(word)]
    if len(words) >= _LEAST_WORDS and not _OTHER_LETTER.search(text) and len(known) >= 2 and own:
        return "en"
    return None


def expected_language(asked: str, references: Sequence[str] = ()) -> str | None:
    """The language that a question wants its answer in; None where it asks for a translation or cannot be told.

    Args:
        asked: the question.
        references: where a right answer is in another language than the question, that is the task.
    """
    if _TRANSLATION.search(asked):
        return None
    language = language_of(asked)
    answers = {found for reference in references if (found := language_of(reference)) is not None}
    return language if language is not None and answers <= {language} else None


def drift(asked: str, answer: str, references: Sequence[str] = ()) -> tuple[str, str] | None:
    """The language asked in and the other one answered in; None where they are one, or cannot be told."""
    wanted, said = expected_language(asked, references), language_of(answer)
    return (wanted, said) if wanted is not None and said is not None and wanted != said else None


def _is_json(text: str) -> bool:
    if text[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
