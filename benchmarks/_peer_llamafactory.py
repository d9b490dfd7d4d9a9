"""LLaMA-Factory's side of training_speed.py, run by the Python of LLaMA-Factory's own environment.

Rows reach it as a tokenised dataset on disk (its `tokenized_path`).
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from _child import Outcome, Settings, read_rows, step_counts
from _watch import Watch


def llamafactory(settings: Settings) -> Outcome:
    """LLaMA-Factory's supervised fine-tuning on the encoded rows, in the file's order."""
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    rows = read_rows(settings)
    out = Path(settings["output"])
    none = [None] * len(rows)
    columns = {
        "input_ids": [row["input_ids"] for row in rows],
        "attention_mask": [[1] * len(row["input_ids"]) for row in rows],
        "labels": [row["labels"] for row in rows],
        "images": none,
        "videos": none,
        "audios": none,
    }
    DatasetDict({"train": Dataset.from_dict(columns)}).save_to_disk(out / "rows")
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": settings["folder"],
        "finetuning_type": settings["method"],
        # Asked for, and not used: the rows are tokenised already.
        "dataset": "none",
        "template": "default",
        "tokenized_path": str(out / "rows"),
        "disable_shuffling": True,
        "cutoff_len": settings["max_length"],
        "output_dir": str(out / "run"),
        "per_device_train_batch_size": settings["batch"],
        "max_steps": settings["steps"],
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": settings["dtype"] == "bfloat16",
        "disable_gradient_checkpointing": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if settings["method"] == "lora":
        arguments |= {
            "lora_rank": settings["r"],
            "lora_alpha": settings["alpha"],
            "lora_dropout": settings["dropout"],
            "lora_target": "all",
            "adapter_name_or_path": settings["initial"],
        }
    watch = Watch()
    run_exp(arguments, [watch])
    return watch.outcome(version("llamafactory")) | step_counts(rows, settings["batch"])
