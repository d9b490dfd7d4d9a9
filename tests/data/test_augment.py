"""Which rows get variants, what a variant keeps, and what becomes of everything that is none."""

from __future__ import annotations

import io
import itertools
import json
import re
import time
from functools import partial

import pytest
from chat_server import chat_server, said
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from luthier import DataAugmentor, TrainingExample
from luthier.data.augmentation import Augmentation, augmenters, noise_injection, render_augmentation
from luthier.data.augmentation.filters import cleaned, fault
from luthier.data.examples import Source
from luthier.data_options import DataSection, Step
from luthier.endpoint import Endpoint
from luthier.errors import UserError

QUESTIONS = [
    TrainingExample(f"She wants to know how many large cars number {i} has", f"{i}", source=Source("rows.jsonl", i + 1))
    for i in range(40)
]


def made(steps, ratio=1.0, rows=QUESTIONS, **options):
    augmentation = Augmentation(steps, ratio, **options)
    return list(augmentation.apply(rows)), augmentation.report()


def upper(text):
    return text.upper()


def inner(body):
    """The text that a request wants rewritten."""
    return said(body).rpartition("\n\n<text>")[2].removesuffix("</text>")


# --- which rows ---


@pytest.mark.parametrize(("ratio", "count"), [(0, 0), (0.1, 4), (0.99, 39), (1, 40), (1.5, 60), (3, 120)])
def test_as_many_variants_as_the_ratio_says_and_never_two_alike(ratio, count):
    variants, report = made(["noise_injection"], ratio)
    assert len(variants) == count == report.made == report.wanted
    assert len({v.input for v in variants}) == count
    numbers = [v.metadata["augmented_index"] for v in variants]
    shares = {numbers.count(i) for i in range(40)}
    assert shares <= {int(ratio), int(ratio) + 1} and numbers == sorted(numbers)
    assert not {v.input for v in variants} & {e.input for e in QUESTIONS}


def test_a_variant_says_where_it_comes_from_and_keeps_everything_else():
    row = TrainingExample("buy a large car", "yes", metadata={"id": 7}, references=["yeah"], source=Source("a.csv", 3))
    (variant,), _ = made([Step(name="synonym_replacement", options={"ratio": 1})], rows=[row])
    assert variant.metadata == {
        "id": 7,
        "augmented_by": "synonym_replacement",
        "augmented_from": "a.csv:3",
        "augmented_index": 0,
    }
    assert (variant.output, variant.references, variant.source, row.input) == (
        "yes",
        ["yeah"],
        row.source,
        "buy a large car",
    )
    assert row.metadata == {"id": 7}


def test_the_same_seed_gives_the_same_variants_whatever_else_is_asked():
    def texts(**options):
        return [v.input for v in made(["noise_injection", "synonym_replacement"], 0.5, **options)[0]]

    assert texts() == texts() != texts(seed=1)
    # a row's variants do not depend on how many the others get
    few = {v.metadata["augmented_index"]: v.input for v in made(["noise_injection"], 0.2)[0]}
    many = [v.input for v in made(["noise_injection"], 1)[0]]
    assert all(many[i] == text for i, text in few.items())


def test_rows_that_cannot_vary_give_their_place_to_others():
    rows = [TrainingExample("12 + 34 =", "46")] * 30 + [TrainingExample("how many are there", "x")] * 10
    variants, report = made(["noise_injection"], 0.25, rows=rows)
    assert len(variants) == 10 == report.made
    assert {v.metadata["augmented_index"] for v in variants} == set(range(30, 40))
    variants, report = made(["noise_injection"], 0.9, rows=rows)
    assert len(variants) == 10 and report.wanted == 36 and report.steps[0].unchanged == 30


def test_where_one_augmenter_finds_nothing_another_follows():
    variants, report = made(["synonym_replacement", "noise_injection"], 1, rows=[TrainingExample("zebras", "x")] * 20)
    assert len(variants) == 20 and {v.metadata["augmented_by"] for v in variants} == {"noise_injection"}
    assert report.steps[0].unchanged > 0 == report.steps[0].made and report.steps[1].made == 20


def test_each_variant_is_of_one_augmenter_and_counted_once():
    _, report = made(["synonym_replacement", "noise_injection"], 1)
    assert [s.made for s in report.steps] == [report.made - report.steps[1].made, report.made - report.steps[0].made]
    assert all(10 < s.made < 30 for s in report.steps)


def test_no_two_variants_of_a_row_are_alike_even_where_few_exist():
    step = Step(name="synonym_replacement", options={"ratio": 1})
    variants, report = made([step], 5, rows=[TrainingExample("it is nearly 5", "x")])
    assert [v.input for v in variants] == ["it is almost 5"]
    assert report.steps[0].refused["repeated"] >= 4


class Counted(list):
    """Rows as on disk: read in order, and never all at once."""

    def __iter__(self):
        self.passes = getattr(self, "passes", 0) + 1
        return super().__iter__()


def test_rows_are_read_in_order_and_as_they_are_needed():
    rows = Counted(QUESTIONS * 50)
    first = next(Augmentation(["noise_injection"], 1).apply(rows))
    assert first.metadata["augmented_index"] == 0 and rows.passes == 1
    assert len(list(Augmentation(["noise_injection"], 1).apply(rows))) == 2000 and rows.passes == 2


# --- what varies ---


def test_answers_and_labels_vary_only_where_asked():
    row = TrainingExample("remember this", "remember that", label="remember")
    for on, prompt, answer in (("prompt", True, False), ("answer", False, True), ("all", True, True)):
        (variant,), _ = made([Step(name=f"{__name__}:upper", options={"on": on})], rows=[row])
        assert (variant.input != row.input, variant.output != row.output) == (prompt, answer)
        assert variant.label == "remember"


def test_of_a_conversation_the_last_question_varies():
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"city": "remember"}'}}
    messages = [
        {"role": "system", "content": "remember"},
        {"role": "user", "content": "remember before"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "remember whatever happens"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "whatever"},
        {"role": "assistant", "content": "done"},
    ]
    rows = [TrainingExample(messages=messages)]
    (variant,), _ = made(["noise_injection"], rows=rows)
    assert [m == n for m, n in zip(variant.messages, messages, strict=True)] == [True] * 3 + [False] + [True] * 3
    # what the tool call and the tool's answer take up stays
    for seed in range(20):
        (variant,), _ = made([Step(name="noise_injection", options={"noise_ratio": 1})], rows=rows, seed=seed)
        assert re.fullmatch(r"remember whatever \w+", variant.messages[3]["content"])
    assert messages[3]["content"] == "remember whatever happens"
    assert made(["noise_injection"], rows=[TrainingExample(messages=messages[4:])])[1].without_text == 1


def test_plain_text_varies_only_where_asked_and_a_labelled_text_does():
    plain, labelled = TrainingExample("all of this is trained"), TrainingExample("all of this is read", label="good")
    variants, report = made(["noise_injection"], rows=[plain, labelled])
    assert [v.label for v in variants] == ["good"] and report.without_text == 1
    assert len(made([Step(name="noise_injection", options={"on": "all"})], rows=[plain])[0]) == 1


def test_the_label_is_kept_in_the_text():
    row = TrainingExample("这家店差评，非常难吃", label="差评")
    for seed in range(20):
        (variant,), _ = made([Step(name="noise_injection", options={"noise_ratio": 1})], rows=[row], seed=seed)
        assert "差评" in variant.input


# --- failures ---


def fails_on_three(text):
    if "number 3 " in text:
        raise KeyError("three")
    return text + "!"


def gives_none(text):
    return None


def gives_nothing(text):
    return "  "


def test_a_failing_augmenter_names_its_row_and_itself():
    with pytest.raises(
        UserError, match=r"'fails_on_three' failed: KeyError: 'three'\n  where: rows\.jsonl:4"
    ) as caught:
        made([fails_on_three])
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(UserError, match="'gives_none' returned NoneType, not text"):
        made([gives_none])


def test_a_failing_augmenter_may_be_listed_instead():
    variants, report = made([fails_on_three], on_error="report")
    assert len(variants) == 39 and report.steps[0].failed == 1
    ((where, error),) = report.steps[0].failures
    assert where == "rows.jsonl:4" and "KeyError" in error
    (step,) = report.to_dict()["steps"]
    assert step["failures"] == [{"where": "rows.jsonl:4", "error": error}]
    json.dumps(report.to_dict())
    console = Console(file=io.StringIO(), width=200)
    console.print(render_augmentation(report))
    assert "39 of 40 variants of 40 rows" in console.file.getvalue() and "rows.jsonl:4" in console.file.getvalue()


def test_an_empty_variant_is_refused():
    variants, report = made([gives_nothing])
    assert not variants and report.steps[0].refused["empty"] == 40


@pytest.mark.parametrize(
    ("steps", "ratio", "message"),
    [
        ([], 1, "no augmenter was named"),
        (["noise_injektion"], 1, r"(?s)no augmenter is called.*data\.augment\[0\].*did you mean 'noise_injection'"),
        ([Step(name="noise_injection", options={"nois_ratio": 1})], 1, "did you mean 'noise_ratio'"),
        ([Step(name="noise_injection", options={"noise_ratio": 2})], 1, "noise_ratio=2"),
        ([Step(name="noise_injection", options={"on": "label"})], 1, "on='label'"),
        ([Step(name="noise_injection", options={"keep": "x"})], 1, "no option 'keep'"),
        (["nowhere:f"], 1, "no module.*nowhere"),
        (["json:nothing"], 1, "'json' has no function 'nothing'"),
        (["noise_injection"], -1, "augment_ratio=-1"),
        (["noise_injection"], float("nan"), "augment_ratio=nan"),
        ([5], 1, "must be a function"),
        (["paraphrase"], 1, "paraphrase needs a model"),
        ([Step(name="paraphrase", options={"base_url": "http://localhost/v1"})], 1, "names an endpoint and no model"),
        ([Step(name="paraphrase", options={"base_url": "localhost", "model": "m"})], 1, "no web address"),
        ([Step(name="paraphrase", options={"model": "m"})], 1, "names no endpoint"),
        ([Step(name="paraphrase", options={"modle": "m"})], 1, "did you mean 'model'"),
    ],
)
def test_wrong_steps_are_told_before_the_first_row(steps, ratio, message):
    with pytest.raises(UserError, match=message):
        Augmentation(steps, ratio)


def test_a_recipe_says_it_in_its_short_form():
    section = DataSection.model_validate(
        {"augment": ["synonym_replacement", {"noise_injection": {"noise_ratio": 0.3}}]}
    )
    variants, report = made(section.augment, 2)
    assert len(variants) == 80 and [s.name for s in report.steps] == ["synonym_replacement", "noise_injection"]
    assert all(s.made for s in report.steps)


def test_every_augmenter_and_option_is_described():
    infos = {info.name: info for info in augmenters()}
    assert list(infos) == ["synonym_replacement", "noise_injection", "back_translation", "paraphrase"]
    for info in infos.values():
        assert info.summary.endswith(".")
        assert all(text for _, _, text in info.options), info
        names = [name for name, _, _ in info.options]
        assert "on" in names and ("base_url" in names and "api_key_env" in names) == info.needs_model
        assert not {"rng", "keep", "answerer", "texts"} & set(names)


# --- models ---


def steps_of(server, tmp_path, name="paraphrase", **options):
    asking = {"base_url": server.url, "model": "m", "cache": str(tmp_path / "answers.sqlite"), "backoff": 0.01}
    return [Step(name=name, options={**asking, **options})]


def test_paraphrase_through_an_endpoint(tmp_path):
    def reply(body, number):
        time.sleep(0.02)
        return 200, f"<think>hm</think><text>{inner(body).replace('She wants to know', 'Tell her')}</text>"

    with chat_server(reply) as server:
        variants, _ = made(steps_of(server, tmp_path), 1)
        assert len(server.bodies) == 40 and server.most_under_way > 1
        assert variants[7].input == "Tell her how many large cars number 7 has" and variants[7].output == "7"
        assert variants[7].metadata["augmented_by"] == "paraphrase"
        again, _ = made(steps_of(server, tmp_path), 1)
        assert [v.input for v in again] == [v.input for v in variants] and len(server.bodies) == 40


def test_an_interrupted_augmentation_goes_on_and_ends_alike(tmp_path):
    def reply(body, number):
        if number == 15:
            return 401, {"error": "expired"}
        return 200, "Tell me: " + inner(body)

    with chat_server(reply) as server:
        with pytest.raises(UserError, match="expired"):
            made(steps_of(server, tmp_path, concurrency=1), 1)
        variants, _ = made(steps_of(server, tmp_path, concurrency=1), 1)
        assert len(server.bodies) == 16 + 25 and len(variants) == 40


def test_several_variants_of_a_row_are_asked_for_in_several_ways(tmp_path):
    counter = itertools.count()
    with chat_server(
        lambda body, number: (200, f"Number {(next(counter) % 2 and 'x') or 'y'}: " + inner(body))
    ) as server:
        variants, _ = made(steps_of(server, tmp_path, concurrency=1), 2, rows=QUESTIONS[:10])
        assert len({v.input for v in variants}) == len(variants) <= 20
        assert len({said(b) for b in server.bodies}) > 12 and len({b["seed"] for b in server.bodies}) > 15


def test_back_translation_goes_there_and_back(tmp_path):
    def reply(body, number):
        if "into Chinese" in said(body):
            return 200, "中文 " + "".join(re.findall(r"\d+", inner(body)))
        if "into German" in said(body):
            return 200, "ohne Zahl"
        assert "into English" in said(body)
        return 200, f"How many large cars has number {re.search(r'[0-9]+', inner(body)).group()}, she wonders"

    with chat_server(reply) as server:
        variants, _ = made(steps_of(server, tmp_path, "back_translation"), 0.5)
        assert len(variants) == 20 and len(server.bodies) == 40
        assert all(f"number {v.metadata['augmented_index']}," in v.input for v in variants)
        german = made(steps_of(server, tmp_path, "back_translation", pivot="German"), 0.1)[1]
        assert any("into German" in said(b) for b in server.bodies) and german.steps[0].refused["numbers"] == 40


REPLIES = {
    "unchanged": lambda text: text,
    "meta": lambda text: "Here is the paraphrase: " + text,
    "refusal": lambda text: "I'm sorry, but " + text,
    "language": lambda text: "她想知道有多少辆大车，" + "".join(re.findall(r"\d+", text)),
    "length": lambda text: text * 5,
    "numbers": lambda text: "Tell her: " + text.replace("number", "number 99"),
}


@pytest.mark.parametrize("reason", REPLIES)
def test_what_is_no_variant_is_refused_and_counted(tmp_path, reason):
    with chat_server(lambda body, number: (200, REPLIES[reason](inner(body)))) as server:
        variants, report = made(steps_of(server, tmp_path), 1, rows=QUESTIONS[:4])
    assert not variants and set(report.steps[0].refused) == {reason}
    assert report.steps[0].refused_samples[0][0] == reason


@pytest.mark.parametrize(
    ("text", "variant", "answer", "reason"),
    [
        ("How many are 1,200 apples?", "What do 1200 apples come to?", "", None),
        ("有３个苹果", "苹果有3个", "", None),
        ("Use `x` here", "Take y here", "", "fixed"),
        ("See https://a.b/c for it", "It is at a website", "", "fixed"),
        ("Fill in {name} please", "Please fill in {name}", "", None),
        ("Is it Paris or Rome?", "Rome, or the French capital?", "Paris", "answer"),
        ("Is it Paris or Rome?", "Rome or Paris, which?", "Paris", None),
        ("改写这句话", "好的，这句话改写如下", "", "meta"),
        ("写一首关于春天的诗", "请以春天为题作诗一首", "", None),
        ("Explain it", "  ", "", "empty"),
        ("Explain it!", "explain it.", "", "unchanged"),
    ],
)
def test_faults(text, variant, answer, reason):
    assert fault(text, variant, answer) == reason


def test_thinking_and_tags_are_cut_off():
    assert cleaned("<think>a\nb</think>\n <text> c </text>\n") == "c"
    assert cleaned("<think>never ends") == ""


def test_one_row_that_an_endpoint_refuses_is_named(tmp_path):
    def reply(body, number):
        return (400, {"error": {"message": "too long"}}) if "number 5 " in said(body) else (200, "Tell: " + inner(body))

    with chat_server(reply) as server:
        with pytest.raises(UserError, match=r"(?s)'paraphrase' failed.*too long.*rows\.jsonl:6"):
            made(steps_of(server, tmp_path), 1)
        variants, report = made(steps_of(server, tmp_path), 1, on_error="report")
        assert len(variants) == 39 and report.steps[0].failures[0][0] == "rows.jsonl:6"


def test_a_local_model_is_asked_through_what_the_caller_gives():
    asked = []

    def local(name):
        def answer(conversations, seeds):
            asked.append((name, len(conversations), len(seeds)))
            return ["Tell me, " + inner({"messages": c}) for c in conversations]

        return answer

    variants, _ = made([Step(name="paraphrase", options={"model": "folder"})], 0.5, local=local)
    assert len(variants) == 20 and asked == [("folder", 20, 20)]


# --- the field's class ---


def test_the_class_of_the_teaching_text(tmp_path):
    augmentor = DataAugmentor().add_augmenter(DataAugmentor.synonym_replacement).add_augmenter(noise_injection)
    rows = augmentor.augment_examples(QUESTIONS, augment_ratio=1.5)
    assert rows[:40] == QUESTIONS and len(rows) == 100 and augmentor.report.made == 60
    with chat_server(lambda body, number: (200, "Tell: " + inner(body))) as server:
        options = {"base_url": server.url, "model": "m", "cache": tmp_path / "a.sqlite"}
        augmentor = DataAugmentor().add_augmenter("paraphrase", **options)
        assert len(augmentor.augment_examples(QUESTIONS, 0.1)) == 44
        model = Endpoint(**options)
        assert DataAugmentor.back_translation("how many 3", answerer=lambda c, s: ["several"] * len(c)) == "how many 3"
        assert model.usage.requests == 0
    for wrong in ("nothing", 5):
        with pytest.raises(UserError):
            DataAugmentor().add_augmenter(wrong)
    with pytest.raises(UserError, match="needs a model"):
        DataAugmentor().add_augmenter(DataAugmentor.back_translation)
    with pytest.raises(UserError, match="functools"):
        DataAugmentor().add_augmenter(upper, ratio=1)
    quarter = partial(noise_injection, noise_ratio=1.0)
    assert len(DataAugmentor().add_augmenter(quarter).augment_examples(QUESTIONS, 1)) == 80


ROWS = st.lists(
    st.builds(
        TrainingExample,
        st.text(max_size=30),
        st.one_of(st.none(), st.text(max_size=10)),
        st.one_of(st.none(), st.integers(0, 1), st.lists(st.text(max_size=3), max_size=2)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, ratio=st.floats(0, 3), seed=st.integers(0, 3))
def test_any_rows(rows, ratio, seed):
    steps = ["noise_injection", "synonym_replacement"]
    variants, report = made(steps, ratio, rows=rows, seed=seed)
    assert variants == made(steps, ratio, rows=rows, seed=seed)[0]
    assert len(variants) == report.made <= int(len(rows) * ratio + 1e-9)
    assert len({(v.metadata["augmented_index"], v.input) for v in variants}) == len(variants)
    for variant in variants:
        row = rows[variant.metadata["augmented_index"]]
        assert (variant.output, variant.label) == (row.output, row.label)
        assert variant.input != row.input
        assert [c for c in variant.input if c.isdigit()] == [c for c in row.input if c.isdigit()]
