"""Whether memory grows with the length of a run: thousands of real steps of a very small random model.

The model is a Llama of one layer and a small vocabulary with random weights, trained by the real Trainer with
everything on that a long run has: accumulation, validation, checkpoints in the background, a record and a tracker's
entry a step, the progress bar. Prints the resident memory at every thousandth step and the slope of a straight line
through the marks after the first, in bytes a step. Linux only: it reads /proc.

    python benchmarks/memory_over_steps.py --steps 10000
"""

from __future__ import annotations

import argparse
import gc
import io
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.data.encode import EncodedExample
from luthier.methods import get_method
from luthier.recipe import Recipe
from luthier.training.loop import Trainer
from luthier.training.loss import LossFunction
from luthier.training.progress import TerminalReporter

VOCABULARY = 256


def resident() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Watcher(TerminalReporter):
    """The progress bar, drawn into nothing; notes the resident memory now and then."""

    def __init__(self, every: int) -> None:
        super().__init__(Console(file=io.StringIO(), force_terminal=True, width=100))
        self.marks_every = every
        self.marks: list[tuple[int, int, int]] = []
        """step, resident bytes, objects that Python's collector knows"""

    def step(self, record: dict[str, Any]) -> None:
        super().step(record)
        # What the bar draws would be kept by this stand-in for a terminal.
        self.console.file.seek(0)
        self.console.file.truncate()  # type: ignore[attr-defined]
        if record["step"] % self.marks_every == 0:
            gc.collect()
            self.marks.append((record["step"], resident(), len(gc.get_objects())))
            step, size, objects = self.marks[-1]
            # Not `sys.stdout`, which the bar takes over.
            print(f"| {step:,} | {size / 1e6:,.1f} | {objects:,} |", file=sys.__stdout__, flush=True)


def rows(count: int, seed: int) -> list[EncodedExample]:
    """Random rows of 4 to 40 tokens, the second half of each trained."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        length = int(rng.integers(4, 41))
        ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
        made.append(EncodedExample(ids, np.arange(length) >= length // 2, None, index))
    return made


def trainer(a: argparse.Namespace, folder: Path, watcher: Watcher) -> Trainer:
    """A trainer of the small model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    settings = {
        "max_steps": a.steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_steps": a.every // 10,
        "save_steps": a.every // 10,
        "logging_steps": 1,
        "report_to": a.report_to,
    }
    recipe = Recipe.from_dict({"method": a.method, "training": settings})
    method = get_method(a.method)
    model = method.wrap(LlamaForCausalLM(config), recipe.method, [])
    accelerator = Accelerator(cpu=True, log_with=a.report_to or None, project_dir=str(folder / "tracking"))
    if a.report_to:
        accelerator.init_trackers("memory")
    return Trainer(model, LossFunction(model), method, recipe, rows(400, 1), rows(20, 2), folder, accelerator, watcher)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000, help="steps between marks; a tenth of it between saves")
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--report-to", nargs="*", default=["tensorboard"])
    a = parser.parse_args()
    watcher = Watcher(a.every)
    print("| step | resident MB | objects |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(a, Path(folder), watcher)
        run.run()
        run.accelerator.end_training()
    steps, memory, objects = np.array(watcher.marks[1:], dtype=float).T
    for name, values, unit in (("resident memory", memory, "bytes"), ("objects", objects, "objects")):
        print(f"{name}: {np.polyfit(steps, values, 1)[0]:+.2f} {unit} a step after step {int(steps[0]):,}")


if __name__ == "__main__":
    main()
