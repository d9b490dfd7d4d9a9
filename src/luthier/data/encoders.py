"""Which encoder a recipe's rows want: one a kind of task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from luthier.data.chats import ChatEncoder
from luthier.data.classes import ClassEncoder, ClassNames
from luthier.data.encode import Encoder
from luthier.data.examples import TrainingExample
from luthier.data.masked import MaskEncoder, Masking
from luthier.data.pairs import PairEncoder
from luthier.data.render import Renderer
from luthier.recipe import Recipe
from luthier.task_options import ClassificationTask, MaskedTask, SeqToSeqTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encoder_for(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    training: Iterable[TrainingExample],
    *,
    context: int | None = None,
    limited: bool = True,
    classes: ClassNames | None = None,
    allow_special_tokens: bool = False,
) -> Encoder:
    """What turns the rows of a recipe's task into token ids.

    Args:
        recipe: its task and data sections.
        tokenizer: with the chat template to render by, where the task has one.
        training: the training rows, whose classes are those that can be learnt.
        context: longest input the model takes, in tokens; the smaller of it and data.max_length holds; None: no limit.
        limited: whether rows have a greatest length at all.
        classes: those of a model that has been trained; None: the training rows'.
        allow_special_tokens: take rows whose text holds control tokens, also where the recipe refuses them.

    Raises:
        UserError: the tokenizer does not fit the task, or the rows have no classes to learn.
    """
    data, task = recipe.data, recipe.task

    def limit(length: int | None) -> int | None:
        given = [n for n in (length, context) if n is not None]
        return min(given, default=None) if limited else None

    max_length = limit(data.max_length)
    allow = allow_special_tokens or data.special_tokens_in_text == "allow"
    if isinstance(task, ClassificationTask):
        several = None if task.problem_type == "auto" else task.problem_type == "multi_label_classification"
        classes = classes or ClassNames.of(training, labels=task.labels, multi_label=several)
        return ClassEncoder(
            tokenizer, classes, max_length=max_length, truncation=data.truncation, allow_special_tokens=allow
        )
    if isinstance(task, MaskedTask):
        return MaskEncoder(
            tokenizer,
            whole_word_mask=task.whole_word_mask,
            masking=Masking.of(tokenizer, task, recipe.seed),
            max_length=max_length,
            truncation=data.truncation,
            allow_special_tokens=allow,
        )
    if isinstance(task, SeqToSeqTask):
        return PairEncoder(
            tokenizer,
            max_length=max_length,
            max_target_length=limit(task.max_target_length),
            truncation=data.truncation,
            source_prefix=task.source_prefix,
            src_lang=task.src_lang,
            tgt_lang=task.tgt_lang,
            allow_special_tokens=allow,
        )
    renderer = Renderer(tokenizer, system=data.system, train_on=data.train_on, allow_special_tokens=allow)
    return ChatEncoder(renderer, max_length=max_length, truncation=data.truncation)
