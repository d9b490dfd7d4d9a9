"""Luthier: fine-tune language models, with proof of what changed.

The public names load on first use, so that ``import luthier`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "UserError": "luthier.errors",
    "Recipe": "luthier.recipe",
    "TaskType": "luthier.data.examples",
    "TrainingExample": "luthier.data.examples",
    "DatasetLoader": "luthier.data.loader",
    "DataPreprocessor": "luthier.data.clean",
    "DataAugmentor": "luthier.data.augment",
    "AdapterSet": "luthier.deployment.adapters",
    "QuantizedModelInference": "luthier.deployment.inference",
    "quantize_model": "luthier.deployment.quantize",
    "AdapterTuner": "luthier.tuners",
    "FullFineTuner": "luthier.tuners",
    "InstructionTuner": "luthier.tuners",
    "LoRATuner": "luthier.tuners",
    "MixedTuner": "luthier.tuners",
    "QLoRATuner": "luthier.tuners",
    "PTuningTuner": "luthier.tuners",
    "PrefixTuner": "luthier.tuners",
    "PromptTuner": "luthier.tuners",
    "Classifier": "luthier.evaluation.classifier",
    "FineTuneEvaluator": "luthier.evaluation.evaluator",
    "calculate_perplexity": "luthier.evaluation.perplexity",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
