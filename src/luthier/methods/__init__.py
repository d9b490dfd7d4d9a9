"""Tuning methods, one file each. Importing this package registers them."""

from luthier.methods import adapter, full, lora
from luthier.methods.base import METHODS, TuningMethod, get_method

__all__ = ["METHODS", "TuningMethod", "adapter", "full", "get_method", "lora"]
