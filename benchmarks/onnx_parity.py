"""A model as ONNX in onnxruntime beside transformers: the same prompts, one after the other, in one process.

    python benchmarks/onnx_parity.py --json onnx.json

Each question of GSM8K's test file is rendered by the model's template. Both sides give the log-probabilities at all
its places and a greedy answer, taking turns at going first; both compute in float32 with a cache of keys and values
and the same number of threads.

What is printed: of how many questions the answers are the same to the last token; mean and greatest |Δ
log-probability| of likely tokens, and the share of places with the same likeliest token; bytes of the weights; and
tokens of answers a second, the reading of the prompt in their time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _harness import GSM8K

from luthier.data.render import prompt_text
from luthier.deployment.onnx import export_onnx
from luthier.deployment.onnx_runtime import OnnxRuntime
from luthier.deployment.parity import distance, log_probabilities
from luthier.methods.saved import load_saved
from luthier.models.loading import set_stop_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="a run or model folder, an embedded model's name or a hub id; no adapter")
    add("--onnx", type=Path, help="where its export lies, or is to lie; a temporary folder by default")
    add("--data", type=Path, default=GSM8K.with_name("gsm8k_test.jsonl"), help="JSONL with a field `question`")
    add("--rows", type=int, default=100)
    add("--tokens", type=int, default=24, help="most of an answer")
    add("--json", type=Path, help="where the numbers go as well")
    given = parser.parse_args()
    if not given.data.is_file():
        sys.exit(f"--data {given.data} does not exist")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.onnx or Path(scratch) / "onnx"
        if not (folder / "model.onnx").is_file():
            export_onnx(given.model, folder)
        found = compare(given.model, folder, given.data, given.rows, given.tokens)
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<32} {value:,.6g}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def compare(model_name: str, folder: Path, data: Path, rows: int, limit: int) -> dict[str, float]:
    """All numbers of both sides over the first so many questions."""
    saved, runtime = load_saved(model_name, dtype=torch.float32), OnnxRuntime(folder)
    model, tokenizer = saved.model, saved.tokenizer
    set_stop_tokens(model, tokenizer)
    lines = data.read_text(encoding="utf-8").splitlines()[:rows]
    questions = [json.loads(line)["question"] for line in lines]
    sides = {"transformers": lambda ids: _generate(model, ids, limit), "onnx": lambda ids: runtime.greedy(ids, limit)}
    seconds, tokens, same = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0), 0
    apart, lengths = [], []
    for number, question in enumerate(questions):
        prompt = prompt_text(tokenizer, [{"role": "user", "content": question}])
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answers = {}
        for side in list(sides) if number % 2 else reversed(list(sides)):
            began = time.perf_counter()
            answers[side] = sides[side](ids)
            seconds[side] += time.perf_counter() - began
            tokens[side] += len(answers[side])
        same += answers["transformers"] == answers["onnx"]
        # A question's log-probabilities at all places take as much memory as its logits: they are not kept.
        apart.append(distance([log_probabilities(model, ids)], [runtime.logits(ids).log_softmax(-1)]))
        lengths.append(len(ids))
    places = sum(lengths)
    return {
        "questions": len(questions),
        "answers_same": same,
        "mean_log_probability_apart": sum(a["mean"] * n for a, n in zip(apart, lengths, strict=True)) / places,
        "max_log_probability_apart": max(a["max"] for a in apart),
        "likeliest_token_same": sum(a["same_top"] * n for a, n in zip(apart, lengths, strict=True)) / places,
        "places": places,
        "transformers_weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "onnx_bytes": sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data")),
        "transformers_tokens_a_second": tokens["transformers"] / seconds["transformers"],
        "onnx_tokens_a_second": tokens["onnx"] / seconds["onnx"],
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def _generate(model: Any, ids: list[int], limit: int) -> list[int]:
    """A greedy answer by transformers' own loop, without its stop token."""
    row = torch.tensor([ids])
    made = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=limit, do_sample=False)
    answer: list[int] = made[0, len(ids) :].tolist()
    stops = model.generation_config.eos_token_id
    return answer[:-1] if answer and answer[-1] in ([stops] if isinstance(stops, int) else stops) else answer


if __name__ == "__main__":
    main()
