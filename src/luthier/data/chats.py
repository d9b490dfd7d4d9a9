"""Conversations, answers and plain texts, encoded: one tokenisation of what the template renders.

What is trained is found by the characters that tokens hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from luthier.data.encode import EncodedRow, Encoder, Run, WordsDiffer, between, mask, reject, runs_of
from luthier.data.examples import Reject, TrainingExample
from luthier.data.render import Rendered, Renderer, RenderError
from luthier.data.words import WordTokenizer, byte_letters
from luthier.errors import UserError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Tokens = tuple[np.ndarray, list[Run], str]
# So many rows pay for trying the tokenizer's characters.
_WORDS_PAY = 500
# Of the rows that are encoded word by word, one in so many is encoded by the tokenizer too, and must be the same.
_COMPARED = 100


class ChatEncoder(Encoder):
    """Renders and tokenises examples.

    Args:
        renderer: holds the tokenizer, which must be a fast one (it gives character offsets).
        max_length: longest example in tokens; None: no limit.
        truncation: ``reject``, ``cut`` or ``split`` for longer ones.
        by_words: encode word by word where the tokenizer allows it; the ids are the same.

    Raises:
        UserError: the tokenizer gives no character offsets.
    """

    def __init__(
        self, renderer: Renderer, *, max_length: int | None = None, truncation: str = "reject", by_words: bool = True
    ) -> None:
        super().__init__(
            renderer.tokenizer,
            max_length=max_length,
            truncation=truncation,
            allow_special_tokens=renderer.allow_special_tokens,
        )
        self.renderer = renderer
        self.by_words = by_words
        if not self.tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(self.tokenizer).__name__} gives no character offsets",
                remedy="use a model with a fast tokenizer (one that has a tokenizer.json)",
            )

        missing = missing_bytes(self.tokenizer)
        self._missing = re.compile(b"[" + re.escape(bytes(sorted(missing))) + b"]") if missing else None
        self._met = 0
        self._by_words = 0

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`Encoder.settings`."""
        renderer = self.renderer
        return {
            "rendering": {k: getattr(renderer, k) for k in ("system", "train_on", "allow_special_tokens")},
            "max_length": self.max_length,
            "truncation": self.truncation,
        }

    @classmethod
    def made(cls, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], *, by_words: bool) -> Self:
        """See :meth:`Encoder.made`."""
        limits = {k: settings[k] for k in ("max_length", "truncation")}
        return cls(Renderer(tokenizer, **settings["rendering"]), by_words=by_words, **limits)

    @cached_property
    def _words(self) -> WordTokenizer | None:
        return WordTokenizer.of(self.tokenizer, missing_bytes(self.tokenizer))

    def _encode(self, examples: Sequence[TrainingExample], first: int) -> Iterator[EncodedRow | Reject]:
        rendered: list[Rendered | None] = []
        refused: dict[int, Reject] = {}
        for number, example in enumerate(examples):
            rendered.append(None)
            try:
                whole = self.renderer.render(example)
                whole.text.encode("utf-8")
                rendered[-1] = whole
            except UnicodeEncodeError as error:
                message = f"the text has half a character (a lone surrogate) at {error.start:,}"
                refused[number] = reject(example, "half_character", message, "mend the text")
            except RenderError as error:
                refused[number] = reject(example, error.reason, str(error), error.remedy)
        tokenised = iter(self._tokenise([r for r in rendered if r is not None]))
        for number, (example, whole_or_none) in enumerate(zip(examples, rendered, strict=True)):
            if whole_or_none is None:
                yield refused[number]
                continue
            ids, runs, lost = next(tokenised)
            if lost:
                message = f"the model's vocabulary has no token for {shorten(lost)}, which would vanish from the text"
                yield reject(example, "characters_lost", message, "take these characters out")
                continue
            yield from self._fit(EncodedRow(ids, between(runs, 1, len(ids)), example.source, first + number), example)

    def _tokenise(self, rendered: Sequence[Rendered]) -> list[_Tokens]:
        """Ids of each text, the ranges of them that are trained, and the characters that they do not hold."""
        result: list[_Tokens | None] = [None] * len(rendered)
        compared: list[int] = []
        self._met += len(rendered)
        words = self._words if self.by_words and self._met > _WORDS_PAY else None
        if words is not None:
            for number, item in enumerate(rendered):
                found = words.encode(item.text, item.spans) if words.covers(item.text) else None
                if found is not None:
                    result[number] = (*found, "")
                    self._by_words += 1
                    if self._by_words <= _COMPARED or self._by_words % _COMPARED == 0:
                        compared.append(number)
        left = [number for number, made in enumerate(result) if made is None]
        by_tokenizer = self._by_tokenizer([rendered[number] for number in [*left, *compared]])
        for number, made in zip(left, by_tokenizer, strict=False):
            result[number] = made
        for number, made in zip(compared, by_tokenizer[len(left) :], strict=True):
            ours = result[number]
            if (
                ours is None
                or not np.array_equal(ours[0], made[0])
                or not np.array_equal(mask(ours[1], len(made[0])), mask(made[1], len(made[0])))
                or made[2]
            ):
                raise WordsDiffer
        return [made for made in result if made is not None]

    def _by_tokenizer(self, rendered: Sequence[Rendered]) -> list[_Tokens]:
        if not rendered:
            return []
        batch = self.tokenizer(
            [r.text for r in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        made: list[_Tokens] = []
        for item, ids, offsets in zip(rendered, batch["input_ids"], batch["offset_mapping"], strict=True):
            ranges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            runs = runs_of(trained_tokens(ranges, item.spans))
            made.append((np.asarray(ids, dtype=np.int32), runs, self._lost(item.text, ids)))
        return made

    def _lost(self, text: str, ids: list[int]) -> str:
        """Characters of a text that its tokens do not hold."""
        if self._missing and self._missing.search(text.encode("utf-8")):
            return "".join(c for c in text if self._missing.search(c.encode("utf-8")))
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids and str(self.tokenizer.unk_token) not in text:
            return f"some characters of {shorten(text)}"
        return ""

    def _fit(self, row: EncodedRow, example: TrainingExample) -> Iterable[EncodedRow | Reject]:
        """The example within ``max_length``, or the reject that says why it is not."""
        limit, ids = self.max_length, row.input_ids
        if limit is not None and len(ids) > limit:
            if self.truncation == "split" and example.is_plain_text:
                # The last token of a piece opens the next one, so that every token is still predicted once.
                for begin in range(0, len(ids) - 1, limit - 1):
                    end = begin + limit
                    runs = [(a - begin, b - begin) for a, b in between(row.runs, begin + 1, end)]
                    yield EncodedRow(ids[begin:end], runs, row.source, row.index)
                return
            if self.truncation != "cut":
                yield reject(
                    example,
                    "too_long",
                    f"the row has {len(ids):,} tokens, more than data.max_length={limit:,}",
                    "raise data.max_length, shorten the row, or set data.truncation=cut to lose the end of it",
                )
                return
            lost = sum(b - a for a, b in between(row.runs, limit, len(ids)))
            row = EncodedRow(ids[:limit], between(row.runs, 1, limit), row.source, row.index, cut=lost)
        if not row.runs:
            yield reject(
                example,
                "nothing_trained",
                "no token of the row would be trained"
                + (f": its answer starts after data.max_length={limit}" if row.cut else ""),
                "give it an answer" if not row.cut else "raise data.max_length",
            )
            return
        yield row


def missing_bytes(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Bytes that a byte-level vocabulary has no token for, and whose characters its tokenizer drops in silence.

    SmolLM2's lacks some control characters and the bytes of unassigned planes.
    """
    backend = tokenizer.backend_tokenizer
    if "ByteLevel" not in f"{backend.pre_tokenizer}{backend.decoder}":
        return frozenset()
    vocabulary = tokenizer.get_vocab()
    return frozenset(byte for byte, letter in byte_letters().items() if letter not in vocabulary)


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
