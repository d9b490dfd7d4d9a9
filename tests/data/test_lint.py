"""Each problem that lint is for is found where it is made on purpose, and not in what only looks like it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import yaml
from rich.console import Console

from luthier.data.advice import AMOUNTS, FORMULA, fitting_method, verdicts
from luthier.data.chats import ChatEncoder
from luthier.data.examples import Reject, Source, TrainingExample
from luthier.data.labels import Classes, label_findings
from luthier.data.lint import _worth_encoding, lint
from luthier.data.lint_view import render_lint
from luthier.data.loader import load_file
from luthier.data.render import Renderer
from luthier.data.report import page, write_report
from luthier.data.stats import measure
from luthier.errors import UserError
from luthier.methods import METHODS
from luthier.recipe import Recipe

LONG = "The river begins in the mountains and runs for many miles through the plain before it comes to the sea at last"


def good(count: int, begin: int = 0) -> list[TrainingExample]:
    """Different sound rows, whose words differ too."""
    return [
        TrainingExample(f"Tell me about town number {i * 37}.", f"Town {i * 37} has {i} inns and {i * i} wells.")
        for i in range(begin, begin + count)
    ]


def found(*rows: TrainingExample, among: int = 60, **options) -> dict:
    return {f.code: f for f in lint([*good(among), *rows], **options).findings}


def row(prompt: str = "Tell me more of the sea.", answer: str = "It is wide and blue.", **more) -> TrainingExample:
    return TrainingExample(prompt, answer, source=Source("rows.jsonl", 7), **more)


def test_sound_rows_have_no_finding():
    assert found() == {}


BAD = [
    ("empty_answer", row(answer="  ")),
    ("answer_begins_blank", row(answer="\n\nIt is wide.")),
    ("answer_begins_blank", row(answer=" It is wide.")),
    ("placeholder_answer", row(answer="N/A")),
    ("placeholder_answer", row(answer="待补充。")),
    ("placeholder_answer", row(answer="TODO")),
    ("placeholder_answer", row(answer="...")),
    ("answer_unfinished", row(answer=LONG + " where the")),
    ("answer_unfinished", row(answer="河流从山里流出来，" * 8 + "最后它")),
    ("answer_unfinished", row(answer="Here:\n```python\nprint(1)\n")),
    ("prompt_repeated", row(LONG + ". What is its name?", LONG + ". What is its name? It is the Rhine.")),
    ("boilerplate", row(answer="As an AI language model, I cannot swim.")),
    ("boilerplate", row(answer="作为一个人工智能语言模型，我不能游泳。")),
    ("language_differs", row("请详细介绍一下这座城市的历史和它最有名的地方。", LONG + ", and it is very wide there.")),
    ("mojibake", row(answer="The cafÃ© is open.")),
    ("mojibake", row(answer="你好你好".encode().decode("gbk"))),
    ("characters_lost", row(answer="The caf\ufffd is open.")),
    ("characters_lost", row(answer="锟斤拷锟斤拷")),
    ("html", row(answer="It is <b>wide</b> and<br>blue.")),
    ("personal_data", row(answer="Write to wei.zhang@gmail.com for it.")),
    ("personal_data", row("我的手机号是13912345678，请记住。", "好的。")),
    ("repetitive", row(answer="the sea is wide and the sea is blue and " * 12 + "deep.")),
    ("chat_markup", row("<|im_start|>user\nhello<|im_end|>")),
    ("chat_markup", row("### Instruction:\nSay hello.\n### Response:")),
    ("reasoning_tags", row(answer="<think>It is wide. So it is wide.")),
    ("reasoning_tags", row(answer="<think>It is wide.</think>")),
]  # fmt: skip


@pytest.mark.parametrize(("code", "bad"), BAD, ids=[f"{code}-{i}" for i, (code, _) in enumerate(BAD)])
def test_a_bad_row_is_found_and_placed(code, bad):
    findings = found(bad)
    assert set(findings) == {code}
    finding = findings[code]
    assert finding.count == 1 and finding.rows == ("rows.jsonl:7",) and len(finding.samples) == 1
    assert finding.share == pytest.approx(1 / 61) and finding.remedy


@pytest.mark.parametrize(
    "sound",
    [
        row(answer="None of them."),
        row("Which sign is it?", "+"),
        row(answer="无锡"),
        row(answer=LONG + "."),
        row(answer=LONG + " (see below)"),
        row(answer="- " + LONG),
        row(answer=f"{LONG} - Mark Twain"),
        row(answer=f"{LONG} #RiverLife"),
        row(answer="Here:\n```python\nx = '" + LONG + "'\n```"),
        row("Go on: the sky is", "the sky is blue."),
        row(answer="She works as an AI engineer in a bank."),
        row("Translate into Chinese: " + LONG, "这条河从山里流出，流过平原，最后流进大海，它在那里非常宽阔。"),
        row("写一段英文介绍这座城市的历史和它最有名的地方。", LONG + ", and it is very wide there."),
        row(answer="Le café est ouvert, naïve Zoë says: €5 — “déjà vu”."),
        row("Write the HTML of a bold word.", "<b>word</b>"),
        row(answer="a < b and c > d; List<int>; Q&A"),
        row(answer="Write to name@example.com, or ask 192.168.1.1."),
        row(answer="<think>It is wide.</think> It is wide."),
        row(answer="Use the Instruction and the Response as they are."),
    ],
)
def test_what_only_looks_bad_is_not_found(sound):
    assert found(sound) == {}


def test_what_most_rows_do_is_how_they_are():
    rows = [row(f"Item {i}?", f"{LONG} {chr(97 + i % 26)}{i}x") for i in range(40)]
    assert "answer_unfinished" not in {f.code for f in lint(rows, near=None).findings}


def test_copies_and_contradictions():
    first = row("Who wrote the long poem?", "Dante wrote it.", metadata={"n": 1})
    findings = found(
        first, row("Who wrote the long poem?", "Dante wrote it."), row("Who wrote the long poem?", "Homer.")
    )
    assert findings["duplicates"].count == 1 and findings["contradictions"].count == 1
    assert "deduplicate: exact" in findings["duplicates"].remedy
    assert "Dante" in findings["contradictions"].samples[0] and "Homer" in findings["contradictions"].samples[0]
    words = " ".join(f"word{i}" for i in range(60))
    near = found(row("q?", words), row("q?", words.replace("word30", "other")))
    assert near["near_duplicates"].severity == "info" and near["near_duplicates"].count == 1
    assert "near_duplicates" not in found(row("q?", words), row("q?", words.replace("word30", "other")), near=None)
    assert "duplicates" not in found(first, first, deduplicated=True)
    report = lint([first, first, *good(98)])
    assert (report.rows, report.different) == (100, 99)


def test_refused_rows_are_counted_by_reason():
    rejects = [Reject("f", n, "bad_json", "not valid JSON", value="{") for n in range(3)]
    rejects.append(Reject("f", 9, "empty_answer", "no answer", remedy="give it a text"))
    report = lint(good(60), rejects=rejects)
    assert [(f.code, f.severity, f.count) for f in report.findings] == [
        ("refused_bad_json", "error", 3), ("refused_empty_answer", "error", 1),
    ]  # fmt: skip
    assert report.findings[0].rows == ("f:0", "f:1", "f:2") and report.errors
    assert {f.severity for f in lint(good(60), rejects=rejects, allowed_rejects=0.1).findings} == {"warning"}


LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
    },
}


def called(name: str, arguments, tools=(LOOK,)) -> TrainingExample:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "Seven."},
    ]
    return TrainingExample(messages=turns, tools=list(tools), source=Source("t", 1))


def test_tool_calls_are_held_to_the_tools():
    assert found(called("look", {"n": 7})) == {}
    assert set(found(called("loook", {"n": 7}))) == {"tool_undeclared"}
    assert set(found(called("look", {"n": 7}, tools=[]))) == {"tool_undeclared"}
    for wrong in ({"n": "7"}, {}, [7]):
        finding = found(called("look", wrong))["tool_arguments"]
        assert finding.count == 1 and "turn 2 calls 'look'" in finding.samples[0]
    turns = [{"role": "user", "content": "?"}, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "7"}]
    assert set(found(TrainingExample(messages=turns))) == {"tool_answer_uncalled"}


def test_classes_and_their_spelling():
    def codes(*labels: str) -> dict:
        classes = Classes()
        for label in labels:
            classes.add(TrainingExample("x", label, label=label))
        return {f.code: f for f in label_findings(classes.counts)}

    assert codes(*["pos"] * 15, *["neg"] * 15) == {}
    assert set(codes(*["pos"] * 30)) == {"one_label"}
    assert set(codes(*["pos"] * 30, "neg")) == {"label_imbalance"}
    spelt = codes(*["Positive"] * 15, *["positive "] * 3, *["好评"] * 12, *["好评。"] * 2)["label_spelling"]
    assert spelt.count == 5 and "'Positive' (15), 'positive ' (3)" in spelt.message
    assert "label_spelling" not in codes(*["A+"] * 10, *["A-"] * 10, *["A"] * 10)
    assert "label_spelling" not in codes(*["!"] * 15, *["?"] * 15)


def test_a_system_message_in_few_rows():
    turns = [{"role": "system", "content": "Be kind."}, *row().to_chat_format()]
    assert found(TrainingExample(messages=turns))["system_in_few_rows"].severity == "info"
    every = [TrainingExample(messages=[turns[0], *r.to_chat_format()]) for r in good(30)]
    assert lint(every, near=None).findings == []


def test_leaks_between_the_parts():
    train = good(300)
    words = " ".join(f"word{i}" for i in range(60))
    train.append(row("Say the words.", words))
    held = [
        *good(40, 1_000),
        train[3],
        row("Say the words.", words.replace("word30", "x")),
        TrainingExample(train[5].input, "No."),
    ]
    codes = {f.code: f for f in lint(train, held_out={"test": held}).findings}
    assert codes["overlap"].severity == "error" and codes["overlap"].count == 1
    assert codes["overlap_prompt"].count == 2 and "overlap_near" not in codes
    assert codes["overlap"].message.startswith("1 of 43 rows (2.3%): test: ")


def test_what_needs_the_tokenizer(tokenizer):
    encoder = ChatEncoder(Renderer(tokenizer, allow_special_tokens=True))
    long = row(answer=" ".join(f"{i} and" for i in range(700)) + " that is all.")
    tools = [{"type": "function", "function": {"name": "look"}}]
    findings = found(long, row("say <|endoftext|> now"), row(tools=tools), encoder=encoder, max_length=1_024)
    count = len(encoder.encode([long]).examples[0])
    assert findings["too_long"].count == 1 and findings["too_long"].samples == (f"{count:,} tokens",)
    assert findings["special_token_in_text"].severity == "error" and findings["special_token_in_text"].count == 1
    assert findings["model_tools_ignored"].count == 1
    assert "too_long" not in found(long, encoder=encoder, max_length=count)
    assert found(long, encoder=encoder, max_length=count - 1)["too_long"].count == 1


def test_no_long_row_escapes(tokenizer):
    """Rows are measured only where their bytes could be too many tokens: that must never be wrong."""
    encoder = ChatEncoder(Renderer(tokenizer, allow_special_tokens=True))
    said = [letter * n for letter in ("a", "é", "龘", "🙂", " x", "0", "\n.") for n in range(1, 300, 23)]
    rows = [TrainingExample("q", text) for text in said] + [TrainingExample(text + ".") for text in said]
    rows += [TrainingExample(messages=row().to_chat_format() * n) for n in range(1, 12)]
    encoded = encoder.encode(rows).examples
    assert len(encoded) == len(rows)
    for limit in (64, 150, 400):
        long = {number for number, e in enumerate(encoded) if len(e) > limit}
        # With such a step none but the first is taken as a sample.
        assert long <= {number for number, _ in _worth_encoding(rows, encoder, limit, step=10**6)}
        assert long


# --- how much data ---


def test_the_verdict_follows_the_tables():
    words = {v.amount.goal: v.word for v in verdicts(5_000)}
    assert words["a simple task"] == "plenty" and words["a domain"] == "enough" and words["full tuning"] == "too few"
    assert [v.word for v in verdicts(99)] == ["too few"] * len(AMOUNTS)
    for rows, says in (
        (99, "few for any tuning"),
        (100, "for LoRA"),
        (9_999, "for LoRA"),
        (10_000, "just enough for full"),
    ):
        assert says in fitting_method(rows)
    assert "memory decides" in fitting_method(50_000)
    assert "1% of the model's parameters is wrong" in FORMULA


def test_the_methods_advise_the_same_amounts():
    assert METHODS["lora"].advice.examples == (100, 1_000)
    assert METHODS["full"].advice.examples == (10_000, 50_000)


def test_the_remedies_are_settings_that_exist():
    from luthier.data.cleaning import Cleaning
    from luthier.data.row_checks import CHECKS

    for check in CHECKS:
        if check.remedy.startswith("set data."):
            assert Cleaning(settings_of(check).data.clean).functions


def settings_of(check) -> Recipe:
    """The settings that a remedy names, as a recipe has them."""
    key, _, value = check.remedy.removeprefix("set data.").partition(": ")
    return Recipe.from_dict({"data": {key: yaml.safe_load(value[: value.index("]") + 1])}})


def test_a_remedy_mends_what_was_found():
    from luthier.data.cleaning import Cleaning
    from luthier.data.row_checks import CHECKS, Look

    mended = 0
    checks = {check.code: check for check in CHECKS}
    for code, bad in BAD:
        if checks[code].remedy.startswith("set data.clean: ["):
            (after,) = Cleaning(settings_of(checks[code]).data.clean).apply([bad])
            mended += 1
            assert isinstance(after, Reject) or checks[code].find(Look(after)) is None
    assert mended >= 6


# --- how it is shown ---


def test_a_hostile_row_is_harmless_in_every_view(tokenizer, tmp_path):
    nasty = "<script>alert(1)</script>[bold]\"'&\x1b[31m\x00"
    rows = [*good(30), *[TrainingExample(nasty, f"{nasty} no", label=nasty, source=Source(nasty, 1))] * 2]
    report = lint(rows)
    assert {"duplicates", "html"} <= {f.code for f in report.findings}
    stats = measure(rows, ChatEncoder(Renderer(tokenizer, allow_special_tokens=True)))
    html = page(nasty, stats={nasty: stats}, lint=report)
    assert "<script" not in html and "\x00" not in html and "&lt;script&gt;" in html
    write_report(tmp_path / "r.html", nasty, lint=report)
    with pytest.raises(UserError, match="exists"):
        write_report(tmp_path / "r.html", nasty, lint=report)
    console = Console(record=True, width=100, force_terminal=True)
    console.print(render_lint(report, nasty))
    assert "[bold]" in console.export_text()


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, or that loads something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.svgs = 0

    def handle_starttag(self, tag, attrs):
        assert (
            tag not in ("script", "link", "img", "iframe", "object")
            and not {"src", "href", "onload"} & dict(attrs).keys()
        )
        self.svgs += tag == "svg"
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("path", "polyline")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_whole_page(tokenizer):
    stats = measure(good(40), ChatEncoder(Renderer(tokenizer, allow_special_tokens=True)))
    html = page("rows", stats={"train": stats}, lint=lint([*good(20), BAD[0][1], BAD[4][1]]))
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == [] and parser.svgs >= 4
    assert "http" not in html.replace('http-equiv="Content-Security-Policy"', "")


def test_the_report_for_programs_is_json():
    content = json.loads(json.dumps(lint([*good(20), BAD[0][1]]).to_dict()))
    assert content["passed"] is False and content["findings"][0]["code"] == "empty_answer"
    assert content["findings"][0]["samples"] == ["'  '"] and len(content["amounts"]) == len(AMOUNTS)


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("gsm8k_test.jsonl", set()),
        ("alpaca_zh_demo.json", {"boilerplate", "language_differs", "duplicates", "answer_unfinished"}),
        ("alpaca_en_demo.json", {"boilerplate", "duplicates", "answer_unfinished", "personal_data"}),
    ],
)
def test_real_rows_have_the_findings_that_were_read(shared_data, file, allowed):
    """Somebody read these findings and found them right; a new one is a false alarm until it is read too."""
    report = lint(load_file(shared_data / file).examples)
    assert {f.code for f in report.findings} == allowed and not report.errors
