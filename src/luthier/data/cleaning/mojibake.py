"""Text that was decoded by the wrong encoding, put right."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

# What byte 0x80..0xBF of UTF-8 reads as in Latin-1, or in Windows-1252 where that differs. A no-break space (0xA0) has
# often become a plain one since.
_CONTINUATION = (
    "[\x80-\xbf \u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc"
    "\u2013-\u2026\u2030\u2039\u203a\u20ac\u2122]"
)
# Two or more characters of three bytes each, U+3000 to U+9FFF, or of full-width punctuation, U+FF00 to U+FFEF.
_UTF8_AS_LATIN = re.compile(f"(?:(?:[\xe3-\xe9]{_CONTINUATION}|\xef[\xbc\xbd\xbe]){_CONTINUATION}){{2,}}")
# Two or more characters of GB 2312 (two bytes, 0xA1..0xF7 and 0xA1..0xFE) read as Latin-1.
_GBK_AS_LATIN = re.compile("(?:[\xa1-\xf7][\xa1-\xfe]){2,}")
# Two Chinese characters are six bytes of UTF-8, which read as three characters of GBK.
_RUN = re.compile("[^\x00-\xa0]{3,}")
# A word in accented Latin, Greek, Cyrillic, Hebrew or Arabic letters.
_WORD = re.compile("[\xc0-\xff]+|[\u0386-\u03ce]+|[\u0410-\u0451]+|[\u05d0-\u05ea]+|[\u0621-\u064a]+")
_HAN_ROWS = range(0xB0, 0xF8)
_COMMON_ROWS = range(0xB0, 0xD8)


def fix_mojibake(text: str, *, chinese: bool = True) -> str:
    """Mend text that was decoded by the wrong encoding (cafÃ© to café, ä½ å¥½ and 浣犲ソ to 你好) and nothing else.

    Curly quotes, ligatures, full-width forms and HTML stay as they are. What was lost (锟斤拷, U+FFFD) can't come back.

    Args:
        text: any text.
        chinese: besides what ftfy mends, Chinese in UTF-8 read as GBK, in GBK read as Latin-1, and in UTF-8 read as
            Latin-1 whose no-break spaces were lost.

    Source: ftfy (Speer, 2019, doi:10.5281/zenodo.2591652), its encoding repair alone.
    """
    if text.isascii():
        return text
    fix = _ftfy()
    while True:
        before = text
        if chinese:
            # Before ftfy, which takes two bytes of GBK for one of the rarer letters that UTF-8 writes in two.
            text = _UTF8_AS_LATIN.sub(_from_utf8_as_latin, text)
            text = _GBK_AS_LATIN.sub(_from_gbk_as_latin, text)
            text = _RUN.sub(_from_utf8_as_gbk, text)
        text = fix(text)
        # Each of these shortens the text or does nothing the second time, so that this ends.
        if text == before:
            return text


@cache
def _ftfy() -> Callable[[str], str]:
    from ftfy import TextFixerConfig, fix_encoding

    config = TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
    )
    return lambda text: fix_encoding(text, config)


def _byte(character: str) -> bytes:
    if character == " ":
        return b"\xa0"
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")


def _from_utf8_as_latin(match: re.Match[str]) -> str:
    try:
        found = b"".join(map(_byte, match.group())).decode("utf-8")
    except UnicodeDecodeError:
        return match.group()
    return found if _is_chinese(found) else match.group()


def _from_gbk_as_latin(match: re.Match[str]) -> str:
    run = match.group()
    if len(set(run)) < 3 or max(run) < "À":
        return run  # a row of signs, such as the dots of a table of contents
    written = run.encode("latin-1")
    try:
        found = written.decode("gb2312")
    except UnicodeDecodeError:
        return run
    # The same bytes may be a word in UTF-8, which ftfy mends.
    if not _is_chinese(found) or _WORD.fullmatch(written.decode("utf-8", "replace")):
        return run
    return found


def _from_utf8_as_gbk(match: re.Match[str]) -> str:
    try:
        found = match.group().encode("gbk").decode("utf-8")
    except UnicodeError:
        return match.group()
    return found if _is_chinese(found) else match.group()


def _is_chinese(text: str) -> bool:
    """Whether a text is of Chinese characters and punctuation, most of them among the 3,755 common ones of GB 2312."""
    common = 0
    for character in text:
        try:
            row = character.encode("gb2312")[0]
        except UnicodeEncodeError:
            return False
        if row in _HAN_ROWS:
            common += row in _COMMON_ROWS
        elif (
            not "\u3000" <= character <= "\u303f"
            and not "\uff00" <= character <= "\uffef"
            and character not in "“”‘’—…·"
        ):
            return False
    return common * 2 > len(text)
