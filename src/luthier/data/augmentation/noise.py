"""Slips of typing: what people really send to a model, in English and in Chinese."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import cache

from luthier.data.augmentation.lexicons.chinese import is_chinese_word
from luthier.data.augmentation.text import Field, Language, Piece, replace_pieces, words_of
from luthier.errors import UserError

KINDS = ("insert", "delete", "swap", "keyboard", "homophone")

_NEIGHBOURS = {
    "q": "wa", "w": "qes", "e": "wrd", "r": "etf", "t": "ryg", "y": "tuh", "u": "yij", "i": "uok", "o": "ipl",
    "p": "ol",
    "a": "qsz", "s": "awdx", "d": "sefc", "f": "drgv", "g": "fthb", "h": "gyjn", "j": "hukm", "k": "jil", "l": "kop",
    "z": "asx", "x": "zsdc", "c": "xdfv", "v": "cfgb", "b": "vghn", "n": "bhjm", "m": "njk",
}  # fmt: skip

# Words that sound alike and are often mistaken. Numbers (two, four, one, eight) are not among them.
_HOMOPHONES = [
    "their there", "your youre", "its it's", "than then", "whose who's", "weather whether", "affect effect",
    "accept except", "loose lose", "quite quiet", "advice advise", "principal principle", "peace piece", "brake break",
    "buy by", "hear here", "know no", "right write", "weak week", "wear where", "which witch", "whole hole",
    "passed past", "plain plane", "sight site", "stationary stationery", "complement compliment", "allowed aloud",
    "board bored", "fair fare", "flour flower", "mail male", "meat meet", "road rode", "sail sale", "scene seen",
    "some sum", "steal steel", "tail tale", "threw through", "waist waste", "wait weight", "desert dessert",
    "definitely definately", "separate seperate", "receive recieve", "believe beleive", "because becuase",
]  # fmt: skip

# What a slip must neither hit nor produce: it would say something else, not the same thing badly.
_NUMBERS = words_of(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion half "
    "third quarter twice thrice double triple dozen first second fourth fifth sixth seventh eighth ninth tenth"
)
_NEGATIONS = words_of("no not never none nor neither without cannot nothing nobody nowhere hardly unless")
_NEGATING_HAN = frozenset("不没无未非别勿莫否毋甭免弗")
_FIXED_HAN = (
    _NEGATING_HAN
    | frozenset("零〇一二三四五六七八九十百千万亿两几半双俩仨第每单壹贰叁肆伍陆柒捌玖拾佰仟")
    | frozenset("买卖多少大小上下左右前后高低长短早晚好坏进出里外男女有增减加减乘除先后反正真假快慢贵差香臭冷热")
)
# Pinyin that hands and ears mistake for each other.
_FUZZY = [
    (r"^zh", "z"), (r"^z(?!h)", "zh"), (r"^ch", "c"), (r"^c(?!h)", "ch"), (r"^sh", "s"), (r"^s(?!h)", "sh"),
    (r"^n", "l"), (r"^l", "n"), (r"^f", "h"), (r"^h", "f"), (r"(?<=[aei])ng$", "n"), (r"(?<=[aei])n$", "ng"),
]  # fmt: skip


def noise_injection(
    text: str,
    rng: random.Random | None = None,
    noise_ratio: float = 0.1,
    *,
    kinds: Sequence[str] = KINDS,
    language: Language = "auto",
    keep: str = "",
) -> str:
    """Typing slips in a share of the words.

    In English a letter inside a word of four letters or more is doubled, left out, swapped with the next, or hit
    beside its key, or the word is taken for one that sounds like it. In Chinese a character is doubled, left out,
    swapped with its neighbour, taken for one of a nearby pinyin (zh for z, ang for an), or for one of the same pinyin
    among the 3,755 common characters of GB 2312. Digits, number words, negations, opposites (买, 卖), words
    written large, code, quotes and links stay,
    and so does what the answer refers to.

    Args:
        text: any text.
        rng: where chance comes from.
        noise_ratio: share of the words that get a slip (two Chinese characters count as a word); at least one does,
            where any can.
        kinds: which of insert, delete, swap, keyboard and homophone may happen.
        language: which language's words get slips; auto: both.
        keep: a text whose words get none: the answer.

    Raises:
        UserError: noise_ratio is not between 0 and 1, or a kind or language is not known.
    """
    if not 0 <= noise_ratio <= 1:
        raise UserError(f"noise_ratio={noise_ratio!r} is no share between 0 and 1", remedy="for example 0.1")
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    unknown = [k for k in kinds if k not in KINDS]
    if unknown or not kinds:
        raise UserError(f"kinds={kinds!r}: no such kind of noise", remedy=f"use some of {', '.join(KINDS)}")
    rng = rng or random.Random()
    field = Field(text, keep, language)
    slips: list[tuple[Piece, Callable[[], str | None]]] = []
    for word in field.english():
        # A word written large may be a name, at a sentence's beginning too.
        if (
            word.text.islower()
            and word.text not in _NUMBERS | _NEGATIONS
            and (len(word) >= 4 or word.text in _sounding_alike())
        ):
            slips.append((word, lambda w=word: _english_slip(w.text, kinds, rng)))  # type: ignore[misc]
    words = float(len(slips))
    for run in field.chinese():
        for at in range(run.start, run.end):
            negated = text[at - 1 : at] in _NEGATING_HAN and at > 0  # 不断 without 断 says the opposite
            if text[at] not in _FIXED_HAN and not negated and not field.keeps(at, at + 1):
                slips.append((Piece(at, at + 1, text[at]), lambda a=at, r=run: _chinese_slip(field, r, a, kinds, rng)))  # type: ignore[misc]
                words += 0.5
    wanted = max(1, round(words * noise_ratio)) if noise_ratio and slips else 0
    changes: dict[Piece, str] = {}
    taken: set[int] = set()
    for index in rng.sample(range(len(slips)), len(slips)) if wanted else ():
        piece, slip = slips[index]
        if piece.start in taken:
            continue
        slipped = slip()
        if slipped is None:
            continue
        if len(piece) == 1 and len(slipped) == 2 and slipped[1] == piece.text and slipped[0] != piece.text:
            # Two characters changed places: the next one belongs to this change.
            piece = Piece(piece.start, piece.start + 2, text[piece.start : piece.start + 2])
            if piece.start + 1 in taken:
                continue
        changes[piece] = slipped
        taken.update(range(piece.start - 1, piece.end + 1))
        if len(changes) == wanted:
            break
    return replace_pieces(text, changes)


def _english_slip(word: str, kinds: Sequence[str], rng: random.Random) -> str | None:
    """A word with one slip in it, or None where none of the kinds fits."""
    for kind in rng.sample(kinds, len(kinds)):
        slipped = _slip_of(word, kind, rng)
        if slipped and slipped != word and slipped not in _NUMBERS | _NEGATIONS:
            return slipped
    return None


def _slip_of(word: str, kind: str, rng: random.Random) -> str | None:
    if kind == "homophone":
        others = _sounding_alike().get(word, ())
        return rng.choice(others) if others else None
    if len(word) < 4:
        return None
    at = rng.randrange(1, len(word) - 1)
    if kind == "insert":
        return word[: at + 1] + word[at:]
    if kind == "delete":
        return word[:at] + word[at + 1 :]
    if kind == "swap":
        places = [i for i in range(1, len(word) - 2) if word[i] != word[i + 1]]
        if not places:
            return None
        at = rng.choice(places)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + rng.choice(_NEIGHBOURS[word[at]]) + word[at + 1 :]


def _chinese_slip(field: Field, run: Piece, at: int, kinds: Sequence[str], rng: random.Random) -> str | None:
    """What stands in place of the character at ``at``: nothing, one or two characters; None where no kind fits."""
    character = field.text[at]
    for kind in rng.sample(kinds, len(kinds)):
        if kind == "insert":
            return character * 2
        if kind == "delete" and _is_in_a_word(run.text, at - run.start):
            return ""
        if kind == "swap" and at + 1 < run.end:
            other = field.text[at + 1]
            if other not in _FIXED_HAN and not field.keeps(at + 1, at + 2) and _swap_is_a_slip(character, other):
                return other + character
        if kind in ("homophone", "keyboard"):
            sound = _reading(run.text, at - run.start)
            sounds = [sound] if kind == "homophone" else _fuzzy(sound)
            others = [c for s in sounds for c in _characters_by_sound().get(s, "") if c != character]
            others = [c for c in others if c not in _FIXED_HAN and c not in field.keep]
            if others:
                return rng.choice(others)
    return None


def _is_in_a_word(run: str, index: int) -> bool:
    """Whether a character is a part of a longer word: left out of it, one still reads the word (but not 差 of 太差)."""
    return is_chinese_word(run[index : index + 2]) or (index > 0 and is_chinese_word(run[index - 1 : index + 1]))


def _swap_is_a_slip(first: str, second: str) -> bool:
    """False where the two say something else the other way round (蜜蜂, 蜂蜜), or stay as they are."""
    return first != second and not is_chinese_word(second + first)


def _fuzzy(sound: str) -> list[str]:
    near = (re.sub(pattern, other, sound) for pattern, other in _FUZZY if re.search(pattern, sound))
    return [s for s in near if s in _characters_by_sound()]


def _reading(run: str, index: int) -> str:
    """The pinyin of one character, read in its run."""
    from pypinyin import lazy_pinyin

    # Words are short: what stands four characters away does not change a reading.
    start = max(0, index - 4)
    return str(lazy_pinyin(run[start : index + 5])[index - start])


@cache
def _characters_by_sound() -> dict[str, str]:
    """The common characters of GB 2312's first level (rows 16 to 55) by their pinyin without tones."""
    from pypinyin import lazy_pinyin

    found: dict[str, str] = {}
    for row in range(0xB0, 0xD8):
        for cell in range(0xA1, 0xFF):
            try:
                character = bytes((row, cell)).decode("gb2312")
            except UnicodeDecodeError:
                continue
            sound = lazy_pinyin(character)[0]
            found[sound] = found.get(sound, "") + character
    return found


@cache
def _sounding_alike() -> dict[str, tuple[str, ...]]:
    pairs = [pair.split() for pair in _HOMOPHONES]
    return {word: tuple(o for o in pair if o != word) for pair in pairs for word in pair if word.isalpha()}
