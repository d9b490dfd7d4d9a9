"""Tuning methods, one file each. Importing this package registers them."""

from luthier.methods import full, ia3, lora, qlora
from luthier.methods.base import METHODS, TuningMethod, get_method

__all__ = ["METHODS", "TuningMethod", "full", "get_method", "ia3", "lora", "qlora"]
