"""Texts are told apart: a head on the model's body gives each class a score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.classes import classes_of
from luthier.data.dataset import Dataset
from luthier.data.encode import EncodedExample, Encoder
from luthier.data.examples import TaskType
from luthier.data.findings import Finding
from luthier.errors import UserError
from luthier.evaluation.classification import ClassComparison, compare_classifiers
from luthier.models.heads import Head
from luthier.recipe import Recipe
from luthier.tasks.base import Models, Task, asked_part, register
from luthier.tasks.text_checks import texts_cut, unknown_tokens
from luthier.training.class_loss import ClassLoss
from luthier.training.preflight.data_checks import check_rows
from luthier.training.runlog import write_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType


@register
class Classification(Task):
    """A class, or several, of each text."""

    type = TaskType.CLASSIFICATION

    def check(self, recipe: Recipe) -> None:
        """See :meth:`Task.check`."""
        data = recipe.data
        for where, given, remedy in (
            ("data.system", data.system is not None, "a classifier reads the text alone; leave it empty"),
            ("data.train_on", data.train_on != "answers", "a classifier's one target is the class; leave it out"),
            ("data.truncation", data.truncation == "split", "use cut, which reads the beginning, or reject"),
            (
                "training.predict_with_generate",
                recipe.training.predict_with_generate,
                "no text is written; leave it out",
            ),
            ("evaluation.metrics", bool(recipe.evaluation.metrics), "it has scores of its own; leave them out"),
            ("evaluation.judge", recipe.evaluation.judge.endpoint is not None, "no answer is written; leave it out"),
            ("model.chat_template", recipe.model.chat_template is not None, "no template is rendered; leave it empty"),
        ):
            if given:
                raise UserError(f"task=classification has no use for {where}", where=where, remedy=remedy)

    def head(self, dataset: Dataset) -> Head:
        """See :meth:`Task.head`."""
        return Head(self.type, dataset.classes)

    def loss_function(self, model: torch.nn.Module, dataset: Dataset, **options: Any) -> ClassLoss:
        """See :meth:`Task.loss_function`."""
        assert dataset.classes is not None
        return ClassLoss(model, classes=len(dataset.classes), multi_label=dataset.classes.multi_label, **options)

    def findings(self, recipe: Recipe, dataset: Dataset) -> list[Finding]:
        """See :meth:`Task.findings`."""
        return [*check_rows(recipe, dataset), *unknown_tokens(dataset), *texts_cut(dataset), *_absent(dataset)]

    def show(self, rows: Sequence[EncodedExample], encoder: Encoder) -> RenderableType:
        """See :meth:`Task.show`."""
        from rich.table import Table
        from rich.text import Text

        table = Table("class", "text as the model reads it", box=None, pad_edge=False, header_style="dim")
        for row in rows:
            names = ", ".join(encoder.told(row)["classes"])
            text = str(encoder.tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False))
            shown = text if len(text) <= 400 else f"{text[:300]} … {text[-80:]}"
            table.add_row(Text(names or "(none)", style="black on green"), Text(shown))
        return table

    def judge(
        self, recipe: Recipe, dataset: Dataset, models: Models, target: Path, console: Console
    ) -> ClassComparison | None:
        """See :meth:`Task.judge`: the classes that each model gives, beside always giving the most frequent one.

        The base is not asked: its head is new and gives classes at random.
        """
        part = asked_part(dataset)
        if not part.encoded or dataset.classes is None:
            return None
        encoded = part.encoded[: recipe.evaluation.max_examples]
        with console.status(f"classifying {len(encoded):,} {part.name} rows"):
            comparison = compare_classifiers(
                [(name, opened) for name, opened in models if name != "base"],
                encoded,
                dataset.classes,
                texts=[part.examples[row.index].input for row in encoded],
                training=[row.extra for row in dataset.train.encoded],
                samples=recipe.evaluation.samples,
                pad_token_id=dataset.tokenizer.pad_token_id or 0,
                seed=recipe.seed,
            )
        write_json(target, comparison.to_json())
        console.print(comparison.render())
        return comparison

    def next_steps(self, folder: Path, kind: str, *, merges: bool) -> list[str]:
        """See :meth:`Task.next_steps`."""
        lines = [f'luthier classify {folder} "TEXT"' + "  the classes of texts, or of standard input's lines"]
        if kind == "adapter" and merges:
            lines.append(f"luthier merge {folder}" + " " * 11 + f"one plain model in {folder}/merged")
        return [*lines, f"luthier evaluate {folder} --data FILE" + "  judge it on other rows"]


def _absent(dataset: Dataset) -> list[Finding]:
    """Classes that the user names and no training row has."""
    assert dataset.classes is not None
    have = {name for example in dataset.train.examples for name in classes_of(example)}
    absent = [name for name in dataset.classes.names if name not in have]
    if not absent:
        return []
    return [
        Finding(
            "class_without_rows",
            "error",
            f"no training row is of the class {', '.join(map(repr, absent[:5]))}" + (" …" if len(absent) > 5 else ""),
            "add rows of it, or take it out of task.labels",
        )
    ]
