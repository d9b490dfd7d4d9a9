"""``DataAugmentor``: more examples from those there are; thin over :mod:`luthier.data.augmentation`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from luthier.data.augmentation import Augmentation, AugmentationReport, Augmenter
from luthier.data.augmentation.noise import noise_injection
from luthier.data.augmentation.rewriting import Refused, back_translation
from luthier.data.augmentation.synonyms import synonym_replacement
from luthier.data.augmentation.ways import way_of
from luthier.data.examples import TrainingExample
from luthier.data_options import Step
from luthier.endpoint import Answerer
from luthier.errors import UserError


class DataAugmentor:
    """Adds variants of examples: the prompt varies, the answer and the label never do unless asked.

    Args:
        seed: the same examples and seed give the same variants.
    """

    synonym_replacement = staticmethod(synonym_replacement)
    noise_injection = staticmethod(noise_injection)

    def __init__(self, seed: int = 42) -> None:
        self.seed = seed
        self.augmenters: list[Augmenter | Step] = []
        self.report: AugmentationReport | None = None

    def add_augmenter(self, augmenter: Augmenter | str, **options: Any) -> DataAugmentor:
        """Add a way to vary a text.

        Args:
            augmenter: a function from text to text, or a built-in's name.
            options: the built-in's options (docs/data.md lists them), for example ``base_url`` and ``model``.

        Raises:
            UserError: it cannot be called, no built-in has that name, or it has no such option.
        """
        if augmenter is back_translation or augmenter is DataAugmentor.back_translation:
            augmenter = "back_translation"
        step = Step(name=augmenter, options=options) if isinstance(augmenter, str) else augmenter
        if options and not isinstance(step, Step):
            raise UserError(
                "options are for built-in augmenters", remedy="give a function its own with functools.partial"
            )
        way_of(step, f"add_augmenter({getattr(augmenter, '__name__', augmenter)})")
        self.augmenters.append(step)
        return self

    def augment_examples(
        self, examples: Sequence[TrainingExample], augment_ratio: float = 0.1
    ) -> list[TrainingExample]:
        """The examples, followed by variants of some of them.

        Augment training rows alone, after the split: a variant of a held-out row is the held-out row.

        Args:
            examples: stay as they are.
            augment_ratio: how many variants, as a share of the examples; above 1, several of each, no two alike.

        Returns:
            all examples and ``int(len(examples) * augment_ratio)`` variants, or as many as could be varied. What
            became of the others is in ``report``.

        Raises:
            UserError: no augmenter was added, the ratio is below 0, or an augmenter fails.
        """
        if not self.augmenters:
            raise UserError("no augmenter was added", remedy="add_augmenter(DataAugmentor.noise_injection)")
        augmentation = Augmentation(self.augmenters, augment_ratio, self.seed)
        made = [*examples, *augmentation.apply(examples)]
        self.report = augmentation.report()
        return made

    @staticmethod
    def back_translation(
        text: str, rng: random.Random | None = None, *, answerer: Answerer | None = None, pivot: str = "auto"
    ) -> str:
        """A text translated into another language and back by a model.

        Args:
            text: any text.
            rng: where chance comes from.
            answerer: the translator, for example a :class:`luthier.endpoint.Endpoint`.
            pivot: the language between; auto: English, and Chinese for English texts.

        Returns:
            the variant, or the text itself where what came back is none.

        Raises:
            UserError: no translator is given, or it gives no answer.
        """
        if answerer is None:
            raise UserError(
                "back_translation needs a translator",
                remedy='add_augmenter("back_translation", base_url="http://…/v1", model="…"), or give answerer=',
            )
        (result,) = back_translation([text], [rng or random.Random()], answerer, pivot=pivot)
        if isinstance(result, UserError):
            raise result
        return text if isinstance(result, Refused) else result
