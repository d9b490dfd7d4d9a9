"""What must travel with a model beside its weights: its tokens, its template, where its answers stop, its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.data.render import RenderError, end_of_turn_ids, template_text
from luthier.models.heads import Head
from luthier.models.loading import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = 512
_TURNS = [
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "It is 42.\n\n  是的。 🙂"},
    {"role": "user", "content": "Why?"},
]


def left_behind(
    head: Head,
    candidate: Any,
    tokenizer: PreTrainedTokenizerBase,
    travelled: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    limit: int | None,
) -> list[str]:
    """What should have travelled with a candidate beside its weights and has not, in words.

    Args:
        head: the reference's.
        candidate: the model to hand over; its weights are not looked at.
        tokenizer: the reference's.
        travelled: the candidate's.
        prompts: rendered texts.
        limit: see :func:`limit_of`.
    """
    reasons = tokens_differ(tokenizer, travelled, prompts, limit, targets=head.pairs)
    if head.writes or head.pairs:
        reasons += stops_missing(candidate, travelled, head)
    if Head.of(candidate).classes != head.classes:
        reasons.append("the classes' names or numbers were lost")
    return reasons


def limit_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Up to how many tokens a model that does not write reads texts here; None: it writes, and reads prompts."""
    if Head.of(model).writes:
        return None
    return min(_TOKENS, context_of(model.config, tokenizer) or _TOKENS)


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int | None) -> list[list[int]]:
    """Token ids of the prompts. A rendered prompt holds its control tokens; other texts get the tokenizer's own."""
    if limit is None:
        return [tokenizer(p, add_special_tokens=False).input_ids[-_TOKENS:] for p in prompts]
    # Rows that were cut in training come whole.
    return [tokenizer(p, truncation=True, max_length=limit).input_ids for p in prompts]


def tokens_differ(
    tokenizer: PreTrainedTokenizerBase,
    travelled: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    limit: int | None,
    *,
    targets: bool,
) -> list[str]:
    """Whether prompts and conversations give other tokens, or other texts, on the other side."""
    if travelled is tokenizer:
        return []
    reasons = []
    if limit is None and not travelled.chat_template:
        return ["the chat template was lost"]
    for prompt in prompts:
        ids = [token_ids(t, [prompt], limit) for t in (tokenizer, travelled)]
        if ids[0] != ids[1]:
            reasons.append("the tokenizer gives other tokens for the same text")
            break
    if targets:
        ids = [t(text_target=list(prompts))["input_ids"] for t in (tokenizer, travelled)]
        if ids[0] != ids[1]:
            reasons.append("the tokenizer gives other tokens for the same target")
    if limit is not None:
        return reasons
    for turns in (_TURNS[:1], _TURNS):
        texts = []
        for t in (tokenizer, travelled):
            try:
                texts.append(template_text(t, turns, add_generation_prompt=True))
            except RenderError as error:
                texts.append(str(error))
        if texts[0] != texts[1]:
            reasons.append("the chat template renders another text")
            break
    return reasons


def stops_missing(candidate: Any, tokenizer: PreTrainedTokenizerBase, head: Head) -> list[str]:
    """Whether a model's own generation config does not stop where an answer ends."""
    eos = getattr(candidate.generation_config, "eos_token_id", None)
    known = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ends = end_of_turn_ids(tokenizer) if head.writes else [tokenizer.eos_token_id]
    missing = [i for i in ends if i not in known]
    if not missing:
        return []
    names = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(missing))
    return [f"generation does not stop at {names}, which ends an answer"]
