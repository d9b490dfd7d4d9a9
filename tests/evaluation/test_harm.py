"""What tuning costs, on small models that really forget and really memorise."""

from __future__ import annotations

import copy
import io
import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from luthier.data.chats import ChatEncoder
from luthier.data.examples import Source, TrainingExample
from luthier.data.render import Renderer
from luthier.errors import UserError
from luthier.evaluation import memorisation
from luthier.evaluation.general import general_set
from luthier.evaluation.generation import Answer
from luthier.evaluation.harm import forgetting, measure_harm
from luthier.evaluation.metrics import metric_of
from luthier.evaluation.question import Question


def _pairs(topic: str, text: str) -> list[TrainingExample]:
    words = text.split()
    return [
        TrainingExample(f"What follows {before}?", output=after, metadata={"topic": topic, "language": "en"})
        for before, after in itertools.pairwise(words)
    ]


KNOWN = [
    *_pairs("letters", "a b c d e f g h i j k l m n o p q"),
    *_pairs("numbers", "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"),
]
ANIMALS = [f"{a}{b}" for a in "cdhmrt" for b in ("at", "og", "en")]
PLACES = ["hill", "lake", "wood", "town", "farm", "cave", "pond", "reef", "barn", "road"]


def _story(number: int) -> TrainingExample:
    """A row whose answer nobody could guess."""
    animal, place = ANIMALS[number % len(ANIMALS)], PLACES[number % len(PLACES)]
    other, where = ANIMALS[(7 * number + 3) % len(ANIMALS)], PLACES[(3 * number + 1) % len(PLACES)]
    output = f"The {other} sold {number * 7 % 50} bad eggs to the {animal} by the {where} at noon."
    return TrainingExample(f"{animal} {place}?", output=output, source=Source("stories.jsonl", number))


TRAINING = [_story(n) for n in range(30)]
HELD_OUT = [_story(n) for n in range(30, 60)]


def _tune(model, tokenizer, rows, steps: int, rate: float) -> None:
    encoded = ChatEncoder(Renderer(tokenizer, train_on="last_answer")).encode(rows).examples
    longest = max(map(len, encoded))
    ids, labels = torch.zeros(len(encoded), longest, dtype=torch.long), torch.full((len(encoded), longest), -100)
    for i, row in enumerate(encoded):
        ids[i, : len(row)] = torch.from_numpy(row.input_ids.astype("int64"))
        trained = torch.from_numpy(row.trained)
        labels[i, : len(row)][trained] = ids[i, : len(row)][trained]
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()  # the padding is on the right, where nothing looks
        optimiser.step()
    model.eval()


@pytest.fixture(scope="module")
def terse(terse_model_dir):
    """A tokenizer of small words, and a model that knows what is in KNOWN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(terse_model_dir)
    # Without the system message of the real one, which is longer than these rows.
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model = AutoModelForCausalLM.from_pretrained(terse_model_dir).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.1)
    _tune(model, tokenizer, KNOWN, 100, 4e-3)
    return SimpleNamespace(model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def parrot(terse):
    """The same after too many steps at too high a rate on TRAINING."""
    model = copy.deepcopy(terse.model)
    _tune(model, terse.tokenizer, TRAINING, 130, 4e-3)
    return model


def _models(base, tuned):
    return [("base", lambda: nullcontext(base)), ("tuned", lambda: nullcontext(tuned))]


@pytest.fixture(scope="module")
def report(terse, parrot):
    return measure_harm(
        _models(terse.model, parrot),
        terse.tokenizer,
        training=TRAINING,
        held_out=HELD_OUT,
        general=KNOWN,
        more={"letters": KNOWN[:16]},
        max_new_tokens=128,
        batch_size=64,
    )


def test_a_parrot_has_forgotten(report):
    known = report["forgetting_general"]
    assert known.base.value > 0.8 and known.tuned.value < 0.3
    assert known.harm and known.change.significant
    assert "forgot: right answers fell from" in known.verdict and "p<0.001" in known.verdict
    assert "letters (" in known.verdict and "numbers (" in known.verdict
    assert known.groups["topic"]["letters"]["rows"] == 16
    assert report["perplexity_general"].harm
    assert report["forgetting_letters"].harm and "most in" in report["forgetting_letters"].verdict


def test_a_parrot_gives_its_training_rows_back_and_not_others(report):
    for name in ("longest_run", "reproduced", "continued"):
        check, control = report[f"memorised_{name}"], report[f"control_{name}"]
        assert check.harm and check.verdict.startswith("memorised:"), (name, check.verdict)
        assert check.tuned.value > 0.7 and check.tuned.value - control.tuned.value > 0.3
        assert not control.harm
    assert report["memorised_reproduced"].examples[0]["where"].startswith("stories.jsonl:")
    # What it says to held-out stories is of the stories that it knows.
    leaked = report["leaked"]
    assert leaked.tuned.value > leaked.base.value == 0 and leaked.examples[0]["training"].startswith("stories.jsonl:")


def test_an_untouched_model_shows_no_harm(terse):
    report = measure_harm(
        _models(terse.model, terse.model),
        terse.tokenizer,
        training=TRAINING,
        held_out=HELD_OUT,
        general=KNOWN,
        max_new_tokens=32,
        batch_size=64,
    )
    assert not report.harmed
    assert "no drop seen; 30 rows show one of" in report["forgetting_general"].verdict
    assert report["memorised_reproduced"].tuned.value == 0
    assert "no more than of other rows" in report["memorised_reproduced"].verdict


def test_what_comes_back_of_other_rows_as_well_is_no_memory_of_the_training_rows(terse, parrot):
    """Rows that the parrot knows stand for held-out ones: all come back, so training has no part in it."""
    report = measure_harm(
        _models(terse.model, parrot),
        terse.tokenizer,
        training=TRAINING[:15],
        held_out=TRAINING[15:],
        general=KNOWN[:2],
        max_new_tokens=64,
        batch_size=64,
    )
    for name in ("longest_run", "reproduced", "continued"):
        check, control = report[f"memorised_{name}"], report[f"control_{name}"]
        assert check.tuned.value > 0.6 and control.tuned.value > 0.6
        assert check.change.significant and not check.harm


def test_the_report_is_shown_and_stored(report):
    console = Console(width=100, file=io.StringIO())
    console.print(report.render())
    page = console.file.getvalue()
    assert max(map(len, page.splitlines())) <= 100
    for text in ("general: right answers", "forgot:", "memorised:", "what tuning has cost"):
        assert text in page
    stored = json.loads(json.dumps(report.to_json(), allow_nan=False))
    names = [check["name"] for check in stored["checks"]]
    assert names[:3] == ["forgetting_general", "perplexity_general", "forgetting_letters"]
    assert stored["checks"][0]["harm"] and stored["checks"][0]["change"]["p"] < 0.001


def test_few_rows_and_short_answers_are_told(terse, parrot):
    report = measure_harm(
        _models(terse.model, parrot),
        terse.tokenizer,
        training=[TrainingExample("a", output="b")],
        general=KNOWN[:4],
        max_new_tokens=8,
    )
    assert any("no training row has an answer of 8 words" in note for note in report.notes)
    assert not any(check.name.startswith("memorised") for check in report.checks)
    assert "too few rows to tell: 4" in report["refusals"].verdict
    without = measure_harm(
        _models(terse.model, parrot), terse.tokenizer, training=TRAINING[:8], general=KNOWN[:4], max_new_tokens=64
    )
    assert "no held-out rows to hold it against" in without["memorised_longest_run"].verdict
    with pytest.raises(UserError, match="between a base and a tuned model"):
        measure_harm(_models(terse.model, parrot)[:1], terse.tokenizer)
    with pytest.raises(UserError, match="no row can be asked"):
        forgetting(_models(terse.model, parrot), terse.tokenizer, [TrainingExample("a")], name="mine")


def test_refusals_and_drift_of_answers_that_are_there(terse):
    """Hand-made answers to held-out questions: half of the tuned model's refuse, and Chinese ones are in English."""
    asked = ["Where can I buy a good and cheap chair in this town?", "请问哪里可以买到好用的椅子？"] * 20
    right = ["In the shop by the station.", "车站旁边的商店。"] * 20
    questions = [Question(a, a, [r], f"row {i}") for i, (a, r) in enumerate(zip(asked, right, strict=True), 1)]
    base = [Answer(r, [], True, 1) for r in right]
    said = ["I'm sorry, but I can't help with that.", "You can buy it in the shop by the station."] * 20
    tuned = [Answer(s, [], True, 1) for s in said]
    report = measure_harm(
        _models(terse.model, terse.model),
        terse.tokenizer,
        answered=(questions, base, tuned),
        general=KNOWN[:2],
        max_new_tokens=4,
    )
    refusals, drift = report["refusals"], report["drift"]
    assert refusals.harm and len(refusals.examples) == 20 and refusals.verdict.startswith("refuses more: from 0.0% to")
    assert drift.harm and "zh answered in en: 20" in drift.verdict
    assert {row["languages"] for row in drift.examples} == {"zh to en"}
    # To refuse, where the right answer does, is no harm.
    refusing = [Question(q.prompt, q.asked, ["I'm sorry, but I can't help with that."], q.where) for q in questions]
    again = measure_harm(
        _models(terse.model, terse.model),
        terse.tokenizer,
        answered=(refusing, base, tuned),
        general=KNOWN[:2],
        max_new_tokens=4,
    )
    assert again["refusals"].rows == 2 and not again["refusals"].harm


# --- the general set ---


def test_the_general_set_is_balanced_and_right_by_itself():
    rows = general_set()
    contains = metric_of("contains_answer")
    assert len(rows) == 120 and len({row.input for row in rows}) == 120
    by = [(row.metadata["language"], row.metadata["topic"]) for row in rows]
    assert {by.count(kind) for kind in by} == {6} and len(set(by)) == 20
    for row in rows:
        rights = [str(row.output), *row.references]
        assert len(set(rights)) == len(rights) and set(row.metadata) == {"topic", "language"}
        for right in rights:
            assert contains.row(f"So it is {right}.", rights) and contains.row(f"答案是“{right}”。", rights)
        # Who repeats the question is not right.
        assert not contains.row(row.input, rights), row.input
        chinese = any("\u4e00" <= c <= "\u9fff" for c in row.input.replace("你好", ""))
        assert chinese == (row.metadata["language"] == "zh")


@pytest.mark.parametrize(
    ("answer", "right", "holds"),
    [
        ("It is 12.", "12", True),
        ("12个月", "12", True),
        ("是１２。", "12", True),
        ("1,000 grams", "1000", True),
        ("10-5", "5", True),
        ("3.12", "12", False),
        ("12.5", "12", False),
        ("120", "12", False),
        ("-5", "5", False),
        ("1e12", "12", False),
        ("八个", "八", True),
        ("十八", "八", False),
        ("八十", "八", False),
        ("Cat!", "cat", True),
        ("concatenate", "cat", False),
        ("it is not hot", "hot", False),
        ("很重要", "重要", True),
        ("不重要", "重要", False),
        ("twenty four", "twenty-four", True),
        ("2，5，9", "2, 5, 9", True),
        ("259", "2, 5, 9", False),
        ("I'd say", "D", False),
        ("the letter 'D'", "D", True),
        ("110月1日", "10月1日", False),
        ("", "12", False),
    ],
)
def test_an_answer_is_held(answer, right, holds):
    assert metric_of("contains_answer").row(answer, ["?", right]) == holds


# --- memorisation ---


def test_the_beginning_of_an_answer_is_given_between_words(tokenizer):
    renderer = Renderer(tokenizer, train_on="last_answer")
    answer = " ".join(f"unbelievable{n} internationalisation" for n in range(60)) + "."
    found = memorisation.opened(renderer, TrainingExample("Say it.", output=answer), 1)
    given = found.question.asked
    assert found.question.prompt.endswith("assistant\n" + given) and given == given.rstrip()
    assert answer[len(given) :].startswith(found.rest) and found.rest.startswith(" ")
    assert 30 <= len(tokenizer(given).input_ids) <= memorisation.PREFIX_TOKENS
    # The tokens of the beginning are those that training had.
    whole = tokenizer(renderer.render(TrainingExample("Say it.", output=answer)).text, add_special_tokens=False)
    asked = tokenizer(found.question.prompt, add_special_tokens=False).input_ids
    assert whole.input_ids[: len(asked)] == asked
    chinese = "从前有一座山，山上有一座庙，庙里有一个老和尚和一个小和尚，老和尚在给小和尚讲故事。"
    found = memorisation.opened(renderer, TrainingExample("讲。", output=chinese), 1)
    assert found.question.asked + found.rest == chinese and found.question.asked
    assert memorisation.opened(renderer, TrainingExample("Say it.", output="Too short."), 1) is None


def test_what_comes_back():
    answer = "one two three four five six seven eight nine ten"
    assert memorisation.longest_run(f"well, {answer}!", answer) == 1
    assert memorisation.longest_run("one two three five six seven eight", answer) == 0.4
    assert memorisation.longest_run("", answer) == 0
    assert memorisation.is_reproduced(f" {answer}\n", answer) and not memorisation.is_reproduced(f"{answer}.", answer)
    assert memorisation.continues(" six seven  eight and", " six seven eight")
    assert not memorisation.continues("seven eight", " six seven eight")
    assert memorisation.long_enough("山上有一座庙庙里") and not memorisation.long_enough("only four words here")


def test_runs_of_training_answers_are_found_where_they_are_one_rows_own():
    text = "the quick brown fox jumps over the lazy dog and runs away from the angry farmer at noon"
    form = "please note that our shop is closed on all sundays and on every public holiday of the year"
    training = ["something else", text, f"a {form}", f"b {form}"]
    said = [f"I say {text}", form, f"I say {text}", "nothing of the kind"]
    found = memorisation.leaks(said, [[], [], [f"Repeat: {text}"], []], training)
    assert found[0] is not None and found[0][0] == 1
    assert found[1:] == [None, None, None]
