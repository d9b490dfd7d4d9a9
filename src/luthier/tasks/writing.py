"""Language models that write: answers to prompts, texts that go on, instructions that are followed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.dataset import Dataset
from luthier.data.encode import EncodedExample, Encoder
from luthier.data.examples import TaskType, TrainingExample
from luthier.data.findings import Finding
from luthier.data.loader import load_source
from luthier.data.preview import render_encoded
from luthier.data.render import prompt_messages, prompt_text
from luthier.errors import UserError
from luthier.evaluation.comparison import Comparison
from luthier.evaluation.harm import GENERAL, HarmReport, measure_harm
from luthier.evaluation.sample import AnswerSample
from luthier.recipe import Recipe
from luthier.tasks.answers import check_sampling, judge_answers, sample_of
from luthier.tasks.base import PARITY_TEXTS, Judgement, Models, Task, asked_part, held_out, register
from luthier.training.loss import LossFunction
from luthier.training.preflight.data_checks import check_conversations
from luthier.training.runlog import write_json

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType
    from transformers import PreTrainedTokenizerBase


@register
class Causal(Task):
    """Answers to prompts, and texts that go on."""

    type = TaskType.CAUSAL_LM
    writes = True

    def check(self, recipe: Recipe) -> None:
        """See :meth:`Task.check`."""
        check_sampling(recipe)

    def check_model(self, config: Any, name: str) -> None:
        """See :meth:`Task.check_model`."""
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"{name!r} ({config.model_type}) has an encoder and a decoder, which task={self.type} cannot train",
                where="task",
                remedy="use task=seq_to_seq, which learns to write an answer for each input",
            )

    def loss_function(self, model: torch.nn.Module, dataset: Dataset, **options: Any) -> LossFunction:
        """See :meth:`Task.loss_function`."""
        return LossFunction(model, **options)

    def chance(self, model: torch.nn.Module) -> float:
        """See :meth:`Task.chance`."""
        return math.log(int(model.config.get_text_config().vocab_size))  # type: ignore[union-attr, operator]

    def findings(self, recipe: Recipe, dataset: Dataset) -> list[Finding]:
        """See :meth:`Task.findings`."""
        return check_conversations(recipe, dataset)

    def show(self, rows: Sequence[EncodedExample], encoder: Encoder) -> RenderableType:
        """See :meth:`Task.show`: trained tokens on green, context dim, a long middle left out."""
        return render_encoded(rows, encoder.tokenizer)

    def judge(
        self, recipe: Recipe, dataset: Dataset, models: Models, target: Path, console: Console
    ) -> Comparison | None:
        """See :meth:`Task.judge`: each model answers the same prompts."""
        settings = recipe.evaluation
        part = asked_part(dataset)
        asked = (i for i, e in enumerate(part.examples) if not e.is_plain_text)
        chosen = list(itertools.islice(asked, settings.max_examples))
        if not chosen:
            return None
        wanted = set(chosen)
        rows = [part.examples[i] for i in chosen]
        encoded = [row for row in part.encoded if row.index in wanted]
        return judge_answers(recipe, dataset, models, target, console, part=part.name, rows=rows, encoded=encoded)

    def answers(self, recipe: Recipe, dataset: Dataset) -> AnswerSample | None:
        """See :meth:`Task.answers`."""
        return sample_of(recipe, dataset)

    def judge_harm(
        self,
        recipe: Recipe,
        dataset: Dataset,
        models: Models,
        target: Path,
        console: Console,
        judged: Judgement | None = None,
    ) -> HarmReport:
        """See :meth:`Task.judge_harm`."""
        settings = recipe.evaluation
        answered = None
        if isinstance(judged, Comparison):
            base, tuned = judged.models[:2]
            answered = (judged.questions, base.answers, tuned.answers)
        more: dict[str, Sequence[TrainingExample]] = {}
        for number, source in enumerate(settings.general, 1):
            loaded, name = load_source(source), Path(source.path).stem
            more[f"{name} ({number})" if name in (*more, GENERAL) else name] = loaded.examples
            for reject in loaded.rejects[:5]:
                console.print(f"refused {reject.file}:{reject.line}: {reject.message}", style="yellow", highlight=False)
        with console.status("measuring harm") as status:
            report = measure_harm(
                models[:2],
                dataset.tokenizer,
                training=dataset.train.examples,
                held_out=asked_part(dataset).examples,
                answered=answered,
                more=more,
                system=dataset.system,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                resume=settings.resume,
                progress=lambda what, done, total: status.update(f"{what}: {done} of {total}"),
            )
        write_json(target, report.to_json())
        console.print(report.render())
        return report

    def parity_texts(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """See :meth:`Task.parity_texts`; prompts are rendered."""
        return [
            e.input if e.is_plain_text else prompt_text(tokenizer, prompt_messages(e, dataset.system), e.tools)
            for e in held_out(dataset).examples[:PARITY_TEXTS]
        ]

    def next_steps(self, folder: Path, kind: str, *, merges: bool) -> list[str]:
        """See :meth:`Task.next_steps`."""
        lines = [f"luthier chat {folder}" + " " * 12 + "talk to it (--compare: beside its base)"]
        if kind == "adapter" and merges:
            lines.append(f"luthier merge {folder}" + " " * 11 + f"one plain model in {folder}/merged, then serve it:")
            lines.append(f"transformers serve {folder}/merged" + "  or any server that loads a model folder")
        elif kind == "model":
            lines.append(f"transformers serve {folder}/model" + "  or any server that loads a model folder")
        return [
            *lines,
            f"luthier evaluate {folder} --data FILE" + "  judge it on other rows",
            f"luthier evaluate {folder} --harm" + " " * 7 + "what it forgot, memorised, refuses now",
        ]


@register
class Instruction(Causal):
    """Instructions, each with its answer: what the pre-flight asks of rows differs, nothing else."""

    type = TaskType.INSTRUCTION
