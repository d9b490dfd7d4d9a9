"""What two texts do not have in common, by words; by characters where a language writes none apart."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal

Kind = Literal["same", "added", "missing"]

_PIECE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|(?:(?![\u2e80-\u9fff\uac00-\ud7af])\w)+|\s+|.")


def pieces(text: str) -> list[str]:
    """Words, single Chinese characters, runs of white space and other characters, which joined give the text."""
    return _PIECE.findall(text)


def differences(said: str, right: str) -> list[tuple[Kind, str]]:
    """A text beside the right one, in its order: what both have, what it alone has (``added``), and what the right one
    has in its place (``missing``).

    Joined, all but the missing parts are the text, and all but the added ones the right text.
    """
    ours, theirs = pieces(said), pieces(right)
    found: list[tuple[Kind, str]] = []
    for kind, begin, end, start, stop in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append(("same", "".join(ours[begin:end])))
            continue
        if end > begin:
            found.append(("added", "".join(ours[begin:end])))
        if stop > start:
            found.append(("missing", "".join(theirs[start:stop])))
    return found
