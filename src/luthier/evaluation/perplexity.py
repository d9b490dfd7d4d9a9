"""Perplexity: how surprised a model is by a text, or by the answers of examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.data.encode import EncodedExample
from luthier.errors import UserError
from luthier.evaluation.state import measuring
from luthier.models.heads import Head
from luthier.models.virtual import VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of one forward pass, padding counted.
_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood of the predicted tokens."""

    perplexity: float
    nll_per_token: float
    """Nats; the mean over tokens, not over examples."""
    tokens: int
    """How many tokens were predicted."""


def calculate_perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    stride: int | None = None,
    max_length: int | None = None,
) -> float:
    """Perplexity of a plain text, each token but the first predicted exactly once.

    A text longer than ``max_length`` is read through a window that moves on by ``stride`` tokens, so that every
    token is predicted from at least ``max_length - stride`` tokens before it.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; special tokens (BOS) are added where the tokenizer itself adds them.
        text: the text.
        stride: tokens by which the window moves; None: half of max_length.
        max_length: tokens that the model sees at once; None: its context, at most 4,096.

    Raises:
        UserError: the text is empty or a single token; a length is out of range; the model reads a source first.
    """
    if Head.of(model).pairs:
        raise UserError(
            "an encoder-decoder gives a text no perplexity without its source",
            where="calculate_perplexity(model=...)",
            remedy="judge it on pairs: FineTuneEvaluator.evaluate_generation, or `luthier evaluate`",
        )
    if not isinstance(text, str):
        raise UserError(f"text must be a string, not {type(text).__name__}", remedy="give the text itself")
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int32)
    if not text or len(ids) < 2:
        raise UserError(
            "the text is empty" if not text else "the text is a single token, and nothing precedes it to predict it",
            where="calculate_perplexity(text=...)",
            remedy="give a longer text",
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    if context is not None:
        context -= VirtualTokens(model).count
    if max_length is None:
        max_length = min(context or _TOKENS, _TOKENS)
    if max_length < 2 or (context is not None and max_length > context):
        raise UserError(f"max_length={max_length} is not between 2 and the model's context of {context}")
    if stride is None:
        stride = max(1, max_length // 2)
    if not 1 <= stride < max_length:
        raise UserError(
            f"stride={stride} is not between 1 and max_length - 1 = {max_length - 1}",
            remedy="a smaller stride gives each token more of what precedes it, and takes longer",
        )
    return perplexity_of_examples(model, list(_windows(ids, max_length, stride))).perplexity


def _windows(ids: np.ndarray, max_length: int, stride: int) -> Iterator[EncodedExample]:
    """Overlapping windows over ``ids [n]`` whose trained tokens cover every token but the first, once each."""
    predicted = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        yield EncodedExample(ids[begin:end], np.arange(begin, end) >= predicted, None, 0)
        predicted = end
        if end == len(ids):
            return


def perplexity_of_examples(model: torch.nn.Module, examples: Sequence[EncodedExample]) -> Perplexity:
    """Perplexity of the trained tokens of encoded examples: of the answers, given their prompts.

    The loss is the one of training: logits at those tokens alone, cross-entropy in float32.

    Raises:
        UserError: no example, or none with a trained token.
    """
    from luthier.training.loss import LossFunction
    from luthier.training.pair_loss import PairLoss

    examples = [e for e in examples if e.trained.any()]
    if not examples:
        raise UserError("no example has a token to predict", remedy="give encoded examples that have answers")
    total, tokens = 0.0, 0
    with measuring(model):
        device = next(model.parameters()).device
        loss = PairLoss(model) if Head.of(model).pairs else LossFunction(model)
        for rows in _by_budget(examples):
            batch = loss.batch(rows).to(device)
            total += float(loss(batch))
            tokens += batch.trained_tokens
    nll = total / tokens
    return Perplexity(_exp(nll), nll, tokens)


def _by_budget(examples: Sequence[EncodedExample]) -> Iterator[list[EncodedExample]]:
    """Examples of like length together, as many as fit ``_TOKENS`` with padding, one at least."""
    rows: list[Any] = []
    for example in sorted(examples, key=len):
        if rows and len(example) * (len(rows) + 1) > _TOKENS:
            yield rows
            rows = []
        rows.append(example)
    yield rows


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
