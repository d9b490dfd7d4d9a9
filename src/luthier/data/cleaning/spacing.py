"""Cleaners of white space: runs of it, empty lines, and the spaces of Chinese text."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from luthier.data.cleaning.code import outside_code

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_RUN = re.compile(r"[^\S\n]+")
_AROUND_LINE_END = re.compile(r" ?\n ?")
_LINE_TAIL = re.compile(r"[^\S\n]+$", re.MULTILINE)
# Within a line: two blanks or a blank that is no space, after something that is no blank.
_INNER_RUN = re.compile(r"(?<=\S)(?:[^\S\n]{2,}|[^\S\n ])(?=\S)")
_SPACES = re.compile("  +")
_SPACES_AT_END = re.compile(" +\n")
_LINE_HEAD = re.compile(r"^[^\S\n]+", re.MULTILINE)
_ODD_HEAD = re.compile(r"^[ \t]*[^\S\n \t]", re.MULTILINE)
# White space that is neither a space nor a line feed.
_ODD_BLANK = re.compile(r"[^\S\n ]")


def normalize_whitespace(text: str, *, keep_indentation: bool = True, keep_code: bool = True) -> str:
    """One space for each run of spaces and tabs, one kind of line end, no blanks at lines' ends nor around the text.

    Args:
        text: any text.
        keep_indentation: the spaces and tabs that a line begins with stay, for they mean something in code and lists;
            what all lines have in common goes.
        keep_code: fenced code (```) stays as it is.
    """
    if _is_tidy(text):
        return text
    plain = _has_plain_blanks(text)
    if not plain:
        text = _LINE_ENDS.sub("\n", text)
    tidy = _tidy_whole if not keep_indentation else _tidy_plain if plain else _tidy_within_lines
    text = outside_code(text, tidy, spans=False) if keep_code else tidy(text)
    return _strip(text) if keep_indentation else text.strip()


def _is_tidy(text: str) -> bool:
    """True only where nothing would change; a text with indented lines is looked at more closely."""
    if not text or text[0].isspace() or text[-1].isspace() or "  " in text or " \n" in text or "\n " in text:
        return not text
    return _has_plain_blanks(text)


def _has_plain_blanks(text: str) -> bool:
    """Whether spaces and line feeds are all the white space there is."""
    # A tab is not printable, and in ASCII no other blank is. The quick look holds for nearly every text.
    return (text.isascii() and text.replace("\n", "").isprintable()) or not _ODD_BLANK.search(text)


def _tidy_plain(text: str) -> str:
    """What _tidy_within_lines does, several times as fast, where spaces are the only blanks."""
    if " \n" in text:
        text = _SPACES_AT_END.sub("\n", text)
    return _SPACES.sub(_one_but_indentation, text) if "  " in text else text


def _one_but_indentation(match: re.Match[str]) -> str:
    start = match.start()
    return match[0] if start == 0 or match.string[start - 1] == "\n" else " "


def _tidy_whole(text: str) -> str:
    return _AROUND_LINE_END.sub("\n", _RUN.sub(" ", text))


def _tidy_within_lines(text: str) -> str:
    text = _LINE_TAIL.sub("", text)
    if _ODD_HEAD.search(text):
        text = _LINE_HEAD.sub(_plain_head, text)
    return _INNER_RUN.sub(" ", text)


def _plain_head(match: re.Match[str]) -> str:
    """Indentation in spaces and tabs: no-break spaces (copied code) become spaces, an ideographic indent goes."""
    return "".join(" " if c == "\xa0" else c for c in match.group() if c in " \t\xa0")


def _strip(text: str) -> str:
    """The text without blank lines around it, without trailing blanks, and without what all its lines begin with."""
    text = text.rstrip()
    first = next((i for i, c in enumerate(text) if not c.isspace()), 0)
    text = text[text.rfind("\n", 0, first) + 1 :]
    if not text[:1].isspace():
        return text
    heads = [match.group() for match in re.finditer(r"^[ \t]*(?=\S)", text, re.MULTILINE)]
    common = min(heads, key=len, default="")
    if common and all(head.startswith(common) for head in heads):
        text = re.sub(f"^{common}", "", text, flags=re.MULTILINE)
    return text.lstrip()


def remove_empty_lines(text: str, *, keep: Annotated[int, Field(ge=0)] = 0) -> str:
    """The text without lines that hold nothing but white space.

    Args:
        text: any text.
        keep: so many empty lines in a row may stay; 1 keeps paragraphs apart.
    """
    lines: list[str] = []
    empty = 0
    for line in text.split("\n"):
        empty = 0 if line.strip() else empty + 1
        if empty <= keep:
            lines.append(line)
    return "\n".join(lines)


_HAN = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_MARKS = "，。！？：；、（）《》〈〉「」『』【】〔〕…"
_BLANK = "[ \t\xa0\u2000-\u200a\u202f\u3000]"
_BESIDE_MARK = re.compile(f"(?<=[{_HAN}{_MARKS}]){_BLANK}+(?=[{_MARKS}])|(?<=[{_MARKS}]){_BLANK}+(?=[{_HAN}{_MARKS}])")
_ISOLATED = re.compile(f"(?<![{_HAN}])[{_HAN}](?:{_BLANK}+[{_HAN}]){{2,}}(?![{_HAN}])")
_BETWEEN_HAN = re.compile(f"(?<=[{_HAN}]){_BLANK}+(?=[{_HAN}])")
_BLANKS = re.compile(f"{_BLANK}+")
# Borders, and addresses, which stay as they are.
_URL = "(?P<url>(?:https?|ftp)://[^\\s，。！？：；、（）《》]+)"
_JOINED = re.compile(f"(?<=[{_HAN}])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9%])(?=[{_HAN}])|{_URL}")
_APART = re.compile(f"(?<=[{_HAN}]) +(?=[A-Za-z0-9])|(?<=[A-Za-z0-9%]) +(?=[{_HAN}])|{_URL}")
_ANY_HAN = re.compile(f"[{_HAN}]")


def normalize_cjk_spacing(
    text: str,
    *,
    between: Literal["isolated", "all", "keep"] = "isolated",
    latin: Literal["keep", "space", "none"] = "keep",
) -> str:
    """Take out the spaces that OCR and PDF leave in Chinese: 我 们 去 北 京 ， to 我们去北京，.

    Args:
        text: any text; code in backticks or fences stays.
        between: ``isolated`` takes out spaces beside Chinese punctuation and within a row of three or more single
            characters, and leaves those between words that somebody set apart (苹果 香蕉); ``all`` takes out every one
            between two Chinese characters.
        latin: a space between Chinese and Latin letters or digits stays as it is, is put there (用 Python 写) or taken
            out (用Python写). Addresses (https://…) stay whole.
    """
    if not _ANY_HAN.search(text):
        return text
    return outside_code(text, lambda prose: _space_cjk(prose, between, latin))


def _space_cjk(text: str, between: str, latin: str) -> str:
    if between != "keep":
        text = _BESIDE_MARK.sub("", text)
        text = _BETWEEN_HAN.sub("", text) if between == "all" else _ISOLATED.sub(_without_blanks, text)
    if latin == "keep":
        return text
    border, filling = (_JOINED, " ") if latin == "space" else (_APART, "")
    return border.sub(lambda match: match["url"] or filling, text)


def _without_blanks(match: re.Match[str]) -> str:
    return _BLANKS.sub("", match.group())
