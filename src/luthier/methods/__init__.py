"""Tuning methods, one file each. Importing this package registers them."""

from luthier.methods import full, lora, p_tuning, prefix, prompt
from luthier.methods.base import METHODS, TuningMethod, get_method

__all__ = ["METHODS", "TuningMethod", "full", "get_method", "lora", "p_tuning", "prefix", "prompt"]
