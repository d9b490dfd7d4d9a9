"""llama.cpp beside transformers on real questions, for each kind of GGUF file.

    python benchmarks/gguf_parity.py [MODEL] [--data gsm8k_test.jsonl] [--questions 100] [--kinds f16,q8_0]

Prints, for each kind: size, how far llama.cpp's log-probabilities lie from those of the file's own weights in
transformers (float32), how far these lie from the exported model's, and the share of greedy answers that are the same
to the last of 24 tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from luthier.data.render import prompt_text
from luthier.deployment.gguf import arithmetic_noise, stored_model
from luthier.deployment.gguf_writing import write_gguf
from luthier.deployment.llamacpp import LlamaCppRuntime
from luthier.deployment.runtimes import check_runtime
from luthier.deployment.tokens import token_ids
from luthier.evaluation.generation import stop_tokens
from luthier.models.loading import load_model, load_tokenizer, resolve_model

NOISE_PROMPTS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k_test.jsonl"))
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--kinds", default="f16,bf16,q8_0,q4_0")
    given = parser.parse_args()
    folder = Path(resolve_model(given.model))
    tokenizer, reference = load_tokenizer(folder), load_model(folder, dtype=torch.float32)
    with given.data.open(encoding="utf-8") as lines:
        questions = [json.loads(line)["question"] for line, _ in zip(lines, range(given.questions), strict=False)]
    prompts = [prompt_text(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    table = Table(title=f"{given.model}: {len(prompts)} questions")
    columns = "kind|MB|llama.cpp to file: mean|bound|max|file to model: mean|same likeliest|same answers|gate"
    for column in columns.split("|"):
        table.add_column(column, justify="right")
    for kind in given.kinds.split(","):
        with tempfile.TemporaryDirectory() as place:
            file = write_gguf(folder, Path(place) / "model.gguf", kind)
            stored = stored_model(file, folder)
            noise = arithmetic_noise(stored, kind, token_ids(tokenizer, prompts[:NOISE_PROMPTS], None))
            with LlamaCppRuntime(file) as runtime:
                report = check_runtime(
                    reference,
                    runtime,
                    tokenizer,
                    prompts,
                    noise=noise,
                    stored=stored,
                    stops=stop_tokens(reference, tokenizer),
                )
            told = report.numbers
            table.add_row(
                kind,
                f"{file.stat().st_size / 1e6:.1f}",
                f"{told['candidate_mean']:.2g}",
                f"{told['bound_mean']:.2g}",
                f"{told['candidate_max']:.2g}",
                f"{told['precision_mean']:.2g}",
                f"{told['candidate_same_top']:.1%}",
                f"{told['answers_same']:.0%}",
                "passed" if report.passed else "; ".join(report.reasons),
            )
            print(kind, json.dumps(report.to_dict()), flush=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
