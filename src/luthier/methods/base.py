"""What a tuning method says of itself, and the registry of methods."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.models.heads import fresh_modules, shared_parameters
from luthier.models.quantized import count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.models.quantized import Quantization
    from luthier.recipe import Recipe


@dataclass(frozen=True)
class Advice:
    """Ranges that usually work for a method. A run outside them is warned of, not refused."""

    learning_rate: tuple[float, float]
    epochs: tuple[float, float]
    examples: tuple[int, int]
    """Fewest rows that are likely to help, and how many a light task wants."""
    rank: tuple[int, int] | None = None


class TuningMethod:
    """A way to tune a model. One file holds one; what most have in common is here: PEFT's own saving and loading.

    Attributes:
        name: the name in the recipe.
        tasks: what it can tune a model for.
        trains: what it trains, in a few words.
        adapter: True where a small adapter is saved beside an untouched base; False where the whole model is.
        merges: True where the adapter can become part of the base's weights.
        embeds: True where embeddings of tokens that are added to the vocabulary are trained.
        divides: True where the model can be divided among processes (FSDP2, DeepSpeed).
        instead: what a recipe sets where this method cannot do what it asks for.
        learning_rate: default peak learning rate.
        weight_decay: default weight decay.
        advice: ranges that usually work.
    """

    name: ClassVar[str]
    tasks: ClassVar[frozenset[TaskType]] = frozenset(TaskType)
    trains: ClassVar[str]
    adapter: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    embeds: ClassVar[bool] = False
    divides: ClassVar[bool] = True
    instead: ClassVar[str] = "method.name=lora"
    learning_rate: ClassVar[float]
    weight_decay: ClassVar[float] = 0.0
    advice: ClassVar[Advice]

    def given(self, options: Any) -> TuningMethod:
        """The method that these options make of it, where what it can do depends on them."""
        return self

    def check(self, recipe: Recipe) -> None:
        """Refuse what this method cannot do, before anything is loaded.

        Raises:
            UserError: the recipe asks for it; the message says what to use instead.
        """
        if TaskType(recipe.task.name) not in self.tasks:
            raise UserError(
                f"method {self.name} cannot tune a model for {recipe.task.name}",
                where="method.name",
                remedy=f"use {self.instead}",
            )
        if recipe.model.added_tokens and not self.embeds:
            raise UserError(
                f"method {self.name} does not train the embeddings of added tokens",
                where="model.added_tokens",
                remedy="use method.name=lora, which trains them, or add no tokens",
            )
        if recipe.training.sharding == "full" and not self.divides:
            raise UserError(
                f"a model that is tuned by method {self.name} cannot be divided among processes",
                where="training.sharding",
                remedy=f"set it to none, or use {self.instead}",
            )
        if recipe.deployment.merge:
            self.require_merging()

    def require_merging(self) -> None:
        """Refuse to merge what cannot become part of the base's weights.

        Raises:
            UserError: what this method trains cannot.
        """
        if not self.adapter:
            raise UserError(
                f"method {self.name} tunes the whole model: there is nothing to merge",
                where="deployment.merge",
                remedy="use the folder of the tuned model as it is",
            )
        if not self.merges:
            raise UserError(
                f"method {self.name} cannot be merged: it trains {self.trains}",
                where="deployment.merge",
                remedy=f"load the adapter beside its base, or train with {self.instead}",
            )

    def quantization(self, options: Any) -> Quantization | None:
        """How the base's weights are held in memory; None: as they are."""
        return None

    def virtual_tokens(self, options: Any) -> int:
        """How many places of the model's context stand before every text."""
        return 0

    def wrap(
        self, model: PreTrainedModel, options: Any, new_token_ids: list[int], task: TaskType = TaskType.CAUSAL_LM
    ) -> torch.nn.Module:
        """Make the model trainable in this way: exactly the parameters it trains require gradients afterwards.

        Args:
            model: the base, on the CPU; changed in place.
            options: this method's section of the recipe.
            new_token_ids: tokens that were added to the vocabulary, whose embeddings are to be trained; none where
                the method does not (:meth:`check` has refused them).
            task: what the model learns.

        Raises:
            UserError: the method does not fit this model.
        """
        raise NotImplementedError

    def rates(self, names: Iterable[str], options: Any, fresh: Sequence[str] = ()) -> dict[str, float]:
        """Factors of the learning rate, for those of the trained parameters that learn at another than the recipe's.

        Args:
            names: of the trained parameters.
            options: this method's section of the recipe.
            fresh: names of modules that begin at random (see ``models.heads``).
        """
        return {}

    def kept_values(self, options: Any, hidden: int, inner: int) -> int:
        """Values a token that the backward pass wants of each layer, beside what the layer itself keeps of them.

        Args:
            options: this method's section of the recipe.
            hidden: width of the model.
            inner: width of its MLPs.
        """
        return 0

    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained into a folder that :meth:`load` takes, in the form that other tools load."""
        model.save_pretrained(folder)

    def load(self, base: PreTrainedModel, folder: Path) -> torch.nn.Module:
        """A saved adapter on its base.

        Raises:
            RuntimeError, ValueError, KeyError, OSError: it does not fit.
        """
        model: torch.nn.Module = load_peft(base, folder)
        return model


def load_peft(base: PreTrainedModel, folder: Path, adapter_name: str = "default") -> Any:
    """An adapter that PEFT has saved on its base, under a name, in the base's precision.

    Raises:
        RuntimeError, ValueError, KeyError, OSError: it does not fit.
    """
    from peft import PeftModel

    with peft_warnings_apart():
        model = PeftModel.from_pretrained(base, str(folder), adapter_name, autocast_adapter_dtype=False)
    tie_copies(model)
    return model


# PEFT's names of what a model learns.
_PEFT_TASKS = {
    TaskType.CAUSAL_LM: "CAUSAL_LM",
    TaskType.INSTRUCTION: "CAUSAL_LM",
    TaskType.CLASSIFICATION: "SEQ_CLS",
    TaskType.SEQ_TO_SEQ: "SEQ_2_SEQ_LM",
    # PEFT has no name for it, and wraps the model without one as it does for feature extraction.
    TaskType.MASKED_LM: None,
}


def peft_task(task: TaskType) -> str | None:
    """The ``task_type`` of a PEFT configuration."""
    return _PEFT_TASKS[task]


def whole_modules(model: PreTrainedModel, asked: Iterable[str], task: TaskType) -> list[str] | None:
    """PEFT's ``modules_to_save``: what the user asks for, and what begins at random (see ``models.heads``)."""
    # PEFT itself adds these to those of a classifier.
    known = {"classifier", "score"} if task is TaskType.CLASSIFICATION else set()
    return sorted({*asked, *fresh_modules(model)} - known) or None


def wrapped_by_peft(
    model: Any,
    config: Any,
    method: str,
    *,
    where: str,
    remedy: str,
    wrapper: Callable[..., torch.nn.Module] | None = None,
) -> torch.nn.Module:
    """The model in PEFT's wrapper.

    Args:
        model: the base.
        config: what PEFT is to add.
        method: its name, for the message.
        where: the field to mend where it does not fit.
        remedy: how.
        wrapper: takes model and configuration; None: PEFT's own.

    Raises:
        UserError: the configuration does not fit the model.
    """
    from peft import get_peft_model

    wrapper = get_peft_model if wrapper is None else wrapper
    try:
        # What is added takes the weights' dtype: a bfloat16 product beside a bfloat16 product costs no casts. The
        # optimiser keeps it in float32 (training.optimiser), where small updates survive.
        with peft_warnings_apart():
            wrapped = wrapper(model, config, autocast_adapter_dtype=False)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{method} does not fit this model: {str(error).splitlines()[0]}", where=where, remedy=remedy
        ) from None
    tie_copies(wrapped)
    return wrapped


def tie_copies(model: Any) -> None:
    """Tie again what PEFT has parted: it trains a copy of a new head, and copies what the head shares with the rest of
    the model, which is the base's and stays as it is."""
    from peft.utils.other import ModulesToSaveWrapper

    base = model.get_base_model()
    for head in fresh_modules(base):
        wrapper = base.get_submodule(head)
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for name, parameter in shared_parameters(base, wrapper).items():
            where, _, own = name.removeprefix("original_module.").rpartition(".")
            for copy in wrapper.modules_to_save.values():
                setattr(copy.get_submodule(where), own, parameter)


@contextlib.contextmanager
def peft_warnings_apart() -> Iterator[None]:
    """Without warnings of PEFT 0.21 that users cannot act on: one that it draws from transformers 5 when it wraps a
    model, and one that names such as 'a' may be lost in loading, which they are not (tests/deployment)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter name '.*' should not be contained in the prefix")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


METHODS: dict[str, TuningMethod] = {}


def register(method: type[TuningMethod]) -> type[TuningMethod]:
    """Make a method known under its name."""
    METHODS[method.name] = method()
    return method


def get_method(name: str) -> TuningMethod:
    """The method of that name; where there are options of it as well, :func:`method_of` heeds them.

    Raises:
        UserError: there is none.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}", where="method.name", remedy=f"known: {', '.join(METHODS)}")
    return METHODS[name]


def method_of(options: Any) -> TuningMethod:
    """The method that a recipe's section asks for.

    Raises:
        UserError: there is none of its name.
    """
    return get_method(options.name).given(options)


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by name, each once (tied ones under their first name)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """``(trained, all)`` parameters, tied ones counted once, quantised ones by what they stand for."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(count(p) for p in model.parameters())
