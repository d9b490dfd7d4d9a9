"""The next token of each row by :class:`~luthier.decoding.Decoding`: in our own loop, and in transformers'."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

import torch

from luthier.decoding import Decoding


class Choice:
    """Chooses each row's next token from its logits.

    The chance of a row comes from its own generator, seeded by the seed and the row's prompt: one number between 0 and
    1 a token, whose place in the cumulated probabilities, in the order of the vocabulary, is the token. So an answer
    depends neither on the batch nor on the place in it, and rounding of the logits matters only where a number falls
    within it of a border between two tokens.

    Args:
        decoding: without beams.
        prompts: each row's token ids.
    """

    def __init__(self, decoding: Decoding, prompts: Sequence[Sequence[int]]) -> None:
        from transformers import (
            LogitsProcessorList,
            NoRepeatNGramLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._greedy = not decoding.do_sample
        self._prompts = prompts
        self._chances = [random.Random(_seed(decoding.seed, ids)) for ids in prompts if decoding.do_sample]
        size = decoding.no_repeat_ngram_size
        self._ngrams = NoRepeatNGramLogitsProcessor(size) if size else None
        self._warpers = LogitsProcessorList()
        if decoding.do_sample:
            if decoding.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(float(decoding.temperature)))
            if decoding.top_k:
                self._warpers.append(TopKLogitsWarper(decoding.top_k))
            if decoding.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(decoding.top_p)))

    def __call__(self, logits: torch.Tensor, rows: Sequence[int], new: Sequence[Sequence[int]]) -> torch.Tensor:
        """``[B]`` tokens.

        Args:
            logits: ``[B, V]`` of the rows that are still answered.
            rows: their numbers, by which the prompts were given.
            new: every prompt's new tokens so far.
        """
        if self._ngrams is not None:
            device = logits.device
            seen = ([*self._prompts[row], *new[row]] for row in rows)
            logits = torch.cat(
                [self._ngrams(torch.tensor([ids], device=device), logits[i : i + 1]) for i, ids in enumerate(seen)]
            )
        return logits.argmax(-1) if self._greedy else self.drawn(logits, rows)

    def drawn(self, logits: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """``[B]`` tokens by chance, from ``[B, V]`` logits."""
        scores = self._warpers(torch.empty(0, dtype=torch.long), logits.float())  # type: ignore[arg-type]
        summed = scores.softmax(-1).double().cumsum(-1)  # [B, V]
        chances = torch.tensor([[self._chances[row].random()] for row in rows], dtype=torch.double)
        places = chances.to(summed.device) * summed[:, -1:]
        # The first token whose sum is above: one of probability 0 adds nothing and is never taken.
        return torch.searchsorted(summed, places, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _seed(seed: int, ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps([seed, list(ids)]).encode()).digest(), "big")


def processors(decoding: Decoding, prompts: Sequence[Sequence[int]]) -> Any:
    """What makes transformers' own ``generate``, set to greedy, draw as :class:`Choice` does; None where it need not.

    Its rows must stay those of ``prompts``, in their order.
    """
    from transformers import LogitsProcessorList

    if not decoding.do_sample:
        return None
    choice, rows = Choice(decoding, prompts), range(len(prompts))

    def drawn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = choice.drawn(scores, rows)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)

    return LogitsProcessorList([drawn])


def generation_config(decoding: Decoding, **more: Any) -> Any:
    """A ``GenerationConfig`` of a decoding and ``more``; what is drawn by chance is left to :func:`processors`."""
    from transformers import GenerationConfig

    own: dict[str, Any] = {}
    if decoding.num_beams > 1:
        own |= {"num_beams": decoding.num_beams, "length_penalty": decoding.length_penalty}
    if decoding.no_repeat_ngram_size:
        own["no_repeat_ngram_size"] = decoding.no_repeat_ngram_size
    return GenerationConfig(do_sample=False, **own, **more)
