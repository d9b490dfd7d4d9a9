"""Bases whose weights are held in 4 or 8 bits while an adapter beside them is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights of a base's linear layers are held in memory."""

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """Of 4 bits."""
    double_quant: bool = True
    """The scales of blocks of 4-bit weights are quantised as well."""
