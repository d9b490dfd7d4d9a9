"""What each child process of training_speed.py does: encode the rows, measure the machine, train one side.

Heavy libraries are imported inside the functions, so that a child holds in memory only what its own side needs.
Every child takes the settings (a dictionary, see `training_speed.py`) and returns a dictionary that JSON can hold.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Outcome = dict[str, Any]


def prepare(settings: Settings) -> Outcome:
    """Render and encode the rows once, by the tokenizer's own chat template and nothing of either side.

    A row is one user and one assistant turn. Its trained tokens are those of the answer and of the end-of-turn token
    that closes it, and not the newline after that. Rows are taken in the file's order, as many as the steps need;
    those longer than ``max_length`` are passed over and counted.
    """
    import platform

    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = _model_place(settings["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = settings["steps"] * settings["batch"]
    rows: list[dict[str, Any]] = []
    passed_over = 0
    with Path(settings["data"]).open(encoding="utf-8") as stream:
        for line in stream:
            if len(rows) == wanted:
                break
            record = json.loads(line)
            row = _encode(tokenizer, record[settings["prompt_column"]], record[settings["response_column"]])
            if len(row["input_ids"]) > settings["max_length"]:
                passed_over += 1
            else:
                rows.append(row)
    if len(rows) < wanted:
        raise SystemExit(f"{settings['data']} has {len(rows)} fitting rows; the steps need {wanted}")
    Path(settings["rows"]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {
        "folder": folder,
        "passed_over": passed_over,
        "matmul_parameters": _matmul_parameters(skeleton, settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _model_place(name: str) -> str:
    """A folder as it is, an embedded model's folder, or a hub id."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    from luthier.models.catalogue import CATALOGUE, embedded_model_folder

    return str(embedded_model_folder(name)) if name in CATALOGUE else name


def _encode(tokenizer: Any, prompt: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    opening = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    end = text.rfind(tokenizer.eos_token)
    if not text.startswith(opening) or end < len(opening):
        raise SystemExit("this benchmark needs a template whose prompt is a prefix and whose turns end in EOS")
    end += len(tokenizer.eos_token)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if start < end and stop > len(opening) else -100
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"prompt": prompt, "answer": answer, "input_ids": encoded["input_ids"], "labels": labels}


def _matmul_parameters(model: Any, settings: Settings) -> dict[str, int]:
    """Parameters that take part in matrix products: of the body, of the output head, and of LoRA's matrices."""
    import torch

    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    lora = sum(settings["r"] * (m.in_features + m.out_features) for m in linear)
    return {
        "body": sum(m.weight.numel() for m in linear),
        "head": head.weight.numel(),
        "lora": lora if settings["method"] == "lora" else 0,
    }


def peak(settings: Settings) -> Outcome:
    """The machine's bfloat16 matmul peak in FLOP/s: the fastest of several large square products."""
    import torch

    best = 0.0
    for size in (1024, 2048, 4096):
        a, b = torch.randn(2, size, size).to(torch.bfloat16)
        a @ b
        for _ in range(5):
            began = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return {"flops": best}


def trl(settings: Settings, packing: bool = False) -> Outcome:
    """TRL's SFTTrainer on the encoded rows, in the file's order.

    Precision is what TRL's users get who load a model in bfloat16: bfloat16 weights, ``bf16=True`` (TRL's default),
    so the forward pass runs under autocast, and LoRA matrices in float32 (PEFT's default). With ``--dtype float32``,
    weights are float32 and there is no autocast. Gradient checkpointing, on by default in TRL, is off.
    """
    import torch
    import trl as library
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)
            peaks.append(_peak_memory())

        def on_log(self, *_: Any, **event: Any) -> None:
            if "loss" in event["logs"]:
                losses.append(float(event["logs"]["loss"]))

    seconds: list[float] = []
    losses: list[float] = []
    peaks: list[int] = []
    rows = _rows(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings["folder"])
    model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=getattr(torch, settings["dtype"]))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules="all-linear",
    )
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
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        packing=packing,
        max_length=bin_size if packing else None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer: Any = library.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]),
        processing_class=tokenizer,
        peft_config=lora if settings["method"] == "lora" else None,
        callbacks=[Watch()],
    )
    trainer.train()
    fed = [(len(r["labels"]), _trained(r["labels"])) for r in trainer.train_dataset]
    tokens, trained = _per_step(fed, 1 if packing else settings["batch"])
    return {
        "version": library.__version__,
        "losses": losses,
        "seconds": seconds,
        "tokens": [tokens[i % len(tokens)] for i in range(len(seconds))],
        "trained_tokens": [trained[i % len(trained)] for i in range(len(seconds))],
        "peak_memory_bytes": peaks[-1],
    }


def trl_packed(settings: Settings) -> Outcome:
    """TRL with ``packing=True``: its rows are packed best-fit, so the order and the losses are other ones."""
    return trl(settings, packing=True)


def luthier(settings: Settings) -> Outcome:
    """Luthier's public tuner on the same rows, and proof that it trained on the same token ids and labels."""
    import luthier as library
    from luthier import FullFineTuner, LoRATuner, TrainingExample

    rows = _rows(settings)
    tuner = (LoRATuner if settings["method"] == "lora" else FullFineTuner)(settings["folder"], dtype=settings["dtype"])
    options = {"lora_r": settings["r"], "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"]}
    result = tuner.train(
        train_examples=[TrainingExample(input=r["prompt"], output=r["answer"]) for r in rows],
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
        seed=0,
        **(options if settings["method"] == "lora" else {}),
    )
    lines = (result.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    manifest = json.loads((result.run_dir / "manifest.json").read_text(encoding="utf-8"))
    _require_same_rows(rows, tuner.tokenizer)
    tokens, trained = _per_step(((len(r["labels"]), _trained(r["labels"])) for r in rows), settings["batch"])
    if [(s["tokens"], s["trained_tokens"]) for s in steps] != list(zip(tokens, trained, strict=True)):
        raise SystemExit("Luthier's steps did not hold the tokens that its peer's steps held")
    return {
        "version": library.__version__,
        "losses": [s["loss"] for s in steps],
        "seconds": [s["seconds"] for s in steps],
        "tokens": tokens,
        "trained_tokens": trained,
        # Written right after the last step, before the adapter is saved and loaded again.
        "peak_memory_bytes": manifest["training"]["peak_memory_bytes"],
    }


def _require_same_rows(rows: list[dict[str, Any]], tokenizer: Any) -> None:
    """Luthier renders and encodes for itself; its ids and labels must be those that TRL was given."""
    from luthier import TrainingExample
    from luthier.data.encode import Encoder
    from luthier.data.render import Renderer

    encoder = Encoder(Renderer(tokenizer))
    encoded = encoder.encode([TrainingExample(input=r["prompt"], output=r["answer"]) for r in rows]).examples
    for number, (ours, row) in enumerate(zip(encoded, rows, strict=True), 1):
        labels = [int(i) if t else -100 for i, t in zip(ours.input_ids, ours.trained, strict=True)]
        if ours.input_ids.tolist() != row["input_ids"] or labels != row["labels"]:
            raise SystemExit(f"row {number}: Luthier's token ids or labels differ from the ones TRL was given")


def _rows(settings: Settings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(settings["rows"]).read_text(encoding="utf-8").splitlines()]


def _trained(labels: list[int]) -> int:
    return sum(label != -100 for label in labels)


def _per_step(counts: Iterable[tuple[int, int]], batch: int) -> tuple[list[int], list[int]]:
    """Tokens and trained tokens of each step, from those of each row in order."""
    listed = list(counts)
    steps = [listed[i : i + batch] for i in range(0, len(listed), batch)]
    return [sum(t for t, _ in step) for step in steps], [sum(k for _, k in step) for step in steps]


def _peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes (VmHWM; on other systems than Linux, ru_maxrss)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


CHILDREN: dict[str, Callable[[Settings], Outcome]] = {
    "prepare": prepare,
    "peak": peak,
    "trl": trl,
    "trl-packed": trl_packed,
    "luthier": luthier,
}
