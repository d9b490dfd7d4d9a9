"""What is done once before the sides of training_speed.py train: encode the rows, draw the initial LoRA matrices,
count the parameters, measure the machine.

Every function takes the settings (a dictionary, see `training_speed.py`) and returns a dictionary that JSON can hold.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from _child import Outcome, Row, Settings

# The seed of every side.
SEED = 0
# Seconds of one product, of which larger ones are not tried.
LONGEST_PRODUCT = 2.0


def prepare(settings: Settings) -> Outcome:
    """Render and encode the rows once, by the tokenizer's own chat template and nothing of either side.

    A row is one user and one assistant turn. Its trained tokens are those of the answer and of the end-of-turn token
    that closes it, and not the newline after that. Rows are taken in the file's order, as many as the steps need;
    those longer than ``max_length`` are passed over and counted. For LoRA, the initial matrices are drawn once and
    saved as a PEFT adapter, for every side that can start from one.
    """
    import platform

    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = model_place(settings["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = settings["steps"] * settings["batch"]
    rows: list[Row] = []
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
        "initial": _initial_adapter(settings, folder) if settings["method"] == "lora" else None,
        "passed_over": passed_over,
        "matmul_parameters": matmul_parameters(skeleton, settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def model_place(name: str) -> str:
    """A folder as it is, an embedded model's folder, or a hub id."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    from luthier.models.catalogue import CATALOGUE, embedded_model_folder

    return str(embedded_model_folder(name)) if name in CATALOGUE else name


def _encode(tokenizer: Any, prompt: str, answer: str) -> Row:
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


def _initial_adapter(settings: Settings, folder: str) -> str:
    """The folder of a PEFT adapter with the initial LoRA matrices (A drawn, B zero), in float32."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(SEED)
    target = Path(settings["rows"]).with_name("initial-adapter")
    get_peft_model(model, _lora_config(settings)).save_pretrained(target)
    return str(target)


def _lora_config(settings: Settings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules="all-linear",
    )


def matmul_parameters(model: Any, settings: Settings) -> dict[str, int]:
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
    """The machine's matmul peak in the run's precision, in FLOP/s: the fastest of several large square products."""
    import torch

    best = 0.0
    for size in (1024, 2048, 4096):
        if best and 2 * size**3 / best > LONGEST_PRODUCT:
            break  # no instructions for this precision: larger products are no faster, and take minutes
        a, b = torch.randn(2, size, size).to(getattr(torch, settings["dtype"]))
        a @ b
        for _ in range(5):
            began = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return {"flops": best}
