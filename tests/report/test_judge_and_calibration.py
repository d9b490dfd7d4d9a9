"""What a judge said, and whether a classifier is as sure as it is right: as the files have it, and as text alone."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from hostile import JUDGE
from page_reader import Page

from luthier.page import harmless
from luthier.report import Report, write_reports
from luthier.report.markdown import fenced, inline


def test_classes_say_whether_they_are_as_sure_as_right(classes):
    told = json.loads((classes / "evaluation" / "comparison.json").read_text())
    sure = told["models"]["tuned"]["calibration"]
    html, text = (classes / "report.html").read_text(encoding="utf-8"), ""
    text = Page(html).text
    assert f"{sure['confidence']:.1%} sure on average, and right in {sure['accuracy']:.1%}" in text
    # In the table of scores, under the terminal's names, and no loss twice.
    assert f"calibration error–{sure['ece']:.1%}" in text and f"Brier score–{sure['brier']:.3f}" in text
    assert "nll" not in {line.name for line in Report.of(classes).comparison.lines}
    markdown = (classes / "report.md").read_text(encoding="utf-8")
    for of in sure["reliability"]:
        shares = (f"{of[key]:.1%}" for key in ("confidence", "accuracy"))
        cells = (f"{of['from']:.1%} … {of['to']:.1%}", f"{of['count']}", *shares)
        assert "".join(cells) in text and f"| {' | '.join(cells)} |" in markdown
    # The picture: a point a row of the table, where the share is higher the higher it lies.
    figure = next(part for part in html.split("<figure>") if "as sure as right" in part).split("</figure>")[0]
    drawn = [tuple(map(float, xy)) for xy in re.findall(r'<circle class="dot c0" cx="([\d.]+)" cy="([\d.]+)"', figure)]
    assert len(drawn) == len(sure["reliability"])
    (corner,) = re.findall(r'<polyline class="curve c1" points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', figure)
    left, base, right, top = map(float, corner)
    for (x, y), of in zip(drawn, sure["reliability"], strict=True):
        assert (x - left) / (right - left) == pytest.approx(of["confidence"], abs=1e-3)
        assert (base - y) / (base - top) == pytest.approx(of["accuracy"], abs=1e-3)
    assert json.loads((classes / "report.json").read_text())["evaluations"][0]["calibration"] == sure


def test_labels_have_their_own_calibration_and_the_note_is_there(classes, tmp_path):
    content = json.loads((classes / "evaluation" / "comparison.json").read_text())
    tuned = content["models"]["tuned"]
    tuned["calibration"]["by_label"] = {"</td><b>x": {"ece": 0.125, "brier": 0.25, "nll": 0.5}}
    content |= {"confusion": {}, "notes": ["tuned is more sure than <right>"]}
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    shutil.copy(classes / "manifest.json", tmp_path / "run")
    (tmp_path / "run" / "evaluation" / "comparison.json").write_text(json.dumps(content))
    html, *_ = write_reports(tmp_path / "run")
    text = Page(html.read_text(encoding="utf-8")).text
    assert "</td><b>x12.5%0.2500.500" in text and "tuned is more sure than <right>" in text
    del tuned["calibration"]
    (tmp_path / "run" / "evaluation" / "comparison.json").write_text(json.dumps(content))
    html, *_ = write_reports(tmp_path / "run")
    assert "as sure as" not in html.read_text(encoding="utf-8")


def test_what_a_judge_said_is_told(judged):
    source = json.loads((judged / "evaluation" / "comparison.json").read_text())
    told = source["judge"]["models"]["tuned"]
    # Who wins the four rows with a verdict depends on the answers' texts, and so on the processor.
    assert told["wins"] + told["losses"] == told["unread"] == told["failed"] == told["ties"] == 4
    stored = json.loads((judged / "report.json").read_text())["evaluations"][0]
    assert stored["judge"] == source["judge"] | {"endpoint": stored["judge"]["endpoint"]}
    page = Page((judged / "report.html").read_text(encoding="utf-8")).text
    markdown = (judged / "report.md").read_text(encoding="utf-8")
    # The password of the address is nowhere.
    assert "//me:hidden@" in source["judge"]["endpoint"] and "http://127.0.0.1" in stored["judge"]["endpoint"]
    assert not any("hidden@" in (judged / f"report.{kind}").read_text() for kind in ("html", "md", "json"))
    facts = {
        "rows judged": f"{told['rows']}",
        "won": f"{told['wins']}", "tied": f"{told['ties']}", "lost": f"{told['losses']}",
        "left out: a reply without a verdict": f"{told['unread']}", "left out: no reply": f"{told['failed']}",
        "p": f"{told['p']:.3f}",
    }  # fmt: skip
    shares = {"share won, ties as half": "win_rate", "share won, without ties": "of_decided"}
    shares |= {
        "rows that the order of the answers decided": "decided",
        "the answer shown first was chosen": "first_preferred",
    }
    for label, key in shares.items():
        value, low, high = (told | told["order"])[key]
        facts[label] = f"{value:.1%} [{low:.1%} … {high:.1%}]"
    for label, shown in facts.items():
        assert f"{label}{shown}" in page and f"| {inline(label)} | {inline(shown)} |" in markdown, label
    rate = told["win_rate"][0]
    assert f"judge{1 - rate:.1%}{rate:.1%} [" in page and f"{told['wins']}/{told['losses']}" in page
    assert JUDGE in page and inline(JUDGE) in markdown and "What did the judge say?" in page
    # Beside each row that is shown, what was said of it; and at the end, what was asked.
    rows = {row["where"]: row for row in source["rows"]}
    outcomes = {
        "win": "won",
        "loss": "lost",
        "tie": "tied; the order decided",
        "unread": "left out, unread",
        "failed": "left out, failed",
    }
    assert stored["examples"]
    for example in stored["examples"]:
        verdict = rows[example["where"]]["answers"]["tuned"]["judge"]
        assert example["judged"] == {"tuned": verdict}
        assert f"judge: tuned {outcomes[verdict['outcome']]}" in page
        for reply in filter(None, verdict["replies"]):
            assert harmless(reply.strip()) in page and fenced(reply.strip()) in markdown
    prompt = source["judge"]["prompt"].strip()
    assert prompt in page and fenced(prompt) in markdown


def test_a_judge_that_gave_up_and_one_that_was_asked_nothing(judged, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(judged, run, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    file = run / "evaluation" / "comparison.json"
    content = json.loads(file.read_text())
    for row in content["rows"]:
        row["answers"]["tuned"]["judge"] = {"outcome": "tie", "identical": True}
    file.write_text(json.dumps(content))
    text = Page(write_reports(run)[0].read_text(encoding="utf-8")).text
    assert "won0tied16 (16 identical)lost0" in text and "the answers are the same, and it was not asked" in text
    for row in content["rows"]:
        del row["answers"]["tuned"]["judge"]
    content["judge"] |= {"models": {}, "error": "down <b>"}
    content["notes"] = ["judge: it gave up: down <b>"]
    file.write_text(json.dumps(content))
    html, _, stored = write_reports(run)
    text = Page(html.read_text(encoding="utf-8")).text
    assert "judge: it gave up: down <b>" in text and "rows judged" not in text and "What did the judge say?" not in text
    assert json.loads(stored.read_text())["evaluations"][0]["judge"]["error"] == "down <b>"
