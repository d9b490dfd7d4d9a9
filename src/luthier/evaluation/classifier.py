"""A tuned classifier in use: :class:`Classifier`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from luthier.data.classes import ClassEncoder, ClassNames
from luthier.data.encode import EncodedExample
from luthier.data.examples import Reject, TrainingExample
from luthier.errors import UserError, shorten
from luthier.evaluation.classification import classify, decide
from luthier.methods.answering import load_to_answer
from luthier.models.loading import context_of


class Classifier:
    """Gives texts their classes.

    Args:
        path: a run, adapter or model folder of a classification task.

    Raises:
        UserError: there is none, or it holds a model of another task.
    """

    def __init__(self, path: str | Path) -> None:
        saved = load_to_answer(path)
        classes = saved.head.classes
        if classes is None:
            raise UserError(
                f"{str(path)!r} holds no classifier", remedy="name a run of task=classification, or use `luthier chat`"
            )
        self.model = saved.model
        self.tokenizer = saved.tokenizer
        self.classes: ClassNames = classes
        self._encoder = ClassEncoder(
            saved.tokenizer, classes, max_length=context_of(saved.model.config, saved.tokenizer), truncation="cut"
        )

    def probabilities(self, texts: Iterable[str]) -> np.ndarray:
        """``[N, C]``: how likely each class is; rows add up to 1 unless a text can be of several classes.

        A text longer than the model takes is read from its beginning.

        Raises:
            UserError: no text, or an empty one.
        """
        if isinstance(texts, str):
            raise UserError("texts must be a list of texts, not one text", remedy="put it into a list")
        texts = list(texts)
        if not texts:
            raise UserError("there is no text to classify", remedy="give at least one")
        # Which class stands there does not matter: it is not looked at.
        label = [self.classes.names[0]] if self.classes.multi_label else self.classes.names[0]
        rows: list[EncodedExample] = []
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str):
                raise UserError(f"text {number} is {shorten(text)}", remedy="give a text")
            (made,) = self._encoder.stream([TrainingExample(input=text, label=label)])
            if isinstance(made, Reject):
                raise UserError(f"text {number}: {made.message}", remedy=made.remedy)
            rows.append(made)
        found, _ = classify(self.model, rows, self.classes, pad_token_id=self.tokenizer.pad_token_id or 0)
        return found

    def classify(self, texts: Iterable[str]) -> list[list[tuple[str, float]]]:
        """The classes of each text with their probabilities, the likeliest first: one, or where a text can be of
        several all that are likelier than not.

        Raises:
            UserError: as :meth:`probabilities`.
        """
        scores = self.probabilities(texts)
        given = decide(scores, self.classes)
        names = self.classes.names
        return [
            sorted(((names[i], float(row[i])) for i in np.flatnonzero(mine)), key=lambda pair: -pair[1])
            for row, mine in zip(scores, given, strict=True)
        ]
