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


class MaskedTask(Section):
    """Texts with some words hidden, which an encoder fills in."""

    name: Literal["masked_lm"] = "masked_lm"
    """Learns to fill in hidden words, as BERT did: how an encoder takes in the language of a field."""
    mlm_probability: float = Field(0.15, gt=0, lt=1)
    """How likely a word is hidden; at least one a text is."""
    whole_word_mask: bool = True
    """Hide all tokens of a word together (Chinese words are found by jieba); false: each token on its own."""
    mask_replace_prob: float = Field(0.8, ge=0, le=1)
    """Share of the hidden tokens that the mask token stands for."""
    random_replace_prob: float = Field(0.1, ge=0, le=1)
    """Share of the hidden tokens that another token stands for, drawn from the vocabulary; the others stay as they
    are."""

    @model_validator(mode="after")
    def _one_fate_each(self) -> MaskedTask:
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise ValueError("mask_replace_prob and random_replace_prob add up to more than 1")
        return self


class SeqToSeqTask(Section):
    """Texts and the texts to make of them, for models that have an encoder and a decoder (T5, BART, NLLB)."""

    name: Literal["seq_to_seq"] = "seq_to_seq"
    """Learns to write a target for each source."""
    max_target_length: int = Field(512, ge=2)
    """Longest target, in tokens; `data.max_length` is the longest source. `data.truncation` says what becomes of longer
    ones."""
    source_prefix: str = ""
    """Put before every source, for models that are told so what to do, for example "summarize: "."""
    src_lang: str | None = None
    """Language of the sources, as the tokenizer names it (en_XX, eng_Latn); empty: the tokenizer's own."""
    tgt_lang: str | None = None
    """Language of the targets, likewise."""


Task = Annotated[
    CausalTask | InstructionTask | ClassificationTask | MaskedTask | SeqToSeqTask, Field(discriminator="name")
]
TASKS_BY_NAME: dict[str, type[Section]] = {
    kind.model_fields["name"].default: kind for kind in get_args(get_args(Task)[0])
}
