"""Weights, peak memory, loss and time of full, lora and qlora on the same rows, each in a process of its own.

``python benchmarks/qlora_memory.py [--model smollm2] [--steps 6]``
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

SETTINGS = {
    "full": {"name": "full"},
    "lora": {"name": "lora"},
    "qlora 8": {"name": "qlora", "bits": 8},
    "qlora 4": {"name": "qlora"},
}
TREES = ("amber oak", "silver birch", "red cedar", "black alder", "white willow", "copper beech", "wych elm", "poplar")


def child(options: dict) -> dict:
    """Train one method for some steps and measure it; bytes, seconds, nats a token."""
    import torch

    from luthier.data.examples import TrainingExample
    from luthier.methods.base import trainable_parameters
    from luthier.models.quantized import held_bytes
    from luthier.preparation import prepare_run
    from luthier.recipe import Recipe

    recipe = Recipe.from_dict(
        {
            "model": {"name": options["model"], "dtype": "float32"},
            "method": SETTINGS[options["method"]],
            "training": {"report_to": []},
            "output_dir": "/nonexistent",
        }
    )
    rows = [TrainingExample(f"Which tree has number {i}?", f"Number {i} is the {t}.") for i, t in enumerate(TREES)]
    began = time.perf_counter()
    ready = prepare_run(recipe, {"train": rows})
    loaded = time.perf_counter() - began
    after_loading = _peak()
    rate = {"full": 2e-5}.get(recipe.method.name, 1e-3)
    optimiser = torch.optim.AdamW(trainable_parameters(ready.model).values(), lr=rate, weight_decay=0.0)
    batch = ready.loss_function.batch(list(ready.dataset.train.encoded))
    ready.model.train()
    losses = []
    began = time.perf_counter()
    for _ in range(options["steps"]):
        loss = ready.loss_function(batch) / batch.trained_tokens
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return {
        "weights": held_bytes(ready.model),
        "peak_loading": after_loading,
        "peak": _peak(),
        "first": losses[0],
        "last": losses[-1],
        "loading_s": loaded,
        "step_s": (time.perf_counter() - began) / options["steps"],
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--child")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(vars(asked) | {"method": asked.child})))
        return
    print("| method | weights, MB | peak RSS loading, MB | peak RSS, MB | first loss | last | load, s | step, s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for method in SETTINGS:
        command = [sys.executable, __file__, "--model", asked.model, "--steps", str(asked.steps), "--child", method]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
        m = json.loads(out.splitlines()[-1])
        print(
            f"| {method} | {m['weights'] / 1e6:,.0f} | {m['peak_loading'] / 1e6:,.0f} | {m['peak'] / 1e6:,.0f} | "
            f"{m['first']:.3f} | {m['last']:.3f} | {m['loading_s']:.1f} | {m['step_s']:.2f} |"
        )


if __name__ == "__main__":
    main()
