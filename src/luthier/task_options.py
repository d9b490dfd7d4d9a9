"""The recipe's `task` section: one class a kind of task."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from luthier.section import Section


class CausalTask(Section):
    """Answers, and the going on of texts that are no answers."""

    name: Literal["causal_lm"] = "causal_lm"
    """Learns to answer, and to go on with texts that are no answers."""


class InstructionTask(Section):
    """Instructions, each with its answer."""

    name: Literal["instruction"] = "instruction"
    """Learns to follow instructions: every row must have an answer."""


class ClassificationTask(Section):
    """Texts and what they are: a new head on the model gives each class a score."""

    name: Literal["classification"] = "classification"
    """Learns which class a text is of, by a head in the place of the one that writes."""
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification"] = "auto"
    """Whether a text is of one class, or of any number; auto: any number where a row has a list of classes."""
    labels: list[str] = Field(default_factory=list)
    """The classes in the order of their numbers; empty: those of the training rows, sorted."""

    @model_validator(mode="after")
    def _each_once(self) -> ClassificationTask:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a class is named twice in labels")
        return self


Task = Annotated[CausalTask | InstructionTask | ClassificationTask, Field(discriminator="name")]
TASKS_BY_NAME: dict[str, type[Section]] = {
    kind.model_fields["name"].default: kind for kind in get_args(get_args(Task)[0])
}
