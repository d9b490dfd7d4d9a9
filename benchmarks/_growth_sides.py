"""What each child process of growth.py does: make a model with random weights, train it on rows of exact lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _child import Outcome, Settings, forget_peak_memory, peak_memory
from _prepare import SEED, matmul_parameters

# The shapes of SmolLM2: hidden size, layers, heads, key-value heads, width of the MLP.
SHAPES = {
    "135M": (576, 30, 9, 3, 1536),
    "360M": (960, 32, 15, 5, 2560),
    "1.7B": (2048, 24, 32, 32, 8192),
}


def build(settings: Settings) -> Outcome:
    """Save a model of a shape with random bfloat16 weights, and SmolLM2's tokenizer beside it.

    Returns:
        ``parameters``, ``matmul_parameters``, and ``attention_width``: layers × heads × head size.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from luthier.models.catalogue import embedded_model_folder

    smollm2 = embedded_model_folder("smollm2")
    hidden, layers, heads, key_heads, width = SHAPES[settings["shape"]]
    config = AutoConfig.from_pretrained(
        smollm2,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=width,
        head_dim=hidden // heads,
        vocab_size=settings["vocabulary"],
        # Rows may be as long as the table asks.
        max_position_embeddings=max(8192, settings["length"]),
    )
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(settings["folder"])
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(settings["folder"])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "matmul_parameters": matmul_parameters(model, settings),
        "attention_width": layers * hidden,
    }


class Watch:
    """A reporter that keeps what each step says, and the peak memory at its end."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.peaks: list[int] = []

    def start(self, total: int, done: int) -> None: ...
    def evaluation(self, record: dict[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.peaks.append(peak_memory())


def train(settings: Settings) -> Outcome:
    """Train by Luthier's own preparation and loop on random rows of one length; the later half of each is trained.

    Peak memory counts from the first step on, so that of loading the model is left out.
    """
    import numpy as np

    from luthier.data.encode import EncodedExample
    from luthier.data.examples import TrainingExample
    from luthier.pipeline import prepare_run
    from luthier.recipe import Recipe
    from luthier.training.loop import Trainer

    method: dict[str, Any] = {"name": settings["method"]}
    if settings["method"] == "lora":
        method |= {"r": settings["r"], "lora_alpha": 32, "lora_dropout": 0.0}
    recipe = Recipe.from_dict(
        {
            "model": {"name": settings["folder"], "dtype": settings["dtype"]},
            "data": {"shuffle": False, "max_length": None},
            "method": method,
            "training": {
                "max_steps": settings["steps"],
                "per_device_train_batch_size": settings["rows"],
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "save_steps": settings["steps"],
                "report_to": [],
            },
            "output_dir": settings["output"],
            "seed": SEED,
        }
    )
    # The rows proper are token ids of exact lengths, and no text; these stand in for the preparation.
    ready = prepare_run(recipe, given={"train": [TrainingExample(input=f"{i}", output="one") for i in range(2)]})
    if not (ready.loss_function.packed and ready.loss_function.head):
        raise SystemExit(f"Luthier doesn't train this model its lean way: {ready.loss_function.reason}")
    numbers = np.random.default_rng(SEED)
    trained = np.arange(settings["length"]) >= max(1, settings["length"] // 2)
    rows = [
        EncodedExample(
            numbers.integers(0, settings["vocabulary"], settings["length"]).astype(np.int32), trained, None, index
        )
        for index in range(settings["steps"] * settings["rows"])
    ]
    watch = Watch()
    run_dir = Path(settings["output"])
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        ready.model, ready.loss_function, ready.method, recipe, rows, [], run_dir, ready.accelerator, watch
    )
    forget_peak_memory()
    trainer.run()
    return {
        "losses": [r["loss"] for r in watch.records],
        "seconds": [r["seconds"] for r in watch.records],
        "tokens": [r["tokens"] for r in watch.records],
        "trained_tokens": [r["trained_tokens"] for r in watch.records],
        "peak_memory_bytes": watch.peaks[-1],
    }
