"""A target is written for each source: models with an encoder and a decoder."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.batch import source_length
from luthier.data.dataset import Dataset
from luthier.data.encode import EncodedExample, Encoder
from luthier.data.examples import Source, TaskType
from luthier.data.findings import Finding, places
from luthier.data.preview import render_encoded
from luthier.errors import UserError
from luthier.evaluation.comparison import Comparison
from luthier.evaluation.sample import AnswerSample
from luthier.recipe import Recipe
from luthier.tasks.answers import check_sampling, judge_answers, sample_of
from luthier.tasks.base import PARITY_TEXTS, Models, Task, asked_part, held_out, register
from luthier.tasks.text_checks import unknown_tokens
from luthier.training.pair_loss import PairLoss
from luthier.training.preflight.data_checks import SAMPLE, check_rows

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType
    from transformers import PreTrainedTokenizerBase


@register
class SeqToSeq(Task):
    """A target for each source."""

    type = TaskType.SEQ_TO_SEQ

    def check(self, recipe: Recipe) -> None:
        """See :meth:`Task.check`."""
        data, method = recipe.data, recipe.method
        for where, given, remedy in (
            ("data.system", data.system is not None, "put its words into task.source_prefix"),
            ("data.train_on", data.train_on != "answers", "the target is what is trained; leave it out"),
            ("data.truncation", data.truncation == "split", "use cut, which reads the beginning, or reject"),
            ("model.chat_template", recipe.model.chat_template is not None, "no template is rendered; leave it empty"),
            (
                "method.layers_to_transform",
                getattr(method, "layers_to_transform", None) is not None,
                "encoder and decoder both have a layer of each number: name layers in method.target_modules",
            ),
            (
                "model.added_tokens",
                bool(recipe.model.added_tokens) and method.name != "full",
                "encoder and decoder read embeddings of their own, which adapters do not all train: use "
                "method.name=full, or add no tokens",
            ),
        ):
            if given:
                raise UserError(f"task=seq_to_seq has no use for {where}", where=where, remedy=remedy)
        check_sampling(recipe)

    def check_model(self, config: Any, name: str) -> None:
        """See :meth:`Task.check_model`."""
        if not getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"{name!r} ({config.model_type}) does not have both an encoder and a decoder",
                where="task",
                remedy="use task=causal_lm, by which a decoder learns to answer an input as well; or name an "
                "encoder-decoder (T5, BART, NLLB) in model.name",
            )

    def loss_function(self, model: torch.nn.Module, dataset: Dataset, **options: Any) -> PairLoss:
        """See :meth:`Task.loss_function`."""
        return PairLoss(model, **options)

    def findings(self, recipe: Recipe, dataset: Dataset) -> list[Finding]:
        """See :meth:`Task.findings`."""
        unknown = unknown_tokens(dataset, "sources", source_length)
        return [*check_rows(recipe, dataset), *_ends(dataset), *_changed(dataset), *unknown, *_cut(dataset)]

    def show(self, rows: Sequence[EncodedExample], encoder: Encoder) -> RenderableType:
        """See :meth:`Task.show`: the source dim, the target, which is trained, on green."""
        return render_encoded(rows, encoder.tokenizer)

    def judge(
        self, recipe: Recipe, dataset: Dataset, models: Models, target: Path, console: Console
    ) -> Comparison | None:
        """See :meth:`Task.judge`: each model writes a target for the same sources."""
        settings, part = recipe.evaluation, asked_part(dataset)
        if not part.encoded:
            return None
        encoded = list(itertools.islice(part.encoded, settings.max_examples))
        rows = [part.examples[row.index] for row in encoded]
        return judge_answers(recipe, dataset, models, target, console, part=part.name, rows=rows, encoded=encoded)

    def answers(self, recipe: Recipe, dataset: Dataset) -> AnswerSample | None:
        """See :meth:`Task.answers`."""
        return sample_of(recipe, dataset)

    def parity_texts(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """See :meth:`Task.parity_texts`; sources with their prefix."""
        assert dataset.pairs is not None
        return [dataset.pairs.texts(e)[0] for e in held_out(dataset).examples[:PARITY_TEXTS]]

    def next_steps(self, folder: Path, kind: str, *, merges: bool) -> list[str]:
        """See :meth:`Task.next_steps`."""
        lines = []
        if kind == "adapter" and merges:
            lines.append(f"luthier merge {folder}" + " " * 11 + f"one plain model in {folder}/merged")
        lines.append(f"luthier evaluate {folder} --data FILE" + "  judge it on other rows")
        if kind == "model" or merges:
            plain = folder / ("merged" if kind == "adapter" else kind)
            lines.append(f'AutoModelForSeq2SeqLM.from_pretrained("{plain}")' + "  use it from transformers")
        return lines


def _sample(dataset: Dataset) -> list[EncodedExample]:
    return [row for row in dataset.train.encoded[:SAMPLE] if not row.cut]


def _ends(dataset: Dataset) -> list[Finding]:
    """Targets without an end, after which the model would not learn to stop."""
    tokenizer = dataset.tokenizer
    end = tokenizer.eos_token_id
    endless = [row.source for row in _sample(dataset) if end is None or end not in row.input_ids[row.trained]]
    if not endless:
        return []
    return [
        Finding(
            "end_of_sequence_untrained",
            "error",
            "the tokenizer has no end-of-sequence token, so targets do not end"
            if end is None
            else f"the tokenizer puts no {tokenizer.eos_token!r} at the end of targets, so the model would not stop",
            "name a model whose tokenizer ends a text with it (tokenizer_config.json, tokenizer.json's post-processor)",
            len(endless),
            places(endless),
        )
    ]


def _changed(dataset: Dataset) -> list[Finding]:
    """Targets that the tokenizer does not give back as they are."""
    tokenizer, pairs = dataset.tokenizer, dataset.pairs
    assert pairs is not None
    differ: list[Source | None] = []
    lines: list[Source | None] = []
    for row in _sample(dataset):
        _, target = pairs.texts(dataset.train.examples[row.index])
        ids = row.input_ids[row.trained]
        said = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if re.sub(r"\s+", "", said) != re.sub(r"\s+", "", str(target)):
            differ.append(row.source)
        elif "\n" in str(target).strip() and "\n" not in said:
            lines.append(row.source)
    found = []
    for code, rows, what, remedy in (
        (
            "target_text_differs",
            differ,
            "the tokens of targets do not decode to the targets: the tokenizer changes characters",
            "look at a few with `luthier check`; where that matters, name a model with another tokenizer",
        ),
        (
            "line_breaks_lost",
            lines,
            "the tokenizer has no line breaks: targets of several lines are learnt as one line",
            "write line breaks as a mark of your own (such as ' | '), or name a model with another tokenizer",
        ),
    ):
        if rows:
            found.append(Finding(code, "warning", what, remedy, len(rows), places(rows)))
    return found


def _cut(dataset: Dataset) -> list[Finding]:
    """What was left out of sources and of targets."""
    found = []
    for part in dataset.parts:
        sources = [row for row in part.encoded if any(row.extra)]
        if sources:
            found.append(
                Finding(
                    "source_cut",
                    "warning",
                    f"{part.name}: of {len(sources):,} sources the model reads the beginning alone; "
                    f"{sum(row.extra[0] for row in sources):,} tokens are left out (data.truncation=cut)",
                    "raise data.max_length if the model takes more",
                    len(sources),
                    places(row.source for row in sources),
                )
            )
        targets = [row for row in part.encoded if row.cut]
        if targets:
            found.append(
                Finding(
                    "answer_cut",
                    "warning",
                    f"{part.name}: {len(targets):,} targets are cut at task.max_target_length and lose "
                    f"{sum(row.cut for row in targets):,} tokens: the model learns to stop in mid-sentence there",
                    "raise task.max_target_length, or set data.truncation=reject",
                    len(targets),
                    places(row.source for row in targets),
                )
            )
    return found
