"""What a model costs to keep and to ask, and how good it is: size, speed and perplexity, of two beside each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from luthier.data.encode import EncodedExample
from luthier.evaluation.generation import generate_answers
from luthier.evaluation.perplexity import perplexity_of_examples
from luthier.methods.saved import SavedModel

_ROUNDS = 2
_NEW_TOKENS = 24
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of one model, as it answers on this machine."""

    bytes: int
    """Of its weights' files; of the weights in memory where they lie in no folder."""
    tokens_per_second: float
    """Of greedy generation, one prompt at a time, on this machine."""
    computed_in: str
    """Precision of its products."""
    perplexity: float | None
    """Of the right answers of given rows; None: there were none."""

    def to_dict(self) -> dict[str, Any]:
        """What the record holds."""
        return asdict(self)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the weights' files in a model's folder; 0 where there are none."""
    place = Path(folder)
    return sum(f.stat().st_size for f in place.iterdir() if f.suffix in _WEIGHTS) if place.is_dir() else 0


def footprints(
    sides: Sequence[SavedModel], places: Sequence[str | Path], prompts: Sequence[str], rows: Sequence[EncodedExample]
) -> list[Footprint]:
    """Measure models that read the same tokens; they take turns, so that a busy machine is busy for all of them.

    Args:
        sides: the models.
        places: the folder of each.
        prompts: rendered texts; the first two are answered, for the speed.
        rows: right answers, for the perplexity; none: it is not measured.
    """
    seconds, tokens = [0.0] * len(sides), [0] * len(sides)
    asked = list(prompts[:2])
    for round_number in range(_ROUNDS + 1):
        for k, side in enumerate(sides):
            begin = time.perf_counter()
            said = generate_answers(
                side.model, side.tokenizer, asked, max_new_tokens=_NEW_TOKENS, batch_size=1, stop_token_ids=()
            )
            # The first round fills caches.
            if round_number:
                seconds[k] += time.perf_counter() - begin
                tokens[k] += sum(len(answer.token_ids) for answer in said)
    made = []
    for k, (side, place) in enumerate(zip(sides, places, strict=True)):
        held = sum(p.numel() * p.element_size() for p in side.model.parameters())
        surprised = perplexity_of_examples(side.model, rows).perplexity if rows else None
        computed_in = str(side.model.dtype).removeprefix("torch.")
        made.append(Footprint(folder_bytes(place) or held, tokens[k] / seconds[k], computed_in, surprised))
    return made


def render_footprints(before: Footprint, after: Footprint, name: str, rows: int) -> Table:
    """Both, and their ratios, as a table.

    Args:
        before: of the model as it was.
        after: of the quantised one.
        name: its precision.
        rows: how many rows the perplexity is of.
    """
    table = Table(title="before and after, on this machine", title_justify="left")
    for column in ("", "before", name, "ratio"):
        table.add_column(column, justify="right" if column else "left")

    def line(what: str, values: tuple[float, float], form: str) -> None:
        a, b = values
        table.add_row(what, format(a, form), format(b, form), f"{b / a:.2f}" if a else "")

    line("size, MB", (before.bytes / 1e6, after.bytes / 1e6), ",.1f")
    line("tokens a second", (before.tokens_per_second, after.tokens_per_second), ",.1f")
    if before.perplexity is not None and after.perplexity is not None:
        line(f"perplexity of {rows:,} rows", (before.perplexity, after.perplexity), ".4g")
    table.add_row("computed in", before.computed_in, after.computed_in, "")
    return table
