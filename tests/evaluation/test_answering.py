"""A local model in an endpoint's place."""

from __future__ import annotations

import pytest

from luthier.data.augmentation import Augmentation
from luthier.data.examples import TrainingExample
from luthier.errors import UserError
from luthier.evaluation.answering import answerer_of, local_answerer


def test_answers_stand_in_order_and_what_has_none_says_why(tiny_model_dir):
    answer = local_answerer(tiny_model_dir, max_new_tokens=8)
    asked = [[{"role": "user", "content": c}] for c in ("one", "word " * 3000, "two")]
    first, long, second = answer(asked, [0, 0, 0])
    assert isinstance(long, UserError) and "context" in str(long)
    again = answer([asked[2], asked[0]], [0, 0])
    assert [str(a) for a in again] == [str(second), str(first)]


def test_a_model_that_is_not_there_is_told_before_any_row(tmp_path):
    with pytest.raises(UserError):
        local_answerer(tmp_path / "nothing")


@pytest.mark.slow
def test_the_small_model_paraphrases(base_model, tokenizer):
    from luthier.data_options import Step

    # Room enough for whatever this machine rounds to: an answer that is cut counts as a failure.
    answer = answerer_of(base_model, tokenizer, max_new_tokens=128)
    rows = [TrainingExample("Explain why the sky looks blue during the day.", "Scattering.")]
    augmentation = Augmentation([Step(name="paraphrase", options={})], 1, answerer=answer)
    variants = list(augmentation.apply(rows))
    report = augmentation.report().steps[0]
    assert report.made + sum(report.refused.values()) + report.failed >= 1
    assert all(v.input != rows[0].input and v.output == "Scattering." for v in variants)
