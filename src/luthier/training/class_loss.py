"""The loss of a classifier: one target a row, the text's class or classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from luthier.data.batch import Batch, pack, pack_whole, pad
from luthier.data.encode import EncodedExample
from luthier.training.encoder_attention import PaddedRows
from luthier.training.encoder_loss import EncoderLoss


class ClassLoss(EncoderLoss):
    """The summed loss of a batch of texts under a classifier; see :class:`LossFunction`.

    Texts lie end to end in one row where the model proves that it takes them so. A decoder's head reads the last token
    of a text, and beginnings that texts share are computed once, as in training a language model. An encoder's head
    reads a text's first token, or all of them: it gets what the body makes of the row with a text to a row. All others
    read right-padded rows by the model's own forward.

    The loss of a text is the cross-entropy of its class; where it can be of several, the mean over all classes of the
    binary cross-entropies, as transformers has them.

    Args:
        model: a model for sequence classification, wrapped by its method.
        classes: how many there are.
        multi_label: whether a text can be of several.
        options: those of :class:`LossFunction`.
    """

    of_tokens = False
    # Whether an encoder's head gets a text's every token, not its first alone.
    _whole = False

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
        scores: torch.Tensor
        if not batch.packed:
            scores = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        elif self.two_way:
            with self._a_text_to_a_row(batch) as more:
                scores = self.model(**self._inputs(batch), **more).logits
        else:
            scores = self.output(self._hidden(batch))
        return scores

    @contextlib.contextmanager
    def _a_text_to_a_row(self, batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
        """The body hands its states of a packed row to the head with a text to a row, the first token's or all; gives
        what the head wants to be told of them."""
        rows = PaddedRows.of(batch.segments, batch.input_ids.device) if self._whole else None

        def lay(module: Any, given: Any, output: Any) -> Any:
            states = output.last_hidden_state[0]  # [N, D]
            output.last_hidden_state = states[batch.kept][:, None] if rows is None else rows.laid(states)
            if getattr(output, "pooler_output", None) is not None:
                output.pooler_output = module.pooler(output.last_hidden_state)
            return output

        assert self.body is not None
        handle = self.body.register_forward_hook(lay)
        try:
            yield {} if rows is None else {"attention_mask": rows.mask.long()}
        finally:
            handle.remove()

    def own_loss(self, row: EncodedExample) -> torch.Tensor:
        """See :meth:`LossFunction.own_loss`."""
        return self(self._pad([row]).to(next(self.model.parameters()).device))

    def _output(self, base: Any) -> Any:
        """A decoder's head, which is a linear layer on the last token's hidden state; None where there is no such."""
        head = getattr(base, "score", None)
        self.two_way = head is None
        return super()._output(base) if self.two_way else head

    def _probe(self, base: Any, batching: str) -> None:
        if self.body is None:
            self.reason = "this model's body is no module of its own"
        elif self.two_way:
            self._probe_packing(batching)
            if not self.packed and batching != "padded":
                reason, self._whole = self.reason, True
                self._probe_packing(batching)
                self.reason = self.reason and reason
        else:
            super()._probe(base, batching)
            # A packed row's scores are the head's of hidden states, by definition; that they are right has been proven.
            self.head = self.packed

    def _pack(self, rows: list[EncodedExample], *, share: bool = False) -> Batch:
        if self.two_way:
            batch = pack_whole([replace(row, trained=np.arange(len(row)) == 0) for row in rows])
        else:
            # What is predicted is kept one token before it; a token more stands for the class, and is no input.
            one = np.zeros(1, dtype=np.int32)
            longer = [
                replace(row, input_ids=np.concatenate([row.input_ids, one]), trained=_last(len(row) + 1))
                for row in rows
            ]
            batch = pack(longer, share=share)
        return replace(batch, targets=self._targets(rows))

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
