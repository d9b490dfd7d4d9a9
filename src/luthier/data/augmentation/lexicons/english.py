"""English synonyms, by the written form, where the words around it show its part of speech."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources

from luthier.data.augmentation.text import Field, Piece, words_of

_DETERMINERS = words_of(
    "a an the this that these those my your his her its our their some any each every another no what which "
    "one two three four five six seven eight nine ten many few several more of"
)
_BEFORE_BASE = words_of("to can could will would shall should must may might do does did i you we they please not")
_BEFORE_PARTICIPLE = words_of("have has had is are was were be been being having i you we they he she it who")
_BEFORE_GERUND = words_of("is are was were be been being am by for of from in about without after before while keep")
_BEFORE_ADJECTIVE = words_of("is are was were be been am very so too quite more most less really a an the seems feels")


@dataclass(frozen=True, slots=True)
class _Entry:
    pos: str
    needs_evidence: bool
    follows: str
    """What must come next: "to" or "object" (a determiner or a number); empty: anything."""
    substitutes: tuple[str, ...]


def english_words(field: Field) -> tuple[list[tuple[Piece, tuple[str, ...]]], int]:
    """The words of a text that have synonyms there, with these; and how many words may vary at all."""
    words = field.english()
    found = []
    for piece in words:
        for entry in _table().get(piece.text.lower(), ()):
            if _fits(field, piece, entry):
                found.append((piece, entry.substitutes))
                break
    return found, len(words)


@cache
def _table() -> dict[str, tuple[_Entry, ...]]:
    table: dict[str, tuple[_Entry, ...]] = {}
    text = resources.files(__package__).joinpath("english.tsv").read_text(encoding="utf-8")
    for line in text.splitlines():
        form, pos, ambiguous, follows, substitutes = line.split("\t")
        entry = _Entry(pos, bool(ambiguous), follows, tuple(substitutes.split()))
        table[form] = (*table.get(form, ()), entry)
    return table


def _fits(field: Field, piece: Piece, entry: _Entry) -> bool:
    before, after = _neighbour(field.text, piece.start, -1), _neighbour(field.text, piece.end, 1)
    if entry.follows == "to" and after != "to":
        return False
    if entry.follows == "object" and not (after in _DETERMINERS or after[:1].isdigit() or after[:1] == "$"):
        return False
    if entry.pos == "v" and not entry.follows and after == "to":  # "happen to", "start to": bound to the verb
        return False
    if entry.pos == "a" and after == "enough":
        return False
    if not entry.needs_evidence:
        return True
    form = piece.text.lower()
    if entry.pos == "n":
        return before in _DETERMINERS
    if entry.pos == "a":
        return before in _BEFORE_ADJECTIVE and not (before in ("a", "an", "the") and not after.isalpha())
    if entry.pos == "r":
        return True
    if form.endswith("ing"):
        return before in _BEFORE_GERUND
    if form.endswith(("ed", "en")):
        return before in _BEFORE_PARTICIPLE
    if form.endswith("s") and not form.endswith("ss"):
        return before in ("he", "she", "it", "who", "that", "which", "also") or after in _DETERMINERS - {"of"}
    opens = field.opens_sentence(piece.start) and after in _DETERMINERS - {"of"}  # "Fix the code."
    return opens or before in _BEFORE_BASE


def _neighbour(text: str, at: int, step: int) -> str:
    """The word before or after a place in the same clause, in lower case; empty where punctuation comes between."""
    if step > 0:
        rest = text[at : at + 40]
        if not rest.startswith(" "):
            return ""
        parts = rest.split()
        return parts[0].lower().strip(".,;:!?\"'") if parts else ""
    rest = text[max(0, at - 40) : at]
    if not rest.endswith(" "):
        return ""
    parts = rest.split()
    word = parts[-1].lower() if parts else ""
    return "" if word.endswith((".", ",", ";", ":", "!", "?")) else word.strip("\"'(")
