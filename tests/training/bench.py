"""A small trainer that the training tests share: the terse model, encoded rows, one run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.data.dataset import Dataset, prepare
from luthier.data.examples import TrainingExample
from luthier.methods import get_method
from luthier.models.loading import load_model, load_tokenizer
from luthier.recipe import Recipe
from luthier.training.division import Replicas, Shards
from luthier.training.loop import Trainer
from luthier.training.loss import LossFunction
from luthier.training.processes import Processes, make_accelerator

WORDS = (
    "amber",
    "birch",
    "cedar",
    "dune",
    "ember",
    "fern",
    "grove",
    "heath",
    "iris",
    "juniper",
    "kelp",
    "larch",
    "moss",
)


@dataclass
class Bench:
    """Builds trainers that differ only in what a test names."""

    model_dir: Path

    def recipe(self, method: str | dict[str, Any] = "lora", **training: Any) -> Recipe:
        seed = training.pop("seed", 7)
        settings = {"learning_rate": 1e-3, "report_to": [], "max_steps": 6, "per_device_train_batch_size": 4}
        return Recipe.from_dict({"method": method, "training": settings | training, "seed": seed})

    def dataset(self, recipe: Recipe, train: int = 20, validation: int = 6) -> Dataset:
        rows = [
            # Lengths differ, so that a mean of means would show.
            TrainingExample(f"Row {i}: {' '.join(WORDS[: i % 9])}", " ".join(WORDS[i % 7 : i % 7 + 1 + i % 11]))
            for i in range(train + validation)
        ]
        return prepare(
            recipe, load_tokenizer(self.model_dir), given={"train": rows[:train], "validation": rows[train:]}
        )

    def trainer(
        self,
        folder: Path,
        recipe: Recipe,
        *,
        dtype: torch.dtype = torch.float32,
        rows: int = 20,
        batching: str = "auto",
        reporter: Any = None,
    ) -> Trainer:
        dataset = self.dataset(recipe, rows)
        model = load_model(self.model_dir, dtype=dtype)
        torch.manual_seed(recipe.seed)
        wrapped = get_method(recipe.method.name).wrap(model, recipe.method, [])
        accelerator, processes = make_accelerator([], folder), Processes.join()
        sharded = recipe.training.sharding == "full" and processes.count > 1
        shards = Shards(wrapped, processes, accelerator.device) if sharded else None
        division = shards or Replicas(wrapped, processes)
        return Trainer(
            wrapped,
            division.call(LossFunction, wrapped, batching=batching),
            get_method(recipe.method.name),
            recipe,
            dataset.train.encoded,
            dataset.validation.encoded,
            folder,
            accelerator,
            reporter,
            shards,
        )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.optimiser.weights().items()}
