"""A few rows that a model answers again and again while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from luthier.data.examples import TrainingExample
from luthier.data.pairs import PairEncoder
from luthier.decoding import BATCH_SIZE
from luthier.errors import UserError
from luthier.evaluation.comparison import questions_of
from luthier.evaluation.generation import generate_answers
from luthier.evaluation.metrics import metric_of, metrics_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class AnswerSample:
    """Scores of a model's greedy answers to the same rows.

    Args:
        tokenizer: the model's.
        examples: rows with answers; those that cannot be asked are passed over.
        best: the metric that says which answers are best; ``loss``: none does.
        more_metrics: metrics beside those that apply.
        system: a system message for rows that have none.
        pairs: how sources of an encoder-decoder are encoded.
        max_new_tokens: longest answer.
        batch_size: prompts answered at once.

    Raises:
        UserError: no row can be asked, or a metric does not apply to them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[TrainingExample],
        *,
        best: str = "loss",
        more_metrics: Sequence[str] = (),
        system: str | None = None,
        pairs: PairEncoder | None = None,
        max_new_tokens: int = 256,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        if not examples:
            raise UserError(
                "no validation row has an answer to compare with",
                where="training.predict_with_generate",
                remedy="set it to false, or give validation rows with answers",
            )
        self.tokenizer, self.pairs = tokenizer, pairs
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.questions, _ = questions_of(tokenizer, examples, system, pairs)
        self.references = [question.references for question in self.questions]
        chosen = [] if best == "loss" else [metric_of(best)]
        for metric in chosen:
            if metric.better != "higher":
                raise UserError(
                    f"more of {metric.name} is not better, so that it cannot say which weights are best",
                    where="training.metric_for_best_model",
                    remedy="name loss, or a metric of which more is better",
                )
        self.metrics = metrics_for(self.references, [*more_metrics, *(m for m in chosen if m.name not in more_metrics)])

    def __call__(self, model: Any) -> dict[str, float]:
        """The scores by name, and ``ended``, the share of answers that a stop token ended."""
        answers = generate_answers(
            model,
            self.tokenizer,
            [question.prompt for question in self.questions],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            max_source_length=None if self.pairs is None else self.pairs.max_length,
        )
        texts = [answer.text for answer in answers]
        found = {metric.name: metric.score(texts, self.references) for metric in self.metrics}
        return found | {"ended": sum(answer.stopped for answer in answers) / len(answers)}
