"""What a data set is made of: rows, tokens, lengths, languages, turns, classes, vocabulary, repetition.

One pass, in memory that does not grow with the texts. Counting characters and roles is cheap and done for every row;
tokens and languages are measured on a seeded sample of a large set, and then said to be an estimate.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from luthier.data.encode import EncodedExample, Encoder
from luthier.data.examples import TrainingExample
from luthier.data.labels import Classes
from luthier.data.prefixes import SHORTEST

SAMPLE = 20_000
LIMITS = (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)
UNSURE = "unsure"
"""Too short, or too mixed, to tell its language."""
_CHUNK = 1_000
_EXTREMES = 5
# Different system messages that are told apart; more of them are as good as one a row.
_SYSTEMS = 1_000
# Rows and tokens among which shared beginnings are looked for.
_PREFIX_ROWS, _PREFIX_TOKENS = 20_000, 1_024


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a row."""

    total: int
    mean: float
    percentiles: dict[int, int]
    """By percent: 0 is the shortest row, 100 the longest."""


@dataclass(frozen=True, slots=True)
class CutAt:
    """What a `max_length` costs."""

    max_length: int
    rows: float
    """Share of rows that are longer; `truncation: reject` refuses them."""
    answers_refused: float
    """Share of all answer tokens that these rows hold: lost where they are refused."""
    answers_cut: float
    """Share of all answer tokens that stand beyond max_length: lost where rows are cut."""


@dataclass(slots=True)
class Stats:
    """The numbers of a data set. Shares are between 0 and 1."""

    rows: int = 0
    characters: int = 0
    plain_text: int = 0
    """Rows without an answer to tell from a prompt: all of their text is trained."""
    turns: dict[int, int] = field(default_factory=dict)
    """Rows by number of turns, system messages not counted."""
    roles: dict[str, int] = field(default_factory=dict)
    """Turns by role."""
    system_rows: int = 0
    systems: int = 0
    """Different system messages (counted up to 1,000)."""
    tool_rows: int = 0
    """Rows that declare tools."""
    tool_calls: dict[str, int] = field(default_factory=dict)
    """Calls by tool."""
    labels: dict[str, int] | None = None
    """Rows by class, where the rows have labels or short answers that repeat."""
    measured: int = 0
    """Rows that were tokenised; where fewer than all, what follows is an estimate from a seeded sample."""
    refused: dict[str, int] = field(default_factory=dict)
    """Rows of these that the model's template or vocabulary cannot take, by reason."""
    tokens: Lengths | None = None
    prompt_tokens: Lengths | None = None
    answer_tokens: Lengths | None = None
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    """``(from, below, rows)`` by tokens; the last one holds the longest rows."""
    cut: list[CutAt] = field(default_factory=list)
    answer_share: float = 0.0
    """Answer tokens, as a share of all."""
    vocabulary_used: int = 0
    """Different tokens in the rows."""
    vocabulary: int = 0
    """Tokens of the model's vocabulary."""
    characters_per_token: float = 0.0
    languages: dict[str, int] = field(default_factory=dict)
    """Measured rows by language (ISO 639-1); ``unsure`` where a row is too short to tell."""
    shared_beginning: int = 0
    """Tokens that all measured rows begin with."""
    shared_share: float = 0.0
    """Share of tokens in a beginning of 16 tokens or more that an earlier row has too."""
    longest: list[tuple[int, str]] = field(default_factory=list)
    shortest: list[tuple[int, str]] = field(default_factory=list)
    exact_copies: int | None = None
    """Rows that repeat an earlier one word for word."""
    near_copies: int | None = None
    """Further rows that nearly do; None: not measured."""

    @property
    def estimated(self) -> bool:
        return self.measured + sum(self.refused.values()) < self.rows

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "estimated": self.estimated}


def measure(
    examples: Iterable[TrainingExample], encoder: Encoder, *, sample: int | None = SAMPLE, seed: int = 0
) -> Stats:
    """The numbers of a data set, without those on copies.

    Args:
        examples: any number of rows.
        encoder: with ``max_length=None``; its tokenizer and template measure the rows.
        sample: rows to tokenise at the most; None: all.
        seed: of the sample.
    """
    texts, tokens = _Texts(), _Tokens(encoder)
    for example in _each_seen(examples, texts, sample, seed):
        tokens.add(example)
    stats = texts.stats
    texts.finish()
    tokens.finish(stats)
    return stats


def _each_seen(
    examples: Iterable[TrainingExample], texts: _Texts, sample: int | None, seed: int
) -> Iterable[TrainingExample]:
    """All rows, or a sample of them in their order, each once all have been counted (Vitter, 1985, algorithm R)."""
    if sample is None:
        for example in examples:
            texts.add(example)
            yield example
        return
    kept: list[tuple[int, TrainingExample]] = []
    rng = random.Random(seed)
    for index, example in enumerate(examples):
        texts.add(example)
        if index < sample:
            kept.append((index, example))
        elif (place := rng.randrange(index + 1)) < sample:
            kept[place] = (index, example)
    yield from (example for _, example in sorted(kept, key=lambda pair: pair[0]))


class _Texts:
    """What is counted of every row."""

    def __init__(self) -> None:
        self.stats = Stats()
        self._turns: Counter[int] = Counter()
        self._roles: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._systems: set[int] = set()
        self._classes = Classes()

    def add(self, example: TrainingExample) -> None:
        stats = self.stats
        stats.rows += 1
        self._classes.add(example)
        stats.tool_rows += bool(example.tools)
        if example.is_plain_text:
            stats.plain_text += 1
            stats.characters += len(example.input)
            return
        messages = example.to_chat_format()
        system = next((m for m in messages if m["role"] in ("system", "developer")), None)
        if system is not None:
            stats.system_rows += 1
            if len(self._systems) < _SYSTEMS:
                self._systems.add(hash(str(system.get("content"))))
        self._turns[sum(m["role"] not in ("system", "developer") for m in messages)] += 1
        for message in messages:
            self._roles[message["role"]] += 1
            stats.characters += len(str(message.get("content") or ""))
            for call in message.get("tool_calls") or ():
                self._calls[str(call.get("function", call).get("name"))] += 1

    def finish(self) -> None:
        stats, counts = self.stats, self._classes.counts
        stats.turns = dict(sorted(self._turns.items()))
        stats.roles = dict(self._roles.most_common())
        stats.tool_calls = dict(self._calls.most_common())
        stats.systems = len(self._systems)
        stats.labels = dict(counts.most_common()) if counts is not None else None


class _Tokens:
    """What is counted of the rows that are tokenised."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._waiting: list[TrainingExample] = []
        self._lengths: list[np.ndarray] = []  # [rows] int32, a chunk each
        self._trained: list[np.ndarray] = []
        self._beyond = np.zeros(len(LIMITS), dtype=np.int64)
        self._used = np.zeros(len(encoder.tokenizer), dtype=bool)
        self._special = np.zeros(len(encoder.tokenizer), dtype=bool)
        self._special[[i for i in encoder.tokenizer.all_special_ids if i < len(self._special)]] = True
        self._plain_tokens = self._characters = 0
        self._languages: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._beginnings: list[np.ndarray] = []
        self._longest: list[tuple[int, str]] = []
        self._shortest: list[tuple[int, str]] = []

    def add(self, example: TrainingExample) -> None:
        self._waiting.append(example)
        if len(self._waiting) == _CHUNK:
            self._encode()

    def _encode(self) -> None:
        examples, self._waiting = self._waiting, []
        encoded = self._encoder.encode(examples)
        self._refused.update(reject.reason for reject in encoded.rejects)
        rows = encoded.examples
        if not rows:
            return
        self._lengths.append(np.array([len(row) for row in rows], dtype=np.int32))
        self._trained.append(np.array([row.trained.sum() for row in rows], dtype=np.int32))
        for row in rows:
            self._used[row.input_ids] = True
            for place, limit in enumerate(LIMITS):
                if len(row) <= limit:
                    break
                self._beyond[place] += row.trained[limit:].sum()
        self._count_characters(rows)
        self._languages.update(_language(examples[row.index]) for row in rows)
        room = _PREFIX_ROWS - len(self._beginnings)
        self._beginnings += [row.input_ids[:_PREFIX_TOKENS] for row in rows[:room]]
        named = sorted(((len(row), str(row.source or "")) for row in rows), key=lambda pair: pair[0])
        self._shortest = sorted([*self._shortest, *named[:_EXTREMES]], key=lambda pair: pair[0])[:_EXTREMES]
        self._longest = sorted([*self._longest, *named[-_EXTREMES:]], key=lambda pair: -pair[0])[:_EXTREMES]

    def _count_characters(self, rows: Sequence[EncodedExample]) -> None:
        """Characters of what is no control token, as the tokens decode; a template's own words count as text."""
        plain = [row.input_ids[~self._special[row.input_ids]] for row in rows]
        self._plain_tokens += sum(len(ids) for ids in plain)
        decoded = self._encoder.tokenizer.batch_decode(plain, clean_up_tokenization_spaces=False)
        self._characters += sum(len(text) for text in decoded)

    def finish(self, stats: Stats) -> None:
        if self._waiting:
            self._encode()
        stats.refused = dict(self._refused.most_common())
        stats.vocabulary = len(self._used)
        if not self._lengths:
            return
        lengths, trained = np.concatenate(self._lengths), np.concatenate(self._trained)
        stats.measured = len(lengths)
        stats.tokens, stats.prompt_tokens, stats.answer_tokens = map(_summary, (lengths, lengths - trained, trained))
        stats.histogram = histogram(lengths)
        answers = max(1, stats.answer_tokens.total)
        stats.cut = [
            CutAt(
                limit,
                float((lengths > limit).mean()),
                float(trained[lengths > limit].sum() / answers),
                float(beyond / answers),
            )
            for limit, beyond in zip(LIMITS, self._beyond, strict=True)
        ]
        stats.answer_share = stats.answer_tokens.total / stats.tokens.total
        stats.vocabulary_used = int(self._used.sum())
        stats.characters_per_token = self._characters / max(1, self._plain_tokens)
        stats.languages = dict(self._languages.most_common())
        stats.longest, stats.shortest = self._longest, self._shortest
        stats.shared_beginning, stats.shared_share = shared_beginnings(self._beginnings)


def _language(example: TrainingExample) -> str:
    """The language of what is asked and answered in a row, without system messages and tools."""
    from luthier.data.cleaning.language import detect_language

    if example.is_plain_text:
        said = example.input
    else:
        turns = [m for m in example.to_chat_format() if m["role"] in ("user", "assistant")]
        said = "\n".join(str(m.get("content") or "")[:500] for m in turns[:4])
    found = detect_language(said)
    return found[0] if found is not None else UNSURE


def _summary(lengths: np.ndarray) -> Lengths:
    # A percentile is a row's own length, not one between two rows'.
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return Lengths(
        int(lengths.sum()), float(lengths.mean()), {p: int(v) for p, v in zip(PERCENTILES, values, strict=True)}
    )


def histogram(lengths: np.ndarray, bins: int = 20) -> list[tuple[int, int, int]]:
    """Rows by length in equal steps of a round width; the last step holds the longest hundredth, however long."""
    top, longest = int(np.percentile(lengths, 99)), int(lengths.max())
    rough = max(1, top / bins)
    size = 10 ** int(np.log10(rough))
    width = next(int(size * m) for m in (1, 2, 5, 10) if size * m >= rough)
    edges = list(range(0, top + 1 + width, width))
    counts, _ = np.histogram(np.minimum(lengths, edges[-1] - 1), edges)
    found = [(a, b, int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    first, _, rows = found[-1]
    return [*found[:-1], (first, max(found[-1][1], longest + 1), rows)]


def shared_beginnings(rows: Sequence[np.ndarray]) -> tuple[int, float]:
    """Tokens that all rows begin with, and the share of tokens that an earlier row's beginning has too.

    In lexicographic order a row's longest beginning in common with any earlier one is that with its neighbour.
    """
    if len(rows) < 2:
        return 0, 0.0
    order = sorted(rows, key=lambda ids: ids.astype(">i4").tobytes())
    shared = [_common(a, b) for a, b in itertools.pairwise(order)]
    total = sum(len(ids) for ids in rows)
    return _common(order[0], order[-1]), sum(n for n in shared if n >= SHORTEST) / max(1, total)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
