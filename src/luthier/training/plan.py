"""What the training settings come to for a number of rows: steps, warm-up, intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from luthier.methods.base import TuningMethod
from luthier.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Plan:
    """What the settings come to for this many rows."""

    steps: int
    steps_per_epoch: int
    warmup: int
    eval_steps: int
    save_steps: int
    learning_rate: float
    weight_decay: float

    @classmethod
    def of(cls, recipe: Recipe, method: TuningMethod, rows: int, processes: int = 1) -> Plan:
        """Steps, warm-up and intervals for ``rows`` training rows on ``processes`` processes."""
        settings = recipe.training
        per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes
        per_epoch = -(-rows // per_step)
        steps = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * per_epoch)
        eval_steps = settings.eval_steps or max(1, math.ceil(steps / 10))
        return cls(
            steps=steps,
            steps_per_epoch=per_epoch,
            warmup=settings.warmup_steps or math.ceil(settings.warmup_ratio * steps),
            eval_steps=eval_steps,
            save_steps=settings.save_steps or eval_steps,
            learning_rate=method.learning_rate if settings.learning_rate is None else settings.learning_rate,
            weight_decay=method.weight_decay if settings.weight_decay is None else settings.weight_decay,
        )
