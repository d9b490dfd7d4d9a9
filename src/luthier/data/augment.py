"""More examples from those there are: the prompt varies, the answer never does."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from luthier.data.examples import TrainingExample
from luthier.errors import UserError, shorten

Augmenter = Callable[..., str]
"""From a text to a variant of it; may take a :class:`random.Random` as its second argument."""


class DataAugmentor:
    """Adds variants of examples.

    Args:
        seed: the same examples and seed give the same variants.
    """

    def __init__(self, seed: int = 42) -> None:
        self.seed = seed
        self.augmenters: list[Augmenter] = []

    def add_augmenter(self, augmenter: Augmenter) -> DataAugmentor:
        """Add a way to vary a text.

        Raises:
            UserError: it cannot be called.
        """
        if not callable(augmenter):
            raise UserError(
                f"an augmenter must be a function from text to text, not {type(augmenter).__name__}",
                remedy="for example DataAugmentor.noise_injection",
            )
        self.augmenters.append(augmenter)
        return self

    def augment_examples(
        self, examples: Sequence[TrainingExample], augment_ratio: float = 0.1
    ) -> list[TrainingExample]:
        """The examples, followed by variants of some of them.

        Augment training rows alone, after the split: a variant of a held-out row is the held-out row.

        Args:
            examples: stay as they are.
            augment_ratio: how many variants, as a share of the examples; each example gets one at most.

        Returns:
            all examples and ``int(len(examples) * augment_ratio)`` variants, or as many as could be varied.

        Raises:
            UserError: no augmenter was added, or the ratio is not between 0 and 1.
        """
        if not self.augmenters:
            raise UserError("no augmenter was added", remedy="add_augmenter(DataAugmentor.noise_injection)")
        if not 0 <= augment_ratio <= 1:
            raise UserError(f"augment_ratio={augment_ratio!r} is no share between 0 and 1", remedy="for example 0.1")
        rng = random.Random(self.seed)
        wanted = int(len(examples) * augment_ratio)
        order = list(range(len(examples)))
        rng.shuffle(order)
        made: list[TrainingExample] = []
        for index in order:
            if len(made) == wanted:
                break
            variant = self._variant(examples[index], rng.choice(self.augmenters), rng)
            if variant is not None:
                made.append(variant)
        return [*examples, *made]

    def _variant(self, example: TrainingExample, augmenter: Augmenter, rng: random.Random) -> TrainingExample | None:
        """A variant of an example, or None where its text came back as it was or all of it is trained."""
        if example.is_plain_text and example.label is None:
            return None
        metadata = {
            **(example.metadata or {}),
            "augmented_by": getattr(augmenter, "__name__", "augmenter"),
            "augmented_from": str(example.source) if example.source else None,
        }
        if example.messages is None:
            text = _apply(augmenter, example.input, rng, example)
            return None if text == example.input else replace(example, input=text, metadata=metadata)
        messages = [dict(m) for m in example.messages]
        for message in reversed(messages):
            if message["role"] == "user":
                text = _apply(augmenter, message["content"], rng, example)
                if text == message["content"]:
                    return None
                message["content"] = text
                return replace(example, messages=messages, metadata=metadata)
        return None

    @staticmethod
    def noise_injection(text: str, rng: random.Random | None = None, noise_ratio: float = 0.1) -> str:
        """Typing slips in a share of the words: two neighbouring letters swapped, one doubled or one left out.

        Words of four letters and more are touched, inside and never at their ends; digits, punctuation and scripts
        without letter case (Chinese) stay, for a slip there would change what is said.

        Args:
            text: any text.
            rng: where chance comes from.
            noise_ratio: share of the words that get a slip; at least one does, where any can.

        Raises:
            UserError: noise_ratio is not between 0 and 1.
        """
        if not 0 <= noise_ratio <= 1:
            raise UserError(f"noise_ratio={noise_ratio!r} is no share between 0 and 1", remedy="for example 0.1")
        rng = rng or random.Random()
        words = text.split(" ")
        fit = [i for i, w in enumerate(words) if len(w) >= 4 and w.isalpha() and w.upper() != w.lower()]
        count = min(len(fit), max(1, round(len(fit) * noise_ratio))) if noise_ratio else 0
        for index in rng.sample(fit, count):
            words[index] = _slip(words[index], rng)
        return " ".join(words)


def _slip(word: str, rng: random.Random) -> str:
    swaps = [i for i in range(1, len(word) - 2) if word[i] != word[i + 1]]
    at = rng.randrange(1, len(word) - 1)
    kind = rng.choice(("swap", "double", "drop")) if swaps else rng.choice(("double", "drop"))
    if kind == "swap":
        at = rng.choice(swaps)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[: at + 1] + word[at:] if kind == "double" else word[:at] + word[at + 1 :]


def _apply(augmenter: Augmenter, text: str, rng: random.Random, example: TrainingExample) -> str:
    """Call an augmenter, with the seeded chance where it takes it.

    Raises:
        UserError: it fails, or gives back no text.
    """
    name = getattr(augmenter, "__name__", repr(augmenter))
    where = str(example.source) if example.source else f"the example {shorten(text)}"
    try:
        positional = len(inspect.signature(augmenter).parameters) > 1
    except (TypeError, ValueError):
        positional = False
    try:
        varied = augmenter(text, rng) if positional else augmenter(text)
    except Exception as error:
        what = f"the augmenter {name!r} failed: {type(error).__name__}: {error}"
        raise UserError(what, where=where, remedy="mend the augmenter") from error
    if not isinstance(varied, str):
        raise UserError(f"the augmenter {name!r} returned {type(varied).__name__}, not text", where=where)
    return varied
