"""From rendered text to token ids and the mask of trained tokens: one tokenisation, labels from character offsets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from luthier.data.examples import Reject, Source, TrainingExample
from luthier.data.render import Rendered, Renderer, RenderError
from luthier.errors import UserError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNKNOWN_SOURCE = Source("examples given in Python", 0)


@dataclass(slots=True)
class EncodedExample:
    """Token ids of one example and which of them are targets."""

    input_ids: np.ndarray
    """``[n] int32``"""
    trained: np.ndarray
    """``[n] bool``: True where the token is to be predicted. The first token never is: nothing precedes it."""
    source: Source | None
    index: int
    """Which example of its part it comes from; several share one where a long text was split."""
    cut: int = 0
    """Trained tokens lost because the example was longer than ``max_length``."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(slots=True)
class Encoded:
    """A part of the data, encoded: ``examples in = kept + refused``."""

    examples: list[EncodedExample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(e) for e in self.examples)

    @property
    def trained_tokens(self) -> int:
        return int(sum(e.trained.sum() for e in self.examples))


class Encoder:
    """Renders and tokenises examples.

    Args:
        renderer: holds the tokenizer, which must be a fast one (it gives character offsets).
        max_length: longest example in tokens; None: no limit.
        truncation: ``reject``, ``cut`` or ``split`` for longer ones.

    Raises:
        UserError: the tokenizer gives no character offsets.
    """

    def __init__(self, renderer: Renderer, *, max_length: int | None = None, truncation: str = "reject") -> None:
        self.renderer = renderer
        self.tokenizer: PreTrainedTokenizerBase = renderer.tokenizer
        self.max_length = max_length
        self.truncation = truncation
        if not self.tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(self.tokenizer).__name__} gives no character offsets",
                remedy="use a model with a fast tokenizer (one that has a tokenizer.json)",
            )

        self._missing = missing_bytes(self.tokenizer)

    def encode(self, examples: Sequence[TrainingExample], *, chunk: int = 1000) -> Encoded:
        """Every example as token ids, or as a reject that says why not."""
        result = Encoded()
        for begin in range(0, len(examples), chunk):
            rendered: list[tuple[int, Rendered]] = []
            for index in range(begin, min(begin + chunk, len(examples))):
                try:
                    whole = self.renderer.render(examples[index])
                    whole.text.encode("utf-8")
                    rendered.append((index, whole))
                except UnicodeEncodeError as error:
                    message = f"the text has half a character (a lone surrogate) at {error.start:,}"
                    result.rejects.append(_reject(examples[index], "half_character", message, "mend the text"))
                except RenderError as error:
                    result.rejects.append(_reject(examples[index], error.reason, str(error), error.remedy))
            for index, item in self._tokenise(rendered, examples):
                kept = [item] if isinstance(item, Reject) else list(self._fit(item, examples[index]))
                if kept and isinstance(kept[0], Reject):
                    result.rejects.append(kept[0])
                else:
                    result.examples.extend(e for e in kept if isinstance(e, EncodedExample))
        return result

    def _tokenise(
        self, rendered: list[tuple[int, Rendered]], examples: Sequence[TrainingExample]
    ) -> Iterator[tuple[int, EncodedExample | Reject]]:
        if not rendered:
            return
        batch = self.tokenizer(
            [r.text for _, r in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        for (index, item), ids, offsets in zip(rendered, batch["input_ids"], batch["offset_mapping"], strict=True):
            ranges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            lost = self._lost(item.text, ids)
            if lost:
                message = f"the model's vocabulary has no token for {shorten(lost)}, which would vanish from the text"
                yield index, _reject(examples[index], "characters_lost", message, "take these characters out")
                continue
            trained = trained_tokens(ranges, item.spans)
            yield (
                index,
                EncodedExample(np.asarray(ids, dtype=np.int32), trained, examples[index].source, index),
            )

    def _lost(self, text: str, ids: list[int]) -> str:
        """Characters of a text that its tokens do not hold."""
        if self._missing and not self._missing.isdisjoint(text.encode("utf-8")):
            return "".join(c for c in text if not self._missing.isdisjoint(c.encode("utf-8")))
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids and str(self.tokenizer.unk_token) not in text:
            return f"some characters of {shorten(text)}"
        return ""

    def _fit(self, item: EncodedExample, example: TrainingExample) -> Iterable[EncodedExample | Reject]:
        """The example within ``max_length``, or the reject that says why it is not."""
        limit = self.max_length
        if limit is not None and len(item) > limit:
            if self.truncation == "split" and example.is_plain_text:
                # The last token of a piece opens the next one, so that every token is still predicted once.
                for begin in range(0, len(item) - 1, limit - 1):
                    ids = item.input_ids[begin : begin + limit]
                    trained = item.trained[begin : begin + limit].copy()
                    trained[0] = False
                    yield EncodedExample(ids, trained, item.source, item.index)
                return
            if self.truncation != "cut":
                yield _reject(
                    example,
                    "too_long",
                    f"the row has {len(item):,} tokens, more than data.max_length={limit:,}",
                    "raise data.max_length, shorten the row, or set data.truncation=cut to lose the end of it",
                )
                return
            lost = int(item.trained[limit:].sum())
            item = EncodedExample(item.input_ids[:limit], item.trained[:limit], item.source, item.index, cut=lost)
        if not item.trained.any():
            yield _reject(
                example,
                "nothing_trained",
                "no token of the row would be trained"
                + (f": its answer starts after data.max_length={limit}" if item.cut else ""),
                "give it an answer" if not item.cut else "raise data.max_length",
            )
            return
        yield item


def missing_bytes(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has no token for, and whose characters its tokenizer drops in silence.

    SmolLM2's lacks some control characters and the bytes of unassigned planes. The table from bytes to the letters
    that stand for them is that of GPT-2 (Radford et al., 2019): printable ones are themselves, the others follow
    from U+0100 on.
    """
    if '"ByteLevel"' not in tokenizer.backend_tokenizer.to_str():
        return frozenset()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocabulary = tokenizer.get_vocab()
    return frozenset(byte for byte, letter in letters.items() if letter not in vocabulary)


def trained_tokens(offsets: np.ndarray, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """Which tokens are trained: those that hold a character of a span.

    Args:
        offsets: ``[n, 2]`` character range of each token.
        spans: half-open character ranges.

    Returns:
        ``[n] bool``; the first token is never trained, for nothing precedes it.
    """
    start, end = offsets[:, 0], offsets[:, 1]
    trained = np.zeros(len(offsets), dtype=bool)
    for begin, stop in spans:
        # A token without characters of its own (some tokenizers have them) belongs where it stands.
        trained |= np.where(end > start, (end > begin) & (start < stop), (start >= begin) & (start < stop))
    trained[:1] = False
    return trained


def _reject(example: TrainingExample, reason: str, message: str, remedy: str | None) -> Reject:
    source = example.source or UNKNOWN_SOURCE
    value = example.input or (str(example.messages[-1].get("content")) if example.messages else "")
    shown = shorten(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return Reject(source.file, source.line, reason, message, value=shown, remedy=remedy)
