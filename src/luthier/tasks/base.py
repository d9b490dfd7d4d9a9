"""What a kind of task says of itself, and the registry of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from luthier.data.dataset import Dataset, Part
from luthier.data.encode import EncodedExample, Encoder
from luthier.data.examples import TaskType
from luthier.data.findings import Finding
from luthier.models.heads import Head
from luthier.recipe import Recipe
from luthier.training.loss import LossFunction

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType
    from transformers import PreTrainedTokenizerBase

Models = Sequence[tuple[str, Callable[[], AbstractContextManager[Any]]]]
"""Names, and what gives each model for as long as it is asked; the base first."""

PARITY_TEXTS = 8


class Judgement(Protocol):
    """How models do on held-out rows."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as what ``json.dumps`` takes."""
        ...

    def render(self) -> RenderableType:
        """What the terminal and the report show."""
        ...


class Task:
    """A kind of work that a model is tuned for. How its rows become token ids is in the data room.

    Attributes:
        type: the name in the recipe.
        writes: whether the model answers prompts of a chat template.
    """

    type: ClassVar[TaskType]
    writes: ClassVar[bool] = False

    def check(self, recipe: Recipe) -> None:
        """Refuse settings that mean nothing here, before anything is loaded.

        Raises:
            UserError: there is one; the message says what to do.
        """

    def check_model(self, config: Any, name: str) -> None:
        """Refuse a model of a kind that this work isn't done with, before its weights are loaded.

        Args:
            config: the model's.
            name: the model's, for the message.

        Raises:
            UserError: it is; the message names the task that fits.
        """

    def head(self, dataset: Dataset) -> Head:
        """What the model is loaded with on its body."""
        return Head(self.type)

    def loss_function(self, model: torch.nn.Module, dataset: Dataset, **options: Any) -> LossFunction:
        """How the loss of a batch is computed.

        Args:
            model: wrapped by its method.
            dataset: the rows.
            options: those of :class:`LossFunction`.
        """
        raise NotImplementedError

    def chance(self, model: torch.nn.Module) -> float | None:
        """The loss of guessing, nats a target, which a pre-trained model must beat before training; None: none must."""
        return None

    def findings(self, recipe: Recipe, dataset: Dataset) -> list[Finding]:
        """What the pre-flight finds in the rows."""
        raise NotImplementedError

    def show(self, rows: Sequence[EncodedExample], encoder: Encoder) -> RenderableType:
        """Rows as the model reads them, with what it is to learn of them."""
        raise NotImplementedError

    def judge(
        self, recipe: Recipe, dataset: Dataset, models: Models, target: Path, console: Console
    ) -> Judgement | None:
        """Put the held-out rows to each model, print how they do and write it to ``target``.

        Args:
            recipe: its evaluation section.
            dataset: the test rows are asked; the validation rows where there are none.
            models: names, and context managers that give the model; the base first.
            target: the JSON file to write.
            console: where the table is printed.

        Returns:
            None where no held-out row can be asked.
        """
        raise NotImplementedError

    def answers(self, recipe: Recipe, dataset: Dataset) -> Callable[[Any], dict[str, float]] | None:
        """What scores a model's answers to some validation rows during training; None: nothing does.

        Raises:
            UserError: no validation row can be asked, or the metric that the recipe asks for does not apply to them.
        """
        return None

    def judge_harm(
        self,
        recipe: Recipe,
        dataset: Dataset,
        models: Models,
        target: Path,
        console: Console,
        judged: Judgement | None = None,
    ) -> Judgement | None:
        """Measure what tuning has cost, print it and write it to ``target``.

        Args:
            recipe: its evaluation section.
            dataset: training rows are asked for memorisation, held-out ones beside them.
            models: the base and the tuned one come first; others are not asked.
            target: the JSON file to write.
            console: where the table is printed.
            judged: what :meth:`judge` gave, whose answers need not be given again.

        Returns:
            None where models of this task do not answer prompts.
        """
        return None

    def parity_texts(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Texts for the parity gate: of the held-out rows where there are any."""
        return [e.input for e in held_out(dataset).examples[:PARITY_TEXTS]]

    def next_steps(self, folder: Path, kind: str, *, merges: bool) -> list[str]:
        """Lines that say what can be done with a finished run.

        Args:
            folder: the run's.
            kind: ``adapter`` or ``model``.
            merges: whether an adapter can become part of the base.
        """
        raise NotImplementedError


def held_out(dataset: Dataset) -> Part:
    """The test rows; the validation rows where there are none, the training rows where there are neither."""
    return next((p for p in reversed(dataset.parts) if p.examples), dataset.train)


def asked_part(dataset: Dataset) -> Part:
    """The rows that models are judged on: the test rows, or the validation rows where there are none."""
    return dataset.test if dataset.test.examples else dataset.validation


TASKS: dict[TaskType, Task] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task known under its type."""
    TASKS[task.type] = task()
    return task


def get_task(name: str) -> Task:
    """The task of that name, which the recipe has checked."""
    return TASKS[TaskType(name)]
