"""What the decoder of an encoder-decoder model reads: the target, shifted to the right behind what opens it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def shifted(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder reads to write ``[B, T]`` labels, ``[B, T]``; by the model's own rule where it has one.

    Args:
        model: an encoder-decoder, wrapped or not.
        labels: padded with -100.

    Raises:
        UserError: its config does not say with which token a target begins, or which one is padding.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = getattr(base, "prepare_decoder_input_ids_from_labels", None) or getattr(base, "_shift_right", None)
    try:
        if own is not None:
            found: torch.Tensor = own(labels)
            return found
        # As those that shift in their forward pass alone do it (M2M100, Blenderbot).
        start = labels.new_full((len(labels), 1), base.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] < 0, base.config.pad_token_id)], 1)
    except (AttributeError, TypeError, ValueError):
        wanting = [
            name for name in ("decoder_start_token_id", "pad_token_id") if getattr(base.config, name, None) is None
        ]
        if not wanting:
            raise
        raise UserError(
            f"the model's config has no {' and no '.join(wanting)}, so its decoder does not know how a target begins",
            where="model.name",
            remedy="put the token's number into its config.json; a T5's targets begin with its padding token",
        ) from None


def opening(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the decoder reads before it writes the first token of a target's text: its start, and a language's token.

    The tokenizer says what stands before every target's text, and the model what it shifts in before that.
    """
    none, some = tokenizer(text_target=["", "a"])["input_ids"]
    before = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(none, some, strict=False)))
    found: list[int] = shifted(model, torch.tensor([some]))[0, : before + 1].tolist()
    return found


def set_opening(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a model's own ``generate`` begin and end a target as training does."""
    config = model.generation_config
    begins = opening(model, tokenizer)
    config.decoder_start_token_id = begins[0]
    if len(begins) == 2:
        config.forced_bos_token_id = begins[1]
    eos = config.eos_token_id
    known = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        config.eos_token_id = [*known, tokenizer.eos_token_id] if known else tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
