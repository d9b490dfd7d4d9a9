"""What of a text may vary: its words, outside code, numbers, names, quotes and what the answer refers to."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from luthier.errors import UserError

Language = Literal["auto", "en", "zh"]

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_HAN_RUN = re.compile(f"[{HAN}]+")
_WORD = re.compile(r"[^\W\d_]+", re.ASCII)
_LETTER = re.compile(r"[^\W\d_]")
# Kana and hangul: the Chinese characters beside them are Japanese or Korean words.
_OTHER_HAN_WRITERS = re.compile("[\u3040-\u30ff\uac00-\ud7af]")

# A dollar sign opens LaTeX only where no digit follows: "$5 and $6" is money. Each alternative is bounded, so that a
# text full of openings without an end takes no quadratic time.
_FIXED = re.compile(
    r"""
    ```[\s\S]*?(?:```|\Z)                                   # fenced code
  | `[^`\n]{1,500}`                                         # code in a line
  | \$\$[^$]{1,1000}\$\$ | \$(?![\d\s])[^$\n]{1,300}\$      # LaTeX
  | \\\([\s\S]{1,300}?\\\) | \\\[[\s\S]{1,1000}?\\\] | \\begin\{[\s\S]{1,2000}?\\end\{[^{}\n]{0,40}\}
  | \\[A-Za-z]+(?:\{[^{}]{0,200}\})*
  | <[|/!A-Za-z][^<>\n]{0,300}>                             # tags and control tokens
  | \{\{[^{}]{0,200}\}\} | \{[^{}\n]{0,200}\} | \[[A-Z_0-9]{2,60}\] | %\(?\w*\)?[sd]\b   # placeholders
  | (?:https?|ftp|file)://[^\s<>"'，。）]+ | www\.[^\s<>"'，。）]+
  | (?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{1,200}    # addresses
  | (?<!\w)[@\#][\w-]+
  | (?<![\w.~/\\-])[~.\w-]{0,100}[/\\][\w.~-]{1,100}(?:[/\\][\w.~-]*)*   # paths, and/or
  | “[^”\n]{0,300}” | ‘[^’\n]{0,300}’ | 「[^」\n]{0,300}」 | 『[^』\n]{0,300}』 | 《[^》\n]{0,100}》
  | 【[^】\n]{0,100}】
  | "[^"\n]{0,1000}" | (?<!\w)'[^'\n]{1,120}'(?!\w)         # quotes
  | (?<!\w)[A-Za-z_]\w{0,60}\([^()\n]{0,200}\)              # calls
  | ^[ \t]*(?:def|class|import|from|return|for|while|if|elif|else|try|SELECT|INSERT|UPDATE|DELETE|CREATE|public|private
      |var|let|const|function|\#include)\b[^\n]*[:;{})][ \t]*$           # lines of bare code
  | ^[^\n]*[;{}][ \t]*$
  | (?<!\w)(?=\w*[\d_])\w+                                  # numbers and identifiers
    """,
    re.VERBOSE | re.MULTILINE | re.ASCII,
)
_NAME = re.compile(r"[A-Z]{2,}[A-Za-z]*|[A-Za-z]+[a-z][A-Z][A-Za-z]*")  # NASA, JavaScript


def words_of(text: str) -> frozenset[str]:
    """The words of a list that is written as a line."""
    return frozenset(text.split())


@dataclass(frozen=True, slots=True)
class Piece:
    """A word of one script at ``text[start:end]``."""

    start: int
    end: int
    text: str

    def __len__(self) -> int:
        return self.end - self.start


class Field:
    """A text with the words in it that may vary.

    Args:
        text: any text.
        keep: a text whose words stay: the answer, and the label.
        language: which language's words vary; auto: Chinese and English both.

    Raises:
        UserError: no such language.
    """

    def __init__(self, text: str, keep: str = "", language: Language = "auto") -> None:
        if language not in ("auto", "en", "zh"):
            raise UserError(f"language={language!r} is not known", remedy="use auto, en or zh")
        self.text = text
        self.keep = keep
        self._language = language
        self._fixed = _merged((m.start(), m.end()) for m in _FIXED.finditer(text) if m.end() > m.start())
        self._starts = [start for start, _ in self._fixed]

    def is_fixed(self, start: int, end: int) -> bool:
        """Whether any of ``text[start:end]`` is code, a number, a quote or the like."""
        at = bisect_right(self._starts, start) - 1
        if at >= 0 and self._fixed[at][1] > start:
            return True
        return at + 1 < len(self._fixed) and self._fixed[at + 1][0] < end

    def fixed_texts(self) -> list[str]:
        """The code, links, quotes and placeholders of the text; numbers are not among them."""
        spans = (self.text[start:end].strip() for start, end in self._fixed)
        return [span for span in spans if not span.isalnum() and span]

    @cached_property
    def kept_stems(self) -> frozenset[str]:
        """Stems of the answer's English words."""
        return frozenset(stem(w) for w in _WORD.findall(self.keep))

    @cached_property
    def _kept_pairs(self) -> frozenset[str]:
        """Each two Chinese characters that stand beside each other in the answer."""
        return frozenset(run[i : i + 2] for run in _HAN_RUN.findall(self.keep) for i in range(len(run) - 1))

    def english(self) -> list[Piece]:
        """The English words that may vary: no names, no parts of can't or well-known, none of the answer's."""
        if self._language == "zh":
            return []
        found = []
        for match in _WORD.finditer(self.text):
            start, end = match.span()
            before, after = self.text[start - 1 : start], self.text[end : end + 1]
            if (start and before in "'’-_") or (after and after in "'’-_"):
                continue
            if _is_letter(before) or _is_letter(after):  # an accent: another language
                continue
            word = match.group()
            if self.is_fixed(start, end) or _NAME.fullmatch(word) or stem(word) in self.kept_stems:
                continue
            if word[0].isupper() and not self.opens_sentence(start):
                continue
            found.append(Piece(start, end, word))
        return found

    def chinese(self) -> list[Piece]:
        """Runs of Chinese characters outside what is fixed, whole; :meth:`keeps` tells what in them stays."""
        if self._language == "en" or _OTHER_HAN_WRITERS.search(self.text):
            return []
        return [
            Piece(*m.span(), m.group()) for m in _HAN_RUN.finditer(self.text) if not self.is_fixed(m.start(), m.end())
        ]

    def opens_sentence(self, at: int) -> bool:
        """Whether a word at this place begins a sentence, and may therefore be written large for that alone."""
        before = self.text[max(0, at - 20) : at].rstrip(" \t\"'“‘(*#->")
        return not before or before[-1] in ".!?:\n。！？：；"

    def keeps(self, start: int, end: int) -> bool:
        """Whether the answer refers to the Chinese characters at ``text[start:end]``: two of them stand there too.

        One character suffices where the answer is short (a class such as 好): common ones stand in any long one.
        """
        pairs = (self.text[i : i + 2] for i in range(max(0, start - 1), min(end, len(self.text) - 1)))
        if not self._kept_pairs.isdisjoint(pairs):
            return True
        return len(self.keep) <= 4 and any(c in self.keep for c in self.text[start:end])


def stem(word: str) -> str:
    """A word without the ending that number and tense give it: rough, for comparing alone."""
    word = word.lower()
    for ending in ("ing", "ies", "ied", "ed", "es", "s", "y", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def dominant_language(text: str) -> Literal["zh", "en", "other"]:
    """The language of most of a text: one Chinese character counts as much as two Latin letters."""
    if _OTHER_HAN_WRITERS.search(text):
        return "other"
    han = sum(len(run) for run in _HAN_RUN.findall(text))
    latin = sum(len(word) for word in _WORD.findall(text))
    other = len(_LETTER.findall(text)) - han - latin
    if other > 2 * han + latin:
        return "other"
    return "zh" if 2 * han > latin else "en"


def replace_pieces(text: str, changes: dict[Piece, str]) -> str:
    """The text with some of its pieces replaced."""
    out, at = [], 0
    for piece in sorted(changes, key=lambda p: p.start):
        out += [text[at : piece.start], changes[piece]]
        at = piece.end
    return "".join([*out, text[at:]])


def _is_letter(character: str) -> bool:
    return bool(character) and not character.isascii() and character.isalpha() and not _HAN_RUN.match(character)


def _merged(spans: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
