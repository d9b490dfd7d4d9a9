"""What stands on a model's body: the head that writes, one that fills in words, or one that gives classes scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.data.classes import ClassNames
from luthier.data.examples import TaskType

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Head:
    """The head that a model is loaded with."""

    task: TaskType = TaskType.CAUSAL_LM
    classes: ClassNames | None = None
    """of a classifier"""

    @property
    def writes(self) -> bool:
        """Whether the model generates text from a chat template's prompts."""
        return self.task in (TaskType.CAUSAL_LM, TaskType.INSTRUCTION)

    @property
    def pairs(self) -> bool:
        """Whether an encoder reads a source and a decoder writes a target."""
        return self.task is TaskType.SEQ_TO_SEQ

    def loader(self) -> Any:
        """The class of transformers that loads a model with this head."""
        import transformers

        return getattr(transformers, self.loader_name)

    @property
    def loader_name(self) -> str:
        """Its name."""
        return _LOADERS[self.task]

    def options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``: they become part of the model's config, and travel with it."""
        if self.classes is None:
            return {}
        names = dict(enumerate(self.classes.names))
        kind = "multi" if self.classes.multi_label else "single"
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": f"{kind}_label_classification",
        }

    @classmethod
    def of_config(cls, config: Any, architecture: str | None = None) -> Head:
        """The head of a saved model.

        Args:
            config: its config.
            architecture: the name of the model's class; None: the one in the config.
        """
        name = architecture or next(iter(getattr(config, "architectures", None) or ()), "")
        if name.endswith("ForMaskedLM"):
            return cls(TaskType.MASKED_LM)
        if not name.endswith("ForSequenceClassification"):
            return cls(TaskType.SEQ_TO_SEQ) if getattr(config, "is_encoder_decoder", False) else cls()
        names = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
        return cls(TaskType.CLASSIFICATION, ClassNames(names, config.problem_type == "multi_label_classification"))

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a loaded model, wrapped or not."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return cls.of_config(base.config, type(base).__name__)

    def to_dict(self) -> dict[str, Any]:
        """What an adapter's record holds."""
        found: dict[str, Any] = {"task": self.task.value}
        if self.classes is not None:
            found |= {"labels": list(self.classes.names), "multi_label": self.classes.multi_label}
        return found

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Head:
        """The inverse of :meth:`to_dict`; a causal language model where nothing is said."""
        task = TaskType(record.get("task", TaskType.CAUSAL_LM))
        labels = record.get("labels")
        return cls(task, ClassNames(tuple(labels), bool(record.get("multi_label"))) if labels else None)


_LOADERS = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.INSTRUCTION: "AutoModelForCausalLM",
    TaskType.CLASSIFICATION: "AutoModelForSequenceClassification",
    TaskType.MASKED_LM: "AutoModelForMaskedLM",
    TaskType.SEQ_TO_SEQ: "AutoModelForSeq2SeqLM",
}


def fresh_modules(model: Any) -> Sequence[str]:
    """Names of the modules that no weights were found for when a model was loaded, such as a new head's.

    They begin at random, so whatever the method, they must be trained and saved whole.
    """
    found: Sequence[str] = getattr(model, "fresh_modules", ())
    return found


def modules_of(model: nn.Module, parameters: Sequence[str]) -> list[str]:
    """The modules that hold these parameters themselves, but for those that lie in another of them; sorted."""
    known = {name for name, _ in model.named_modules()}
    found = {name.rpartition(".")[0] for name in parameters if name.rpartition(".")[0] in known}
    return sorted(name for name in found if not any(name.startswith(f"{other}.") for other in found))


def shared_parameters(model: nn.Module, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that stand elsewhere in the model as well, by their names in the module: a head's
    output matrix that is the input embeddings."""
    inside = set(module.modules())
    others = {id(p) for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    return {name: p for name, p in module.named_parameters(remove_duplicate=False) if id(p) in others}
