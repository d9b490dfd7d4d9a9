"""How much of the training answers a model gives back word for word.

Two ways of asking: the training prompt alone, and the prompt with the beginning of its answer (extractable
memorisation: Carlini et al., 2022, arXiv:2202.07646, who give 50 tokens and look at the next 50). Rows that the model
never saw are asked in the same ways, for what comes back of them is no memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from hashlib import blake2b
from typing import TYPE_CHECKING

from luthier.data.examples import TrainingExample
from luthier.data.render import Renderer, RenderError
from luthier.evaluation.metrics.words import words
from luthier.evaluation.question import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_WORDS = 8
"""Shorter answers are no evidence: they can be right by knowing."""
PREFIX_TOKENS = 50
"""Given of an answer at most; a quarter of one that is shorter than four times as many."""
CONTINUED_TOKENS = 50
"""Looked at of what follows."""
LEAK_WORDS = 13
"""In a run that tells another row's answer (Brown et al., 2020, appendix C, took n-grams of up to 13 words)."""
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True, slots=True)
class Opened:
    """A row with the beginning of its answer given."""

    question: Question
    """Its prompt ends in the middle of the answer."""
    rest: str
    """What follows there, at most :data:`CONTINUED_TOKENS`."""


def long_enough(answer: str | None) -> bool:
    """Whether an answer has :data:`LEAST_WORDS`."""
    return answer is not None and len(words(answer)) >= LEAST_WORDS


def opened(renderer: Renderer, example: TrainingExample, number: int) -> Opened | None:
    """A row asked with the beginning of its answer, as training rendered it.

    Args:
        renderer: of the training.
        example: with an answer, or a plain text, whose beginning is then all that is given.
        number: 1-based, names the row where it has no source.

    Returns:
        None where the template refuses the row, or too little of its answer is left to be continued.
    """
    try:
        rendered = renderer.render(example)
    except RenderError:
        return None
    if not rendered.spans:
        return None
    begin, end = rendered.spans[-1]
    answer = rendered.text[begin:end]
    for closing in (*renderer.ends_of_turn, str(renderer.tokenizer.eos_token or "")):
        answer = answer.rstrip().removesuffix(closing)
    cut, until = _cut(renderer.tokenizer, answer)
    rest = answer[cut:until]
    if len(words(rest)) < LEAST_WORDS // 2 or not answer[:cut].strip():
        return None
    where = str(example.source) if example.source else f"row {number}"
    prompt = rendered.text[:begin] + answer[:cut]
    return Opened(Question(prompt, answer[:cut], [rest], where), rest)


def _cut(tokenizer: PreTrainedTokenizerBase, answer: str) -> tuple[int, int]:
    """Where the given beginning of an answer ends, and where what is looked at does: characters, between words."""
    offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    given = min(PREFIX_TOKENS, len(offsets) // 4)
    last = given + CONTINUED_TOKENS
    until = len(answer) if last >= len(offsets) else _between(answer, offsets[last][0])
    return (_between(answer, offsets[given][0]) if offsets else 0), until


def _between(text: str, at: int) -> int:
    """The nearest place before that is between two words: what is cut within one has other tokens than the whole."""
    while 0 < at < len(text) and not text[at].isspace() and not _UNSPACED.match(text[at]):
        at -= 1
    while at > 0 and text[at - 1].isspace():
        at -= 1
    return at


def continues(said: str, rest: str) -> bool:
    """Whether an answer goes on with the rest, verbatim but for white space."""
    return " ".join(said.split()).startswith(" ".join(rest.split()))


def longest_run(said: str, answer: str) -> float:
    """Of an answer's words, the share that its longest run in what was said has: 1 where all of it came back."""
    right, found = words(answer), words(said)
    if not right:
        return 0.0
    return SequenceMatcher(None, right, found, autojunk=False).find_longest_match().size / len(right)


def is_reproduced(said: str, answer: str) -> bool:
    """Whether an answer came back whole, verbatim but for white space."""
    return said.split() == answer.split()


def leaks(said: Sequence[str], own: Sequence[Sequence[str]], training: Iterable[str]) -> list[tuple[int, int] | None]:
    """Which answers hold a run of :data:`LEAK_WORDS` of one training row's answer, and of which row.

    A run that several rows' answers have is their form, and no row's text; nor is one that stands in the question or
    its right answers.

    Args:
        said: what a model answered, ``N``.
        own: of each question, the texts that its answer may take from.
        training: the answers of the training rows; read once.

    Returns:
        for each of ``said`` the training row of which it holds most runs and how many; None: there is none.
    """
    looked: dict[bytes, list[int]] = {}
    for number, (text, texts) in enumerate(zip(said, own, strict=True)):
        allowed = set().union(*(_runs(t) for t in texts)) if texts else set()
        for run in _runs(text) - allowed:
            looked.setdefault(run, []).append(number)
    owners: dict[bytes, int] = {}
    shared: set[bytes] = set()
    if looked:
        seen: dict[bytes, str] = {}
        for row, answer in enumerate(training):
            for run in _runs(answer) & looked.keys():
                if run in seen and seen[run] != answer:
                    shared.add(run)
                owners.setdefault(run, row)
                seen.setdefault(run, answer)
    counts: list[dict[int, int]] = [{} for _ in said]
    for run, row in owners.items():
        if run not in shared:
            for number in looked[run]:
                counts[number][row] = counts[number].get(row, 0) + 1
    return [max(rows.items(), key=lambda item: item[1]) if rows else None for rows in counts]


def _runs(text: str) -> set[bytes]:
    """Hashes of the runs of :data:`LEAK_WORDS` words."""
    found = words(text)
    return {
        blake2b(" ".join(found[i : i + LEAK_WORDS]).encode(), digest_size=8).digest()
        for i in range(len(found) - LEAK_WORDS + 1)
    }
