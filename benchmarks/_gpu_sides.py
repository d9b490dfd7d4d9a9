"""What each child process of gpu_speed.py does: measure the device, or train one side on random rows of one length.

Every function takes the settings (a dictionary, see `gpu_speed.py`) and returns a dictionary that JSON can hold. Both
sides' models have the same random weights: they are drawn on the same device from the same seed, or read from the same
folder where they are quantised.
"""

from __future__ import annotations

import importlib.util
import time
import traceback
from pathlib import Path
from typing import Any

from _child import Outcome, Settings, forget_peak_memory, peak_memory
from _prepare import SEED, matmul_parameters

# Hidden size, layers, heads, key-value heads, width of the MLP, vocabulary, and whether the head is the embedding.
SHAPES = {
    "8B": (4096, 32, 32, 8, 14336, 128_256, False),  # Llama 3.1 8B
    "1B": (2048, 16, 32, 8, 8192, 128_256, True),  # Llama 3.2 1B
    "tiny": (64, 2, 2, 1, 128, 512, True),
}
LORA_ALPHA = 32


def describe(settings: Settings) -> Outcome:
    """The device, the libraries, and the sizes of this workload's model."""
    import platform

    import torch
    import transformers

    with torch.device("meta"):
        model = _from_config(settings)
    hidden, layers, *_ = SHAPES[settings["shape"]]
    return {
        "device": torch.cuda.get_device_name() if settings["gpu"] else f"CPU ({platform.machine()})",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(p.numel() for p in model.parameters()),
        "matmul_parameters": matmul_parameters(model, settings | {"method": _method(settings)}),
        "attention_width": layers * hidden,
    }


def save(settings: Settings) -> Outcome:
    """Write the model with random weights to the settings' folder, from where it is read in four bits."""
    _drawn(settings, "sdpa").save_pretrained(settings["folder"])
    return {}


def peak(settings: Settings) -> Outcome:
    """The device's bfloat16 matmul peak in FLOP/s: the fastest of several large square products."""
    import torch

    best = 0.0
    for size in (4096, 8192, 16384) if settings["gpu"] else (128,):
        a, b = torch.randn(2, size, size, device=_device(settings), dtype=torch.bfloat16)
        for _ in range(3):
            a @ b
        for _ in range(5):
            # Several at a time: one alone would count its launch as well.
            _wait(settings)
            began = time.perf_counter()
            for _ in range(4):
                a @ b
            _wait(settings)
            best = max(best, 4 * 2 * size**3 / (time.perf_counter() - began))
    return {"flops": best}


def side(settings: Settings) -> Outcome:
    """Train the side that the settings name. What fails is returned as ``skipped``: the other side is still timed."""
    try:
        return {"trl": _trl, "luthier": _luthier}[settings["side"]](settings)
    except Exception as error:  # memory, a missing library, a peer's own fault
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return {"skipped": f"{type(error).__name__}: {lines[0]}"}


class Course:
    """The end of each step in seconds, when the device has done all of it; and the memory of its peak."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.memory = 0
        self.last = 0.0

    def begin(self) -> None:
        """Training begins; loading is left out of its peak memory, but not what was loaded."""
        if self.settings["gpu"]:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak_memory()
        self.last = time.perf_counter()

    def step(self) -> None:
        """A step ends: a step's time is all that passes between two ends, fetching rows and logging included."""
        _wait(self.settings)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if self.settings["gpu"]:
            import torch

            self.memory = torch.cuda.max_memory_allocated()
        else:
            self.memory = peak_memory()

    def outcome(self, version: str, notes: list[str]) -> Outcome:
        return {
            "version": version,
            "losses": self.losses,
            "seconds": self.seconds,
            "peak_memory_bytes": self.memory,
            "notes": notes,
        }


def _trl(settings: Settings) -> Outcome:
    """TRL's SFTTrainer with Liger's kernels, in bfloat16.

    Rows are of one length, so none is padded and packing them would change nothing. Where flash-attn is installed they
    are padding-free over it, as TRL advises; else PyTorch's own flash attention computes them, by transformers' "sdpa".
    """
    import trl as library
    from datasets import Dataset
    from transformers import TrainerCallback

    course, notes = Course(settings), []
    liger = settings["gpu"] and importlib.util.find_spec("liger_kernel") is not None
    if not liger:
        notes.append("WITHOUT Liger, " + ("which isn't installed" if settings["gpu"] else "which needs a GPU"))
    flash = settings["gpu"] and importlib.util.find_spec("flash_attn") is not None
    notes.append(f"attention: {'flash-attn, padding-free' if flash else 'sdpa'}")

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            course.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            course.step()

        def on_log(self, *_: Any, **event: Any) -> None:
            if "loss" in event["logs"]:
                course.losses.append(float(event["logs"]["loss"]))

    arguments = library.SFTConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=settings["rows"],
        max_steps=settings["steps"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=True,
        use_liger_kernel=liger,
        gradient_checkpointing=settings["recompute"] != "none",
        padding_free=flash,
        max_length=None,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        use_cpu=not settings["gpu"],
        disable_tqdm=True,
    )
    peft_config = None
    if _method(settings) == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings["r"],
            lora_alpha=LORA_ALPHA,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
    rows = [[int(i) for i in row] for row in _rows(settings)]
    trainer = library.SFTTrainer(
        model=_model(settings, attention="flash_attention_2" if flash else "sdpa"),
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
        processing_class=_tokenizer(settings),
        peft_config=peft_config,
        callbacks=[Watch()],
    )
    trainer.train()
    return course.outcome(library.__version__, notes)


def _luthier(settings: Settings) -> Outcome:
    """Luthier's loss and loop on the same rows; the model is loaded here, for it has random weights or four bits."""
    import torch

    import luthier as library
    from luthier.data.encode import EncodedExample
    from luthier.methods import get_method
    from luthier.recipe import Recipe
    from luthier.training.fused import cuda
    from luthier.training.loop import Trainer
    from luthier.training.loss import LossFunction
    from luthier.training.processes import make_accelerator

    class Unsaved(Trainer):
        """Checkpoints and weights are no part of a step here."""

        def _save(self) -> None: ...

    method: dict[str, Any] = {"name": _method(settings)}
    if method["name"] == "lora":
        method |= {"r": settings["r"], "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0}
    recipe = Recipe.from_dict(
        {
            "data": {"shuffle": False},
            "method": method,
            "training": {
                "max_steps": settings["steps"],
                "per_device_train_batch_size": settings["rows"],
                "learning_rate": settings["lr"],
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
                "gradient_checkpointing": {"none": False, "layers": True, "mlp": "mlp"}[settings["recompute"]],
                "report_to": [],
            },
            "output_dir": settings["output"],
            "seed": SEED,
        }
    )
    run_dir = Path(settings["output"])
    run_dir.mkdir(parents=True)
    tuning = get_method(method["name"])
    base = _model(settings, attention="sdpa")
    torch.manual_seed(SEED)
    model = tuning.wrap(base, recipe.method, [])
    loss_function = LossFunction(model)
    notes = [f"layers not fused: {loss_function.fused_reason}"] if loss_function.fused is None else ["layers fused"]
    if not (loss_function.packed and loss_function.head):
        notes.append(f"NOT its lean way: {loss_function.reason}")
    if settings["gpu"]:
        notes += [f"{key}: {what}" for key, what in cuda.facts(torch.device("cuda", 0), torch.bfloat16).items()]
    course = Course(settings)
    trained = [i > 0 for i in range(settings["length"])]
    rows = [EncodedExample(row, torch.tensor(trained).numpy(), None, i) for i, row in enumerate(_rows(settings))]
    reporter = _Reporter(course)
    accelerator = make_accelerator([], run_dir)
    trainer = Unsaved(model, loss_function, tuning, recipe, rows, [], run_dir, accelerator, reporter)
    trainer.run()
    return course.outcome(library.__version__, notes + reporter.said)


class _Reporter:
    """Tells a course what the loop tells its reporter."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.said: list[str] = []

    def start(self, total: int, done: int) -> None:
        self.course.begin()

    def step(self, record: dict[str, Any]) -> None:
        self.course.step()
        self.course.losses.append(record["loss"])

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)

    def stop(self) -> None: ...


def _method(settings: Settings) -> str:
    return "full" if settings["workload"] == "full" else "lora"


def _device(settings: Settings) -> str:
    return "cuda" if settings["gpu"] else "cpu"


def _wait(settings: Settings) -> None:
    """Until the device has done everything."""
    if settings["gpu"]:
        import torch

        torch.cuda.synchronize()


def _from_config(settings: Settings, attention: str = "sdpa") -> Any:
    """A Llama of the workload's shape with random bfloat16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers, heads, key_heads, width, vocabulary, tied = SHAPES[settings["shape"]]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=width,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=settings["length"],
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)


def _drawn(settings: Settings, attention: str) -> Any:
    """The same, drawn on the device: eight billion random numbers take a CPU minutes."""
    import torch

    with torch.device(_device(settings)):
        return _from_config(settings, attention)


def _model(settings: Settings, attention: str) -> Any:
    """The workload's model on the device."""
    import torch

    if settings["workload"] != "qlora":
        return _drawn(settings, attention)
    import bitsandbytes  # noqa: F401  (says what is missing before transformers says it longer)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        settings["folder"],
        dtype=torch.bfloat16,
        quantization_config=quantised,
        device_map={"": _device(settings) + (":0" if settings["gpu"] else "")},
        attn_implementation=attention,
    )


def _rows(settings: Settings) -> Any:
    """``[steps · rows, length] int32`` random tokens, the special ones left out."""
    import numpy as np

    count = settings["steps"] * settings["rows"]
    vocabulary = SHAPES[settings["shape"]][5]
    return np.random.default_rng(SEED).integers(3, vocabulary, (count, settings["length"])).astype(np.int32)


def _tokenizer(settings: Settings) -> Any:
    """A tokenizer that TRL can hold: the rows are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
