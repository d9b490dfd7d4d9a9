"""The loss of an encoder-decoder: the cross-entropy of targets, given their sources."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from luthier.data.batch import Batch, PairBatch, pad_pairs, source_length
from luthier.data.encode import EncodedExample
from luthier.models.pairs import shifted
from luthier.training.loss import LossFunction, proves_head


class PairLoss(LossFunction):
    """The summed loss of a batch of pairs under an encoder-decoder; see :class:`LossFunction`.

    Batches are right-padded on both sides. Where the model proves that its logits are a linear layer of the decoder's
    last hidden states (which T5 scales before, and BART adds a bias to), they are computed in chunks at the targets
    alone.

    Args:
        model: an encoder-decoder, wrapped by its method.
        options: those of :class:`LossFunction`.

    Raises:
        UserError: its config does not say how a target begins.
    """

    model: Any
    body: Any
    encoder: Any

    def batch(self, examples: list[EncodedExample], *, draw: int = 0) -> PairBatch:
        """See :meth:`LossFunction.batch`."""
        return pad_pairs(examples, self.pad_token_id, partial(shifted, self.model))

    def logits(self, batch: Batch) -> torch.Tensor:
        """``[K, V]`` logits at the kept positions, by the model's own forward."""
        assert isinstance(batch, PairBatch)
        logits: torch.Tensor = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        ).logits
        return logits.reshape(-1, logits.shape[-1])[batch.kept]

    def own_loss(self, row: EncodedExample) -> torch.Tensor:
        """See :meth:`LossFunction.own_loss`; the model shifts the labels itself."""
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None].to(next(self.model.parameters()).device)
        border = source_length(row)
        labels = ids[:, border:]
        loss: torch.Tensor = self.model(input_ids=ids[:, :border], labels=labels, use_cache=False).loss
        return loss.float() * labels.shape[1]

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """``[K, D]`` what the output layer reads at the kept positions."""
        assert isinstance(batch, PairBatch)
        read = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        hidden = self.body(
            input_ids=batch.decoder_input_ids,
            encoder_hidden_states=read,
            encoder_attention_mask=batch.attention_mask,
            use_cache=False,
        ).last_hidden_state
        kept = hidden.reshape(-1, hidden.shape[-1])[batch.kept]
        return kept if self.scale == 1.0 else kept * self.scale

    def _bias(self) -> torch.Tensor | None:
        """See :meth:`LossFunction._bias`; some models add one of their own."""
        own = getattr(self.output, "bias", None)
        added = getattr(self.base, "final_logits_bias", None)
        if added is None:
            return own
        return added[0] if own is None else own + added[0]

    def _probe(self, base: Any, batching: str) -> None:
        self.reason = "an encoder-decoder reads sources and targets as rows of their own"
        self.base = base
        self.encoder = base.get_encoder() if hasattr(base, "get_encoder") else None
        self.scale = 1.0
        batch = self.batch(self._probe_rows()).to(next(self.model.parameters()).device)
        own = self.logits(batch)
        if self.body is None or self.encoder is None or not isinstance(self.output, torch.nn.Linear):
            return
        # T5 scales where its head is the embeddings; its config says so, but other models' configs say it otherwise.
        for scale in (1.0, self.output.in_features**-0.5):
            self.scale = scale
            try:
                direct = self._hidden(batch) @ self.output.weight.t()
            except (TypeError, ValueError, AttributeError):
                return  # its parts take other arguments
            bias = self._bias()
            self.head = proves_head(base, direct if bias is None else direct + bias, own)
            if self.head:
                return

    def _probe_rows(self) -> list[EncodedExample]:
        """Three short pairs of different lengths; none of their tokens is padding."""
        pad = getattr(self.model.config, "pad_token_id", None)
        rows = []
        for row, border in zip(super()._probe_rows(), (2, 5, 6), strict=True):
            ids = np.where(row.input_ids == pad, (row.input_ids + 1) % 5, row.input_ids).astype(np.int32)
            rows.append(replace(row, input_ids=ids, trained=np.arange(len(row)) >= border))
        return rows
