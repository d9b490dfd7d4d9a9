"""Filters: rows that training is better off without, each refused with its reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from luthier.data.cleaning.language import detect_language, known_languages
from luthier.data.cleaning.rows import Refusal, Side, Text
from luthier.errors import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Share = Annotated[float, Field(ge=0, le=1)]


def filter_length(
    texts: Sequence[Text],
    *,
    min: Annotated[int, Field(ge=0)] = 1,
    max: Annotated[int, Field(ge=1)] | None = None,
    unit: Literal["characters", "tokens"] = "characters",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Refusal | None:
    """Refuse rows whose prompt or answer is too short or too long: all turns of a side together.

    Args:
        texts: those of a row.
        min: fewest that a side may have.
        max: most that a side may have; empty: no limit.
        unit: what is counted; tokens are the model's own.
        tokenizer: the model's.
    """
    for side in _sides(texts):
        said = [t for t in texts if t.side == side and not t.place.startswith("references")]
        if unit == "tokens":
            assert tokenizer is not None
            length = sum(len(tokenizer(t.text, add_special_tokens=False, verbose=False)["input_ids"]) for t in said)
        else:
            length = sum(len(t.text) for t in said)
        if said and (length < min or (max is not None and length > max)):
            reason, limit = ("too_short", f"below {min:,}") if length < min else ("too_long", f"above {max:,}")
            remedy = f"lower filter_length's min={min}" if length < min else f"raise filter_length's max={max}"
            message = f"the {side} has {length:,} {unit}, {limit}"
            return Refusal(reason, message, said[0].place, shorten(said[0].text), f"{remedy}, or mend the row")
    return None


def _known(languages: Sequence[str]) -> Sequence[str]:
    unknown = sorted(set(languages) - set(known_languages()))
    if unknown or not languages:
        what = f"{unknown[0]!r} is no language code known here" if unknown else "no language is named"
        raise ValueError(f"{what}; ISO 639-1 has zh, en, ja, ko, fr, de, es, ru, …")
    return languages


def filter_language(
    texts: Sequence[Text],
    *,
    languages: Annotated[Sequence[str], AfterValidator(_known)] = ("zh", "en"),
    confidence: Share = 0.9,
) -> Refusal | None:
    """Refuse rows with a text in another language.

    Short texts (four Chinese characters; eight words of Latin letters) and unsure ones are kept rather than guessed.

    Args:
        texts: those of a row.
        languages: ISO 639-1 codes of those to keep.
        confidence: how sure a text must be in another language.
    """
    for text in texts:
        found = detect_language(text.text)
        if found and found[0] not in languages and found[1] >= confidence:
            message = f"the text is in {found[0]!r} ({found[1]:.0%} sure), not in {' or '.join(map(repr, languages))}"
            remedy = f"add {found[0]!r} to filter_language's languages, or let the row go"
            return Refusal("other_language", message, text.place, shorten(text.text), remedy)
    return None


# A word, a number, a Chinese or Korean character or a kana. No signs: the rules of a drawn table repeat rightly.
_UNIT = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3]|[^\\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]+"
)


def filter_repetition(
    texts: Sequence[Text],
    *,
    max_share: Share = 0.5,
    n: Annotated[int, Field(ge=2)] = 8,
    min_units: Annotated[int, Field(ge=1)] = 40,
) -> Refusal | None:
    """Refuse rows with a text that says the same over and over: lines, phrases or characters.

    Args:
        texts: those of a row.
        max_share: the largest share of a text that may repeat earlier words.
        n: so many words (or Chinese characters) in a row are a repetition.
        min_units: shorter texts are kept.

    Source: repeated n-grams, as in Rae et al. (2021, arXiv:2112.11446, table A1), with bounds for single answers.
    """
    for text in texts:
        share = repeated_share(text.text, n, min_units)
        if share > max_share:
            message = f"{share:.0%} of the text repeats what it said before"
            remedy = f"mend the row, or raise filter_repetition's max_share={max_share}"
            return Refusal("repetitive", message, text.place, shorten(text.text), remedy)
    return None


def repeated_share(text: str, n: int = 8, min_units: int = 40) -> float:
    """The share of a text's words (or Chinese characters) that lie in a row of n that stood there before."""
    units = _UNIT.findall(text) if len(text) >= min_units else []
    if len(units) < max(min_units, n):
        return 0.0
    seen: set[tuple[str, ...]] = set()
    repeated = 0
    covered = 0  # units before this index are counted
    for start in range(len(units) - n + 1):
        gram = tuple(units[start : start + n])
        if gram in seen:
            repeated += start + n - max(covered, start)
            covered = start + n
        else:
            seen.add(gram)
    return repeated / len(units)


_NO_SYMBOL = re.compile(r"[\w\s]+")


def filter_symbols(
    texts: Sequence[Text], *, max_share: Share = 0.6, min_chars: Annotated[int, Field(ge=1)] = 20
) -> Refusal | None:
    """Refuse rows with a text that is mostly signs: neither letters, digits nor white space.

    Args:
        texts: those of a row.
        max_share: the largest share of signs.
        min_chars: shorter texts are kept.
    """
    for text in texts:
        if len(text.text) >= min_chars:
            share = len(_NO_SYMBOL.sub("", text.text)) / len(text.text)
            if share > max_share:
                remedy = f"mend the row, or raise filter_symbols' max_share={max_share}"
                message = f"{share:.0%} of the text are signs"
                return Refusal("mostly_symbols", message, text.place, shorten(text.text), remedy)
    return None


def _sides(texts: Sequence[Text]) -> list[Side]:
    sides: list[Side] = ["prompt", "answer"]
    return [side for side in sides if any(t.side == side for t in texts)]
