"""What the losses of encoders share: texts end to end in one row, read from both sides, where the model proves it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from luthier.data.batch import Batch, pack_whole
from luthier.data.encode import EncodedExample
from luthier.training import attention, encoder_attention
from luthier.training.fused.decoder import FusedDecoder, NotFused
from luthier.training.loss import LossFunction


class EncoderLoss(LossFunction):
    """The summed loss of a batch under a model that reads texts from both sides; see :class:`LossFunction`.

    A packed row holds all tokens of its texts, and shares nothing: what stands for a token depends on the whole text.

    Attributes:
        two_way: whether this model is one; where not, everything is as for a decoder.
    """

    two_way = True
    # Where a text's positions begin, and how many the model has a vector for (0: it has no such table).
    _first, _places = 0, 0

    def _output(self, base: Any) -> Any:
        self.body = None if base.base_model is base else base.base_model
        return base.get_output_embeddings()

    def _attention(self) -> str:
        return encoder_attention.register() if self.two_way else super()._attention()

    def _packable(self, rows: list[EncodedExample]) -> bool:
        # Some models give padding tokens inside a text, where a user lets them stand, a position of their own.
        inside = self.two_way and any((row.input_ids == self._padding()).any() for row in rows)
        return self.packed and not inside

    def _pack(self, rows: list[EncodedExample], *, share: bool = False) -> Batch:
        return pack_whole(rows)

    def _padding(self) -> int | None:
        """The token that the model itself takes for padding."""
        number: int | None = getattr(self.model.config, "pad_token_id", None)
        return number

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if not self.two_way:
            return super()._inputs(batch)
        if batch.attention_mask is not None:
            return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        positions = batch.position_ids + self._first
        return {"input_ids": batch.input_ids, "position_ids": positions, "segments": batch.segments}

    def _fuse(self, ops: Any) -> FusedDecoder:
        if self.two_way:
            raise NotFused("fused layers are those of decoders")
        return super()._fuse(ops)

    def _why_not_packed(self) -> str:
        if not self.two_way:
            return super()._why_not_packed()
        self._first, self._places = self._positions()
        rows = self._probe_rows()
        with attention.recording() as calls:
            together, bound, why = self._beside_alone(rows)
        # A token that looks across a border may look to either side.
        why = why or self._why_moved(rows, 0, together, bound) or self._why_moved(rows, len(rows) - 1, together, bound)
        # A model may ask for windows by its masks alone, which a packed row has none of.
        config = self.model.config.get_text_config()  # type: ignore[union-attr, operator]
        windows = [getattr(config, "sliding_window", None), *(call.sliding_window for call in calls.values())]
        return why or self._why_not_long(max(window or 0 for window in windows))

    def _positions(self) -> tuple[int, int]:
        """The first position of a text, as the model's own embeddings are asked for it, and how many they have."""
        row = self._probe_rows()[1]
        asked: list[tuple[torch.Tensor, int]] = []

        def note(module: torch.nn.Embedding, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], torch.Tensor):
                asked.append((given[0].flatten().cpu(), module.num_embeddings))

        assert self.body is not None
        tables = [m for m in self.body.modules() if isinstance(m, torch.nn.Embedding)]
        handles = [table.register_forward_pre_hook(note) for table in tables]
        try:
            self.logits(self._pad([row]).to(next(self.model.parameters()).device))
        finally:
            for handle in handles:
                handle.remove()
        for numbers, places in asked:
            if torch.equal(numbers - numbers[:1], torch.arange(len(row))):
                return int(numbers[0]), places
        return 0, 0

    def _why_not_long(self, window: int) -> str:
        """Empty where the body gives each text the states it has alone in rows that are longer than its window, and
        longer than it has positions."""
        rows = self._probe_rows()
        if window:
            length = min(window + 8, self._places - self._first or window + 8)
            vocabulary = self.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
            ids = np.random.default_rng(1).integers(0, vocabulary, length).astype(np.int32)
            rows.append(self._without_padding(replace(rows[0], input_ids=ids, trained=np.arange(length) == length - 1)))
        elif not self._places:
            return ""
        times = self._places // sum(map(len, rows)) + 1
        device = next(self.model.parameters()).device
        self.model.set_attn_implementation("eager")  # type: ignore[operator]
        alone = torch.cat([self._states(self._pad([row]).to(device)) for row in rows])
        self.model.set_attn_implementation(self._attention())  # type: ignore[operator]
        together = self._states(self._pack(rows * times).to(device))
        half = next(self.model.parameters()).dtype in (torch.bfloat16, torch.float16)
        # A window that ends a token too early changes little.
        bound = (0.15 if half else 1e-3) * self._spread(alone)
        apart = float((together - alone.repeat(times, 1)).abs().mean())
        if not apart <= bound:
            return f"long packed rows change this model's hidden states by {apart:.2g} (bound {bound:.2g})"
        return ""

    def _states(self, batch: Batch) -> torch.Tensor:
        """``[N, D]`` the body's last hidden states."""
        assert self.body is not None
        states: torch.Tensor = self.body(**self._inputs(batch)).last_hidden_state
        return states.flatten(0, 1).float()

    def _spread(self, logits: torch.Tensor) -> float:
        """How much ``[K, V]`` logits differ from place to place: what all places have in common shows no mistake."""
        return float((logits - logits.mean(0)).std()) if self.two_way else super()._spread(logits)

    def _probe_rows(self) -> list[EncodedExample]:
        rows = super()._probe_rows()
        return [self._without_padding(row) for row in rows] if self.two_way else rows

    def _without_padding(self, row: EncodedExample) -> EncodedExample:
        ids = np.where(row.input_ids == self._padding(), (row.input_ids + 1) % 5, row.input_ids)
        return replace(row, input_ids=ids.astype(np.int32))
