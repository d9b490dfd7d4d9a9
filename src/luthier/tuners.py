"""The tuners of the Python interface: each builds a recipe and calls the same functions as the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rapidfuzz import process
from rich.console import Console

from luthier.data.examples import TaskType, TrainingExample
from luthier.data_options import DataSection
from luthier.errors import UserError
from luthier.method_options import (
    AdapterMethod,
    FullMethod,
    LoraMethod,
    MixedMethod,
    PrefixMethod,
    PromptMethod,
    PTuningMethod,
    QloraMethod,
    options_of,
)
from luthier.recipe import Recipe
from luthier.run_options import ModelSection, TrainingSection
from luthier.section import Section
from luthier.task_options import TASKS_BY_NAME

if TYPE_CHECKING:
    from luthier.deployment.parity import ParityReport
    from luthier.pipeline import RunResult

# Names that Hugging Face's trainers and PEFT use for what a recipe calls otherwise.
_ALIASES = {"lora_r": "r", "max_seq_length": "max_length", "torch_dtype": "dtype"}
_NO_WRITING = {TaskType.CLASSIFICATION, TaskType.MASKED_LM}
_NOT_ARGUMENTS = {"train", "validation", "test", "columns", "split", "name"}


class _Tuner:
    """Common to all tuners. Use :class:`LoRATuner`, :class:`FullFineTuner` or :class:`InstructionTuner`."""

    _method: type[Section]
    _task: str | None = None

    def __init__(self, model_name: str = "smollm2", *, task: str | None = None, **model_options: Any) -> None:
        if task is not None and task not in TASKS_BY_NAME:
            raise UserError(f"unknown task {task!r}", remedy=f"known: {', '.join(TASKS_BY_NAME)}")
        self._task = task or self._task
        unknown = set(model_options) - (set(ModelSection.model_fields) - {"name"})
        if unknown:
            raise UserError(
                f"unknown model option {sorted(unknown)[0]!r}",
                remedy=f"known: {', '.join(sorted(set(ModelSection.model_fields) - {'name'}))}",
            )
        self.model_name = model_name
        self._model_options = model_options
        self._result: RunResult | None = None

    def train(
        self,
        train_examples: Iterable[TrainingExample | Mapping[str, Any]],
        val_examples: Iterable[TrainingExample | Mapping[str, Any]] | None = None,
        output_dir: str | Path = "runs/luthier",
        *,
        test_examples: Iterable[TrainingExample | Mapping[str, Any]] | None = None,
        resume: bool = False,
        overwrite_output_dir: bool = False,
        quiet: bool = False,
        **training_args: Any,
    ) -> RunResult:
        """Train on examples, behind the pre-flight and the parity gate.

        Args:
            train_examples: rows to train on.
            val_examples: rows to validate on during training.
            output_dir: the run folder.
            test_examples: rows to compare base and tuned on after training; without any, nothing is compared.
            resume: go on with the run in output_dir.
            overwrite_output_dir: replace the run in output_dir.
            quiet: print nothing.
            **training_args: any field of the recipe's training, data, method or task section by its own name,
                ``seed``, and ``lora_r``; see docs/recipe.md.

        Returns:
            the run's result: its folder, the trained model and the comparison.

        Raises:
            UserError: an unknown or wrong argument, rows that cannot be trained on, or an output_dir in use.
        """
        from luthier.pipeline import run
        from luthier.training.progress import TerminalReporter

        given = {"train": _listed(train_examples, "train_examples")}
        if val_examples is not None:
            given["validation"] = _listed(val_examples, "val_examples")
        if test_examples is not None:
            given["test"] = _listed(test_examples, "test_examples")
        recipe = self._recipe(str(output_dir), training_args, self._task or self._task_of(given["train"]))
        recipe.evaluation.enabled = test_examples is not None
        console = Console(quiet=quiet)
        self._result = run(
            recipe,
            given=given,
            resume=resume,
            overwrite=overwrite_output_dir,
            console=console,
            reporter=TerminalReporter(console),
        )
        return self._result

    @property
    def model(self) -> Any:
        """The trained model (with its adapter, where the method has one)."""
        return self._trained().model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the chat template that training used."""
        return self._trained().tokenizer

    def merge_and_save(self, output_dir: str | Path) -> ParityReport:
        """Merge what was trained into the base's weights and save a plain model with its tokenizer.

        Raises:
            UserError: nothing is trained yet, the method has nothing to merge, the folder is in use, or the merged
                model does not answer as the tuned one does (the parity gate); nothing is left behind then.
        """
        from luthier.deployment.merge import merge_model
        from luthier.methods import method_of

        result = self._trained()
        method_of(Recipe.load(result.run_dir / "recipe.yaml").method).require_merging()
        return merge_model(result.model, result.tokenizer, Path(output_dir), prompts=result.parity_prompts)

    def _trained(self) -> RunResult:
        if self._result is None:
            raise UserError("this tuner has not trained yet", remedy="call train() first")
        return self._result

    def _task_of(self, rows: list[TrainingExample]) -> str:
        """The task that all rows are meant for, where a model that writes would learn something else of them.

        A decoder learns to write an output after its input; that they are pairs matters to an encoder-decoder alone.
        """
        kinds = {row.task_type for row in rows}
        if kinds == {TaskType.SEQ_TO_SEQ}:
            from luthier.models.loading import load_config

            config = load_config(self.model_name, revision=self._model_options.get("revision"))
            return "seq_to_seq" if getattr(config, "is_encoder_decoder", False) else "causal_lm"
        return str(next(iter(kinds))) if len(kinds) == 1 and kinds <= _NO_WRITING else "causal_lm"

    def _recipe(self, output_dir: str, arguments: Mapping[str, Any], task: str = "causal_lm") -> Recipe:
        sections: dict[str, type[Section]] = {
            "training": TrainingSection,
            "method": self._method,
            "data": DataSection,
            "model": ModelSection,
            "task": TASKS_BY_NAME[task],
        }
        content: dict[str, Any] = {
            "task": {"name": str(task)},
            "model": {"name": self.model_name, **self._model_options},
            "data": {},
            "method": {"name": self._method.model_fields["name"].default},
            "training": {},
            "output_dir": output_dir,
        }
        homes = {f: name for name, kind in sections.items() for f in kind.model_fields if f not in _NOT_ARGUMENTS}
        for key, value in arguments.items():
            field = _ALIASES.get(key, key)
            if field == "seed":
                content["seed"] = value
            elif field in homes:
                content[homes[field]][field] = value
            else:
                known = [*homes, *_ALIASES, "seed"]
                near = process.extractOne(key, known, score_cutoff=60)
                raise UserError(
                    f"unknown training argument {key!r} for {type(self).__name__}",
                    remedy=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}",
                )
        return Recipe.from_dict(content, where=f"arguments of {type(self).__name__}.train")


class LoRATuner(_Tuner):
    """Trains low-rank matrices beside frozen weights (Hu et al., 2021, arXiv:2106.09685).

    Args:
        model_name: an embedded model's name, a local folder, a GGUF file or a hub id.
        task: what the model learns: causal_lm, instruction, classification, masked_lm or seq_to_seq; None: which of the
            last three the ``task_type`` of all rows names (seq_to_seq: where the model has an encoder), else causal_lm.
        **model_options: other fields of the recipe's model section, for example ``dtype``.
    """

    _method = LoraMethod


class QLoRATuner(LoRATuner):
    """Trains low-rank matrices beside weights held in 4 or 8 bits (Dettmers et al., 2023, arXiv:2305.14314).

    Merging goes into the weights as they are stored, never into the quantised ones.

    Args:
        model_name: an embedded model's name, a local folder or a hub id.
        task: what the model learns: causal_lm, instruction, classification, masked_lm or seq_to_seq; None: which of the
            last three the ``task_type`` of all rows names (seq_to_seq: where the model has an encoder), else causal_lm.
        **model_options: other fields of the recipe's model section, for example ``dtype``.
    """

    _method = QloraMethod


class MixedTuner(LoRATuner):
    """Trains low-rank matrices in some layers, other modules whole and, with ``num_virtual_tokens``, keys and values
    before every text, at rates of their own.

    Args:
        model_name: an embedded model's name, a local folder, a GGUF file or a hub id.
        task: what the model learns: causal_lm, instruction or classification; None: classification where all rows
            are of that ``task_type``, else causal_lm.
        **model_options: other fields of the recipe's model section, for example ``dtype``.
    """

    _method = MixedMethod


class PromptTuner(_Tuner):
    """Trains vectors before every text (prompt tuning, Lester et al., 2021, arXiv:2104.08691).

    Args:
        model_name: an embedded model's name, a local folder, a GGUF file or a hub id.
        task: what the model learns: causal_lm, instruction, classification, masked_lm or seq_to_seq; None: which of the
            last three the ``task_type`` of all rows names (seq_to_seq: where the model has an encoder), else causal_lm.
        **model_options: other fields of the recipe's model section, for example ``dtype``.
    """

    _method = PromptMethod


class PTuningTuner(_Tuner):
    """Trains a network that makes vectors before every text (P-tuning, Liu et al., 2021, arXiv:2103.10385).

    Args:
        model_name: an embedded model's name, a local folder, a GGUF file or a hub id.
        task: what the model learns: causal_lm, instruction, classification, masked_lm or seq_to_seq; None: which of the
            last three the ``task_type`` of all rows names (seq_to_seq: where the model has an encoder), else causal_lm.
        **model_options: other fields of the recipe's model section, for example ``dtype``.
    """

    _method = PTuningMethod


class PrefixTuner(_Tuner):
    """Trains keys and values before every text, in every layer (Li and Liang, 2021, arXiv:2101.00190).

    Args:
        model_name: an embedded model's name, a local folder, a GGUF file or a hub id.
        task: what the model learns: causal_lm, instruction, classification, masked_lm or seq_to_seq; None: which of the
            last three the ``task_type`` of all rows names (seq_to_seq: where the model has an encoder), else causal_lm.
        **model_options: other fields of the recipe's model section, for example ``dtype``.
    """

    _method = PrefixMethod


class FullFineTuner(_Tuner):
    """Trains every parameter of the model; ``output_dir/model`` is a plain model folder.

    Args:
        model_name: an embedded model's name, a local folder, a GGUF file or a hub id.
        task: what the model learns: causal_lm, instruction, classification, masked_lm or seq_to_seq; None: which of the
            last three the ``task_type`` of all rows names (seq_to_seq: where the model has an encoder), else causal_lm.
        **model_options: other fields of the recipe's model section, for example ``dtype``.
    """

    _method = FullMethod


class AdapterTuner(_Tuner):
    """Trains bottleneck adapters in a frozen model (Houlsby et al., 2019, arXiv:1902.00751).

    Args:
        model_name: an embedded model's name, a local folder, a GGUF file or a hub id.
        task: what the model learns: causal_lm, instruction, classification, masked_lm or seq_to_seq; None: which of the
            last three the ``task_type`` of all rows names (seq_to_seq: where the model has an encoder), else causal_lm.
        **model_options: other fields of the recipe's model section, for example ``dtype``.
    """

    _method = AdapterMethod


class InstructionTuner(_Tuner):
    """Tuning on instructions, in any way: every row must have an answer, for only answers are trained.

    Args:
        model_name: an embedded model's name, a local folder, a GGUF file or a hub id.
        method: the tuning method's name: full, lora or another; see docs/methods.md.
        **model_options: other fields of the recipe's model section, for example ``dtype``.

    Raises:
        UserError: there is no such method.
    """

    _task = "instruction"

    def __init__(self, model_name: str = "smollm2", method: str = "full", **model_options: Any) -> None:
        super().__init__(model_name, **model_options)
        self._method = options_of(method)

    def train(
        self, train_examples: Iterable[TrainingExample | Mapping[str, Any]], *args: Any, **kwargs: Any
    ) -> RunResult:
        """As :meth:`FullFineTuner.train`.

        Raises:
            UserError: also where a row has no answer.
        """
        rows = _listed(train_examples, "train_examples")
        for number, row in enumerate(rows, 1):
            if row.is_plain_text:
                raise UserError(
                    f"example {number} has no answer, so there is no instruction to follow",
                    where=str(row.source) if row.source else None,
                    remedy="give it an output, or use FullFineTuner, which trains plain text whole",
                )
        return super().train(rows, *args, **kwargs)


def _listed(examples: Iterable[TrainingExample | Mapping[str, Any]], name: str) -> list[TrainingExample]:
    if isinstance(examples, (str, bytes, Mapping)) or not isinstance(examples, Iterable):
        raise UserError(
            f"{name} must be a list of TrainingExample, not {type(examples).__name__}",
            remedy="read a file with DatasetLoader().load_from_jsonl(path)",
        )
    return [TrainingExample.from_any(e) for e in examples]
