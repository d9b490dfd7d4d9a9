"""What fewer bits cost: size, tokens a second, perplexity and exact match of one model in several precisions.

Each kind is made by `quantize_model` or `export_gguf`, behind its parity gate, and answers the quickstart's held-out
rows as any user of it would be answered: a folder by transformers, a GGUF file by llama.cpp as `luthier serve` runs it.
All kinds take turns, row by row, in one process. "calibrated": by llama.cpp's quantiser with an importance matrix of
the first 128 rows of `--calibration`.

    python benchmarks/quantisation_table.py --model runs/records --rows 40
    python benchmarks/quantisation_table.py --model smollm2 --rows 8 --only int8,nf4 --json quantisation.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.data.chats import ChatEncoder
from luthier.data.examples import TrainingExample
from luthier.data.loader import load_file
from luthier.data.render import Renderer
from luthier.deployment.footprint import folder_bytes
from luthier.deployment.gguf import export_gguf
from luthier.deployment.k_quants import K_QUANTS
from luthier.deployment.llamacpp import LlamaCppRuntime
from luthier.deployment.quantize import quantize_model
from luthier.deployment.serving.engine import Ask, Piece
from luthier.deployment.serving.llamacpp import LlamaCppEngine
from luthier.errors import UserError
from luthier.evaluation.generation import generate_answers
from luthier.evaluation.metrics import score
from luthier.evaluation.perplexity import perplexity_of_examples
from luthier.evaluation.question import Question, ask
from luthier.methods.answering import load_to_answer

ROWS = Path(__file__).parent.parent / "examples" / "records" / "test.jsonl"
CALIBRATION = ROWS.with_name("train.jsonl")
RUN = Path(__file__).parent.parent / "runs" / "records"
KINDS = ("float32", "bfloat16", "int8", "int4", "nf4")
GGUF = "gguf "
GGUF_KINDS = ("f16", "bf16", "q8_0", "q4_0")
CALIBRATED = " calibrated"
CONTEXT = 1024  # tokens


@dataclass(slots=True)
class Side:
    """A row of the table: one kind, loaded and ready to be asked."""

    kind: str
    bytes: int
    computed_in: str
    """Precision of the products."""
    answer: Callable[[str], tuple[str, int]]
    """A rendered prompt's greedy answer, and of how many tokens it is."""
    perplexity: float | None
    """Of the right answers; None where the runtime does not tell."""
    said: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def transformers_side(a: argparse.Namespace, kind: str, examples: list[TrainingExample], folder: Path) -> Side:
    """A kind that transformers loads. float32 is bfloat16's folder without its rounding: the weights of a base that is
    stored in bfloat16 are the same in both."""
    print(f"{kind}: writing, loading again, comparing", file=sys.stderr, flush=True)
    stored = "bfloat16" if kind == "float32" else kind
    place = folder / stored
    if not place.is_dir():
        quantize_model(a.model, place, stored, data=examples, max_rows=1)
    return loaded(kind, place, examples, a.max_new_tokens, torch.float32 if kind == "float32" else None)


def loaded(kind: str, place: Path, examples: list[TrainingExample], limit: int, dtype: torch.dtype | None) -> Side:
    """A folder's model, as any user of it would be answered."""
    saved = load_to_answer(place, dtype=dtype)
    renderer = Renderer(saved.tokenizer, train_on="last_answer", allow_special_tokens=True)
    encoded = ChatEncoder(renderer).encode(examples).examples
    # No folder holds float32: its weights as they lie in memory.
    size = folder_bytes(place) if dtype is None else sum(p.nbytes for p in saved.model.parameters())

    def answer(prompt: str) -> tuple[str, int]:
        said = generate_answers(saved.model, saved.tokenizer, [prompt], max_new_tokens=limit)[0]
        return said.text, len(said.token_ids)

    computed_in = str(saved.model.dtype).removeprefix("torch.")
    return Side(kind, size, computed_in, answer, perplexity_of_examples(saved.model, encoded).perplexity)


def gguf_side(a: argparse.Namespace, name: str, examples: list[TrainingExample], folder: Path) -> Side:
    """A kind that llama.cpp runs; perplexity by llama.cpp too."""
    print(f"{name}: writing, loading again, comparing", file=sys.stderr, flush=True)
    kind = name.removeprefix(GGUF).removesuffix(CALIBRATED)
    rows = a.calibration if name.endswith(CALIBRATED) else None
    made = export_gguf(a.model, folder / name.replace(" ", "-"), kind=kind, calibration=rows)
    file, tokenizer = made.files[0], load_to_answer(a.model).tokenizer
    with LlamaCppRuntime(file, context=CONTEXT) as runtime:
        perplexity = perplexity_by(runtime, tokenizer, examples)
    engine = LlamaCppEngine(file, {}, context=CONTEXT, slots=1, threads=torch.get_num_threads(), convert=Path)
    answer = partial(ask_engine, engine, tokenizer, a.max_new_tokens)
    return Side(name, made.sizes[file.name], f"llama.cpp, {kind}", answer, perplexity)


def perplexity_by(runtime: LlamaCppRuntime, tokenizer: Any, examples: list[TrainingExample]) -> float:
    """Perplexity of the right answers, token by token."""
    renderer = Renderer(tokenizer, train_on="last_answer", allow_special_tokens=True)
    found = [
        runtime.log_probability(row.input_ids[:at].tolist(), int(row.input_ids[at]))
        for row in ChatEncoder(renderer).encode(examples).examples
        for at in np.flatnonzero(row.trained)
    ]
    return math.exp(-sum(found) / len(found))


def ask_engine(engine: LlamaCppEngine, tokenizer: Any, limit: int, prompt: str) -> tuple[str, int]:
    """A rendered prompt's greedy answer by the server's engine."""
    pieces: list[Piece] = []

    def take(piece: Piece) -> bool:
        pieces.append(piece)
        return False

    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    engine.write(None, Ask(tuple(ids), limit), take)
    return "".join(piece.text for piece in pieces), pieces[-1].written


def all_kinds() -> list[str]:
    """Every kind that can be made here; K-quants where llama.cpp's quantiser is installed."""
    found = [*KINDS, *(GGUF + kind for kind in GGUF_KINDS)]
    if importlib.util.find_spec("llama_cpp") is not None:
        found += [GGUF + kind + rows for kind in K_QUANTS for rows in ("", CALIBRATED)]
    return found


def ask_all(sides: list[Side], questions: list[Question]) -> None:
    """Every question to every side in turn, so that a busy machine is busy for all of them."""
    for number, question in enumerate(questions, 1):
        for side in sides:
            if number == 1:
                side.answer(question.prompt)  # fills caches
            begin = time.perf_counter()
            text, tokens = side.answer(question.prompt)
            side.seconds += time.perf_counter() - begin
            side.tokens += tokens
            side.said.append(text)
        print(f"\r{number} of {len(questions)} rows answered by all", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def row(side: Side, questions: list[Question]) -> dict[str, Any]:
    """What a row of the table says."""
    return {
        "kind": side.kind,
        "megabytes": side.bytes / 1e6,
        "tokens_per_second": side.tokens / side.seconds,
        "perplexity": side.perplexity,
        "exact_match": score(side.said, [q.references for q in questions])["exact_match"],
        "computed_in": side.computed_in,
    }


def line(told: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    perplexity = "" if told["perplexity"] is None else f"{told['perplexity']:.4g}"
    return (
        f"| {told['kind']} | {told['megabytes']:,.1f} | {told['tokens_per_second']:.2f} | {perplexity} "
        f"| {told['exact_match']:.1%} | {told['computed_in']} |"
    )


def main() -> None:
    """Measure every kind in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(RUN) if RUN.is_dir() else "smollm2", help="run, folder or embedded name")
    parser.add_argument("--data", type=Path, default=ROWS)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="rows that calibrated K-quants heed")
    parser.add_argument("--only", help=f"of {','.join(all_kinds())}; default: all")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    examples = load_file(a.data).examples[: a.rows]
    kinds = a.only.split(",") if a.only else all_kinds()
    tokenizer = load_to_answer(a.model).tokenizer
    questions = [ask(tokenizer, e, n) for n, e in enumerate(examples, 1)]
    with tempfile.TemporaryDirectory() as folder:
        sides, refused = [], {}
        for kind in kinds:
            try:
                made = gguf_side if kind.startswith(GGUF) else transformers_side
                sides.append(made(a, kind, examples, Path(folder)))
            except UserError as error:
                refused[kind] = error.what
        ask_all(sides, questions)
    found = [row(side, questions) for side in sides]
    print(f"{a.model}, {len(examples)} rows of {a.data.name}, {a.threads} threads\n")
    print("| kind | MB | tokens/s | perplexity | exact match | computed in |\n|---|---|---|---|---|---|")
    print(*map(line, found), sep="\n")
    for kind, why in refused.items():
        print(f"\n{kind}: {why}")
    if a.json:
        a.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
