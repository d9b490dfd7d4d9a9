"""Words of texts are hidden and filled in: an encoder learns the language of a field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.dataset import Dataset
from luthier.data.encode import EncodedExample, Encoder
from luthier.data.examples import TaskType
from luthier.data.findings import Finding, places
from luthier.data.masked import MaskEncoder, words_of
from luthier.errors import UserError
from luthier.evaluation.masked import MaskedComparison, compare_masked
from luthier.models.heads import fresh_modules
from luthier.recipe import Recipe
from luthier.tasks.base import Models, Task, asked_part, register
from luthier.tasks.text_checks import texts_cut, unknown_tokens
from luthier.training.masked_loss import MaskedLoss
from luthier.training.preflight.data_checks import check_rows
from luthier.training.runlog import write_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType
    from rich.text import Text

_SAMPLE = 2_000
# A larger share of short texts is worth a word.
_SHORT = 0.1


@register
class MaskedLM(Task):
    """Hidden words of texts."""

    type = TaskType.MASKED_LM

    def check(self, recipe: Recipe) -> None:
        """See :meth:`Task.check`."""
        data = recipe.data
        for where, given, remedy in (
            ("data.system", data.system is not None, "the model reads the text alone; leave it empty"),
            ("data.train_on", data.train_on != "answers", "words are hidden anywhere in a text; leave it out"),
            (
                "training.predict_with_generate",
                recipe.training.predict_with_generate,
                "no text is written; leave it out",
            ),
            ("evaluation.metrics", bool(recipe.evaluation.metrics), "it has scores of its own; leave them out"),
            ("evaluation.judge", recipe.evaluation.judge.endpoint is not None, "no answer is written; leave it out"),
            ("model.chat_template", recipe.model.chat_template is not None, "no template is rendered; leave it empty"),
            (
                "training.sharding",
                recipe.training.sharding == "full",
                "the embeddings are the head's output matrix as well and cannot be divided; set it to none",
            ),
        ):
            if given:
                raise UserError(f"task=masked_lm has no use for {where}", where=where, remedy=remedy)

    def loss_function(self, model: torch.nn.Module, dataset: Dataset, **options: Any) -> MaskedLoss:
        """See :meth:`Task.loss_function`."""
        assert dataset.masking is not None
        return MaskedLoss(model, masking=dataset.masking, **options)

    def chance(self, model: torch.nn.Module) -> float | None:
        """See :meth:`Task.chance`; a new head knows nothing yet."""
        if fresh_modules(model):
            return None
        return math.log(int(model.config.get_text_config().vocab_size))  # type: ignore[union-attr, operator]

    def findings(self, recipe: Recipe, dataset: Dataset) -> list[Finding]:
        """See :meth:`Task.findings`."""
        cut = texts_cut(dataset, "set data.truncation=split, which reads every text whole, in pieces")
        return [*check_rows(recipe, dataset), *unknown_tokens(dataset), *cut, *_short(dataset)]

    def show(self, rows: Sequence[EncodedExample], encoder: Encoder) -> RenderableType:
        """See :meth:`Task.show`: hidden tokens on green, with what stands there to be read."""
        from rich.table import Table

        table = Table("text, one draw: hidden tokens, and what is read there", box=None, header_style="dim")
        assert isinstance(encoder, MaskEncoder)
        for row in rows:
            table.add_row(_drawn(encoder, row))
        return table

    def judge(
        self, recipe: Recipe, dataset: Dataset, models: Models, target: Path, console: Console
    ) -> MaskedComparison | None:
        """See :meth:`Task.judge`: how often each model fills in hidden words rightly, the same words for all."""
        part = asked_part(dataset)
        if not part.encoded or dataset.masking is None:
            return None
        rows = part.encoded[: recipe.evaluation.max_examples]
        with console.status(f"filling in words of {len(rows):,} {part.name} rows"):
            comparison = compare_masked(
                models,
                rows,
                dataset.masking,
                dataset.tokenizer,
                samples=recipe.evaluation.samples,
                seed=recipe.seed,
            )
        write_json(target, comparison.to_json())
        console.print(comparison.render())
        return comparison

    def next_steps(self, folder: Path, kind: str, *, merges: bool) -> list[str]:
        """See :meth:`Task.next_steps`."""
        lines = []
        if kind == "adapter" and merges:
            lines.append(f"luthier merge {folder}" + " " * 11 + f"one plain model in {folder}/merged, then in Python:")
        if kind == "model" or merges:
            plain = folder / ("merged" if kind == "adapter" else "model")
            lines.append(f'transformers.pipeline("fill-mask", "{plain}")')
            lines.append(
                f'task: classification, model: {{name: "{plain}"}}' + "  in a recipe: a classifier on its body"
            )
        return [*lines, f"luthier evaluate {folder} --data FILE" + "  judge it on other rows"]


def _short(dataset: Dataset) -> list[Finding]:
    """Texts of so few words that more than the asked share of them is hidden, for one always is."""
    assert dataset.masking is not None
    share = dataset.masking.mlm_probability
    rows = dataset.train.encoded[:_SAMPLE]
    short = [row for row in rows if (int(words_of(row)[-1]) + 1) * share < 1]
    if len(short) <= _SHORT * len(rows):
        return []
    return [
        Finding(
            "short_texts",
            "warning",
            f"{len(short):,} of {len(rows):,} texts have fewer than {math.ceil(1 / share)} words: one of each is "
            f"always hidden, which is more than {share:.0%} and leaves little to guess it from",
            "join short texts to longer ones, for example a text's sentences to paragraphs",
            len(short),
            places(row.source for row in short),
        )
    ]


def _drawn(encoder: MaskEncoder, row: EncodedExample) -> Text:
    """A row with one draw's hidden tokens on green, each followed by what the model reads in its place."""
    from rich.text import Text

    assert encoder.masking is not None
    tokenizer = encoder.tokenizer
    ids, at = encoder.masking.draw(row, 1)
    text, hidden, begin = Text(), set(at.tolist()), 0
    most = min(len(row), 120)
    while begin < most:
        end = begin + 1
        while end < most and (end in hidden) == (begin in hidden):
            end += 1
        piece = str(tokenizer.decode(row.input_ids[begin:end], clean_up_tokenization_spaces=False))
        text.append(f" {piece.strip()}", style="black on green" if begin in hidden else "")
        if begin in hidden:
            read = str(tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False))
            text.append(f" {read.strip()}", style="dim")
        begin = end
    return text.append(" …" if most < len(row) else "")
