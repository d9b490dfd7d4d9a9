"""What each child process of data_speed.py does: make rows, prepare them by Luthier's own path, or by TRL's."""

from __future__ import annotations

import json
import random
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _child import Outcome, Settings, forget_peak_memory, peak_memory


def make(settings: Settings) -> Outcome:
    """Write GSM8K's rows, again and again with other numbers, as one JSONL file."""
    rng = random.Random(0)
    rows = [json.loads(line) for line in Path(settings["gsm8k"]).read_text(encoding="utf-8").splitlines()]
    number = re.compile(r"\d+")
    with Path(settings["file"]).open("w", encoding="utf-8") as file:
        for index in range(settings["rows"]):
            other: dict[str, str] = {}

            def changed(found: re.Match[str], other: dict[str, str] = other) -> str:
                return other.setdefault(found.group(), str(rng.randrange(2, 10 ** len(found.group()) + 2)))

            row = rows[index % len(rows)]
            file.write(json.dumps({key: number.sub(changed, row[key]) for key in ("question", "answer")}) + "\n")
    return {"bytes": Path(settings["file"]).stat().st_size}


def luthier(settings: Settings) -> Outcome:
    """Read, judge (with a search for near copies) and encode a file, each in turn.

    Returns:
        ``stages``: seconds and peak memory of each, in bytes: this process's, and that of its largest child.
    """
    from luthier.data.chats import ChatEncoder
    from luthier.data.duplicates import find_copies
    from luthier.data.encoded import encode_rows
    from luthier.data.examples import TrainingExample
    from luthier.data.lint import lint
    from luthier.data.render import Renderer
    from luthier.data.sources import read_examples
    from luthier.data.store import ExampleStore
    from luthier.models.loading import load_tokenizer

    stages: dict[str, dict[str, float]] = {}

    def measured(name: str, work: Callable[[], Any]) -> Any:
        forget_peak_memory()
        began = time.perf_counter()
        result = work()
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        stages[name] = {
            "seconds": time.perf_counter() - began,
            "peak_memory_bytes": peak_memory(),
            "child_peak_memory_bytes": children,
        }
        return result

    tokenizer = measured("tokenizer", lambda: load_tokenizer(settings["model"]))
    rows = (row for row in read_examples(settings["file"]) if isinstance(row, TrainingExample))
    examples = measured("read", lambda: ExampleStore(rows))
    copies = measured("near copies", lambda: find_copies(examples, near=0.8))
    if settings["lint"]:
        unlimited = ChatEncoder(Renderer(tokenizer))
        measured("lint", lambda: lint(examples, encoder=unlimited, max_length=settings["max_length"], near=None))
    encoder = ChatEncoder(Renderer(tokenizer), max_length=settings["max_length"])
    encoded = measured("encode", lambda: encode_rows(encoder, examples))
    again = measured("find again", lambda: encode_rows(encoder, examples))
    return {
        "stages": stages,
        "rows": len(encoded),
        "tokens": int(again.lengths.sum()),
        "trained_tokens": int(again.trained.sum()),
        "near_copies": int((copies.near_first != range(len(examples))).sum()),
    }


def trl(settings: Settings) -> Outcome:
    """Read a file with `datasets` and prepare it as SFTTrainer does when it is made.

    Returns:
        ``seconds`` from the file to the trainer, the tiny model's share left out; ``tokens``, ``trained_tokens``.
    """
    import torch
    from datasets import disable_caching, load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    torch.manual_seed(0)
    tiny = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(tiny)

    def prepared(rows: int | None) -> tuple[float, Any]:
        began = time.perf_counter()
        found = load_dataset("json", data_files=settings["file"], split="train", cache_dir=settings["cache"])
        found = found.select(range(min(rows or len(found), len(found))))
        columns = found.column_names
        found = found.map(
            lambda row: {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            },
            remove_columns=columns,
            num_proc=settings["num_proc"],
        )
        config = SFTConfig(
            output_dir=settings["cache"],
            max_length=settings["max_length"],
            dataset_num_proc=settings["num_proc"],
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        trainer = SFTTrainer(model, config, train_dataset=found, processing_class=tokenizer)
        return time.perf_counter() - began, trainer.train_dataset

    startup, _ = prepared(1)
    seconds, made = prepared(settings["rows"])
    first = made[: settings["compared"]]
    return {
        "seconds": seconds - startup,
        "rows": len(made),
        "columns": made.column_names,
        "first": {name: first[name] for name in made.column_names},
        "peak_memory_bytes": peak_memory(),
    }


def first_rows(settings: Settings) -> Outcome:
    """The first rows of a file by Luthier: ids and which of them are trained."""
    from itertools import islice

    from luthier.data.chats import ChatEncoder
    from luthier.data.examples import TrainingExample
    from luthier.data.render import Renderer
    from luthier.data.sources import read_examples
    from luthier.models.loading import load_tokenizer

    rows = [r for r in islice(read_examples(settings["file"]), settings["compared"]) if isinstance(r, TrainingExample)]
    encoded = ChatEncoder(Renderer(load_tokenizer(settings["model"])), max_length=settings["max_length"]).encode(rows)
    return {
        "input_ids": [row.input_ids.tolist() for row in encoded.examples],
        "trained": [row.trained.tolist() for row in encoded.examples],
    }
