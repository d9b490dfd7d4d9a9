"""A callback for peers that train by Hugging Face's Trainer: seconds, losses and peak memory of each step."""

from __future__ import annotations

import time
from typing import Any

from _child import Outcome, peak_memory
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """A step lasts from ``on_step_begin`` to ``on_step_end``; fetching its batch is outside."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peaks: list[int] = []
        self.trained_in: list[str] = []

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.trained_in = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.peaks.append(peak_memory())

    def on_log(self, *_: Any, **event: Any) -> None:
        if "loss" in event["logs"]:
            self.losses.append(float(event["logs"]["loss"]))

    def outcome(self, version: str) -> Outcome:
        return {
            "version": version,
            "losses": self.losses,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peaks[-1],
            "trained_in": self.trained_in,
        }
