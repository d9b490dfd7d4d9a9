"""Steps put together: order, sides, refusals, reports, a user's own functions, and what is said of a mistake."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from luthier import DataPreprocessor, TrainingExample, UserError
from luthier.data.cleaning import Cleaning, cleaners, render_cleaners, render_cleaning
from luthier.data.cleaning.registry import BUILT_IN
from luthier.data.examples import Reject, Source
from luthier.data.loader import load_file
from luthier.data_options import Step
from luthier.models.loading import load_tokenizer
from luthier.recipe import Recipe

CALL = {"type": "function", "function": {"name": "dial", "arguments": {"number": "13812345678"}}}
CHAT = TrainingExample(
    messages=[
        {"role": "system", "content": "be  brief"},
        {"role": "user", "content": "call 13812345678"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rang  13812345678 and 13987654321"},
        {"role": "assistant", "content": "done:  13987654321"},
    ],
    metadata={"note": "x  y"},
    source=Source("chat.jsonl", 7),
)


def only(steps, example, **more):
    (outcome,) = Cleaning(steps, **more).apply([example])
    return outcome


def said(example):
    return [message.get("content") for message in example.messages]


def test_every_text_is_cleaned_in_order_and_nothing_else():
    steps = ["normalize_whitespace", {"mask_personal_data": {"numbered": True}}]
    made = only(steps, CHAT)
    assert said(made) == ["be brief", "call [PHONE_1]", None, "rang [PHONE_1] and [PHONE_2]", "done: [PHONE_2]"]
    assert made.messages[2]["tool_calls"] == [CALL] and made.metadata == {"note": "x  y"}
    assert made.source == CHAT.source and CHAT.messages[0]["content"] == "be  brief"
    pair = TrainingExample("a  b", "c  d", references=["e  f"])
    assert only(["normalize_whitespace"], pair) == TrainingExample("a b", "c d", references=["e f"])
    # Another row begins its numbers anew.
    rows = [TrainingExample("13812345678", "ok"), TrainingExample("13987654321", "ok")]
    assert [r.input for r in Cleaning(steps).apply(rows)] == ["[PHONE_1]", "[PHONE_1]"]


def test_a_row_with_nothing_to_clean_is_given_back_as_it_is():
    row = TrainingExample("a b", "c")
    assert only(["normalize_whitespace", "strip_html", "mask_personal_data"], row) is row


def test_one_side_alone():
    pair = TrainingExample("a  b", "c  d", references=["e  f"])
    prompt = only([{"normalize_whitespace": {"on": "prompt"}}], pair)
    assert (prompt.input, prompt.output, prompt.references) == ("a b", "c  d", ["e  f"])
    answer = only(["normalize_whitespace"], pair, scope="answer")
    assert (answer.input, answer.output, answer.references) == ("a  b", "c d", ["e f"])
    turns = only([{"normalize_whitespace": {"on": "answer"}}], CHAT)
    assert said(turns) == [*said(CHAT)[:4], "done: 13987654321"]
    plain = TrainingExample("plain  text")
    assert only([{"normalize_whitespace": {"on": "prompt"}}], plain).input == "plain  text"
    assert only([{"normalize_whitespace": {"on": "answer"}}], plain).input == "plain text"
    labelled = TrainingExample("good  food", "very  good", label="very  good")
    assert only(["normalize_whitespace"], labelled) == replace(labelled, input="good food")


@pytest.mark.parametrize(
    ("step", "example", "reason", "field"),
    [
        ("remove_special_chars", TrainingExample("a", "\u200b x"[:1]), "emptied", "output"),
        ({"filter_length": {"min": 3, "on": "answer"}}, TrainingExample("a", "no"), "too_short", "output"),
        ({"filter_length": {"max": 5}}, TrainingExample("a question", "b"), "too_long", "input"),
        (
            {"filter_language": {"languages": ["zh"]}},
            TrainingExample("用英语说", "This is an answer that was written in plain English."),
            "other_language",
            "output",
        ),
        (
            {"filter_language": {"languages": ["en"]}},
            TrainingExample("请问今天北京的天气怎么样", "ok"),
            "other_language",
            "input",
        ),
        ("filter_repetition", TrainingExample("a", "I am sorry, I can not do that now. " * 20), "repetitive", "output"),
        ("filter_repetition", TrainingExample("笑", "哈" * 60), "repetitive", "output"),
        ("filter_symbols", TrainingExample("a", "=-=-=-=-=-=-=-=-=-=-=-= x"), "mostly_symbols", "output"),
    ],
)
def test_refused_rows_say_why_where_and_what_to_do(step, example, reason, field):
    placed = replace(example, source=Source("rows.jsonl", 3))
    cleaning = Cleaning(["normalize_whitespace", step])
    (reject,) = cleaning.apply([placed])
    assert isinstance(reject, Reject)
    assert (reject.file, reject.line, reject.reason, reject.field) == ("rows.jsonl", 3, reason, field)
    assert reject.message and reject.value and reject.remedy
    report = cleaning.report()[1]
    assert (report.rows, report.refused, dict(report.counts)) == (1, 1, {reason: 1})


@pytest.mark.parametrize(
    ("step", "example"),
    [
        (
            "filter_language",
            TrainingExample(
                "请解释 machine learning 中的 overfitting 是什么意思", "It's when a model learns too much."
            ),
        ),
        (
            {"filter_language": {"languages": ["zh"]}},
            TrainingExample("用 Python 写", "def f(x):\n    return x + 1\n\nprint(f(2))"),
        ),
        ({"filter_language": {"languages": ["en"]}}, TrainingExample("ok", "Voilà")),
        ("filter_repetition", TrainingExample("sing", "Row, row, row your boat, gently down the stream. " * 2)),
        ("filter_repetition", TrainingExample("table", "| a | b |\n|---|---|\n" + "|   |   |\n" * 40)),
        ({"filter_length": {"max": 3}}, TrainingExample("abc", "abc", references=["a much longer reference"])),
    ],
)
def test_rows_that_filters_keep(step, example):
    assert only([step], example) is example


def test_later_steps_do_not_see_refused_rows_and_there_is_one_out_for_each_in():
    rows = [TrainingExample(f"q {i}", "x" * i, source=Source("f", i)) for i in range(1, 6)]
    cleaning = Cleaning([{"filter_length": {"min": 3, "on": "answer"}}, "remove_empty_lines"])
    outcomes = list(cleaning.apply(iter(rows)))
    assert [isinstance(o, Reject) for o in outcomes] == [True, True, False, False, False]
    assert [r.line for r in outcomes[:2]] == [1, 2] and outcomes[2:] == rows[2:]
    assert [r.rows for r in cleaning.report()] == [5, 3]


def test_rows_stream():
    """The first row is there before the second is read."""

    def rows():
        yield TrainingExample("a  b", "c")
        raise AssertionError("read too far")

    assert next(Cleaning(["normalize_whitespace"]).apply(rows())).input == "a b"


def test_tokens_are_counted_by_the_models_tokenizer(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir)
    long = TrainingExample("ask", "one two three four five six seven eight nine ten")
    cut = only([{"truncate_by_tokens": {"max_tokens": 4, "on": "answer"}}], long, tokenizer=tokenizer)
    assert cut.input == "ask" and long.output.startswith(cut.output)
    assert len(tokenizer(cut.output, add_special_tokens=False)["input_ids"]) == 4
    step = {"filter_length": {"unit": "tokens", "max": 9, "on": "answer"}}
    assert only([step], long, tokenizer=tokenizer).message == "the answer has 10 tokens, above 9"
    for needs in (step, {"truncate_by_tokens": {"max_tokens": 4}}):
        with pytest.raises(UserError, match="no tokenizer was given"):
            Cleaning([needs])


def test_the_recipe_names_steps():
    recipe = Recipe.from_dict({"data": {"clean": ["strip_html", {"filter_length": {"min": 2}}]}})
    assert recipe.data.clean == [Step(name="strip_html"), Step(name="filter_length", options={"min": 2})]
    assert only(recipe.data.clean, TrainingExample("<b>hi</b>", "yes")).input == "hi"


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (
            "normalise_whitespaces",
            ["no cleaner is called 'normalise_whitespaces'", "did you mean 'normalize_whitespace'"],
        ),
        ({"remove_empty_lines": {"kep": 1}}, ["no option 'kep'; did you mean 'keep'", "keep, on"]),
        ({"remove_empty_lines": {"keep": "1"}}, ["remove_empty_lines", "keep='1'", "integer"]),
        ({"remove_empty_lines": {"keep": -1}}, ["keep=-1", "greater than or equal to 0"]),
        ({"mask_personal_data": {"kinds": ["phone", "fone"]}}, ["kinds.1='fone'", "'phone'"]),
        ({"mask_personal_data": {"kinds": "phone"}}, ["kinds='phone'"]),
        ({"filter_language": {"languages": ["zh", "english"]}}, ["'english' is no language code"]),
        ({"truncate_by_tokens": {}}, ["needs the option 'max_tokens'"]),
        ({"strip_html": {"on": "answers"}}, ["strip_html: on='answers'", "all, prompt or answer"]),
        ("no_such_module:fix", ["no module is called 'no_such_module'", "no_such_module.py:fix"]),
        ("no_such_file.py:fix", ["'no_such_file.py' does not exist"]),
        ("json:lods", ["'json' has no function 'lods'", "did you mean 'loads'"]),
        (7, ["must be a function"]),
    ],
)
def test_a_mistake_in_a_step_is_named_with_its_place(step, wanted):
    with pytest.raises(UserError) as caught:
        Cleaning(["strip_html", step])
    assert "cleaning step 2" in str(caught.value)
    for part in wanted:
        assert part in str(caught.value)


OWN = """
from __future__ import annotations
from luthier import TrainingExample

def shout(text: str, sign: str = "!") -> str:
    return text.upper() + sign

def fussy(text):
    return text[5]

def lost(text):
    print(text)

def only_short(example: TrainingExample) -> TrainingExample | None:
    example.metadata["seen"] = True
    if len(example.output) > 3:
        return None
    return TrainingExample(example.input, example.output + ".", metadata=example.metadata)

def wrong(example: TrainingExample):
    return example.input

not_callable = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_cleaners.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "broken_cleaners.py").write_text("1 / 0", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_cleaners", "broken_cleaners"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", ["own_cleaners", "own_cleaners.py", "./own_cleaners.py"])
def test_a_users_own_function_of_texts(own, module):
    row = TrainingExample("a", "b")
    assert only([f"{module}:shout"], row) == TrainingExample("A!", "B!")
    step = Step(name=f"{module}:shout", options={"sign": "?", "on": "answer"})
    assert only([step], row) == TrainingExample("a", "B?")
    assert only([str.upper], row) == TrainingExample("A", "B")


def test_a_users_own_function_of_rows(own):
    rows = [TrainingExample("a", "b", source=Source("f", 1)), TrainingExample("a", "long", source=Source("f", 2))]
    cleaning = Cleaning(["own_cleaners:only_short", "normalize_whitespace"])
    kept, refused = cleaning.apply(rows)
    assert (kept.output, kept.source, kept.metadata) == ("b.", Source("f", 1), {"seen": True})
    assert (refused.line, refused.reason) == (2, "refused_by_cleaner") and "only_short" in refused.message
    assert rows[0].metadata == {} and rows[0].output == "b"
    report = cleaning.report()[0]
    assert (report.changed, report.refused, report.added) == (1, 1, 1)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("own_cleaners:fussy", ["'own_cleaners:fussy' failed: IndexError", "f:9"]),
        ("own_cleaners:lost", ["returned NoneType, not text", "f:9"]),
        ("own_cleaners:wrong", ["returned str, not a row or None", "f:9"]),
    ],
)
def test_a_users_function_that_fails_names_the_row(own, name, wanted):
    with pytest.raises(UserError) as caught:
        only([name], TrainingExample("abc", "b", source=Source("f", 9)))
    for part in wanted:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        ("own_cleaners:shuot", "did you mean 'shout'"),
        ("own_cleaners:not_callable", "has no function"),
        ("broken_cleaners:f", "failed on import: ZeroDivisionError"),
        ({"own_cleaners:shout": {"sing": "?"}}, "did you mean 'sign'"),
        ({"own_cleaners:only_short": {"on": "answer"}}, "takes whole rows"),
    ],
)
def test_a_users_function_that_cannot_be_had(own, step, wanted):
    with pytest.raises(UserError, match=wanted.replace("?", r"\?")):
        Cleaning([step])


def test_the_report_counts_and_shows_what_changed():
    rows = [TrainingExample(f"word{i}  more", "x", source=Source("f.jsonl", i)) for i in range(1, 101)]
    rows.append(TrainingExample("电话13812345678", "<b>好</b>", source=Source("f.jsonl", 101)))
    steps = ["normalize_whitespace", "mask_personal_data", "strip_html"]
    cleaning = Cleaning(steps)
    assert len(list(cleaning.apply(rows))) == 101
    spaces, masked, html = cleaning.report()
    assert (spaces.rows, spaces.changed, spaces.removed, spaces.added) == (101, 100, 100, 0)
    assert (masked.changed, masked.removed, masked.added, dict(masked.counts)) == (1, 11, 7, {"phone": 1})
    assert (html.changed, html.removed) == (1, 7)
    assert len(spaces.samples) == 3 and len({sample.place for sample in spaces.samples}) == 3
    for sample in spaces.samples:
        assert sample.before[sample.start : sample.before_end] == " " and sample.after_end == sample.start
    (sample,) = masked.samples
    assert (sample.place, sample.field, sample.before) == ("f.jsonl:101", "input", "电话13*******78")
    assert sample.after[sample.start : sample.after_end] == "[PHONE]"
    again = Cleaning(steps)
    list(again.apply(rows))
    plain = [report.as_dict() for report in again.report()]
    assert plain == [report.as_dict() for report in cleaning.report()]
    assert "13812345678" not in json.dumps(plain)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_cleaning(cleaning.report()))
    shown = console.export_text()
    assert "normalize_whitespace" in shown and "phone 1" in shown and "f.jsonl:101" in shown and "[PHONE]" in shown


def test_every_cleaner_is_listed_with_its_options():
    listed = {cleaner.name: cleaner for cleaner in cleaners()}
    assert set(listed) == set(BUILT_IN)
    for cleaner in listed.values():
        assert cleaner.doc.endswith(".") or "." in cleaner.doc
        for option in cleaner.options:
            assert option.doc and option.type, (cleaner.name, option.name)
            assert not option.required or option.name == "max_tokens"
    assert {o.name: o.default for o in listed["filter_length"].options} == {"min": 1, "max": None, "unit": "characters"}
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_cleaners(cleaners()))
    shown = console.export_text()
    assert all(name in shown for name in BUILT_IN) and "max_tokens (needed)" in shown and "keep=0" in shown
    assert {o.name: o.type for o in listed["normalize_cjk_spacing"].options}["latin"] == '"keep" | "space" | "none"'


def test_the_public_class_is_the_same_machinery():
    cleaner = DataPreprocessor().add_cleaner("normalize_whitespace").add_cleaner("mask_personal_data", kinds=["email"])
    assert cleaner.clean_text("a  b@c.cn 13812345678") == "a [EMAIL] 13812345678"
    cleaner.add_cleaner("filter_length", min=2)
    with pytest.warns(UserWarning, match="refused 1 of 2"):
        kept = cleaner.clean_examples([TrainingExample("a  b", "cd"), TrainingExample("ab", "c")])
    assert kept == [TrainingExample("a b", "cd")] and [r.reason for r in cleaner.rejects] == ["too_short"]
    assert [report.name for report in cleaner.report()] == [
        "normalize_whitespace",
        "mask_personal_data",
        "filter_length",
    ]
    assert len(cleaner.cleaners) == 3


def test_real_rows_come_through_the_filters(shared_data):
    """The only rows refused are those that a reader would refuse: an English answer in a Chinese file is one."""
    steps = ["fix_mojibake", "filter_length", "filter_language", "filter_repetition", "filter_symbols"]
    for name in ("gsm8k_test.jsonl", "alpaca_zh_demo.json", "alpaca_en_demo.json"):
        rows = load_file(shared_data / name).examples
        assert [o for o in Cleaning(steps).apply(rows) if isinstance(o, Reject)] == []
    rows = load_file(shared_data / "alpaca_zh_demo.json").examples
    refused = [o for o in Cleaning([{"filter_language": {"languages": ["zh"]}}]).apply(rows) if isinstance(o, Reject)]
    assert 10 <= len(refused) <= 17 and all("'en'" in r.message for r in refused)
