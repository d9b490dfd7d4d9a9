"""LitGPT's side of training_speed.py, run by the Python of LitGPT's own environment.

Rows reach it through a data module of its own kind; what its recipes leave no choice about (a schedule that warms up
and falls, no clipping) is set by an optimiser class of its own choice, which its `optimizer` argument takes.
"""

from __future__ import annotations

import csv
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _child import Outcome, Row, Settings, peak_memory, read_rows, step_counts
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import configs
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default
from torch.utils.data import DataLoader


class SteadyAdamW(torch.optim.AdamW):
    """AdamW at a constant rate, gradients clipped at 1, that notes the peak memory at the end of each step."""

    peaks: list[int] = []  # noqa: RUF012, one run a process

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, weight_decay=0.0)
        self.steady = lr

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = self.steady
            torch.nn.utils.clip_grad_norm_([p for p in group["params"] if p.grad is not None], 1.0)
        result = super().step(closure)
        self.peaks.append(peak_memory())
        return result


class Encoded(DataModule):
    """The encoded rows in the file's order."""

    prompt_style = Default()

    def __init__(self, rows: list[Row], batch: int) -> None:
        super().__init__()
        self.items = [
            {
                "input_ids": torch.tensor(row["input_ids"]),
                "labels": torch.tensor(row["labels"]),
                "token_counts": {"raw": len(row["labels"]), "raw_plus_prompt_template": len(row["labels"])},
            }
            for row in rows
        ]
        self.batch = batch

    def connect(self, *_: Any, **__: Any) -> None:
        """Nothing: rows are encoded and the batch is known."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.items, batch_size=self.batch, collate_fn=get_sft_collate_fn())

    def val_dataloader(self) -> Any:
        # LitGPT validates on this before the first step, to see that it can; one short row costs least.
        shortest = min(self.items, key=lambda item: len(item["labels"]))
        return DataLoader([shortest], batch_size=1, collate_fn=get_sft_collate_fn())


def litgpt(settings: Settings) -> Outcome:
    """LitGPT's LoRA or full recipe on the encoded rows, in its true bfloat16 (or float32) precision."""
    from litgpt.finetune.full import setup as full
    from litgpt.finetune.lora import setup as lora

    rows = read_rows(settings)
    out = Path(settings["output"])
    common: dict[str, Any] = {
        "checkpoint_dir": _converted(Path(settings["folder"]), out),
        "out_dir": out / "run",
        "precision": "bf16-true" if settings["dtype"] == "bfloat16" else "32-true",
        "data": Encoded(rows, settings["batch"]),
        "train": TrainArgs(
            global_batch_size=settings["batch"],
            micro_batch_size=settings["batch"],
            max_steps=settings["steps"],
            epochs=2,
            lr_warmup_steps=1,  # its schedule divides by this; the optimiser above keeps the rate all the same
            save_interval=None,
        ),
        "eval": EvalArgs(interval=10**9, final_validation=False, max_new_tokens=1, max_iters=1),
        "optimizer": {"class_path": f"{__name__}.SteadyAdamW", "init_args": {"lr": settings["lr"]}},
        "seed": 0,
    }
    own: dict[str, Any] = {}
    if settings["method"] == "lora":
        own = {"lora_r": settings["r"], "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"]}
        own |= dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp"), True)
    # When it saves, LitGPT reads its settings once more from the command line.
    sys.argv = ["litgpt", str(common["checkpoint_dir"]), *(f"--{name}={value}" for name, value in own.items())]
    (lora if settings["method"] == "lora" else full)(**common, **own)
    with next((out / "run").rglob("metrics.csv")).open(encoding="utf-8") as stream:
        steps = [line for line in csv.DictReader(stream) if line["loss"]]
    return {
        "version": version("litgpt"),
        "losses": [float(step["loss"]) for step in steps],
        "seconds": [float(step["iter_time"]) for step in steps],
        **step_counts(rows, settings["batch"]),
        "peak_memory_bytes": SteadyAdamW.peaks[-1],
        "notes": ["LoRA matrices drawn by itself, and in bfloat16 in the optimiser too"]
        if settings["method"] == "lora"
        else ["weights and moments in bfloat16; the output head is not tied to the embedding, so it is trained apart"],
    }


def _converted(folder: Path, out: Path) -> Path:
    """The model in LitGPT's own format, by its converter, from links to the files."""
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = {
        "n_layer": config["num_hidden_layers"],
        "n_embd": config["hidden_size"],
        "n_head": config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
        "intermediate_size": config["intermediate_size"],
    }
    known = [c["name"] for c in configs if all(c.get(key) == value for key, value in shape.items())]
    if not known:
        raise SystemExit(f"LitGPT knows no model of the shape {shape}")
    target = out / known[0]
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    convert_hf_checkpoint(target)
    return target
