"""ms-swift's side of training_speed.py, run by the Python of ms-swift's own environment.

Rows reach it as conversations, with a template made from the model's own chat template; the run stops where what it
encodes is not what the other sides were given.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from _child import Outcome, Row, Settings, read_rows, step_counts
from _watch import Watch
from swift import callbacks_map, get_processor, get_template, sft_main
from swift.template import TemplateMeta, register_template
from transformers import AutoTokenizer

TEMPLATE = "from-chat-template"


def msswift(settings: Settings) -> Outcome:
    """ms-swift's supervised fine-tuning on the same conversations, in the file's order."""
    rows = read_rows(settings)
    out = Path(settings["output"])
    out.mkdir(parents=True)
    conversations = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    (out / "rows.jsonl").write_text("".join(json.dumps(c) + "\n" for c in conversations), encoding="utf-8")
    _register(AutoTokenizer.from_pretrained(settings["folder"]))
    watch = Watch()
    # ms-swift makes a run's callbacks by name, from its arguments and its trainer.
    callbacks_map["watch"] = lambda *_: watch
    arguments: dict[str, Any] = {
        "model": settings["folder"],
        "model_type": "llama",
        "template": TEMPLATE,
        "dataset": str(out / "rows.jsonl"),
        "split_dataset_ratio": 0,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "max_length": settings["max_length"],
        "torch_dtype": settings["dtype"],
        "tuner_type": settings["method"],
        "output_dir": str(out / "run"),
        "add_version": False,
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": settings["steps"],
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta2": 0.999,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "use_cpu": True,
        "callbacks": "watch",
        "check_model": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    if settings["method"] == "lora":
        arguments |= {
            "lora_rank": settings["r"],
            "lora_alpha": settings["alpha"],
            "lora_dropout": settings["dropout"],
            "target_modules": "all-linear",
            "adapters": settings["initial"],
        }
    sft_main([part for name, value in arguments.items() for part in (f"--{name}", str(value))])
    _require_same_rows(settings, rows, conversations)
    return watch.outcome(version("ms-swift")) | step_counts(rows, settings["batch"])


def _register(tokenizer: Any) -> None:
    """The model's own chat template, for one question and one answer, in ms-swift's form."""
    mark = "{{QUERY}}"
    opening = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    register_template(TemplateMeta(TEMPLATE, prefix=[], prompt=[opening], chat_sep=None, suffix=[tokenizer.eos_token]))


def _require_same_rows(settings: Settings, rows: list[Row], conversations: list[dict[str, Any]]) -> None:
    """The ids and labels must be those of the other sides, but for untrained tokens after the answer's end."""
    template = get_template(get_processor(settings["folder"], model_type="llama"), template_type=TEMPLATE)
    template.set_mode("train")
    for number, (row, conversation) in enumerate(zip(rows, conversations, strict=True), 1):
        encoded = template.encode(conversation)
        length = len(encoded["input_ids"])
        same = encoded["input_ids"] == row["input_ids"][:length] and encoded["labels"] == row["labels"][:length]
        if not same or any(label != -100 for label in row["labels"][length:]):
            raise SystemExit(f"row {number}: ms-swift's token ids or labels differ from the other sides'")
