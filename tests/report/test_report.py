"""A run's report: the numbers are those of its files, nothing in a row is read as markup, and nothing is loaded."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from hostile import HOSTILE
from markdown_it import MarkdownIt
from page_reader import Page

from luthier.cli import main
from luthier.errors import UserError
from luthier.evaluation.differences import differences
from luthier.page import harmless
from luthier.report import Report, write_reports
from luthier.report.blocks import Series
from luthier.report.evaluation_files import read_evaluation
from luthier.report.gather import without_secrets
from luthier.report.markdown import fenced, inline
from luthier.report.svg import nice_ticks, thinned


@pytest.fixture(params=["chat", "judged", "classes", "words", "stopped"])
def any_run(request) -> Path:
    return request.getfixturevalue(request.param)


def test_the_page_is_whole_and_loads_nothing(any_run, tmp_path):
    (target,) = write_reports(any_run, ["html"], tmp_path / "page.html")
    source = target.read_text(encoding="utf-8")
    page = Page(source)
    names = {name for name, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "embed", "use", "image", "base", "form", "b"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes and (attributes.get("href") or "#").startswith("#")
    assert "url(" not in source and "@import" not in source
    policy = next(a for name, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert dict(page.tags)["html"]["lang"] == "en"
    # What a picture shows is in words too, and each table says what its columns and rows are.
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for name, a in page.tags if name == "a"} <= set(ids)
    pictures = [a for name, a in page.tags if name == "svg"]
    assert pictures and all(set(a["aria-labelledby"].split()) <= set(ids) for a in pictures)
    heads = [a.get("scope") for name, a in page.tags if name == "th"]
    assert heads and set(heads) <= {"col", "row"}


def test_rows_that_try_to_break_out_are_shown_as_they_are(chat):
    # The text of the page is the row's, to the letter.
    assert harmless(HOSTILE) in Page((chat / "report.html").read_text(encoding="utf-8")).text
    markdown = (chat / "report.md").read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    inner = [child for token in tokens for child in token.children or ()]
    assert not [
        t for t in [*tokens, *inner] if t.type.startswith("html") or t.type in ("image", "link_open", "code_block")
    ]
    assert any(token.type == "fence" and harmless(HOSTILE) in token.content for token in tokens)
    heads = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert heads[:3] == ["Report of run", "In short", "Scores"] and "head" not in heads
    # The file's name holds a | and backticks: the row of the table has its two cells all the same.
    row = next(line for line in markdown.splitlines() if "SHA-256" in line and line.startswith("| file"))
    files = tokens[[i for i, t in enumerate(tokens) if t.content == "SHA-256"][-1] :]
    cells = [t.content for t in files if t.type == "inline"][1:3]
    assert row and len(re.findall(r"(?<!\\)\|", next(x for x in markdown.splitlines() if cells[1] in x))) == 3


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        "# a",
        "- a",
        "+ a",
        "1. a",
        "12) a",
        "---",
        "===",
        "_a_ a_b",
        "~~a~~",
        "[a](b)",
        "`a` ``b``",
        "&lt;",
        "> a",
    ],
)
def test_no_text_is_read_as_markdown(text):
    for document in (inline(text), f"| a | b |\n| - | - |\n| {inline(text)} | c |", f"- {inline(text)}\n- x"):
        tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(document)
        (shown,) = [t for t in tokens if t.type == "inline" and t.content not in ("a", "b", "c", "x")] or [tokens[1]]
        assert {child.type for child in shown.children or ()} <= {"text", "text_special"}
        assert "".join(child.content for child in shown.children or ()) == " ".join(harmless(text).split())
    (fence,) = MarkdownIt("commonmark").parse(fenced(text))
    assert fence.content == harmless(text) + "\n"


def test_the_numbers_are_those_of_the_evaluations(chat):
    stored = json.loads((chat / "report.json").read_text(encoding="utf-8"))
    assert [found["name"] for found in stored["evaluations"]] == ["comparison", "other"]
    texts = [Page((chat / "report.html").read_text()).text, (chat / "report.md").read_text().replace("\\", "")]
    for found in stored["evaluations"]:
        source = json.loads((chat / "evaluation" / f"{found['name']}.json").read_text())
        assert found["rows"] == len(source["rows"]) and found["notes"] == source["notes"]
        assert found["main"] == source["judged_by"]
        assert {line["name"] for line in found["lines"]} == set(source["models"]["tuned"]["metrics"])
        for line in found["lines"]:
            for name, model in source["models"].items():
                assert line["values"][name] == model["metrics"][line["name"]]
                assert list(line["intervals"][name]) == model["intervals"][line["name"]]
            change = source["models"]["tuned"]["changes"][line["name"]]
            assert line["changes"]["tuned"] == change
            shown = f"{change['value'] * 100:+.1f}%" if line["share"] else f"{change['value']:+,.{line['digits']}f}"
            assert all(line["label"] in text and shown in text for text in texts), line["label"]
        assert all(note in text for note in found["notes"] for text in texts)
    assert stored["rejects"][0]["reason"] == "empty_prompt" and "empty_prompt" in texts[0]
    assert [record["step"] for record in stored["training"]["steps"]] == [1, 2, 3, 4]
    assert all(record["peak_memory_bytes"] > 1e8 for record in stored["training"]["steps"])
    assert stored["manifest"]["environment"]["versions"]["torch"] in texts[0]
    assert stored["helped"]["text"] in texts[0] and "Did it harm? It was not measured." in texts[0]


def test_classes_have_their_tables(classes):
    source = json.loads((classes / "evaluation" / "comparison.json").read_text())
    tuned = source["models"]["tuned"]
    assert tuned["intervals"]["accuracy"][0] < tuned["metrics"]["accuracy"] < tuned["intervals"]["accuracy"][1]
    hits = [(r["given"]["majority"] == r["right"], r["given"]["tuned"] == r["right"]) for r in source["rows"]]
    won, lost = hits.count((False, True)), hits.count((True, False))
    assert (tuned["changes"]["accuracy"]["wins"], tuned["changes"]["accuracy"]["losses"]) == (won, lost)
    found = Report.of(classes).comparison
    assert found.moved == {"tuned": (won, lost)} and found.confusion == source["confusion"]["tuned"]
    text = Page((classes / "report.html").read_text(encoding="utf-8")).text
    for name, of in tuned["by_class"].items():
        assert f"{name}{of['support']:.0f}{of['precision']:.1%}{of['recall']:.1%}{of['f1']:.1%}" in text
        assert f"{name}{''.join(map(str, source['confusion']['tuned'][source['classes'].index(name)]))}" in text
    assert f"accuracy went from {source['models']['majority']['metrics']['accuracy']:.1%} to" in text
    assert "whose models answer no prompts" in text and "很好" in text


def test_hidden_words_have_their_scores(words):
    source = json.loads((words / "evaluation" / "comparison.json").read_text())
    tuned = source["models"]["tuned"]
    text = Page((words / "report.html").read_text(encoding="utf-8")).text
    low, high = tuned["intervals"]["accuracy"]
    assert low <= tuned["metrics"]["accuracy"] <= high and set(tuned["intervals"]) == set(tuned["metrics"])
    assert f"tuned: right {tuned['metrics']['accuracy']:.1%} (95% interval {low:.1%} … {high:.1%}) on 6 rows" in text
    assert "there is nothing to compare with" in text and source["notes"][0] in text and "[MASK]" in text


def test_rows_that_moved_are_chosen_each_once():
    rows = [
        {"where": f"r{n}", "read": "x", "right": ["a", "b"], "given": {"base": list(base), "tuned": list(tuned)}}
        for n, (base, tuned) in enumerate([("ab", "ab"), ("ax", "xx"), ("xx", "ab"), ("xx", "ax"), ("xb", "xx")])
    ]
    model = {"metrics": {"accuracy": 0.5}, "intervals": {"accuracy": [0.4, None]}, "changes": {}}
    content = {
        "models": {"base": model, "tuned": model},
        "hidden_tokens": 10,
        "notes": [],
        "samples": [0, 2],
        "rows": rows,
    }
    found = read_evaluation("comparison", content)
    assert found.moved == {"tuned": (2, 2)} and found.lines[0].intervals == {}
    assert [(e.where, e.why) for e in found.examples] == [
        ("r2", "improved"), ("r3", "improved"), ("r1", "got worse"), ("r4", "got worse"), ("r0", "sampled"),
    ]  # fmt: skip


def test_differences_are_words_and_chinese_characters():
    assert differences("我爱北京", "我爱南京") == [("same", "我爱"), ("added", "北"), ("missing", "南"), ("same", "京")]
    said, right = "the cat sat down, 2024", "the dog sat"
    found = differences(said, right)
    assert ("added", "cat") in found and ("missing", "dog") in found
    assert "".join(text for kind, text in found if kind != "missing") == said
    assert "".join(text for kind, text in found if kind != "added") == right


def test_an_unfinished_run_says_so_and_shows_what_there_is(stopped, tmp_path):
    assert not (stopped / "report.html").exists()
    html, markdown, stored = write_reports(stopped, output=tmp_path)
    text = Page(html.read_text(encoding="utf-8")).text
    assert "This run is not finished. status: interrupted" in text and "never compared with its base" in text
    assert "training loss" in text and "--resume" in text and "No evaluation is in this folder." in text
    assert json.loads(stored.read_text())["status"] == "interrupted"
    assert "interrupted" in markdown.read_text()
    with pytest.raises(UserError, match="saved no model"):
        write_reports(stopped, ["card"])
    # Only a manifest: refused before anything else was there.
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "manifest.json").write_text('{"status": "failed", "error": "no <room>"}')
    (html, *_) = write_reports(tmp_path / "bare")
    assert "status: failed: no <room>" in Page(html.read_text()).text


def test_damaged_and_unknown_files_cost_no_report(chat, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chat, run, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    (run / "evaluation" / "damaged.json").write_text('{"judged_by": "bleu", "models": {}}')
    (run / "evaluation" / "half.json").write_text('{"judged_by":')
    (run / "evaluation" / "unknown.json").write_text('{"something": "else"}')
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 5, "loss": "nan", "grad_norm": "inf", "tokens": 1, "seconds": 0}\n{"step": 6, "lo')
    html, _, stored = write_reports(run)
    text = Page(html.read_text()).text
    assert "could not be read: evaluation/damaged.json, evaluation/half.json" in text
    assert "1 values are no finite numbers" in text
    assert len(json.loads(stored.read_text())["evaluations"]) == 2


def test_harm_is_told(chat, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(chat, run, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    change = {"value": -0.2, "low": -0.3, "high": -0.1, "p": 0.0001, "wins": 0, "ties": 1, "losses": 9}
    check = {
        "name": "forgetting_general", "label": "right answers", "rows": 120, "verdict": "forgot: <most>", "harm": True,
        "groups": {}, "examples": [{"where": "g:1", "asked": "2+2?", "base": "4", "tuned": "five"}],
        "measure": {"label": "right answers", "better": "higher", "share": True, "digits": 1},
        "base": {"value": 0.6, "low": 0.5, "high": 0.7}, "tuned": {"value": 0.4, "low": 0.3, "high": 0.5},
        "change": change,
    }  # fmt: skip
    (run / "evaluation" / "harm.json").write_text(json.dumps({"checks": [check], "notes": ["n"], "seconds": 1}))
    html, markdown, stored = write_reports(run)
    text = Page(html.read_text()).text
    assert "Did it harm? right answers: forgot: <most>" in text and "right answers12060.0%40.0%-20.0%" in text
    assert "2+2? → base 4, tuned five" in text
    assert json.loads(stored.read_text())["harmed"]["kind"] == "bad" and "✗" in markdown.read_text()


def test_no_secret_is_shown():
    told = without_secrets(
        {
            "api_key": "abc", "api_key_env": "MY_KEY", "added_tokens": ["<x>"], "max_new_tokens": 4, "hub_token": "",
            "options": {"password": "p", "base_url": "https://me:pass@host/v1?api_key=123&x=1"},
            "notes": ["used hf_abcdefghijklmnopqrstu"],
        }
    )  # fmt: skip
    assert told == {
        "api_key": "(left out)", "api_key_env": "MY_KEY", "added_tokens": ["<x>"], "max_new_tokens": 4, "hub_token": "",
        "options": {"password": "(left out)", "base_url": "https://host/v1?api_key=(left out)&x=1"},
        "notes": ["used (left out)"],
    }  # fmt: skip


def test_plots_keep_spikes_and_have_round_ticks():
    points = [(float(i), 100.0 if i == 4321 else 1.0) for i in range(10_000)]
    few = thinned(Series("loss", points)).points
    assert len(few) <= 400 and (4321.0, 100.0) in few and list(few) == sorted(few)
    for low, high in ((0, 1), (-3, 5), (1e-5, 2e-4), (7, 7), (0, 0), (1234, 98765), (-1.2, -1.1)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 7, (low, high, ticks)


def test_the_verb(chat, tmp_path, monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), *capsys.readouterr()

    code, out, err = run(chat, "--format", "md, json", "-o", tmp_path)
    assert code == 0 and out.splitlines() == [f"wrote {tmp_path}/report.md", f"wrote {tmp_path}/report.json"], err
    code, out, err = run(chat, "--format", "card", "-o", tmp_path / "card.md")
    assert code == 0 and (tmp_path / "card.md").read_text().startswith("---\n"), err
    code, _, err = run(chat, "--format", "pdf")
    assert code == 2 and "there is no format 'pdf'" in err
    code, _, err = run(tmp_path)
    assert code == 2 and "holds no run" in err
