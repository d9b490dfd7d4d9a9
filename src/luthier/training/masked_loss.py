"""The loss of filling in hidden words: targets at hidden tokens alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from luthier.data.batch import Batch
from luthier.data.encode import EncodedExample
from luthier.data.masked import Masking
from luthier.training.encoder_loss import EncoderLoss


class MaskedLoss(EncoderLoss):
    """The summed cross-entropy of a batch's hidden tokens; see :class:`EncoderLoss`.

    The model's head turns the hidden states of the hidden tokens alone into logits, where the model proves that it
    gives the same logits so; else its own forward turns all.

    Args:
        model: a masked language model, wrapped by its method.
        masking: which tokens are hidden.
        options: those of :class:`LossFunction`.

    Attributes:
        head: whether the head is computed for hidden tokens alone.
    """

    def __init__(self, model: torch.nn.Module, *, masking: Masking, **options: Any) -> None:
        self.masking = masking
        super().__init__(model, **options)

    def batch(self, examples: list[EncodedExample], *, draw: int = 0) -> Batch:
        """See :meth:`LossFunction.batch`; ``kept`` are the flat places of the hidden tokens, ``targets`` what stood
        there."""
        drawn = [self.masking.draw(example, draw) for example in examples]
        marked = [
            replace(example, trained=_at(places, len(example)))
            for example, (_, places) in zip(examples, drawn, strict=True)
        ]
        batch = super().batch(marked)
        read = np.concatenate([ids[places] for ids, places in drawn]).astype(np.int64)
        batch.input_ids.view(-1)[batch.kept] = torch.from_numpy(read)
        return batch

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Sum of the cross-entropies of the batch's hidden tokens, float32 scalar."""
        return F.cross_entropy(self.logits(batch).float(), batch.targets, reduction="sum")

    def logits(self, batch: Batch) -> torch.Tensor:
        """``[K, V]`` logits at the hidden tokens."""
        inputs = self._inputs(batch)
        if self.head:
            with self._narrowed(batch.kept):
                narrow: torch.Tensor = self.model(**inputs).logits[0]
            return narrow
        logits = self.model(**inputs).logits
        whole: torch.Tensor = logits.reshape(-1, logits.shape[-1])[batch.kept]
        return whole

    def own_loss(self, row: EncodedExample) -> torch.Tensor:
        """See :meth:`LossFunction.own_loss`: transformers' own loss of the row, with the words of draw 0 hidden."""
        device = next(self.model.parameters()).device
        ids, places = self.masking.draw(row, 0)
        labels = np.full(len(row), -100, dtype=np.int64)
        labels[places] = row.input_ids[places]
        rows = (torch.from_numpy(a.astype(np.int64))[None].to(device) for a in (ids, labels))
        loss: torch.Tensor = self.model(**dict(zip(("input_ids", "labels"), rows, strict=True))).loss
        return loss.float() * len(places)

    @contextlib.contextmanager
    def _narrowed(self, kept: torch.Tensor) -> Iterator[None]:
        """The body hands the hidden states at ``kept`` alone to the head, as one row of them."""

        def narrow(module: Any, given: Any, output: Any) -> Any:
            states = output.last_hidden_state  # [B, L, D]
            output.last_hidden_state = states.reshape(-1, states.shape[-1])[kept][None]
            return output

        assert self.body is not None
        handle = self.body.register_forward_hook(narrow)
        try:
            yield
        finally:
            handle.remove()

    def _pad(self, rows: list[EncodedExample]) -> Batch:
        # A decoder's target is predicted one place before it; here it is predicted where it stands.
        batch = super()._pad(rows)
        return replace(batch, kept=batch.kept + 1)

    def _probe(self, base: Any, batching: str) -> None:
        if self.body is None:
            self.reason = "this model's body is no module of its own"
            return
        self._probe_packing(batching)
        batch = self.batch(self._probe_rows()).to(next(self.model.parameters()).device)
        whole = self.logits(batch).float()
        self.head = True
        try:
            narrow = self.logits(batch).float()
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            narrow = whole[:0]
        half = next(self.model.parameters()).dtype in (torch.bfloat16, torch.float16)
        bound = (3e-2 if half else 1e-4) * float(whole.std())
        self.head = narrow.shape == whole.shape and float((narrow - whole).abs().mean()) <= bound


def _at(places: np.ndarray, length: int) -> np.ndarray:
    """``[n] bool``: True at these places."""
    found = np.zeros(length, dtype=bool)
    found[places] = True
    return found
