"""A tokenizer's own result, several times as fast: what it makes of each word is remembered.

A byte-level BPE tokenizer (GPT-2's kind: SmolLM2, Llama 3, Qwen, DeepSeek, GLM) cuts a text at its added tokens, then
into words by regular expressions, and encodes each word on its own. Texts consist of few different words, so nearly
all the work is finding them. Here that is done by the tokenizer's own expressions, written for Python's ``re``, and
each new word is given to the tokenizer's own model, once.

Nothing rests on the translation being right: every character is tried beside the tokenizer in the contexts that
expressions tell apart, and texts with others, or tokenizers of another kind, take the tokenizer's usual way.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

# Latin letters, punctuation, currency, arrows and mathematical signs: what English, code and figures are written in.
# Scripts without spaces have few words that come twice, and gain nothing.
_BLOCKS = ((0, 0x250), (0x2000, 0x2070), (0x20A0, 0x20D0), (0x2100, 0x2150), (0x2190, 0x2300))
# What a character is tried in: alone, twice, beside letters, digits, blanks, line ends, punctuation and apostrophes.
_CONTEXTS = (
    *("{0}", "{0}{0}", "a{0}b", "1{0}2", " {0} ", "  {0}", "{0}  ", "\n{0}\n", "\r\n {0}", ".{0}!", "'{0}", "A{0}'s"),
    *("'{0}e", "{0}1234", "{0}Ab", "\t{0}."),
)
_REMEMBERED = 300_000
_LONGEST = 64


class WordTokenizer:
    """Encodes texts word by word. :meth:`of` makes one where a tokenizer is of the kind.

    Args:
        tokenizer: a fast tokenizer.
        steps: the expressions that cut a text into words, one after the other.
        characters: those that were found to be cut alike.
        missing: bytes that the vocabulary has no token for.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, steps: list[re.Pattern[str]], characters: str, missing: frozenset[int]
    ) -> None:
        self._steps = steps
        self._covered = re.compile(f"[{_class(characters)}]*")
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        # The longest of those that begin at one place wins; an empty alternation would match everywhere.
        self._added = re.compile(f"({'|'.join(map(re.escape, sorted(added, key=len, reverse=True))) or '(?!)'})")
        self._known = _Words(tokenizer.backend_tokenizer.model, added, missing, tokenizer.unk_token_id)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, missing: frozenset[int] = frozenset()) -> WordTokenizer | None:
        """One for this tokenizer; None where it is of another kind, or where trying it shows that it is."""
        backend = tokenizer.backend_tokenizer
        expressions = _expressions(json.loads(backend.to_str()))
        added = tokenizer.added_tokens_decoder.values()
        if expressions is None or any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in added):
            return None
        characters = [chr(code) for first, end in _BLOCKS for code in range(first, end)]
        characters = [c for c in characters if unicodedata.normalize("NFC", c) == c]
        try:
            steps = [re.compile(_translated(expression, characters)) for expression in expressions]
        except (re.error, _Unsupported):
            return None
        alike = "".join(c for c in characters if _cut_alike(c, steps, backend.pre_tokenizer.pre_tokenize_str))
        return cls(tokenizer, steps, alike, missing) if set("aZ09 .\n") <= set(alike) else None

    def covers(self, text: str) -> bool:
        """Whether the text holds nothing but characters that were tried."""
        return self._covered.fullmatch(text) is not None

    def encode(self, text: str, spans: Sequence[Span] = ()) -> tuple[np.ndarray, list[Span]] | None:
        """Token ids of a covered text, and the half-open token ranges of character ranges.

        Args:
            text: see :meth:`covers`.
            spans: half-open character ranges.

        Returns:
            ``[n] int32`` (read-only) and the ranges; None where a range begins or ends inside a word (where its tokens
            do, this class does not know) and where tokens would not hold all of a word.
        """
        words: list[str] = []
        borders: list[tuple[int, int]] = []  # where each piece begins: in characters, and in words
        at = 0
        for number, piece in enumerate(self._added.split(text)):
            borders.append((at, len(words)))
            at += len(piece)
            if number % 2:
                words.append(piece)
            elif piece:
                words += _cut(piece, self._steps)
        borders.append((at, len(words)))
        try:
            tokens = list(map(self._known.__getitem__, words))
        except _Lossy:
            return None
        ranges: list[Span] = []
        for begin, end in spans:
            first, last = _word_at(begin, borders, words), _word_at(end, borders, words)
            if first is None or last is None:
                return None
            start = sum(map(len, tokens[:first])) // 4
            ranges.append((start, start + sum(map(len, tokens[first:last])) // 4))
        return np.frombuffer(b"".join(tokens), dtype=np.int32), ranges


class _Lossy(ValueError):
    """A word that its tokens do not hold."""


class _Words(dict[str, bytes]):
    """Token ids of each word met, as the four bytes of each: read at once, where numbers are read one by one."""

    def __init__(self, model: Any, known: dict[str, int], missing: frozenset[int], unknown: int | None) -> None:
        super().__init__({word: array("i", [index]).tobytes() for word, index in known.items()})
        self._model = model
        self._missing = missing
        self._unknown = unknown

    def __missing__(self, word: str) -> bytes:
        numbers = [token.id for token in self._model.tokenize(_spelt(word))]
        if self._unknown in numbers or not self._missing.isdisjoint(word.encode("utf-8")):
            raise _Lossy
        ids = array("i", numbers).tobytes()
        if len(word) <= _LONGEST and len(self) < _REMEMBERED:
            self[word] = ids
        return ids


def _word_at(place: int, borders: list[tuple[int, int]], words: list[str]) -> int | None:
    """The number of the word that begins at a character; None where none does."""
    at, word = next(border for border in reversed(borders) if border[0] <= place)
    while at < place:
        at += len(words[word])
        word += 1
    return word if at == place else None


def _cut(text: str, steps: list[re.Pattern[str]]) -> list[str]:
    words = [text]
    for step in steps:
        words = _found(step, words[0]) if len(words) == 1 else [w for word in words for w in _found(step, word)]
    return words


def _found(step: re.Pattern[str], text: str) -> list[str]:
    """What a step finds, and what lies between."""
    words: list[str] = step.findall(text)
    if sum(map(len, words)) == len(text):
        return words
    return [word for word in re.split(f"({step.pattern})", text) if word]


@lru_cache
def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in a byte-level vocabulary.

    The table is that of GPT-2 (Radford et al., 2019): printable bytes are themselves, the others follow from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _spelt(word: str) -> str:
    """A word in the letters of its bytes."""
    letters = byte_letters()
    if word.isascii():
        return word.translate(letters)
    return "".join([letters[byte] for byte in word.encode("utf-8")])


# --- the tokenizer's expressions ---

# GPT-2's, which the tokenizers library has built in.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class _Unsupported(ValueError):
    """An expression that has no translation."""


def _expressions(content: dict[str, Any]) -> list[str] | None:
    """The expressions of a tokenizer.json of the byte-level kind; None for any other."""
    model = content["model"]
    other = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    # The characters that are tried are in NFC, and none of them joins another.
    if model["type"] != "BPE" or any(map(model.get, other)) or content.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    first = content.get("pre_tokenizer") or {}
    *before, last = first["pretokenizers"] if first.get("type") == "Sequence" else [first]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    expressions: list[str] = []
    for step in before:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            expressions.append(step["pattern"].get("Regex") or re.escape(step["pattern"]["String"]))
        elif step["type"] == "Digits":
            expressions.append(r"\p{N}" if step["individual_digits"] else r"\p{N}+")
        else:
            return None
    return [*expressions, *([_BYTE_LEVEL] if last.get("use_regex", True) else [])]


def _translated(expression: str, characters: list[str]) -> str:
    """An expression with Unicode properties, for Python's ``re``: each property as the characters that have it.

    Raises:
        _Unsupported: it has something else that ``re`` reads in another way, or not at all.
    """
    out: list[str] = []
    inside = False  # a character class
    for part in re.findall(r"\\[pP]\{[^}]*\}|\\.|&&|.", expression, re.DOTALL):
        if part[0] == "\\" and part[1] in "pPsSdDwW":
            negated = part[1].isupper()
            if inside and negated:
                raise _Unsupported(part)
            members = _class(_having(part[0] + part[1].lower() + part[2:], characters))
            out.append(members if inside else f"[{'^' * negated}{members}]")
            continue
        if (part[0] == "\\" and part[1].isalpha() and part[1] not in "nrtfv") or (inside and part in ("[", "&&")):
            raise _Unsupported(part)
        if part in ("[", "]"):
            inside = part == "["
        out.append(part)
    return "".join(out)


def _having(name: str, characters: list[str]) -> str:
    """The characters with a property."""
    import regex

    try:
        pattern = regex.compile(name)
    except regex.error as error:
        raise _Unsupported(name) from error
    return "".join(c for c in characters if pattern.fullmatch(c))


def _class(characters: str) -> str:
    """The inside of a character class that holds these."""
    runs: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in runs)


def _cut_alike(character: str, steps: list[re.Pattern[str]], splits: Any) -> bool:
    """Whether a text with this character falls into the tokenizer's words, in each context."""
    texts = (context.format(character) for context in _CONTEXTS)
    return all([_spelt(w) for w in _cut(text, steps)] == [w for w, _ in splits(text)] for text in texts)
