"""Answers to prompts, in batches from which finished rows retire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from luthier.data.render import end_of_turn_ids
from luthier.decoding import BATCH_SIZE, Decoding
from luthier.errors import UserError, shorten
from luthier.evaluation.choice import Choice, generation_config, processors
from luthier.evaluation.room import rows_that_fit
from luthier.evaluation.state import measuring
from luthier.evaluation.until import Until
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
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = BATCH_SIZE,
    stop_token_ids: Iterable[int] | None = None,
    until: Sequence[str] = (),
    max_source_length: int | None = None,
    decoding: Decoding | None = None,
    progress: Progress | None = None,
    answered: Callable[[dict[int, Answer]], None] | None = None,
) -> list[Answer]:
    """Answers, each until a stop token or the limit: greedy ones, or as ``decoding`` says.

    Nothing else bends the choice (no repetition penalty, whatever the model's own generation config says), so that two
    models are compared on equal terms. A prompt's answer does not depend on its batch, its place, or the other prompts,
    but for the rounding of logits.

    Greedy and sampled tokens of a decoder are chosen here; beams are those of transformers' ``generate``, in batches of
    prompts of one length, which need no padding. So are all answers of an encoder-decoder and, one prompt at a time, of
    a model that remembers more than keys and values.

    Args:
        model: a decoder, or an encoder-decoder; its training mode and attention are given back as they were.
        tokenizer: the model's tokenizer.
        prompts: rendered texts, as ``luthier.data.render.prompt_text`` makes them; no special token is added. To an
            encoder-decoder, sources, which get those that the tokenizer puts around them. Or the token ids of each.
        max_new_tokens: longest answer in tokens; less where the model's context ends before.
        batch_size: prompts answered at once, fewer where memory would not suffice; with beams, beams.
        stop_token_ids: tokens that end an answer; None: those of :func:`stop_tokens`.
        until: texts that end an answer as well, and are no part of it. What transformers' ``generate`` writes goes on
            to its stop token or limit, and is cut afterwards: the answer is the same.
        max_source_length: an encoder-decoder reads so many tokens of a longer source, as in training.
        decoding: how tokens are chosen; None: greedily.
        progress: told how many prompts are answered.
        answered: given each batch's answers, by the prompts' numbers from 0, before ``progress`` is told.

    Returns:
        the answers, in the order of the prompts.

    Raises:
        UserError: a prompt is empty or leaves no room in the model's context; a size is below 1; the model cannot be
            decoded so.
    """
    decoding = Decoding() if decoding is None else decoding
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
    encoded: list[list[int]] = (
        tokenizer(list(prompts), add_special_tokens=pairs, verbose=False, **cut)["input_ids"]
        if isinstance(prompts[0], str)
        else [list(ids) for ids in cast("Sequence[list[int]]", prompts)]
    )
    limits = [_room(model, ids, i, prompts[i], max_new_tokens) for i, ids in enumerate(encoded)]
    end = Until(tokenizer, until)
    if decoding.num_beams > 1 and decoding.no_repeat_ngram_size and VirtualTokens(model).count:
        raise UserError(
            "with virtual tokens, beams see the answer's runs of tokens alone and not the prompt's",
            where=f"no_repeat_ngram_size={decoding.no_repeat_ngram_size}",
            remedy="leave no_repeat_ngram_size out, or set num_beams=1",
        )
    answers: dict[int, Answer] = {}
    # SDPA, for packed training attention takes no cache.
    with measuring(model, "sdpa" if model.config._attn_implementation == "luthier" else None):  # type: ignore[union-attr]
        for rows in _batches(model, encoded, limits, batch_size, decoding):
            asked, room = [encoded[i] for i in rows], [limits[i] for i in rows]
            if pairs:
                new = _targets(model, asked, room, stops, begins, decoding)
            elif decoding.num_beams > 1:
                new = _generated(model, asked, room[0], stops, decoding)
            else:
                new = _chosen(model, asked, room, stops, decoding, end)
            batch: dict[int, Answer] = {}
            for i, ids in zip(rows, new, strict=True):
                text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
                kept = end.cut(text)
                stopped = ids[-1] in stops or end.reached(ids) or len(kept) < len(text)
                batch[i] = Answer(kept, ids, stopped, len(encoded[i]))
            answers |= batch
            if answered is not None:
                answered(batch)
            if progress is not None:
                progress(len(answers), len(encoded))
    return [answers[i] for i in range(len(encoded))]


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


def _room(model: Any, ids: list[int], index: int, prompt: str | list[int], wanted: int) -> int:
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


def _batches(
    model: Any, encoded: Sequence[Sequence[int]], limits: Sequence[int], batch_size: int, decoding: Decoding
) -> Iterator[list[int]]:
    """Numbers of the prompts that share a batch: those of like length, with beams of one length.

    Long prompts come first: where memory does not suffice, that shows at once.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    begin = 0
    while begin < len(order):
        most = rows_that_fit(model, len(encoded[order[begin]]), max(limits)) if batch_size > 1 else 1
        rows = order[begin : begin + max(1, min(most, batch_size) // decoding.num_beams)]
        if decoding.num_beams > 1:
            rows = [i for i in rows if len(encoded[i]) == len(encoded[rows[0]])]
        yield rows
        begin += len(rows)


def _chosen(
    model: Any,
    prompts: list[list[int]],
    limits: list[int],
    stops: list[int],
    decoding: Decoding,
    end: Until | None = None,
) -> list[list[int]]:
    """New token ids of each prompt. Rows leave the batch, and their keys and values the cache, once finished."""
    from luthier.evaluation.growing import grow

    choice = Choice(decoding, prompts)
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
            # A recurrent state (Mamba, hybrids) has taken up the padding of its row, and rows cannot leave its cache.
            each = zip(prompts, limits, strict=True)
            return [_generated(model, [prompt], limit, stops, decoding)[0] for prompt, limit in each]
        if not new[alive[0]]:
            grow(cache)
        chosen = choice(out.logits[:, -1], alive, new)  # [B]
        for row, token in zip(alive, chosen.tolist(), strict=True):
            new[row].append(token)
        going = [
            i
            for i, row in enumerate(alive)
            if new[row][-1] not in stops and len(new[row]) < limits[row] and not (end and end.reached(new[row]))
        ]
        if not going:
            return new
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        if len(going) < len(alive):
            index = torch.tensor(going, device=device)
            cache.batch_select_indices(index)
            ids, positions, mask = ids[index], positions[index], mask[index]
            alive = [alive[i] for i in going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


@contextmanager
def _without_own_config(reader: Any) -> Iterator[None]:
    """``generate()`` takes from the model's generation config what its argument leaves open: here nothing."""
    from transformers import GenerationConfig

    own = reader.generation_config
    reader.generation_config = GenerationConfig()
    try:
        yield
    finally:
        reader.generation_config = own


def _targets(
    model: Any,
    sources: list[list[int]],
    limits: list[int],
    stops: list[int],
    begins: list[int],
    decoding: Decoding,
) -> list[list[int]]:
    """New token ids for each source, by an encoder-decoder's own loop: the decoder begins with ``begins``."""
    device = next(model.parameters()).device
    reader = model.get_base_model() if hasattr(model, "get_base_model") else model
    pad = reader.config.pad_token_id
    longest = max(map(len, sources))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in sources], device=device)  # [B, L]
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sources], device=device)
    config = generation_config(
        decoding,
        max_new_tokens=max(limits),
        eos_token_id=stops or None,
        pad_token_id=pad,
        decoder_start_token_id=begins[0],
    )
    with _without_own_config(reader):
        out = reader.generate(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=torch.tensor([begins] * len(sources), device=device),
            generation_config=config,
            logits_processor=processors(decoding, sources),
        )
    return [_ended(row, stops) for row in out[:, len(begins) :].tolist()]


def _generated(
    model: Any, prompts: list[list[int]], limit: int, stops: list[int], decoding: Decoding
) -> list[list[int]]:
    """New token ids of prompts of one length, from transformers' own loop."""
    device = next(model.parameters()).device
    virtual = VirtualTokens(model)
    inputs = virtual.generation_inputs(torch.tensor(prompts, device=device), decoding.num_beams)
    config = generation_config(decoding, max_new_tokens=limit, eos_token_id=stops or None, pad_token_id=0)
    with _without_own_config(virtual.reader):
        out = virtual.reader.generate(
            **inputs, generation_config=config, logits_processor=processors(decoding, prompts)
        )
    # Where vectors went in, what comes out are the new tokens alone.
    begin = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return [_ended(row, stops) for row in out[:, begin:].tolist()]


def _ended(ids: list[int], stops: list[int]) -> list[int]:
    """A row up to its first stop token, that included; what follows is padding."""
    return ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1) + 1]
