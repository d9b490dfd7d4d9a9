"""How near answers are to the right ones: BLEU, ROUGE, exact match and JSON, all from 0 to 1."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from luthier.errors import UserError, shorten

References = Sequence[str] | Sequence[Sequence[str]]
"""One right answer a row, or several of which the best counts."""

ROUGE = ("rouge1", "rouge2", "rougeL")

# Scripts written without spaces between words: Han, kana, Thai to Khmer, Hangul. A character is a word.
_SINGLE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
# Latin words as rouge-score has them (ASCII letters and digits); words of other alphabets, which it would drop.
_WORD = re.compile(f"[a-z0-9]+|[{_SINGLE}]|(?:(?![{_SINGLE}])[^\\W\\x00-\\u036f])+")


@dataclass(frozen=True, slots=True)
class Bleu:
    """Corpus BLEU, and how it was computed."""

    score: float
    """0 to 1: sacrebleu's score over 100"""
    signature: str
    """sacrebleu's, to be given wherever the score is published (Post, 2018, arXiv:1804.08771)"""


def score(answers: Sequence[str], references: References) -> dict[str, float]:
    """Every metric that applies, from 0 (worst) to 1.

    ``bleu``, ``rouge1``, ``rouge2``, ``rougeL`` and ``exact_match`` always; ``json_valid`` and ``json_exact`` where
    every reference is a JSON object.

    Args:
        answers: what the model said; an empty answer scores 0.
        references: the right answer of each row, or several.

    Raises:
        UserError: no rows, unequal lengths, a row without a reference, or something that is no text.
    """
    rows = check_rows(answers, references)
    result = {"bleu": bleu(answers, rows).score, **rouge(answers, rows), "exact_match": exact_match(answers, rows)}
    if is_json(rows):
        result |= {"json_valid": json_valid(answers), "json_exact": json_exact(answers, rows)}
    return result


def bleu(answers: Sequence[str], references: References) -> Bleu:
    """Corpus BLEU by sacrebleu, which cuts words as ``zh`` where the references are mostly Chinese, else as ``13a``.

    It counts runs of four words: answers that are all shorter score 0, even where they are right.

    Raises:
        UserError: as :func:`score`.
    """
    from sacrebleu.metrics import BLEU

    rows = check_rows(answers, references)
    text = "".join(text for row in rows for text in row)
    letters = sum(map(str.isalpha, text))
    # force: sacrebleu else warns of texts that end in " .", as if the user had cut the words beforehand.
    metric = BLEU(tokenize="zh" if 2 * len(_HAN.findall(text)) > letters else "13a", force=True)
    most = max(map(len, rows))
    streams = [[row[i] if i < len(row) else None for row in rows] for i in range(most)]
    result = metric.corpus_score(list(answers), streams)  # type: ignore[arg-type]
    # A perfect score comes as 100.00000000000004.
    return Bleu(min(result.score / 100, 1.0), str(metric.get_signature()))


def rouge(answers: Sequence[str], references: References) -> dict[str, float]:
    """``rouge1``, ``rouge2`` and ``rougeL``: F-measures by rouge-score, the mean over rows.

    Words of Latin script are rouge-score's own; each Chinese character is a word.

    Raises:
        UserError: as :func:`score`.
    """
    rows = check_rows(answers, references)
    scores = [_rouge_row(answer, row) for answer, row in zip(answers, rows, strict=True)]
    return {name: sum(s[name] for s in scores) / len(scores) for name in ROUGE}


def exact_match(answers: Sequence[str], references: References) -> float:
    """Share of answers equal to a reference, white space around both left out."""
    rows = check_rows(answers, references)
    return _share([is_exact(answer, row) for answer, row in zip(answers, rows, strict=True)])


def json_valid(answers: Sequence[str]) -> float:
    """Share of answers that are one JSON object and nothing else."""
    return _share([parse_object(answer) is not None for answer in answers])


def json_exact(answers: Sequence[str], references: References) -> float:
    """Share of answers that are the same JSON as a reference, whatever the order of keys and the white space."""
    rows = check_rows(answers, references)
    return _share([is_json_exact(answer, row) for answer, row in zip(answers, rows, strict=True)])


def is_exact(answer: str, references: Sequence[str]) -> bool:
    """Whether one answer equals one of its references, white space around both left out."""
    return answer.strip() in [reference.strip() for reference in references]


def is_json_exact(answer: str, references: Sequence[str]) -> bool:
    """Whether one answer is the same JSON object as one of its references."""
    parsed = parse_object(answer)
    return parsed is not None and parsed in [parse_object(reference) for reference in references]


def is_json(references: Sequence[Sequence[str]]) -> bool:
    """Whether every reference is a JSON object."""
    return all(parse_object(reference) is not None for row in references for reference in row)


def parse_object(text: str) -> str | None:
    """A JSON object in one canonical form, so that equal ones are equal texts; None where ``text`` is none."""
    try:
        value = json.loads(text, parse_float=_number, parse_constant=_refuse)
        return json.dumps(value, sort_keys=True) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """rougeL of one row."""
    return _rouge_row(answer, references)["rougeL"]


def check_rows(answers: Sequence[str], references: References) -> list[list[str]]:
    """The references as lists.

    Raises:
        UserError: no rows, unequal lengths, a row without a reference, or something that is no text.
    """
    for name, value in (("answers", answers), ("references", references)):
        if value is None or isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{name} must be a list with one item a row, not {shorten(value)}")
    if len(answers) != len(references):
        raise UserError(
            f"{len(answers):,} answers but {len(references):,} references",
            remedy="give one reference (or list of references) for each answer",
        )
    if not answers:
        raise UserError("there are no answers to score", remedy="give at least one row")
    rows = [[row] if isinstance(row, str) else list(row or ()) for row in references]
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True), 1):
        if not isinstance(answer, str):
            raise UserError(f"an answer must be text, not {shorten(answer)}", where=f"answers, row {number}")
        if not row or not all(isinstance(reference, str) for reference in row):
            raise UserError(
                f"a reference must be text or a list of texts, not {shorten(references[number - 1])}",
                where=f"references, row {number}",
                remedy="give the row a right answer, or leave it out",
            )
    return rows


class _Words:
    """The tokenizer given to rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), tokenizer=_Words())


def _rouge_row(answer: str, references: Sequence[str]) -> dict[str, float]:
    return {name: s.fmeasure for name, s in _scorer().score_multi(references, answer).items()}


def _number(text: str) -> int | float:
    """JSON has one kind of number: 1.0 is 1."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
