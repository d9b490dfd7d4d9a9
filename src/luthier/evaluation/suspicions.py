"""What makes answers suspicious whatever their scores: a template's control text, circles, the question again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.evaluation.generation import Answer
from luthier.evaluation.metrics.words import ngrams, words
from luthier.evaluation.question import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of so large a share of the answers it is told.
_SHARE = 0.1
_ROLES = "assistant|user|system|human|model|bot|ai"
# Written out: where it were control tokens, decoding would have left them out.
_CONTROL = re.compile(
    rf"<\|?[a-z]+_(?:start|end|of_turn|of_text|header_id|header)[a-z_]*\|?>|<\|(?:{_ROLES}|end|eot_id|endoftext)\|>"
    r"|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>|^### ?(?:Instruction|Response|Human|Assistant|Input)\b"
    rf"|\A\s*(?:{_ROLES})\s*(?::|：|\n)|^(?:Human|User|Assistant|用户|助手)\s*[:：]",
    re.IGNORECASE | re.MULTILINE,
)
_LEAST_RUNS = 8  # four-word runs of an answer that can go round in circles
_LEAST_ASKED = 4  # words of a question that can be given back


def suspicions(
    name: str,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Notes on a model's answers, each with what to do; what the right answers have too is none.

    Args:
        name: the model's.
        questions: what was asked.
        answers: to each.
        tokenizer: the model's, to see control tokens within answers; None: they are not looked for.
    """
    specials = frozenset() if tokenizer is None else frozenset(tokenizer.all_special_ids)
    control, circles, again = [], [], []
    for question, answer in zip(questions, answers, strict=True):
        inner = specials & set(answer.token_ids[:-1])
        if (shown := _control_text(question, answer.text)) is not None:
            control.append(shown)
        elif inner and tokenizer is not None and not question.tools:
            control.append(str(tokenizer.convert_ids_to_tokens(min(inner))))
        if _goes_round(answer.text) and not any(map(_goes_round, question.references)):
            circles.append(answer)
        if _asks_again(question, answer.text):
            again.append(answer)
    notes = []
    count = len(answers)
    if control and len(control) >= _SHARE * count:
        notes.append(
            f"{name}: {len(control)} of {count} answers hold a template's control text ({control[0]!r}); was it "
            "trained with another chat template than it is asked with? Compare the template's hash in manifest.json, "
            "and set model.chat_template to the one of its training"
        )
    if circles and len(circles) >= _SHARE * count:
        notes.append(
            f"{name}: {len(circles)} of {count} answers go round in circles: most of their runs of four words were "
            "there before; look at a few, and train for fewer epochs or at a lower rate where the base does not"
        )
    if again and len(again) >= _SHARE * count:
        notes.append(
            f"{name}: {len(again)} of {count} answers give the question again; see whether training was on answers "
            "alone (data.train_on) and whether the model is a chat model"
        )
    return notes


def _control_text(question: Question, text: str) -> str | None:
    """Control text that neither the question nor a right answer has."""
    for found in _CONTROL.finditer(text):
        shown = found[0].strip()
        if not any(shown in right for right in (question.asked, *question.references)):
            return shown
    return None


def _goes_round(text: str) -> bool:
    runs = ngrams(words(text), 4)
    return runs.total() >= _LEAST_RUNS and 2 * len(runs) < runs.total()


def _asks_again(question: Question, text: str) -> bool:
    asked = words(question.asked)
    if len(asked) < _LEAST_ASKED or words(text)[: len(asked)] != asked:
        return False
    return not any(words(right)[: len(asked)] == asked for right in question.references)
