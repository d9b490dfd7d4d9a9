"""Models that fill in hidden words, on held-out rows: how often they are right, and how surely."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.data.encode import EncodedExample
from luthier.data.masked import Masking
from luthier.evaluation.measures import Measure, how_sure, result_json
from luthier.evaluation.state import by_length, measuring
from luthier.evaluation.statistics import Change, Interval, Value
from luthier.models.heads import fresh_modules
from luthier.training.masked_loss import MaskedLoss

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

_TOP = 5


@dataclass(slots=True)
class MaskedResult:
    """One model's part."""

    name: str
    metrics: dict[str, float]
    """``accuracy`` and ``top5_accuracy``, shares of the hidden tokens that are the likeliest one, or among the five
    likeliest; ``loss``, nats a hidden token, and ``perplexity``, its exponential"""
    fills: list[np.ndarray]
    """of each row ``[k]`` likeliest token ids"""
    seconds: float
    measures: dict[str, Measure] = field(default_factory=dict)
    """The metrics, with what of each row they come from."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Each measure's value and its 95% confidence interval"""
    changes: dict[str, Change] = field(default_factory=dict)
    """Against the first model; empty for the first itself."""


@dataclass(slots=True)
class MaskedComparison:
    """What :func:`compare_masked` found."""

    models: list[MaskedResult]
    read: list[str]
    """Each row as it was read, words hidden."""
    right: list[list[str]]
    """Of each row, what was hidden: tokens that stand together are one text."""
    given: dict[str, list[list[str]]]
    """Of each model and row, what stands there instead."""
    places: list[str]
    hidden: int
    """tokens"""
    samples: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes: metrics by model, notes, each row with what it was filled with."""
        rows = []
        for i, text in enumerate(self.read):
            given = {m.name: self.given[m.name][i] for m in self.models}
            rows.append({"where": self.places[i], "read": text, "right": self.right[i], "given": given})
        return {
            "models": {m.name: result_json(m.metrics, m.intervals, m.changes, m.seconds) for m in self.models},
            "measures": {name: measure.describe() for name, measure in self.models[0].measures.items()},
            "hidden_tokens": self.hidden,
            "notes": self.notes,
            "samples": list(range(min(self.samples, len(self.read)))),
            "rows": rows,
        }

    def render(self) -> RenderableType:
        """A table of the metrics, the notes, and a few rows with what was hidden and what each model puts there."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        title = f"{len(self.read):,} held-out rows, {self.hidden:,} hidden tokens"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for model in self.models:
            table.add_column(model.name, justify="right")
        for key, label in (("accuracy", "right"), ("top5_accuracy", "right among the 5 likeliest")):
            table.add_row(label, *(f"{m.metrics[key]:.1%}" for m in self.models))
        table.add_row("loss", *(f"{m.metrics['loss']:.3f}" for m in self.models))
        table.add_row("perplexity of hidden tokens", *(f"{m.metrics['perplexity']:,.1f}" for m in self.models))
        parts: list[RenderableType] = [table, *(Text(f"! {note}", style="yellow") for note in self.notes)]
        if self.samples:
            shown = Table("text", "hidden", *(m.name for m in self.models), show_lines=True)
            for i in range(min(self.samples, len(self.read))):
                text = self.read[i].replace("\x1b", "␛")
                words = [self.right[i], *(self.given[m.name][i] for m in self.models)]
                cells = (Text("\n".join(w[:12]) + ("\n…" if len(w) > 12 else "")) for w in words)
                shown.add_row(Text(text[:400] + ("…" if len(text) > 400 else "")), *cells)
            parts.append(shown)
        return Group(*parts)


def compare_masked(
    models: Sequence[tuple[str, Callable[[], AbstractContextManager[Any]]]],
    rows: Sequence[EncodedExample],
    masking: Masking,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 3,
    seed: int = 42,
) -> MaskedComparison:
    """Hide the same words from every model and score what it puts there.

    All hidden tokens are replaced by the mask token, unlike in training: what stays as it is can be read off.

    Args:
        models: names and context managers that give the model; one whose head is new is not asked.
        rows: encoded as in training, at least one.
        masking: which words are hidden.
        tokenizer: of the models.
        samples: how many rows to show.
        seed: of the resamples that intervals and significance come from.
    """
    masking = replace(masking, mask_replace_prob=1.0, random_replace_prob=0.0)
    results: list[MaskedResult] = []
    notes = []
    for name, opened in models:
        with opened() as model:
            if name == "base" and fresh_modules(model):
                notes.append("the base's head is new and fills in words at random, so it isn't asked")
                continue
            begin = time.perf_counter()
            metrics, fills, sums = fill(model, rows, masking, pad_token_id=tokenizer.pad_token_id or 0)
            found = MaskedResult(name, metrics, fills, time.perf_counter() - begin, _measures(sums))
        found.intervals, found.changes = how_sure(found.measures, results[0].measures if results else None, seed)
        results.append(found)
    if len(results) > 1 and results[0].name == "base" and results[1].metrics["loss"] >= results[0].metrics["loss"]:
        notes.append("the tuned model fills in the words of these rows no better than its base")
    drawn = [masking.draw(row, 0) for row in rows]
    return MaskedComparison(
        results,
        [str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids, _ in drawn],
        [_texts(row.input_ids[at], at, tokenizer) for row, (_, at) in zip(rows, drawn, strict=True)],
        {m.name: [_texts(ids, at, tokenizer) for ids, (_, at) in zip(m.fills, drawn, strict=True)] for m in results},
        [str(row.source) if row.source else f"row {row.index + 1}" for row in rows],
        sum(len(at) for _, at in drawn),
        samples,
        notes,
    )


@torch.no_grad()
def fill(
    model: torch.nn.Module, rows: Sequence[EncodedExample], masking: Masking, *, pad_token_id: int = 0
) -> tuple[dict[str, float], list[np.ndarray], np.ndarray]:
    """How well a model fills in hidden tokens.

    Args:
        model: a masked language model.
        rows: encoded texts, at least one.
        masking: which tokens are hidden.
        pad_token_id: fills padded rows.

    Returns:
        the metrics and the likeliest token of each, as :class:`MaskedResult` has them, and ``[N, 4]`` what the metrics
        are sums of: nats, right ones, right ones among the likeliest, and hidden tokens of each row.
    """
    fills: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(rows)
    sums = np.zeros((len(rows), 4))
    with measuring(model):
        device = next(model.parameters()).device
        loss = MaskedLoss(model, masking=masking, pad_token_id=pad_token_id)
        for numbers in by_length(rows):
            taken = [rows[number] for number in numbers]
            batch = loss.batch(taken).to(device)
            logits = loss.logits(batch).float()
            losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
            likeliest = logits.topk(min(_TOP, logits.shape[-1]), -1).indices
            hits = likeliest == batch.targets[:, None]
            each = torch.stack([losses.double(), hits[:, 0].double(), hits.sum(1).double()], 1).cpu().numpy()
            first = likeliest[:, 0].cpu().numpy()
            ends = np.cumsum([len(masking.draw(row, 0)[1]) for row in taken])[:-1]
            for number, found, of_row in zip(numbers, np.split(first, ends), np.split(each, ends), strict=True):
                fills[number] = found
                sums[number] = [*of_row.sum(0), len(found)]
    total, right, among, count = sums.sum(0).tolist()
    mean = total / count
    metrics = {
        "accuracy": right / count,
        "top5_accuracy": among / count,
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),
    }
    return metrics, fills, sums


def _measures(sums: np.ndarray) -> dict[str, Measure]:
    """The metrics as sums over rows."""
    each, five = sums[:, :3] / sums[:, 3:], f"right among the {_TOP} likeliest"
    found = [
        Measure("accuracy", "right", "higher", True, False, 3, _mean_of(1), sums, each[:, 1]),
        Measure("top5_accuracy", five, "higher", True, False, 3, _mean_of(2), sums, each[:, 2]),
        Measure("loss", "loss", "lower", False, False, 3, _mean_of(0), sums, each[:, 0]),
        Measure("perplexity", "perplexity of hidden tokens", "lower", False, False, 1, _perplexity, sums, each[:, 0]),
    ]
    return {measure.name: measure for measure in found}


def _mean_of(part: int) -> Value:
    return lambda sums, count: sums[..., part] / sums[..., 3]


def _perplexity(sums: np.ndarray, count: int) -> np.ndarray:
    found: np.ndarray = np.exp(np.minimum(sums[..., 0] / sums[..., 3], 700))
    return found


def _texts(ids: np.ndarray, at: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of tokens at places of a row, those of neighbours as one."""
    groups = np.split(ids, np.flatnonzero(np.diff(at) != 1) + 1)
    return [str(tokenizer.decode(group, clean_up_tokenization_spaces=False)).strip() for group in groups]
