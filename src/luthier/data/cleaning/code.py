"""Where the code in a text is, so that cleaners of prose can leave it alone."""

from __future__ import annotations

import re
from collections.abc import Callable

# A fence of three or more backticks or tildes at a line's start, up to the same fence or the text's end (CommonMark
# 4.5), or a span of backticks within one line (CommonMark 6.1).
_FENCED = r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n`]*\n(?:.*?^[ \t]*(?P=fence)`*~*[ \t]*$|.*\Z)"
_SPAN = r"(?<!`)(?P<ticks>`+)(?!`)[^\n]{0,2000}?(?<!`)(?P=ticks)(?!`)"
_CODE = re.compile(f"{_FENCED}|{_SPAN}", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(_FENCED, re.MULTILINE | re.DOTALL)


def outside_code(text: str, change: Callable[[str], str], *, spans: bool = True) -> str:
    """The text with ``change`` applied to all but its fenced code and, where ``spans``, its `code` in backticks."""
    if "`" not in text and "~~~" not in text:
        return change(text)
    parts: list[str] = []
    at = 0
    for match in (_CODE if spans else _BLOCK).finditer(text):
        parts += (change(text[at : match.start()]), match.group())
        at = match.end()
    return "".join((*parts, change(text[at:])))


def blank_code(text: str) -> str:
    """The text, as long as it was, with U+FFFC in place of each character of its code."""
    if "`" not in text and "~~~" not in text:
        return text
    return _CODE.sub(lambda match: "\ufffc" * len(match.group()), text)
