"""Cleaners of single characters: invisible ones, full-width forms, composed and decomposed letters."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

# Controls but for tab, line feed and carriage return.
_ASCII_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# A black flag and the tag letters that name its region, such as Scotland's (Unicode TS 51, ED-14a).
_TAGGED_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")
_JOINERS = "\u200c\u200d"
# What a joiner never stands beside in an emoji or in a script that joins letters: white space, Latin, Greek and
# Cyrillic, general punctuation, Chinese, Japanese and Korean.
_PLAIN = r"\s\x00-\u058f\u2000-\u206f\u2e80-\ua4cf\uac00-\ud7ff\uff00-\uffef"
_LONE_JOINER = re.compile(f"(?<![^{_PLAIN}])[{_JOINERS}]|[{_JOINERS}](?![^{_PLAIN}])")
# Line ends in other clothes: vertical tab, form feed (a PDF's page break), NEL.
_BREAKS = {0x0B: "\n", 0x0C: "\n", 0x85: "\n"}
# Prepended marks are of category Cf and yet drawn (Unicode 16, 23.2 and 9.2).
_DRAWN_FORMATS = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}


class _Unseen(dict[int, str | int | None]):
    """For ``str.translate``: each character that nobody sees to nothing, looked up once."""

    def __missing__(self, code: int) -> str | int | None:
        self[code] = kept = None if _is_unseen(code) else code
        return kept


def _is_unseen(code: int) -> bool:
    if chr(code) in "\n\r\t" + _JOINERS or code in _DRAWN_FORMATS:
        return False
    never_a_character = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
    return code == 0xFFFD or never_a_character or unicodedata.category(chr(code)) in ("Cc", "Cf", "Co", "Cs")


_UNSEEN = _Unseen(_BREAKS)


def remove_special_chars(text: str) -> str:
    """Take out characters that nobody sees: controls, zero-width marks, byte-order marks, private use, U+FFFD.

    Line ends, tabs, punctuation, the letters of every script and emoji stay, with the joiners that emoji and scripts
    such as Persian are written with. A form feed becomes a line's end.
    """
    if text.isascii():
        quick = text.replace("\n", "").isprintable()
        return text if quick or not _ASCII_CONTROLS.search(text) else text.translate(_UNSEEN)
    if _TAGGED_FLAG.search(text):
        parts = re.split(f"({_TAGGED_FLAG.pattern})", text)
        text = "".join(p if i % 2 else p.translate(_UNSEEN) for i, p in enumerate(parts))
    elif any(_UNSEEN[ord(c)] != ord(c) for c in set(text)):
        text = text.translate(_UNSEEN)
    if "\u200c" in text or "\u200d" in text:
        text = _LONE_JOINER.sub("", text)
    return text


def normalize_unicode(text: str, *, form: Literal["NFC", "NFKC"] = "NFC") -> str:
    """Write each letter one way (Unicode TR 15): e and a combining accent become é.

    Args:
        text: any text.
        form: NFC joins letter and accent; NFKC also replaces forms such as ① and ﬁ, and makes Chinese punctuation
            ASCII, which normalize_fullwidth doesn't.
    """
    return text if unicodedata.is_normalized(form, text) else unicodedata.normalize(form, text)


def _half(characters: str) -> dict[int, int]:
    return {ord(c) + 0xFEE0: ord(c) for c in characters}


_LETTERS = _half("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
_DIGITS = _half("0123456789")
# Chinese writes none of these full-width on purpose, unlike the punctuation below.
_SYMBOLS = _half("\"#$%&'*+-./<=>@\\^_`|")
_PUNCTUATION = _half(",!?:;()[]{}")
_SPACE = {0x3000: 0x20}
_WIDE = re.compile(f"[{''.join(map(chr, (*_LETTERS, *_DIGITS, *_SYMBOLS, *_SPACE)))}]")
_WIDE_PUNCTUATION = re.compile(f"[{re.escape(''.join(map(chr, _PUNCTUATION)))}]")
_CJK_LETTER = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]")
_LATIN = re.compile("[A-Za-z0-9]")
_CLOCK = re.compile("(?<![0-9：])((?:[01]?[0-9]|2[0-4]))：(?=[0-5][0-9](?![0-9：]))")


def normalize_fullwidth(
    text: str,
    *,
    letters: bool = True,
    digits: bool = True,
    symbols: bool = True,
    spaces: bool = True,
    punctuation: Literal["auto", "keep", "all"] = "auto",
) -> str:
    """Full-width letters, digits, symbols and spaces to the usual ones: １２３ＡＢＣ％ to 123ABC%.

    Args:
        text: any text.
        letters: Ａ to A.
        digits: １ to 1.
        symbols: ％ ＋ ＝ ＠ ／ and the like.
        spaces: the ideographic space to a plain one.
        punctuation: what becomes of ，！？：；（）［］｛｝. ``auto`` leaves them as they are in Chinese, Japanese and
            Korean text, and makes them ASCII in a text of Latin letters alone and in the time of day (１２：３０).
            。、「」《》～ always stay.
    """
    if text.isascii():
        return text
    if _WIDE.search(text):
        parts = ((letters, _LETTERS), (digits, _DIGITS), (symbols, _SYMBOLS), (spaces, _SPACE))
        text = text.translate({wide: half for wanted, part in parts if wanted for wide, half in part.items()})
    if punctuation == "keep" or not _WIDE_PUNCTUATION.search(text):
        return text
    if punctuation == "all" or (_LATIN.search(text) and not _CJK_LETTER.search(text)):
        return text.translate(_PUNCTUATION)
    return _CLOCK.sub(r"\1:", text)
