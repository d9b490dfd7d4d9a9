"""An exported folder in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.deployment.onnx_graph import GRAPH, require_onnx
from luthier.models.loading import load_tokenizer

Cache = dict[str, np.ndarray]
"""Keys and values by the graph's input names, ``[B, heads, past, head size]`` each."""


class OnnxRuntime:
    """A :class:`~luthier.deployment.runtimes.Runtime`; also runs graphs of models that do not write.

    Args:
        folder: what :func:`~luthier.deployment.onnx.export_onnx` has written; nothing else is read.
        threads: of onnxruntime; None: as many as torch uses.

    Raises:
        UserError: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        require_onnx()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(
            str(Path(folder) / GRAPH), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {spec.name: spec for spec in self.session.get_inputs()}
        self._outputs = [spec.name for spec in self.session.get_outputs()]
        self._cached = [name for name in self._inputs if name.startswith("past_key_values.")]
        self.tokenizer = load_tokenizer(folder, chats=bool(self._cached))
        self.stops = _stops(Path(folder)) if self._cached else []
        """Ids that end an answer, as the folder's generation config has them."""

    def tokens(self, text: str) -> list[int] | None:
        """By the folder's own tokenizer."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """``[V] float32``: log-probability of each next token."""
        return self.logits(ids)[-1].log_softmax(-1)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """``[L, V]`` of a text's places, or a classifier's ``[C]``."""
        return self.batch_logits([ids])[0]

    def batch_logits(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """:meth:`logits` of several texts that are run at once, the shorter ones padded: on the left where the model
        writes, as for generation, else on the right."""
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids, mask = np.full((len(rows), longest), pad, np.int64), np.zeros((len(rows), longest), np.int64)
        own = [slice(longest - len(r), longest) if self._cached else slice(0, len(r)) for r in rows]
        for place, (row, at) in enumerate(zip(rows, own, strict=True)):
            ids[place, at], mask[place, at] = row, 1
        logits = torch.from_numpy(self.run(ids, mask, self.empty(len(rows)))[0])
        return [row[at] if logits.ndim == 3 else row for row, at in zip(logits, own, strict=True)]

    def greedy(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The likeliest continuation, up to and without a stop token: the prompt is read once, each token after it
        alone."""
        answer: list[int] = []
        new, cache = np.array([list(ids)], np.int64), self.empty(1)
        for _ in range(max_new_tokens):
            mask = np.ones((1, len(ids) + len(answer)), np.int64)
            logits, cache = self.run(new, mask, cache)
            token = int(logits[0, -1].argmax())
            if token in self.stops:
                break
            answer.append(token)
            new = np.array([[token]], np.int64)
        return answer

    def empty(self, rows: int) -> Cache:
        """What is known before the first token."""
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        cache = {}
        for name in self._cached:
            _, heads, _, size = self._inputs[name].shape
            cache[name] = np.zeros((rows, int(heads), 0, int(size)), kinds[self._inputs[name].type])
        return cache

    def run(self, ids: np.ndarray, mask: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        """One pass.

        Args:
            ids: ``[B, L] int64``, new tokens.
            mask: ``[B, P + L] int64``, 0 where a row is padded; the P tokens of the cache included.
            cache: of those before; empty for a model that does not write.

        Returns:
            logits ``[B, L, V]``, or ``[B, C]`` of a classifier; and the cache with the new tokens in it.
        """
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        known |= {"token_type_ids": np.zeros_like(ids), **cache}
        logits, *present = self.session.run(
            ["logits", *(n.replace("past_key_values", "present") for n in self._cached)],
            {name: known[name] for name in self._inputs},
        )
        return logits, dict(zip(self._cached, present, strict=True))


def _stops(folder: Path) -> list[int]:
    from transformers import GenerationConfig

    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
