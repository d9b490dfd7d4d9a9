"""The cleaners as one public class, thin over luthier.data.cleaning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.data.cleaning import Cleaning, StepReport
from luthier.data.cleaning.characters import remove_special_chars
from luthier.data.cleaning.spacing import normalize_whitespace, remove_empty_lines
from luthier.data.cleaning.truncate import truncate_by_tokens
from luthier.data.examples import Reject, TrainingExample
from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cleaner = Callable[[str], str]


class DataPreprocessor:
    """Cleans texts and examples with the cleaners that were added, in their order; without any, nothing changes.

    Rows that a filter refused, or of which cleaning left nothing to ask or to answer, are in ``rejects``, and a warning
    counts them.

    Args:
        tokenizer: the model's, for the cleaners that count tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.rejects: list[Reject] = []
        self._cleaning = Cleaning(tokenizer=tokenizer)

    @property
    def cleaners(self) -> list[Callable[..., Any]]:
        """The functions that were added, in their order."""
        return self._cleaning.functions

    def add_cleaner(self, cleaner: Callable[..., Any] | str, **options: Any) -> DataPreprocessor:
        """Add a function, from text to text or from row to row, or a built-in one by its name, with its options.

        Raises:
            UserError: it cannot be called, no built-in has that name, or it has no such option.
        """
        self._cleaning.add(cleaner, **options)
        return self

    def clean_text(self, text: str) -> str:
        """The text after every cleaner.

        Raises:
            UserError: a cleaner gave back something else.
        """
        return self._cleaning.clean_text(text)

    def clean_examples(self, examples: Iterable[TrainingExample]) -> list[TrainingExample]:
        """Every example with its texts cleaned; the ones given stay as they are.

        A row that a filter refuses, or of which cleaning left no prompt or no answer, is not returned but added to
        ``rejects``: an empty answer would teach the model to say nothing.
        """
        outcomes = list(self._cleaning.apply(examples))
        refused = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
        self.rejects += refused
        if refused:
            verb = "emptied" if all(reject.reason == "emptied" for reject in refused) else "refused"
            warnings.warn(
                f"cleaning {verb} {len(refused)} of {len(outcomes)} rows; first: {refused[0].file}:"
                f"{refused[0].line}: {refused[0].message}; all are in .rejects",
                stacklevel=2,
            )
        return [outcome for outcome in outcomes if isinstance(outcome, TrainingExample)]

    def report(self) -> list[StepReport]:
        """What each cleaner has done to the examples so far; ``luthier.data.cleaning.render_cleaning`` prints it."""
        return self._cleaning.report()

    remove_special_chars = staticmethod(remove_special_chars)
    normalize_whitespace = staticmethod(normalize_whitespace)
    remove_empty_lines = staticmethod(remove_empty_lines)

    @staticmethod
    def truncate_by_tokens(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Cleaner:
        """A cleaner that keeps at most the first ``max_tokens`` tokens of a text, cut between characters.

        Raises:
            UserError: max_tokens is below 1.
        """
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens} leaves nothing", remedy="give at least 1")
        return partial(truncate_by_tokens, tokenizer=tokenizer, max_tokens=max_tokens)
