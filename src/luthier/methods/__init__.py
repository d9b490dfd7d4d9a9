"""Tuning methods, one file each. Importing this package registers them."""

from luthier.methods import adapter, full, ia3, lora, mixed, p_tuning, prefix, prompt, qlora
from luthier.methods.base import METHODS, TuningMethod, get_method, method_of

__all__ = [
    "METHODS",
    "TuningMethod",
    "adapter",
    "full",
    "get_method",
    "ia3",
    "lora",
    "method_of",
    "mixed",
    "p_tuning",
    "prefix",
    "prompt",
    "qlora",
]
