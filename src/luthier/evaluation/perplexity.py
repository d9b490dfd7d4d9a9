"""Perplexity: how surprised a model is by a text, or by the answers of examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from luthier.data.encode import EncodedExample
from luthier.errors import UserError
from luthier.evaluation.state import by_context, by_length, measuring
from luthier.models.heads import Head
from luthier.models.virtual import VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.data.batch import Batch
    from luthier.training.loss import LossFunction

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
    bytes: int | None = None
    """UTF-8 bytes of the text that they stand for; None where it is not known."""

    @property
    def bits_per_byte(self) -> float | None:
        """What compares models whose tokenizers cut texts differently (Gao et al., 2020, arXiv:2101.00027)."""
        return None if not self.bytes else self.nll_per_token * self.tokens / self.bytes / math.log(2)


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


def perplexity_of_examples(
    model: torch.nn.Module,
    examples: Sequence[EncodedExample],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    every_token: bool = False,
) -> Perplexity:
    """Perplexity of the trained tokens of encoded examples: of the answers, given their prompts.

    The loss is the one of training: logits at those tokens alone, cross-entropy in float32.

    Args:
        model: a causal language model, or an encoder-decoder.
        examples: encoded for it.
        tokenizer: the model's, to count the bytes of what is predicted; None: they are not counted.
        every_token: predict all tokens but the first of each example, prompts among them, and not the trained alone.

    Raises:
        UserError: no example, or none with a trained token.
    """
    if every_token:
        examples = [replace(e, trained=np.arange(len(e)) > 0) for e in examples]
    losses = losses_of_examples(model, examples)
    total, tokens = losses.sum(0)
    if not tokens:
        raise UserError("no example has a token to predict", remedy="give encoded examples that have answers")
    nll = float(total / tokens)
    count = None if tokenizer is None else int(predicted_bytes(tokenizer, examples).sum())
    return Perplexity(_exp(nll), nll, int(tokens), count)


def predicted_bytes(tokenizer: PreTrainedTokenizerBase, examples: Sequence[EncodedExample]) -> np.ndarray:
    """``[N] int64``: how many UTF-8 bytes the trained tokens of each example stand for; control tokens stand for none.

    Args:
        tokenizer: the one that encoded them.
        examples: any.
    """
    texts = tokenizer.batch_decode(
        [e.input_ids[e.trained] for e in examples], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return np.array([len(text.encode()) for text in texts], dtype=np.int64)


def losses_of_examples(model: torch.nn.Module, examples: Sequence[EncodedExample]) -> np.ndarray:
    """``[N, 2] float64``: of each example the summed loss of its trained tokens, in nats, and how many they are.

    Args:
        model: a causal language model, or an encoder-decoder.
        examples: encoded for it; one without a trained token has the loss 0.
    """
    sums = _summed(model, examples, by_length, lambda loss, batch: loss.token_losses(batch)[:, None])
    counts = np.array([int(example.trained.sum()) for example in examples], dtype=np.float64)
    return np.concatenate([sums, counts[:, None]], 1)


def likelihoods_of_examples(
    model: torch.nn.Module,
    examples: Sequence[EncodedExample],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """``[N, 2] float64``: the log-probability of each example's trained tokens, and 1 where all are likeliest, else 0.

    Examples of one context share its computation where the model takes packed rows.

    Args:
        model: a causal language model.
        examples: encoded for it, each with a trained token.
        progress: told how many are done, of how many.
    """
    sums = _summed(model, examples, by_context, lambda loss, batch: loss.token_scores(batch), progress)
    return np.stack([-sums[:, 0], sums[:, 1] == 0], 1)


def _summed(
    model: torch.nn.Module,
    examples: Sequence[EncodedExample],
    batches: Callable[[Sequence[EncodedExample]], Iterator[list[int]]],
    scores: Callable[[LossFunction, Batch], torch.Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """``[N, S] float64``: of each example the sums of its trained tokens' ``[K, S]`` scores."""
    from luthier.training.loss import LossFunction
    from luthier.training.pair_loss import PairLoss

    numbers = [number for number, example in enumerate(examples) if example.trained.any()]
    asked = [examples[number] for number in numbers]
    found: dict[int, np.ndarray] = {}
    with measuring(model):
        device = next(model.parameters()).device
        loss = PairLoss(model) if Head.of(model).pairs else LossFunction(model)
        for chosen in batches(asked):
            rows = [asked[place] for place in chosen]
            values = scores(loss, loss.batch(rows).to(device)).double().cpu().numpy()
            counts = [int(row.trained.sum()) for row in rows]
            sums = np.add.reduceat(values, np.r_[0, np.cumsum(counts)[:-1]])
            found |= {numbers[place]: row for place, row in zip(chosen, sums, strict=True)}
            if progress is not None:
                progress(len(found), len(asked))
    width = len(next(iter(found.values()))) if found else 1
    return np.stack([found.get(n, np.zeros(width)) for n in range(len(examples))]) if examples else np.zeros((0, 1))


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
