"""A local model as an answerer: what augmentation asks, in place of an endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from luthier.data.render import RenderError, prompt_text
from luthier.decoding import BATCH_SIZE
from luthier.endpoint import Answerer, Conversation
from luthier.errors import UserError
from luthier.evaluation.generation import generate_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def answerer_of(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int = 512,
    batch_size: int = BATCH_SIZE,
) -> Answerer:
    """A loaded model as an answerer: its most likely answers, so that seeds change nothing.

    Args:
        model: a decoder.
        tokenizer: its tokenizer, with a chat template.
        max_new_tokens: longest answer; one cut there counts as none.
        batch_size: conversations answered at once.
    """

    def answer(conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str | UserError]:
        results: dict[int, str | UserError] = {}
        prompts: dict[int, str] = {}
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
        for index, conversation in enumerate(conversations):
            try:
                prompt = prompt_text(tokenizer, conversation)
            except RenderError as error:
                results[index] = UserError(f"the model's template refuses the conversation: {error}")
                continue
            tokens = len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
            if context is not None and tokens >= context:
                results[index] = UserError(f"the text has {tokens:,} tokens and the model's context {context:,}")
            else:
                prompts[index] = prompt
        said = generate_answers(
            model, tokenizer, list(prompts.values()), max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        for index, one in zip(prompts, said, strict=True):
            cut = UserError(f"the answer was cut at {max_new_tokens} tokens", remedy="raise max_new_tokens")
            results[index] = one.text if one.stopped else cut
        return [results[index] for index in range(len(conversations))]

    return answer


def local_answerer(name: str | Path, *, max_new_tokens: int = 512, batch_size: int = BATCH_SIZE) -> Answerer:
    """A model of this machine as an answerer; it is loaded when it is first asked.

    Args:
        name: embedded name, folder, GGUF file or hub id.
        max_new_tokens: longest answer; one cut there counts as none.
        batch_size: conversations answered at once.

    Raises:
        UserError: nothing is found under that name.
    """
    from luthier.models.loading import load_model, load_tokenizer, resolve_model, training_dtype

    resolve_model(name)
    loaded: list[Answerer] = []

    def answer(conversations: Sequence[Conversation], seeds: Sequence[int]) -> list[str | UserError]:
        if not loaded:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            model = load_model(name, dtype=training_dtype("auto", device)).to(device)  # type: ignore[arg-type]
            loaded.append(
                answerer_of(model, load_tokenizer(name), max_new_tokens=max_new_tokens, batch_size=batch_size)
            )
        return loaded[0](conversations, seeds)

    return answer
