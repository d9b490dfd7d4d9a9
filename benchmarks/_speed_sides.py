"""What a child process of training_speed.py does: train one side on the prepared rows.

Heavy libraries are imported inside the functions, so that a child holds in memory only what its own side needs.
Every function takes the settings (a dictionary, see `training_speed.py`) and returns a dictionary that JSON can hold.
The peers that live in environments of their own are in the files `_peer_*.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _child import Outcome, Row, Settings, per_step, read_rows, step_counts, trained
from _prepare import SEED


def _loaded(settings: Settings, dtype: str) -> Any:
    """The model in plain transformers, and, for LoRA, plain PEFT with the initial adapter (matrices in float32)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=getattr(torch, dtype))
    if settings["method"] == "full":
        return model
    return PeftModel.from_pretrained(model, settings["initial"], is_trainable=True)


def trl(settings: Settings, packing: bool = False, checkpointing: bool = False) -> Outcome:
    """TRL's SFTTrainer on the encoded rows, in the file's order.

    Precision is what TRL's users get who load a model in bfloat16: bfloat16 weights, ``bf16=True`` (TRL's default),
    so the forward pass runs under autocast, and LoRA matrices in float32 (PEFT's default). With ``--dtype float32``,
    weights are float32 and there is no autocast. Gradient checkpointing is off unless asked for; TRL turns it on by
    default.
    """
    import trl as library
    from _watch import Watch
    from datasets import Dataset
    from transformers import AutoTokenizer

    watch = Watch()
    rows = read_rows(settings)
    # A packed row holds as many tokens as a step has on the average without packing, so steps are of one size.
    bin_size = max(settings["longest"], -(-settings["tokens"] // settings["steps"]))
    arguments = library.SFTConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=1 if packing else settings["batch"],
        max_steps=settings["steps"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=settings["dtype"] == "bfloat16",
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
        packing=packing,
        max_length=bin_size if packing else None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer: Any = library.SFTTrainer(
        model=_loaded(settings, settings["dtype"]),
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]),
        processing_class=AutoTokenizer.from_pretrained(settings["folder"]),
        callbacks=[watch],
    )
    trainer.train()
    fed = [(len(r["labels"]), trained(r["labels"])) for r in trainer.train_dataset]
    tokens, kept = per_step(fed, 1 if packing else settings["batch"])
    return watch.outcome(library.__version__) | {
        "tokens": [tokens[i % len(tokens)] for i in range(len(watch.seconds))],
        "trained_tokens": [kept[i % len(kept)] for i in range(len(watch.seconds))],
    }


def trl_packed(settings: Settings) -> Outcome:
    """TRL with ``packing=True``: its rows are packed best-fit, so the order and the losses are other ones."""
    return trl(settings, packing=True)


def trl_checkpointed(settings: Settings) -> Outcome:
    """TRL with gradient checkpointing, as it comes."""
    return trl(settings, checkpointing=True)


def luthier(settings: Settings) -> Outcome:
    """Luthier's public tuner on the same rows, and proof that it trained on the same token ids and labels."""
    from luthier import TrainingExample

    rows = read_rows(settings)
    outcome, tuner = train_luthier(settings, [TrainingExample(input=r["prompt"], output=r["answer"]) for r in rows])
    _require_same_rows(rows, tuner.tokenizer)
    expected = step_counts(rows, settings["batch"])
    if any(outcome[key] != counts for key, counts in expected.items()):
        raise SystemExit("Luthier's steps did not hold the tokens that its peer's steps held")
    if settings["method"] == "lora" and not _draws_the_initial_adapter(settings):
        outcome["notes"] = ["LoRA matrices drawn by itself"]
    return outcome


def train_luthier(settings: Settings, examples: list[Any], **more: Any) -> tuple[Outcome, Any]:
    """Train by Luthier's public tuner, rows in their order, at a constant rate.

    Returns:
        what each step took and gave, and the tuner.
    """
    import luthier as library
    from luthier import FullFineTuner, LoRATuner

    tuner = (LoRATuner if settings["method"] == "lora" else FullFineTuner)(settings["folder"], dtype=settings["dtype"])
    options = {"lora_r": settings["r"], "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"]}
    result = tuner.train(
        train_examples=examples,
        output_dir=settings["output"],
        quiet=True,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=settings["max_length"],
        shuffle=False,
        logging_steps=1,
        save_steps=settings["steps"],
        report_to=[],
        seed=SEED,
        **(options if settings["method"] == "lora" else {}),
        **more,
    )
    lines = (result.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    manifest = json.loads((result.run_dir / "manifest.json").read_text(encoding="utf-8"))
    outcome: Outcome = {
        "version": library.__version__,
        "losses": [s["loss"] for s in steps],
        "seconds": [s["seconds"] for s in steps],
        "tokens": [s["tokens"] for s in steps],
        "trained_tokens": [s["trained_tokens"] for s in steps],
        # Written right after the last step, before the adapter is saved and loaded again.
        "peak_memory_bytes": manifest["training"]["peak_memory_bytes"],
    }
    return outcome, tuner


def _require_same_rows(rows: list[Row], tokenizer: Any) -> None:
    """Luthier renders and encodes for itself; its ids and labels must be those that TRL was given."""
    from luthier import TrainingExample
    from luthier.data.chats import ChatEncoder
    from luthier.data.render import Renderer

    encoder = ChatEncoder(Renderer(tokenizer))
    encoded = encoder.encode([TrainingExample(input=r["prompt"], output=r["answer"]) for r in rows]).examples
    for number, (ours, row) in enumerate(zip(encoded, rows, strict=True), 1):
        labels = [int(i) if t else -100 for i, t in zip(ours.input_ids, ours.trained, strict=True)]
        if ours.input_ids.tolist() != row["input_ids"] or labels != row["labels"]:
            raise SystemExit(f"row {number}: Luthier's token ids or labels differ from the ones TRL was given")


def _draws_the_initial_adapter(settings: Settings) -> bool:
    """Whether Luthier's way of starting a run, by the same seed, draws the LoRA matrices that were saved.

    Luthier starts from no saved adapter; it draws the matrices from the recipe's seed as PEFT does, rounded to the
    precision of the weights.
    """
    import torch
    from safetensors.torch import load_file

    from luthier.method_options import LoraMethod
    from luthier.methods import get_method
    from luthier.models.loading import load_model

    model = load_model(settings["folder"], dtype=getattr(torch, settings["dtype"]))
    options = LoraMethod(r=settings["r"], lora_alpha=settings["alpha"], lora_dropout=settings["dropout"])
    torch.manual_seed(SEED)
    drawn = dict(get_method("lora").wrap(model, options, []).named_parameters())
    saved = load_file(Path(settings["initial"]) / "adapter_model.safetensors")
    own = {name.replace(".default", ""): value for name, value in drawn.items() if value.requires_grad}
    return own.keys() == saved.keys() and all(torch.equal(own[name], saved[name].to(own[name].dtype)) for name in saved)


def reference(settings: Settings) -> Outcome:
    """The same steps in float32 throughout: plain transformers and torch, one row at a time, full logits.

    The loss of a step is the sum over its trained tokens divided by their count.
    """
    import torch
    import torch.nn.functional as F

    rows = read_rows(settings)
    model = _loaded(settings, "float32").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=0.0)
    losses = []
    for begin in range(0, len(rows), settings["batch"]):
        step = rows[begin : begin + settings["batch"]]
        count = sum(trained(row["labels"]) for row in step)
        total = 0.0
        for row in step:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]  # [L - 1, V] float32
            loss = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
    return {"losses": losses}
