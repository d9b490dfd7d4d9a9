"""Synonyms: words in whose place another one reads as well, in English and in Chinese, offline."""

from __future__ import annotations

import random

from luthier.data.augmentation.lexicons.chinese import chinese_words
from luthier.data.augmentation.lexicons.english import english_words
from luthier.data.augmentation.text import Field, Language, Piece, replace_pieces
from luthier.errors import UserError


def synonym_replacement(
    text: str,
    rng: random.Random | None = None,
    ratio: float = 0.1,
    *,
    language: Language = "auto",
    keep: str = "",
) -> str:
    """Some words replaced by synonyms of the same part of speech and form.

    English pairs are WordNet's (Miller, 1995), of which those were kept by hand that read as well in the other's
    place. Words that are also another part of speech are replaced where the words beside them tell which one they
    are. Chinese is segmented and tagged by jieba, and its pairs were chosen by hand. Numbers, negations, names, code,
    quotes and links stay, and so does what the answer refers to. A word changes everywhere in the text or nowhere.

    Args:
        text: any text.
        rng: where chance comes from.
        ratio: share of the words that change; at least one does, where any can.
        language: which language's words change; auto: both.
        keep: a text whose words stay: the answer.

    Raises:
        UserError: ratio is not between 0 and 1, or the language is not known.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"ratio={ratio!r} is no share between 0 and 1", remedy="for example 0.1")
    rng = rng or random.Random()
    field = Field(text, keep, language)
    english, words = english_words(field)
    chinese, more = chinese_words(field)
    places: dict[str, list[tuple[Piece, tuple[str, ...]]]] = {}
    for piece, options in [*english, *chinese]:
        places.setdefault(piece.text.lower(), []).append((piece, options))
    wanted = max(1, round((words + more) * ratio)) if ratio and places else 0
    changes: dict[Piece, str] = {}
    lower = text.lower()
    for word in rng.sample(sorted(places), min(wanted, len(places))):
        common = set.intersection(*(set(options) for _, options in places[word]))
        # A synonym that the text uses already would make one thing of two, or two of one.
        free = sorted(o for o in common if o not in lower)
        if free:
            chosen = rng.choice(free)
            changes.update({p: chosen.capitalize() if p.text[0].isupper() else chosen for p, _ in places[word]})
    return replace_pieces(text, _with_articles(text, changes))


def _with_articles(text: str, changes: dict[Piece, str]) -> dict[Piece, str]:
    """The changes, with "a" and "an" before the changed words mended."""
    mended = dict(changes)
    for piece, word in changes.items():
        before = text[max(0, piece.start - 4) : piece.start].lower()
        for article in ("an", "a"):
            if before.endswith(f" {article} ") or before == f"{article} ":
                right = "an" if _begins_with_vowel(word) else "a"
                if right != article and _begins_with_vowel(piece.text) != _begins_with_vowel(word):
                    start = piece.start - len(article) - 1
                    old = text[start : start + len(article)]
                    mended[Piece(start, start + len(article), old)] = right.capitalize() if old[0].isupper() else right
                break
    return mended


def _begins_with_vowel(word: str) -> bool:
    word = word.lower()
    if word.startswith(("hour", "honest", "honour", "honor", "heir")):
        return True
    return word[0] in "aeiou" and not word.startswith(("uni", "use", "usu", "uti", "eu", "one", "once"))
