"""The loss of a classifier: one target a row, the text's class or classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from luthier.data.batch import Batch, pack, pad
from luthier.data.encode import EncodedExample
from luthier.training.loss import LossFunction


class ClassLoss(LossFunction):
    """The summed loss of a batch of texts under a classifier; see :class:`LossFunction`.

    A decoder's head reads the last token of a text, so texts can lie end to end in one row, and beginnings that they
    share are computed once, as in training a language model: where the model proves it. All others read right-padded
    rows by the model's own forward.

    The loss of a text is the cross-entropy of its class; where it can be of several, the mean over all classes of the
    binary cross-entropies, as transformers has them.

    Args:
        model: a model for sequence classification, wrapped by its method.
        classes: how many there are.
        multi_label: whether a text can be of several.
        options: those of :class:`LossFunction`.
    """

    of_tokens = False

    def __init__(self, model: torch.nn.Module, *, classes: int, multi_label: bool, **options: Any) -> None:
        self.classes = classes
        self.multi_label = multi_label
        super().__init__(model, **options)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Sum of the losses of the batch's texts, float32 scalar."""
        scores = self.logits(batch).float()
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(scores, batch.targets, reduction="sum") / self.classes
        return F.cross_entropy(scores, batch.targets, reduction="sum")

    def logits(self, batch: Batch) -> torch.Tensor:
        """``[B, C]`` scores of the texts."""
        if batch.packed:
            scores: torch.Tensor = self.output(self._hidden(batch))
            return scores
        own: torch.Tensor = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return own

    def own_loss(self, row: EncodedExample) -> torch.Tensor:
        """See :meth:`LossFunction.own_loss`."""
        return self(self._pad([row]).to(next(self.model.parameters()).device))

    def _output(self, base: Any) -> Any:
        """A decoder's head, which is a linear layer on the last token's hidden state; None where there is no such."""
        head = getattr(base, "score", None)
        if head is None:
            self.body = None
        return head

    def _probe(self, base: Any, batching: str) -> None:
        if self.body is None:
            self.reason = "this model's head reads more than a text's last token"
            return
        super()._probe(base, batching)
        # A packed row's scores are the head's of hidden states, by definition; that they are right has been proven.
        self.head = self.packed

    def _pack(self, rows: list[EncodedExample], *, share: bool = False) -> Batch:
        # What is predicted is kept one token before it; a token more stands for the class, and is no input.
        one = np.zeros(1, dtype=np.int32)
        longer = [
            replace(row, input_ids=np.concatenate([row.input_ids, one]), trained=_last(len(row) + 1)) for row in rows
        ]
        return replace(pack(longer, share=share), targets=self._targets(rows))

    def _pad(self, rows: list[EncodedExample]) -> Batch:
        marked = [replace(row, trained=_last(len(row))) for row in rows]
        return replace(pad(marked, self.pad_token_id), targets=self._targets(rows))

    def _targets(self, rows: Sequence[EncodedExample]) -> torch.Tensor:
        """``[B] int64`` numbers of classes, or ``[B, C] float32`` of 0 and 1."""
        if not self.multi_label:
            return torch.tensor([row.extra[0] for row in rows])
        targets = torch.zeros(len(rows), self.classes)
        for number, row in enumerate(rows):
            targets[number, list(row.extra)] = 1.0
        return targets

    def _probe_rows(self) -> list[EncodedExample]:
        return [replace(row, trained=_last(len(row)), extra=(0,)) for row in super()._probe_rows()]


def _last(length: int) -> np.ndarray:
    """``[n] bool``: the last of so many tokens, alone."""
    return np.arange(length) == length - 1
