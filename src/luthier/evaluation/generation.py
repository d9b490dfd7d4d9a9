"""Answers to prompts, greedily, in batches from which finished rows retire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.data.render import end_of_turn_ids
from luthier.errors import UserError, shorten
from luthier.evaluation.state import measuring
from luthier.models.heads import Head
from luthier.models.pairs import opening
from luthier.models.virtual import VirtualTokens, cache_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` each time prompts have been answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one prompt."""

    text: str
    """Without the prompt and without control tokens, otherwise untouched."""
    token_ids: list[int]
    """As generated, the stop token included."""
    stopped: bool
    """True where a stop token ended it, False where the limit cut it."""
    prompt_tokens: int


def generate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    stop_token_ids: Iterable[int] | None = None,
    max_source_length: int | None = None,
    progress: Progress | None = None,
) -> list[Answer]:
    """The most likely next token, again and again, until a stop token or the limit.

    Nothing bends the choice (no temperature, no repetition penalty, whatever the model's own generation config
    says), so that two models are compared on equal terms and a prompt's answer does not depend on its batch.

    Args:
        model: a decoder, or an encoder-decoder; its training mode and attention are given back as they were.
        tokenizer: the model's tokenizer.
        prompts: rendered texts, as ``luthier.data.render.prompt_text`` makes them; no special token is added. To an
            encoder-decoder, sources, which get those that the tokenizer puts around them.
        max_new_tokens: longest answer in tokens; less where the model's context ends before.
        batch_size: prompts answered at once.
        stop_token_ids: tokens that end an answer; None: those of :func:`stop_tokens`.
        max_source_length: an encoder-decoder reads so many tokens of a longer source, as in training.
        progress: told how many prompts are answered.

    Returns:
        the answers, in the order of the prompts.

    Raises:
        UserError: a prompt is empty or leaves no room in the model's context; a size is below 1.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r} is not a whole number above 0", remedy=f"give {name} at least 1")
    if isinstance(prompts, str):
        raise UserError("prompts is one text, not a list of texts", remedy="give [prompt]")
    if not prompts:
        return []
    stops = list(stop_tokens(model, tokenizer) if stop_token_ids is None else stop_token_ids)
    pairs = Head.of(model).pairs
    begins = opening(model, tokenizer) if pairs else []
    cut = {"truncation": max_source_length is not None, "max_length": max_source_length} if pairs else {}
    encoded: list[list[int]] = tokenizer(list(prompts), add_special_tokens=pairs, verbose=False, **cut)["input_ids"]
    limits = [_room(model, ids, i, prompts[i], max_new_tokens) for i, ids in enumerate(encoded)]
    # Long prompts first: where memory does not suffice, that shows at once. Equal lengths share a batch.
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    answers: dict[int, Answer] = {}
    # SDPA, for packed training attention takes no cache.
    with measuring(model, "sdpa" if model.config._attn_implementation == "luthier" else None):  # type: ignore[union-attr]
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            asked, room = [encoded[i] for i in rows], [limits[i] for i in rows]
            new = _targets(model, asked, room, stops, begins) if pairs else _greedy(model, asked, room, stops)
            for i, ids in zip(rows, new, strict=True):
                stopped = ids[-1] in stops
                text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
                answers[i] = Answer(text, ids, stopped, len(encoded[i]))
            if progress is not None:
                progress(len(answers), len(order))
    return [answers[i] for i in range(len(order))]


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, and the template's end-of-turn.

    A target of an encoder-decoder ends with the tokenizer's end-of-sequence.
    """
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    own = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if not Head.of(model).pairs:
        return list(dict.fromkeys([*own, *end_of_turn_ids(tokenizer)]))
    return list(dict.fromkeys(own if tokenizer.eos_token_id is None else [*own, int(tokenizer.eos_token_id)]))


def _room(model: Any, ids: list[int], index: int, prompt: str, wanted: int) -> int:
    """How many tokens the answer to a prompt may have."""
    if not ids:
        raise UserError("the prompt is empty", where=f"prompt {index + 1}", remedy="render it with prompt_text")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return wanted
    context -= VirtualTokens(model).count
    if Head.of(model).pairs and len(ids) <= context:
        # The target has positions of its own, two of which may go to what opens it.
        return max(1, min(wanted, context - 2))
    if len(ids) >= context:
        raise UserError(
            f"the prompt has {len(ids):,} tokens and the model's context {context:,}: {shorten(prompt)}",
            where=f"prompt {index + 1}",
            remedy="shorten it, or leave it out",
        )
    return min(wanted, context - len(ids))


def _greedy(model: Any, prompts: list[list[int]], limits: list[int], stops: list[int]) -> list[list[int]]:
    """New token ids of each prompt. Rows leave the batch, and their keys and values the cache, once finished."""
    device = next(model.parameters()).device
    virtual = VirtualTokens(model)
    rows = [virtual.placeholders + ids for ids in prompts]
    longest = max(map(len, rows))
    pads = [longest - len(ids) for ids in rows]
    # Any token can stand in the padding on the left: it is masked.
    ids = torch.tensor([[0] * n + p for n, p in zip(pads, rows, strict=True)], device=device)  # [B, L]
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pads, rows, strict=True)], device=device)
    mask = virtual.mask(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, virtual.keys :]
    alive = list(range(len(prompts)))
    new: list[list[int]] = [[] for _ in prompts]
    cache, name = virtual.cache(len(prompts)), cache_name(virtual.reader)
    while True:
        out = virtual.reader(
            **virtual.inputs(ids),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{name: cache},
        )
        cache = getattr(out, name, None)
        if cache is None or any(hasattr(layer, "recurrent_states") for layer in cache.layers):
            return _one_by_one(model, prompts, limits, stops)
        chosen = out.logits[:, -1].argmax(-1)  # [B]
        for row, token in zip(alive, chosen.tolist(), strict=True):
            new[row].append(token)
        going = [i for i, row in enumerate(alive) if new[row][-1] not in stops and len(new[row]) < limits[row]]
        if not going:
            return new
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        if len(going) < len(alive):
            index = torch.tensor(going, device=device)
            cache.batch_select_indices(index)
            ids, positions, mask = ids[index], positions[index], mask[index]
            alive = [alive[i] for i in going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


def _targets(
    model: Any, sources: list[list[int]], limits: list[int], stops: list[int], begins: list[int]
) -> list[list[int]]:
    """New token ids for each source, by an encoder-decoder's own loop: the decoder begins with ``begins``."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    reader = model.get_base_model() if hasattr(model, "get_base_model") else model
    pad = reader.config.pad_token_id
    longest = max(map(len, sources))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in sources], device=device)  # [B, L]
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sources], device=device)
    own = reader.generation_config
    reader.generation_config = GenerationConfig()  # generate() takes from it what its argument leaves open
    try:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(limits),
            eos_token_id=stops or None,
            pad_token_id=pad,
            decoder_start_token_id=begins[0],
        )
        out = reader.generate(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=torch.tensor([begins] * len(sources), device=device),
            generation_config=config,
        )
    finally:
        reader.generation_config = own
    new = []
    for row in out[:, len(begins) :].tolist():
        end = next((at for at, token in enumerate(row) if token in stops), len(row) - 1)
        new.append(row[: end + 1])
    return new


def _one_by_one(model: Any, prompts: list[list[int]], limits: list[int], stops: list[int]) -> list[list[int]]:
    """New token ids of each prompt from transformers' own loop, for models that remember more than keys and values.

    A recurrent state (Mamba, hybrids) has taken up the padding of its row, and rows cannot leave its cache.
    """
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    virtual = VirtualTokens(model)
    reader = virtual.reader
    own, new = reader.generation_config, []
    reader.generation_config = GenerationConfig()  # generate() takes from it what its argument leaves open
    try:
        for prompt, limit in zip(prompts, limits, strict=True):
            config = GenerationConfig(do_sample=False, max_new_tokens=limit, eos_token_id=stops or None, pad_token_id=0)
            inputs = virtual.generation_inputs(torch.tensor([prompt], device=device))
            out = reader.generate(**inputs, generation_config=config)
            # Where vectors went in, what comes out are the new tokens alone.
            new.append(out[0, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist())
    finally:
        reader.generation_config = own
    return new
