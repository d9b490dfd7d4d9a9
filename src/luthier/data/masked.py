"""Texts with some words hidden: encoded with the borders of their words, and hidden anew at each step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.data.borders import words_of_tokens
from luthier.data.encode import EncodedExample, EncodedRow, Encoder, reject, runs_of
from luthier.data.examples import Reject, TrainingExample
from luthier.errors import UserError
from luthier.task_options import MaskedTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Masking:
    """Which tokens of a row are hidden, and what stands in their places.

    Devlin et al., 2019, arXiv:1810.04805: 15% of the tokens are chosen, of which 80% are replaced by the mask token
    and 10% by another one, and 10% stay. Each word is chosen or not, on its own; where a row would have none, one is.
    """

    mask_token_id: int
    replacements: np.ndarray
    """``[V'] int64``: tokens that may stand for a chosen one; no special ones"""
    seed: int
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, task: MaskedTask, seed: int) -> Masking:
        """As the recipe says."""
        ids = np.array(sorted(tokenizer.get_vocab().values()))
        return cls(
            require_mask_token(tokenizer),
            ids[~np.isin(ids, tokenizer.all_special_ids)],
            seed,
            task.mlm_probability,
            task.mask_replace_prob,
            task.random_replace_prob,
        )

    def draw(self, row: EncodedExample, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A row with tokens hidden: a function of seed, number and the row's tokens alone.

        Args:
            row: made by :class:`MaskEncoder`.
            number: of the draw: a step's, from 1; 0 where it must always be the same one.

        Returns:
            ``[n] int32`` the tokens to read, and ``[k] int64`` the places, ascending, of those to predict.
        """
        digest = hashlib.blake2b(row.input_ids.tobytes(), digest_size=8).digest()
        rng = np.random.default_rng([self.seed, number, int.from_bytes(digest, "little")])
        at = np.flatnonzero(row.trained)
        words = words_of(row)
        count = int(words[-1]) + 1
        chosen = rng.random(count) < self.mlm_probability
        if not chosen.any():
            chosen[rng.integers(count)] = True
        at = at[chosen[words]]
        fate = rng.random(len(at))
        ids = row.input_ids.copy()
        ids[at[fate < self.mask_replace_prob]] = self.mask_token_id
        swapped = at[(fate >= self.mask_replace_prob) & (fate < self.mask_replace_prob + self.random_replace_prob)]
        ids[swapped] = rng.choice(self.replacements, len(swapped))
        return ids, at


def require_mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of the mask token.

    Raises:
        UserError: there is none.
    """
    number: int | None = tokenizer.mask_token_id
    if number is None:
        raise UserError(
            "this model's tokenizer has no mask token, so nothing can be hidden",
            where="model.name",
            remedy="name an encoder that was trained to fill in words, such as BERT or RoBERTa, or use task=causal_lm",
        )
    return number


def words_of(row: EncodedExample) -> np.ndarray:
    """``[k] int64``: which of the row's words, from 0, each token that may be hidden belongs to."""
    if not row.extra:
        return np.arange(int(row.trained.sum()))
    begins = np.zeros(len(row), dtype=np.int64)
    begins[list(row.extra)] = 1
    return np.cumsum(begins)[row.trained] - 1


class MaskEncoder(Encoder):
    """Texts as an encoder reads them: the tokens of the text, and those that the tokenizer puts around every text.

    ``trained`` marks the tokens that may be hidden: all but special ones, unknown ones among them. ``extra`` are the
    places where the words of these begin; empty where each token is on its own. A row with an answer is read as one
    text: the prompt, a line break, the answer.

    Args:
        tokenizer: a fast one, with a mask token.
        whole_word_mask: whether a word's tokens are hidden together.
        masking: how words are to be hidden, for those who show or train on the rows; it changes none of them.
        max_length: longest text in tokens; None: no limit.
        truncation: ``reject``, ``cut`` or ``split`` longer ones; what the tokenizer puts around a text stands around
            each piece.
        allow_special_tokens: take rows whose text holds special tokens, instead of refusing them.

    Raises:
        UserError: the tokenizer gives no character offsets, or has no mask token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        whole_word_mask: bool = True,
        masking: Masking | None = None,
        max_length: int | None = None,
        truncation: str = "reject",
        allow_special_tokens: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets",
                remedy="use a model with a fast tokenizer (one that has a tokenizer.json)",
            )
        require_mask_token(tokenizer)
        super().__init__(
            tokenizer, max_length=max_length, truncation=truncation, allow_special_tokens=allow_special_tokens
        )
        self.whole_word_mask = whole_word_mask
        self.masking = masking

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`Encoder.settings`."""
        return super().settings | {"whole_word_mask": self.whole_word_mask}

    def _encode(self, examples: Sequence[TrainingExample], first: int) -> Iterator[EncodedRow | Reject]:
        wrong = [self._wrong(example) for example in examples]
        texts = [e.to_causal_lm_format() for e, problem in zip(examples, wrong, strict=True) if problem is None]
        made = iter(self._tokens_of(texts) if texts else ())
        for number, (example, problem) in enumerate(zip(examples, wrong, strict=True), first):
            if problem is not None:
                yield problem
            else:
                yield from self._rows(example, number, *next(made))

    def _tokens_of(self, texts: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
        """Of each text ``[n]`` ids, ``[n]`` words (-1: never hidden), and how many tokens stand before and after it."""
        batch = self.tokenizer(
            texts,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )
        columns = (batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"])
        for text, ids_, offsets, added in zip(texts, *columns, strict=True):
            ids = np.array(ids_, dtype=np.int32)
            own = np.flatnonzero(np.array(added) == 0)
            around = (int(own[0]), len(ids) - 1 - int(own[-1])) if len(own) else (len(ids), 0)
            words = words_of_tokens(text, np.array(offsets, dtype=np.int64).reshape(-1, 2))
            if not self.whole_word_mask:
                words = np.arange(len(ids))
            never = np.array(added, dtype=bool) | np.isin(ids, self.tokenizer.all_special_ids)
            yield ids, np.where(never, -1, words), around

    def _rows(
        self, example: TrainingExample, number: int, ids: np.ndarray, words: np.ndarray, around: tuple[int, int]
    ) -> Iterator[EncodedRow | Reject]:
        """The text as one row, as the pieces of it, or refused."""
        limit, length = self.max_length, len(ids)
        before, after = around
        pieces, cut = [(before, length - after)], 0
        if limit is not None and length > limit:
            if self.truncation == "split":
                pieces = list(_pieces(words, before, length - after, limit - before - after))
            elif self.truncation == "cut":
                pieces, cut = [(before, limit - after)], length - limit
            else:
                yield reject(
                    example,
                    "too_long",
                    f"the text has {length:,} tokens, more than the model or data.max_length={limit:,} takes",
                    "raise data.max_length if the model takes more, or set data.truncation: split takes the text in "
                    "pieces, cut reads its beginning",
                )
                return
        rows = []
        for begin, end in pieces:
            taken = np.r_[0:before, begin:end, length - after : length]
            row = self._row(example, number, ids[taken], words[taken])
            if row.runs:
                rows.append(row)
            else:
                cut += end - begin
        if not rows:
            yield reject(
                example,
                "nothing_to_hide",
                "the text has no token that could be hidden: the vocabulary knows none of it",
                "take the row out, or name a model that was trained on texts of this language",
            )
            return
        rows[0].cut = cut
        yield from rows

    def _row(self, example: TrainingExample, number: int, ids: np.ndarray, words: np.ndarray) -> EncodedRow:
        if words[0] >= 0:
            # The first token of any row is never trained; here it is a word's, which would be hidden in part.
            words = np.where(words == words[0], -1, words)
        hidden = words >= 0
        begins: list[int] = []
        if self.whole_word_mask:
            begins = np.flatnonzero(hidden & (words != np.r_[-1, words[:-1]])).tolist()
        return EncodedRow(ids, runs_of(hidden), example.source, number, extra=tuple(begins))

    def _wrong(self, example: TrainingExample) -> Reject | None:
        if example.messages is not None:
            return reject(
                example, "conversation", "a conversation is no one text to hide words of", "name the text's column"
            )
        return self._unreadable(example, example.to_causal_lm_format())


def _pieces(words: np.ndarray, begin: int, end: int, room: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``room`` tokens that end where a word does, where one does in them."""
    begins = np.flatnonzero(words != np.r_[-2, words[:-1]])
    while end - begin > room:
        border = int(begins[np.searchsorted(begins, begin + room, side="right") - 1])
        stop = border if border > begin else begin + room
        yield begin, stop
        begin = stop
    yield begin, end
