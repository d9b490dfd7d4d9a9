"""What fewer bits cost: size, tokens a second, perplexity and exact match of one model in several precisions.

Each kind is made by `quantize_model`, behind its parity gate, and answers the quickstart's held-out rows as any user of
its folder would be answered. Rows of the table come from functions (`SOURCES`), each of which yields names and what
was measured; another runtime's kinds are one more function.

    python benchmarks/quantisation_table.py --model runs/records --rows 40
    python benchmarks/quantisation_table.py --model smollm2 --rows 8 --only int8,nf4 --json quantisation.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from luthier.data.chats import ChatEncoder
from luthier.data.examples import TrainingExample
from luthier.data.loader import load_file
from luthier.data.render import Renderer
from luthier.deployment.footprint import folder_bytes
from luthier.deployment.quantize import quantize_model
from luthier.errors import UserError
from luthier.evaluation.generation import generate_answers
from luthier.evaluation.metrics import score
from luthier.evaluation.perplexity import perplexity_of_examples
from luthier.evaluation.question import ask
from luthier.methods.answering import load_to_answer

ROWS = Path(__file__).parent.parent / "examples" / "records" / "test.jsonl"
RUN = Path(__file__).parent.parent / "runs" / "records"
KINDS = ("float32", "bfloat16", "int8", "int4", "nf4")


@dataclass(slots=True)
class Measured:
    """A row of the table."""

    kind: str
    bytes: int
    tokens_per_second: float
    """Of greedy answers to all rows, in batches of one."""
    perplexity: float | None
    """Of the right answers; None where the runtime does not tell."""
    exact_match: float
    computed_in: str
    """Precision of the products."""


def transformers_kinds(
    model: str, kinds: list[str], examples: list[TrainingExample], folder: Path, limit: int
) -> Iterator[Measured]:
    """The kinds that transformers loads."""
    for kind in kinds:
        print(f"{kind}: writing, loading again, comparing", file=sys.stderr, flush=True)
        # The reference is bfloat16's folder, loaded in float32: of a run it is the merged model.
        stored = "bfloat16" if kind == "float32" else kind
        place = folder / stored
        if not place.is_dir():
            quantize_model(model, place, stored, data=examples, max_rows=1)
        yield measured(kind, place, examples, limit, torch.float32 if kind == "float32" else None)


def measured(
    kind: str, place: Path, examples: list[TrainingExample], limit: int, dtype: torch.dtype | None
) -> Measured:
    """Ask a folder's model all rows."""
    saved = load_to_answer(place, dtype=dtype)
    questions = [ask(saved.tokenizer, e, n) for n, e in enumerate(examples, 1)]

    def progress(done: int, total: int) -> None:
        print(f"\r{kind}: {done} of {total} answered", end="", file=sys.stderr, flush=True)

    begin = time.perf_counter()
    answers = generate_answers(
        saved.model,
        saved.tokenizer,
        [q.prompt for q in questions],
        max_new_tokens=limit,
        batch_size=1,
        progress=progress,
    )
    seconds = time.perf_counter() - begin
    print(file=sys.stderr)
    renderer = Renderer(saved.tokenizer, train_on="last_answer", allow_special_tokens=True)
    encoded = ChatEncoder(renderer).encode(examples).examples
    scores = score([a.text for a in answers], [q.references for q in questions])
    # No folder holds float32: its weights as they lie in memory.
    size = folder_bytes(place) if dtype is None else sum(p.nbytes for p in saved.model.parameters())
    tokens = sum(len(a.token_ids) for a in answers)
    computed_in = str(saved.model.dtype).removeprefix("torch.")
    surprised = perplexity_of_examples(saved.model, encoded).perplexity
    return Measured(kind, size, tokens / seconds, surprised, scores["exact_match"], computed_in)


SOURCES: list[Callable[[str, list[str], list[TrainingExample], Path, int], Iterator[Measured]]] = [transformers_kinds]


def line(row: Measured) -> str:
    """A row of the table, as Markdown."""
    told = "" if row.perplexity is None else f"{row.perplexity:.4g}"
    return f"| {row.kind} | {row.bytes / 1e6:,.1f} | {row.tokens_per_second:.2f} | {told} | {row.exact_match:.1%} | {row.computed_in} |"


def main() -> None:
    """Measure every kind in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(RUN) if RUN.is_dir() else "smollm2", help="run, folder or embedded name")
    parser.add_argument("--data", type=Path, default=ROWS)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help=f"of {','.join(KINDS)}; default: all")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    examples = load_file(a.data).examples[: a.rows]
    kinds = a.only.split(",") if a.only else list(KINDS)
    found: list[Measured] = []
    print(f"{a.model}, {len(examples)} rows of {a.data.name}, {a.threads} threads\n")
    print("| kind | MB | tokens/s | perplexity | exact match | computed in |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            for row in source(a.model, kinds, examples, Path(folder), a.max_new_tokens):
                found.append(row)
                print(line(row), flush=True)
    if a.json:
        a.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
