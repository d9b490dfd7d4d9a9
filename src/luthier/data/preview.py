"""Rows as the model reads them, with the tokens that are trained told apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group
from rich.text import Text

from luthier.data.encode import EncodedExample, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 1200
_TRAINED, _CONTEXT = "black on green", "dim"
# Control tokens stand out in either.
_SPECIAL = {True: "bold black on bright_green", False: "bold cyan"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of a row that are alike."""

    text: str
    trained: bool
    special: bool
    """A control token, such as the end of a turn."""


def pieces(row: EncodedExample, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A row's text, cut where training begins or ends and around control tokens."""
    special = np.isin(row.input_ids, tokenizer.all_special_ids)
    # Whole runs are decoded, for one token may be a part of a character; each control token stands alone.
    edge = (np.diff(row.trained.astype(np.int8)) != 0) | special[1:] | special[:-1]
    borders = [0, *(np.flatnonzero(edge) + 1).tolist(), len(row)]
    return [
        Piece(
            str(tokenizer.decode(row.input_ids[a:b], skip_special_tokens=False, clean_up_tokenization_spaces=False)),
            bool(row.trained[a]),
            bool(special[a]),
        )
        for a, b in itertools.pairwise(borders)
    ]


def render_encoded(rows: Iterable[EncodedExample], tokenizer: PreTrainedTokenizerBase) -> Group:
    """Rows under a legend: trained tokens on green, context dim, control tokens bold, a long middle left out."""
    shown = [
        Text.assemble(
            ("  trained  ", _TRAINED),
            ("  context, not trained  ", _CONTEXT),
            ("  control token  ", _SPECIAL[False]),
            "  ↵ is a line's end",
        )
    ]
    for row in rows:
        head = f"{row.source}: {len(row):,} tokens, {int(row.trained.sum()):,} trained"
        if row.cut:
            head += f", {row.cut:,} cut off"
        shown.append(Text.assemble("\n", (head, "bold")))
        shown.append(_coloured(row, tokenizer))
    return Group(*shown)


def _coloured(row: EncodedExample, tokenizer: PreTrainedTokenizerBase) -> Text:
    text = Text()
    for piece in pieces(row, tokenizer):
        said = piece.text
        if len(said) > _CHARACTERS:
            left_out = f" … {len(said) - _CHARACTERS:,} characters … "
            said = said[: _CHARACTERS // 2] + left_out + said[-_CHARACTERS // 2 :]
        style = _SPECIAL[piece.trained] if piece.special else _TRAINED if piece.trained else _CONTEXT
        text.append(said.replace("\n", "↵\n"), style=style)
    return text


def row_json(row: EncodedExample, encoder: Encoder) -> dict[str, Any]:
    """A row for JSON, whole, with what its encoder says of it beside its tokens."""
    return encoder.told(row) | {
        "source": str(row.source) if row.source else None,
        "tokens": len(row),
        "trained_tokens": int(row.trained.sum()),
        "cut_tokens": row.cut,
        "pieces": [
            {"text": p.text, "trained": p.trained, "special": p.special} for p in pieces(row, encoder.tokenizer)
        ],
    }
