"""An encoder's batches, packed beside padded: the same rows in the same order, in turns, in one process.

A classifier is tuned whole on real texts by Luthier's own loss and optimiser; the sides differ in `model.batching`
alone. Dropout is off, so that the losses of each step can be compared; `--dropout` leaves it as the model has it.
Tokens a second count the texts' own tokens on both sides. Each round begins from the same weights.

    python benchmarks/encoder_batches.py --data reviews.csv --model BERT_FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from luthier.data.batch import Order
from luthier.data.dataset import Dataset, prepare
from luthier.methods.base import trainable_parameters
from luthier.models.heads import Head
from luthier.models.loading import load_model, load_tokenizer, set_padding
from luthier.recipe import Recipe
from luthier.tasks import get_task
from luthier.training.optimiser import MasterAdamW

SIDES = ("packed", "padded")


def rows_of(a: argparse.Namespace) -> Dataset:
    """The texts with their classes, cut as the model needs."""
    recipe = Recipe.from_dict(
        {
            "task": "classification",
            "data": {"train": str(a.data), "truncation": "cut", "max_length": a.max_length,
                     "split": {"validation": 0.0, "test": 0.0}},
        }
    )  # fmt: skip
    return prepare(recipe, load_tokenizer(a.model, chats=False))


def train(a: argparse.Namespace, dataset: Dataset, batching: str, round_number: int) -> dict[str, Any]:
    """Steps of one side: seconds, tokens and loss of each, and what was computed."""
    torch.manual_seed(a.seed)
    model: Any = load_model(a.model, dtype=torch.float32, head=Head(get_task("classification").type, dataset.classes))
    set_padding(model, dataset.tokenizer)
    if not a.dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    loss = get_task("classification").loss_function(
        model, dataset, batching=batching, pad_token_id=dataset.tokenizer.pad_token_id or 0
    )
    if loss.packed is not (batching == "packed"):
        raise SystemExit(f"this model's rows are padded: {loss.reason}")
    model.train()
    optimiser = MasterAdamW(
        trainable_parameters(model), lr=a.learning_rate, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8
    )
    rows = dataset.train.encoded
    order = Order(len(rows), batch_size=a.batch, seed=a.seed + round_number)
    found: dict[str, Any] = {"seconds": [], "tokens": [], "computed": [], "losses": []}
    for step in range(a.warmup_steps + a.steps):
        began = time.perf_counter()
        (numbers,) = order.step(step)
        batch = loss.batch([rows[n] for n in numbers], draw=step + 1)
        total = loss(batch) / batch.trained_tokens
        total.backward()
        optimiser.clip(1.0)
        optimiser.step(a.learning_rate)
        value = float(total.detach())
        if step >= a.warmup_steps:
            found["seconds"].append(time.perf_counter() - began)
            found["tokens"].append(batch.tokens)
            found["computed"].append(batch.computed)
            found["losses"].append(value)
    optimiser.close()
    return found


def main() -> None:
    """Train both sides in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of texts with their class")
    parser.add_argument("--model", required=True, help="an encoder's folder")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a side and round")
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    dataset = rows_of(a)
    rounds = []
    for number in range(a.rounds):
        # Who begins takes turns too.
        turns = SIDES if number % 2 == 0 else SIDES[::-1]
        found = {side: train(a, dataset, side, number) for side in turns}
        if found["packed"]["tokens"] != found["padded"]["tokens"]:
            raise SystemExit("the sides had other rows")
        rounds.append(found)
        speed = {side: sum(f["tokens"]) / sum(f["seconds"]) for side, f in found.items()}
        print(f"round {number + 1}: " + ", ".join(f"{side} {speed[side]:,.0f} tokens/s" for side in SIDES), flush=True)

    def total(side: str, what: str) -> float:
        return sum(sum(found[side][what]) for found in rounds)

    print("\n| batches | tokens/s, padding not counted | tokens computed for one of the texts' | ms a step |")
    print("|---|---|---|---|")
    for side in SIDES:
        seconds, tokens = total(side, "seconds"), total(side, "tokens")
        each = 1000 * seconds / (a.rounds * a.steps)
        print(f"| {side} | {tokens / seconds:,.0f} | {total(side, 'computed') / tokens:.2f} | {each:,.0f} |")
    ratios = [sum(found["padded"]["seconds"]) / sum(found["packed"]["seconds"]) for found in rounds]
    print(f"\npacked is {statistics.median(ratios):.2f} × padded ({min(ratios):.2f} to {max(ratios):.2f} by round)")
    apart = max(
        abs(x - y)
        for found in rounds
        for x, y in zip(found["packed"]["losses"], found["padded"]["losses"], strict=True)
    )
    print(f"losses differ by at most {apart:.2g} at any step" + (" (dropout draws are others)" if a.dropout else ""))
    print("\n| step of round 1 | packed | padded |\n|---|---|---|")
    for step, pair in enumerate(zip(*(rounds[0][side]["losses"] for side in SIDES), strict=True), 1):
        print(f"| {step} | " + " | ".join(f"{value:.6f}" for value in pair) + " |")
    if a.json:
        a.json.write_text(json.dumps({"rounds": rounds, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
