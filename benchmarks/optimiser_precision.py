"""What float32 masters and moments are worth: the same steps with the optimiser in float32 and in bfloat16.

Trains the same rows from the same start three times, the model computing in bfloat16: with float32 masters, gradients
and moments (Luthier's `MasterAdamW`), with AdamW on the bfloat16 weights themselves (moments in bfloat16 too), and,
as the reference, with model and optimiser in float32. Prints the held-out loss of each and the optimiser's time.

    python benchmarks/optimiser_precision.py --data rows.jsonl --prompt-column question --response-column answer
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from luthier.data.chats import ChatEncoder
from luthier.data.encode import EncodedExample
from luthier.data.examples import TrainingExample
from luthier.data.render import Renderer
from luthier.method_options import FullMethod, LoraMethod
from luthier.methods import get_method
from luthier.methods.base import trainable_parameters
from luthier.models.loading import load_model, load_tokenizer
from luthier.training.loss import LossFunction
from luthier.training.optimiser import MasterAdamW, learning_rate_factor

VARIANTS = ("float32 reference", "bfloat16, float32 masters", "bfloat16 throughout")


def train(
    variant: str, method: str, rows: list[EncodedExample], held_out: list[EncodedExample], a: argparse.Namespace
) -> tuple[float, float, float]:
    """Held-out loss at the end, mean training loss of the last ten steps, and optimiser seconds a step."""
    model = load_model(a.model, dtype=torch.float32 if variant.startswith("float32") else torch.bfloat16)
    torch.manual_seed(0)
    options = LoraMethod(lora_dropout=0.0) if method == "lora" else FullMethod()
    wrapped = get_method(method).wrap(model, options, [])
    loss_function = LossFunction(wrapped)
    rate = get_method(method).learning_rate
    parameters = trainable_parameters(wrapped)
    if variant == "bfloat16 throughout":
        optimiser = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0, fused=True)
    else:
        optimiser = MasterAdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    wrapped.train()
    losses, seconds = [], 0.0
    for step in range(a.steps):
        begin = step * a.batch % (len(rows) - a.batch + 1)
        batch = loss_function.batch(rows[begin : begin + a.batch])
        loss = loss_function(batch) / batch.trained_tokens
        loss.backward()
        losses.append(float(loss.detach()))
        began = time.perf_counter()
        now = rate * learning_rate_factor("cosine", step, a.steps, a.steps // 10)
        if isinstance(optimiser, MasterAdamW):
            optimiser.clip(1.0)
            optimiser.step(now)
        else:
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
            optimiser.param_groups[0]["lr"] = now
            optimiser.step()
            optimiser.zero_grad()
        seconds += time.perf_counter() - began
    wrapped.eval()
    total = count = 0.0
    with torch.no_grad():
        for begin in range(0, len(held_out), 8):
            batch = loss_function.batch(held_out[begin : begin + 8])
            total += float(loss_function(batch))
            count += batch.trained_tokens
    return total / count, sum(losses[-10:]) / len(losses[-10:]), seconds / a.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--response-column", default="response")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    a = parser.parse_args()
    with Path(a.data).open(encoding="utf-8") as stream:
        records = [json.loads(line) for line, _ in zip(stream, range(a.steps * a.batch + 64), strict=False)]
    examples = [TrainingExample(input=r[a.prompt_column], output=r[a.response_column]) for r in records]
    encoded = ChatEncoder(Renderer(load_tokenizer(a.model))).encode(examples).examples
    held_out, rows = encoded[:64], encoded[64:]
    print(
        "| method | precision | held-out loss | last ten training losses | optimiser ms a step |\n|---|---|---|---|---|"
    )
    for method in a.methods:
        for variant in a.variants:
            held, last, seconds = train(variant, method, rows, held_out, a)
            print(f"| {method} | {variant} | {held:.4f} | {last:.4f} | {seconds * 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main()
