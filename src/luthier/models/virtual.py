"""Virtual tokens: trained vectors before every text (prompt tuning, P-tuning) or keys and values (prefix tuning).

PEFT puts them in front at every forward pass of its wrapper. That cannot pack rows, gives logits of the virtual
positions too, and puts them in once more at each step of a cached loop; so does PEFT 0.21's own ``generate``, which
looks for the cache under the name that it had before transformers 5.24. Here the base runs instead, and they stand in
front once: virtual vectors as placeholder ids above the vocabulary, so that rows of ids can be packed, padded, shared
and masked like any others; virtual keys and values as the cache that the first step finds.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from luthier.data.encode import EncodedExample
from luthier.data.examples import TaskType
from luthier.models.heads import Head


class VirtualTokens:
    """What stands before every text that a model reads; read anew for a model whose adapter is switched on or off.

    Args:
        model: any model, wrapped by PEFT or not.

    Attributes:
        count: how many there are; 0 where the model has none, or its adapter is off.
        vectors: whether they are vectors at the model's input; False: keys and values in each layer.
        placeholders: their ids; empty where they take no place in a row of ids.
    """

    def __init__(self, model: Any) -> None:
        config: Any = getattr(model, "active_peft_config", None)
        learnt = config is not None and config.is_prompt_learning and model.has_active_enabled_adapter
        self._model = model
        self.count: int = config.num_virtual_tokens if learnt else 0
        self.vectors = bool(self.count) and config.peft_type.value != "PREFIX_TUNING"
        self._rows = int(model.word_embeddings.weight.shape[0]) if self.vectors else 0
        self.placeholders = list(range(self._rows, self._rows + self.count)) if self.vectors else []
        self.reader: Any = model.get_base_model() if self.count else model
        """The model to call with :meth:`inputs` and :meth:`cache`."""

    @property
    def keys(self) -> int:
        """How many keys and values stand before those of a row's own tokens."""
        return 0 if self.vectors else self.count

    def before(self, examples: Sequence[EncodedExample]) -> list[EncodedExample]:
        """The examples with placeholders in front, which are not trained to be predicted."""
        if not self.vectors:
            return list(examples)
        ids, none = np.array(self.placeholders, dtype=np.int32), np.zeros(self.count, dtype=bool)
        return [
            replace(e, input_ids=np.concatenate([ids, e.input_ids]), trained=np.concatenate([none, e.trained]))
            for e in examples
        ]

    def inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The argument that gives the reader ``[B, L]`` ids: ``input_ids``, or their vectors ``[B, L, D]``."""
        return {"inputs_embeds": self.embedded(ids)} if self.vectors else {"input_ids": ids}

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """``[B, L, D]`` vectors of ``[B, L]`` ids, virtual ones where placeholders stand."""
        text = self._model.word_embeddings(ids.clamp(max=self._rows - 1))
        prompt = self._model.get_prompt(batch_size=1)[0].to(text.dtype)  # [n, D]
        return torch.where((ids >= self._rows)[..., None], prompt[(ids - self._rows).clamp(min=0)], text)

    def cache(self, rows: int) -> Any:
        """The keys and values that so many rows begin with; None where they begin with none."""
        return self._model.get_prompt(batch_size=rows) if self.keys else None

    def begun(self, rows: int) -> dict[str, Any]:
        """The argument that gives the reader :meth:`cache`; none where there is nothing to give."""
        return {cache_name(self.reader): self.cache(rows)} if self.keys else {}

    def generation_inputs(self, ids: torch.Tensor, beams: int = 1) -> dict[str, Any]:
        """Arguments of the reader's ``generate``, with so many beams, for ``[B, L]`` ids without padding."""
        if self.vectors:
            ids = torch.cat([ids.new_tensor([self.placeholders]).expand(len(ids), -1), ids], 1)
            return self.inputs(ids) | {"attention_mask": torch.ones_like(ids)}
        # It leaves out as many ids as have keys already, whatever they are.
        ids = torch.cat([ids.new_zeros(len(ids), self.keys), ids], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.begun(len(ids) * beams)}

    def mask(self, mask: torch.Tensor) -> torch.Tensor:
        """``[B, keys + L]``: the mask of a row's keys, from that of its own tokens."""
        return torch.cat([mask.new_ones(len(mask), self.keys), mask], 1) if self.keys else mask


def cache_name(model: Any) -> str:
    """What a model's forward calls its cache: transformers 5.24 renamed it."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(own.forward).parameters else "past_key_values"


def own_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """``[B, L, V]`` logits of ``[B, L]`` ids by the model's own forward, without those of virtual positions.

    A masked language model's are those of each place itself. A classifier's are ``[B, 1, C]``; where a text can be of
    several classes, ``[B, C, 2]``, each with its opposite. A decoder beside an encoder reads
    the same ids as that.
    """
    head = Head.of(model)
    if head.classes is not None:
        scores: torch.Tensor = model(input_ids=ids).logits
        return torch.stack([scores, torch.zeros_like(scores)], -1) if head.classes.multi_label else scores[:, None]
    if head.task is TaskType.MASKED_LM:
        filled: torch.Tensor = model(input_ids=ids).logits
        return filled
    more = {"decoder_input_ids": ids} if head.pairs else {}
    logits: torch.Tensor = model(input_ids=ids, **more, use_cache=False).logits
    return logits[:, -ids.shape[1] :]
