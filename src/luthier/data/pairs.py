"""Sources and targets of encoder-decoder models, encoded: one row a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rapidfuzz import process

from luthier.data.encode import EncodedRow, Encoder, reject
from luthier.data.examples import Reject, TrainingExample
from luthier.data.render import RenderError
from luthier.errors import UserError, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairEncoder(Encoder):
    """Pairs of texts as one row each: the tokens of the source, which are not trained, then all those of the target.

    Each side has the special tokens that the tokenizer puts there. ``extra`` of a row is what was cut off its source;
    ``cut`` is what was cut off its target.

    Args:
        tokenizer: of an encoder-decoder model; its languages are set to those given.
        max_length: longest source in tokens; None: no limit.
        max_target_length: longest target; None: no limit.
        truncation: ``reject`` or ``cut`` longer ones; what the tokenizer puts at the end stays there.
        source_prefix: put before every source.
        src_lang: the sources' language; None: the tokenizer's own.
        tgt_lang: the targets'; None: the tokenizer's own.
        allow_special_tokens: encode rows whose text holds control tokens, instead of refusing them.

    Raises:
        UserError: the tokenizer knows no languages, or not these, or a language is wanting.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        max_target_length: int | None = None,
        truncation: str = "reject",
        source_prefix: str = "",
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        allow_special_tokens: bool = False,
    ) -> None:
        super().__init__(
            tokenizer, max_length=max_length, truncation=truncation, allow_special_tokens=allow_special_tokens
        )
        self.max_target_length = max_target_length
        self.source_prefix = source_prefix
        _set_languages(tokenizer, src_lang, tgt_lang)
        self.src_lang: str | None = getattr(tokenizer, "src_lang", None)
        self.tgt_lang: str | None = getattr(tokenizer, "tgt_lang", None)

    @property
    def settings(self) -> dict[str, Any]:
        """See :attr:`Encoder.settings`."""
        names = ("max_target_length", "source_prefix", "src_lang", "tgt_lang")
        return super().settings | {name: getattr(self, name) for name in names}

    def texts(self, example: TrainingExample) -> tuple[str, str | None]:
        """The source of an example, with the prefix, and its target; None where it has none.

        Raises:
            RenderError: it is a conversation of more than one exchange.
        """
        if example.messages is None:
            return self.source_prefix + example.input, example.output
        turns = example.messages
        if [turn["role"] for turn in turns] not in (["user", "assistant"], ["user"]) or example.tools:
            roles = ", ".join(str(turn["role"]) for turn in turns[:6])
            raise RenderError(
                "conversation",
                f"a conversation of the turns {roles} is no source with its target",
                "give a question and its answer alone; what a system turn says belongs into task.source_prefix",
            )
        source, *target = (str(turn.get("content") or "") for turn in turns)
        return self.source_prefix + source, target[0] if target else None

    def _encode(self, examples: Sequence[TrainingExample], first: int) -> Iterator[EncodedRow | Reject]:
        found = [self._pair(example) for example in examples]
        pairs = [pair for pair in found if not isinstance(pair, Reject)]
        sources = iter(self._ids([source for source, _ in pairs]))
        targets = iter(self._ids([target for _, target in pairs], target=True))
        for number, (example, pair) in enumerate(zip(examples, found, strict=True), first):
            if isinstance(pair, Reject):
                yield pair
            else:
                yield self._row(example, pair, next(sources), next(targets), number)

    def _ids(self, texts: list[str], *, target: bool = False, limit: int | None = None) -> list[list[int]]:
        if not texts:
            return []
        given: dict[str, Any] = {"text_target" if target else "text": texts}
        made = self.tokenizer(**given, truncation=limit is not None, max_length=limit, verbose=False)
        ids: list[list[int]] = made["input_ids"]
        return ids

    def _row(
        self, example: TrainingExample, pair: tuple[str, str], source: list[int], target: list[int], number: int
    ) -> EncodedRow | Reject:
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in target and str(self.tokenizer.unk_token) not in pair[1]:
            return reject(
                example,
                "characters_lost",
                f"the model's vocabulary has no token for some characters of the target {shorten(pair[1])}",
                "take them out, or name a model whose vocabulary has them",
            )
        cut = []
        sides = (("source", "data.max_length", self.max_length), ("target", "task.max_target_length", None))
        for (what, field, limit), ids in zip(sides, (source, target), strict=True):
            limit = self.max_target_length if what == "target" else limit
            over = 0 if limit is None else max(0, len(ids) - limit)
            if over and self.truncation != "cut":
                return reject(
                    example,
                    "too_long",
                    f"the {what} has {len(ids):,} tokens, more than the model or {field} takes ({limit:,})",
                    f"raise {field} if the model takes more, or set data.truncation=cut to leave out its end",
                )
            cut.append(over)
        if cut[0]:
            (source,) = self._ids([pair[0]], limit=self.max_length)
        if cut[1]:
            (target,) = self._ids([pair[1]], target=True, limit=self.max_target_length)
        row = np.array(source + target, dtype=np.int32)
        return EncodedRow(row, [(len(source), len(row))], example.source, number, cut[1], (cut[0],))

    def _pair(self, example: TrainingExample) -> tuple[str, str] | Reject:
        """The two texts of an example, or why it has none that can be learnt."""
        try:
            source, target = self.texts(example)
        except RenderError as error:
            return reject(example, error.reason, str(error), error.remedy)
        if target is None or not target.strip():
            return reject(example, "no_answer", "the row has no target", "give it an answer, or take the row out")
        for what, text in (("source", source.removeprefix(self.source_prefix)), ("target", target)):
            if (unreadable := self._unreadable(example, text, what)) is not None:
                return unreadable
        return source, target


def _set_languages(tokenizer: Any, src_lang: str | None, tgt_lang: str | None) -> None:
    for name, code in (("src_lang", src_lang), ("tgt_lang", tgt_lang)):
        if not hasattr(tokenizer, name):
            if code is not None:
                raise UserError(
                    f"the tokenizer {type(tokenizer).__name__} has no languages to choose from",
                    where=f"task.{name}",
                    remedy="leave it empty; models like T5 are told by words in task.source_prefix",
                )
            continue
        if code is None:
            if getattr(tokenizer, name) is None:
                raise UserError(
                    "the tokenizer opens texts with their language, and none is named",
                    where=f"task.{name}",
                    remedy="name it as the tokenizer does, for example en_XX or eng_Latn",
                )
            continue
        known = {*tokenizer.get_vocab(), *getattr(tokenizer, "lang_code_to_token", ())}
        if code not in known:
            near = process.extractOne(code, [token for token in tokenizer.all_special_tokens if token])
            raise UserError(
                f"the tokenizer has no language {code!r}",
                where=f"task.{name}",
                remedy=f"did you mean {near[0]!r}?" if near else "name it as the tokenizer does",
            )
        setattr(tokenizer, name, code)
        # What is saved with the model are the arguments it was made with.
        tokenizer.init_kwargs[name] = code
