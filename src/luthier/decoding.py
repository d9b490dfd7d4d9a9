"""How answers are made: of the likeliest tokens, of tokens drawn by chance, or as the best of several beams."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from luthier.errors import UserError

BATCH_SIZE = 64
"""Prompts answered at once, where nothing else is said and memory suffices."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are made; the names are those of transformers' ``GenerationConfig``, the default is greedy.

    Raises:
        UserError: a value is out of its range, or two ask for what excludes each other.
    """

    do_sample: bool = False
    """Draw tokens by chance; False: the likeliest one."""
    temperature: float = 1.0
    """Logits are divided by it before a token is drawn; below 1 likely tokens become likelier."""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose probabilities sum to this (Holtzman et al., 2020); 1: among all."""
    seed: int = 42
    """Of what is drawn; another seed gives other answers."""
    num_beams: int = 1
    """Beginnings of an answer that are followed at once; 1: no beam search."""
    length_penalty: float = 1.0
    """A beam's score is its log-probability divided by its length to this power: above 0 favours long answers."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice in a prompt with its answer; 0: no limit."""

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise UserError(f"do_sample={self.do_sample!r} is neither True nor False")
        for name, least in (("top_k", 0), ("seed", 0), ("num_beams", 1), ("no_repeat_ngram_size", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} is not a whole number of at least {least}")
        for name in ("temperature", "top_p", "length_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{name}={value!r} is not a number")
        if self.temperature <= 0:
            raise UserError(
                f"temperature={self.temperature!r} is not above 0", remedy="for the likeliest token: do_sample=False"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p!r} is not above 0 and at most 1")
        if self.do_sample and self.num_beams > 1:
            raise UserError(
                f"do_sample=True and num_beams={self.num_beams} exclude each other",
                remedy="set num_beams=1, or do_sample=False",
            )
        unused = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if not self.do_sample else {}
        if self.num_beams == 1:
            unused["length_penalty"] = 1.0
        for name, default in unused.items():
            if getattr(self, name) != default:
                wanted = "num_beams=2 or more" if name == "length_penalty" else "do_sample=True"
                raise UserError(
                    f"{name}={getattr(self, name)!r} changes nothing here", remedy=f"set {wanted}, or leave {name} out"
                )

    def describe(self) -> dict[str, Any]:
        """What bears on the answers, by name; greedy: ``{"do_sample": False, "num_beams": 1}``."""
        found: dict[str, Any] = {"do_sample": self.do_sample, "num_beams": self.num_beams}
        if self.do_sample:
            found |= {n: getattr(self, n) for n in ("temperature", "top_k", "top_p", "seed")}
        if self.num_beams > 1:
            found["length_penalty"] = self.length_penalty
        if self.no_repeat_ngram_size:
            found["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        return found
