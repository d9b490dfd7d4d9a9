"""What two rows are compared by: keys for the same words, hashed word n-grams for nearly the same words.

**Keys** are 128-bit hashes. Nothing is normalised but what no reader can see: Unicode's NFC form and white space
around a text. Case, punctuation and inner white space count.

**Shingles** are the word 3-grams of a text (Broder, 1997, "On the resemblance and containment of documents"), case and
punctuation left out. A word is a run of letters, digits and underscores; each character of a script that is written
without spaces (Chinese, Japanese, Thai, …) is a word, and so is each symbol (``+``, ``-``, ``€``, an emoji), for
``5 + 3`` is not ``5 - 3``. A text of fewer words is one shingle, and a text without a word is its own shingle. Three
words, not the five that are common for web pages: one changed word touches n shingles, so at a threshold of 0.8 it
takes 29 words to bear one with n = 3 and 49 with n = 5, and most prompts are shorter than that.

The work is done on arrays of code points, a few hundred rows at once.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from luthier.data.examples import Message, Source, TrainingExample

WORDS = 3
"""Words in a shingle."""

# Scripts without spaces between words: Thai to Myanmar, Khmer, kana, Han with its extensions, each a half-open range.
_UNSPACED = (
    (0x0E00, 0x10A0),
    (0x1780, 0x1800),
    (0x3040, 0x3100),
    (0x31F0, 0x3200),
    (0x3400, 0x4DC0),
    (0x4E00, 0xA000),
    (0xF900, 0xFB00),
    (0xFF66, 0xFFA0),
    (0x20000, 0x323B0),
)
_LAST = 0x323B0  # code points from here on are no letters
_BATCH = 1 << 18  # code points worked on at once: arrays of 2 MB stay in the cache
_FACTOR = 0x9E3779B97F4A7C15
_ODD = np.array([(_FACTOR * (2 * k + 3)) % (1 << 64) | 1 for k in range(16)], dtype=np.uint64)


def texts_of(example: TrainingExample) -> tuple[str, str]:
    """``(what is asked, what is answered)`` as plain texts.

    The answer is the last assistant turn with what follows it; for a plain text it is its label, where it has one.
    """
    if example.messages is None:
        answer = example.output if example.output is not None else _label(example)
        return example.input, answer or ""
    asked, answered = _divided(example.messages)
    return "\n".join(map(_said, asked)), "\n".join(map(_said, answered))


def _divided(messages: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=len(messages))
    return messages[:last], messages[last:]


def _label(example: TrainingExample) -> str | None:
    return None if example.label is None else json.dumps(example.label, ensure_ascii=False)


def _said(message: Message) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else "" if content is None else _json(content)
    return f"{text}\n{_json(message['tool_calls'])}" if message.get("tool_calls") else text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def place(source: Source | None, index: int, side: str = "row") -> str:
    """``file:line`` of a row, or its number where it came from no file."""
    return str(source) if source is not None else f"{side} {index + 1}"


# --- the same words ---


def keys_of(example: TrainingExample, *, tools: bool = True) -> tuple[bytes, bytes]:
    """128-bit hashes of what is asked, and of that with its answer.

    A prompt with its answer and a conversation of the same two turns have the same keys.

    Args:
        example: the row.
        tools: whether the tools on offer belong to what is asked. They do where a row is to be removed or to be called
            contradicting. To keep rows apart they do not: one conversation under two wordings of a tool is a leak.
    """
    hashed = blake2b(digest_size=16)
    if example.messages is None:
        asked: Sequence[Message] = ()
        answered: Sequence[Message] = ()
        hashed.update(_turn("user", example.input))
    else:
        asked, answered = _divided(example.messages)
    for message in asked:
        hashed.update(_turn(message.get("role"), message.get("content"), message))
    if tools and example.tools:
        hashed.update(b"\0tools" + _bytes(_json(example.tools)))
    prompt = hashed.digest()
    if example.messages is None:
        answer = example.output if example.output is not None else _label(example)
        hashed.update(b"\0" if answer is None else _turn("assistant", answer))
    for message in answered:
        hashed.update(_turn(message.get("role"), message.get("content"), message))
    return prompt, hashed.digest()


def _turn(role: object, content: Any, message: Message | None = None) -> bytes:
    """One turn without ambiguity: its role, the length of its text, the text, and what else it holds."""
    text = _bytes(normal(content) if isinstance(content, str) else "" if content is None else _json(content))
    more = {k: v for k, v in message.items() if k not in ("role", "content") and v} if message else None
    return b"%s\0%d\0%s%s" % (_bytes(str(role)), len(text), text, _bytes(_json(more)) if more else b"")


def normal(text: str) -> str:
    """A text in Unicode's NFC form, without white space around it."""
    text = text.strip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def all_keys(examples: Iterable[TrainingExample], *, tools: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """:func:`keys_of` many rows: of what is asked, and of that with its answer (each ``[n, 2] uint64``)."""
    prompts, rows = bytearray(), bytearray()
    for example in examples:
        prompt, row = keys_of(example, tools=tools)
        prompts += prompt
        rows += row
    return np.frombuffer(prompts, dtype=np.uint64).reshape(-1, 2), np.frombuffer(rows, dtype=np.uint64).reshape(-1, 2)


def first_equal(keys: np.ndarray) -> np.ndarray:
    """For each key (``[n, 2] uint64``) the index of the first that is the same (``[n] int64``)."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in their order
    ordered = keys[order]
    opens = np.ones(len(keys), dtype=bool)
    opens[1:] = (ordered[1:] != ordered[:-1]).any(1)
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[opens][np.cumsum(opens) - 1]
    return first


# --- nearly the same words ---


class Grams:
    """Hashed word n-grams of a batch of rows, each row in two parts: what is asked, then what is answered.

    ``hashes [total] uint64`` lie end to end; ``ends [2 * rows] int64`` says where each part's end. A part's grams are
    its own: none crosses from the question into the answer.
    """

    __slots__ = ("ends", "hashes", "rows")

    def __init__(self, rows: np.ndarray, hashes: np.ndarray, ends: np.ndarray) -> None:
        self.rows, self.hashes, self.ends = rows, hashes, ends

    def offsets(self, *, parts: bool = False) -> np.ndarray:
        """Where the grams of each row begin and end, or of each part (``[rows + 1]`` or ``[2 * rows + 1]``)."""
        return np.concatenate([[0], self.ends if parts else self.ends[1::2]])


def grams(
    examples: Sequence[TrainingExample], rows: np.ndarray, *, words: int = WORDS, whole_short: bool = True
) -> Iterator[Grams]:
    """The n-grams of some rows, a batch of a few hundred at a time.

    Args:
        examples: the rows.
        rows: indices of those wanted, ``[m] int64``.
        words: n.
        whole_short: a part of fewer than n words is one gram; False: it has none.
    """
    texts: list[str] = []
    length = begin = 0
    for number, row in enumerate(rows.tolist()):
        for text in texts_of(examples[row]):
            texts.append(_folded(text))
            length += len(texts[-1]) + 1
        if length >= _BATCH:
            yield Grams(rows[begin : number + 1], *_hashed(texts, words, whole_short))
            texts, length, begin = [], 0, number + 1
    if texts:
        yield Grams(rows[begin:], *_hashed(texts, words, whole_short))


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text).casefold()


def _hashed(texts: list[str], words: int, whole_short: bool) -> tuple[np.ndarray, np.ndarray]:
    """The hashed n-grams of texts end to end (``[total] uint64``), and where each text's end (``[texts] int64``)."""
    kinds, noise = _tables()
    points = np.frombuffer(("\n".join(texts) + "\n").encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    points = points.astype(np.intp)  # take is several times faster by it
    kind = kinds.take(points, mode="clip")
    within = kind == 1
    begins = kind == 2
    begins[0] |= within[0]
    begins[1:] |= within[1:] > within[:-1]
    starts = np.flatnonzero(begins)
    # A word is the polynomial of its characters, taken from running sums; gaps between words are zeros in it.
    powers, inverses = _powers(1 << max(18, len(points).bit_length()))
    sums = np.cumsum(noise.take(points, mode="clip") * powers[: len(points)])
    before = sums.take(starts - 1)
    if len(starts) and starts[0] == 0:
        before[0] = 0  # nothing comes before; taken was the last sum
    word = mixed((np.append(before[1:], sums[-1]) - before) * inverses.take(starts))
    text_ends = np.cumsum(np.fromiter((len(t) + 1 for t in texts), dtype=np.int64, count=len(texts)))
    word_ends = np.searchsorted(starts, text_ends)
    counts = np.diff(word_ends, prepend=0)
    if whole_short and not counts.all():
        wordless = [i for i in np.flatnonzero(counts == 0).tolist() if texts[i].strip()]
        if wordless:
            named = list(texts)
            for i in wordless:
                named[i] = blake2b(_bytes(texts[i].strip()), digest_size=16).hexdigest()
            return _hashed(named, words, whole_short)
    left = np.repeat(word_ends, counts) - np.arange(len(word))  # words from here to the end of the text, this one too
    total = word * _ODD[0]
    for k in range(1, words):
        # Odd factors that differ, so that the order of the words counts.
        following = word[k:] * _ODD[k]
        following *= left[:-k] > k
        total[:-k] += following
    taken = left >= words
    per_text = np.maximum(counts - (words - 1), 0)
    if whole_short:
        short = (counts > 0) & (counts < words)
        taken[word_ends[short] - counts[short]] = True
        per_text += short
    return mixed(total[taken]), np.cumsum(per_text)


def mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the result depends on every bit of the value (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """By code point: 0 a gap, 1 part of a word, 2 a word alone (``uint8``); and its noise, 0 for a gap (``uint64``)."""
    kinds = np.zeros(_LAST + 1, dtype=np.uint8)
    for point in range(_LAST):
        if 0xAC00 <= point < 0xD7A4:
            kinds[point] = 1  # Hangul syllables
            continue
        category = unicodedata.category(chr(point))
        if category[0] in "LMN" or category == "Pc":
            kinds[point] = 1
        elif category in ("Sm", "Sc", "So"):
            kinds[point] = 2
    kinds[[ord(c) for c in "-*/%^"]] = 2
    kinds[[ord(c) for c in "~～"]] = 0  # symbols to Unicode, full stops in Chinese
    for begin, end in _UNSPACED:
        kinds[begin:end][kinds[begin:end] == 1] = 2
    noise = mixed(np.arange(1, _LAST + 2, dtype=np.uint64) * np.uint64(_FACTOR))
    return kinds, np.where(kinds > 0, noise, np.uint64(0))


@lru_cache(2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of an odd number modulo 2⁶⁴, and their inverses."""
    tables = []
    for base in (_FACTOR, pow(_FACTOR, -1, 1 << 64)):
        powers = np.full(count, base, dtype=np.uint64)
        powers[0] = 1
        tables.append(np.cumprod(powers, dtype=np.uint64))
    return tables[0], tables[1]


assert sys.byteorder == "little", "code points are read as little-endian"
