"""The parts of a report in their order, for any view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from luthier.report.blocks import Block, Code, Heading, Listing, Plot, Series, Table, Text
from luthier.report.evaluation_files import finite
from luthier.report.gather import Report
from luthier.report.harm_parts import harm_blocks
from luthier.report.judge_parts import judge_verdict, prompt_blocks
from luthier.report.score_parts import evaluation_blocks, sample_blocks
from luthier.report.snippets import NO_TEMPLATE
from luthier.report.verdict import harmed, helped

_COUNTS = ("rows_in", "kept", "refused", "set_aside", "augmented", "repeated", "tokens", "trained_tokens")


def content(report: Report) -> list[Block]:
    """Everything that is shown, the headline first."""
    return [
        *_headline(report),
        *_scores(report),
        *harm_blocks(report),
        *_course(report),
        *_samples(report),
        *_data(report),
        *_preflight(report),
        *_use(report),
        *_environment(report),
        *prompt_blocks(report),
        *_settings(report),
    ]


def _headline(report: Report) -> Iterator[Block]:
    yield Heading("In short")
    if not report.finished:
        error = f": {report.manifest['error']}" if report.manifest.get("error") else ""
        yield Text(
            f"status: {report.status}{error}. What follows is what was there when the report was written.",
            "warning",
            "This run is not finished.",
        )
    verdict = helped(report)
    yield Text(f"{verdict.text} {verdict.hint}".strip(), _mood(verdict.kind), "Did it help?")
    if (judged := judge_verdict(report.comparison)) is not None:
        yield judged
    cost = harmed(report)
    yield Text(f"{cost.text} {cost.hint}".strip(), _mood(cost.kind), "Did it harm?")
    yield Text(trained(report), "", "What was trained?")
    notes = [note for found in report.evaluations for note in found.notes]
    if notes:
        yield Text(f"{len(notes)} noted below, under the scores.", "warning", "Doubts:")


def _mood(kind: str) -> Any:
    return kind if kind in ("good", "bad") else ""


def trained(report: Report) -> str:
    """What was trained, of what, and for how long, in a line."""
    facts = report.preflight.get("facts", {})
    method, counts = facts.get("method", {}), facts.get("parameters", {})
    text = f"{report.method}: {method['trains']}" if "trains" in method else report.method
    if counts.get("all"):
        text += f"; {counts['trained']:,} of {counts['all']:,} parameters ({counts['trained'] / counts['all']:.2%})"
    text += f", of {report.base}, for {report.task}"
    done = report.training
    if done:
        seconds = done.get("seconds") or 0
        text += f". {done.get('step', 0):,} steps, {int(done.get('tokens', 0)):,} tokens, {seconds:,.1f} s"
        if seconds:
            text += f" ({done['tokens'] / seconds:,.0f} tokens/s)"
    return text + "."


# --- scores ---


def _scores(report: Report) -> Iterator[Block]:
    yield Heading("Scores")
    if not report.evaluations:
        yield Text("No evaluation is in this folder.", "dim")
    for found in report.evaluations:
        yield Heading(f"{report.part_of(found)}: {found.rows:,} rows", 3)
        yield from evaluation_blocks(found)
    if report.unread:
        yield Text(f"could not be read: {', '.join(report.unread)}", "warning")


def _samples(report: Report) -> Iterator[Block]:
    if not any(found.examples for found in report.evaluations):
        return
    yield Heading("Rows side by side")
    for found in report.evaluations:
        if found.examples:
            yield Heading(report.part_of(found), 3)
            yield from sample_blocks(found)


# --- the course of training ---


def _course(report: Report) -> Iterator[Block]:
    yield Heading("The course of training")
    plots = [*_plots(report)]
    if not plots:
        yield Text("No step was recorded.", "dim")
    yield from plots


def _plots(report: Report) -> Iterator[Plot]:
    steps, checks = report.steps, report.validations
    losses = [("training loss", steps, "loss"), ("validation loss", checks, "eval_loss")]
    for title, unit, wanted in (
        ("Loss", "", losses),
        ("Learning rate", "", [("learning rate", steps, "learning_rate")]),
        ("Gradient norm, before clipping", "", [("gradient norm", steps, "grad_norm")]),
        ("Speed", "tokens/s", [("tokens a second", steps, "speed")]),
        ("Peak memory so far", "GB", [("peak memory", steps, "memory")]),
    ):
        yield from _plot(title, unit, wanted)
    known = ("step", "best", "best_by", "eval_loss", "eval_trained_tokens", "eval_seconds", "eval_perplexity")
    scores = dict.fromkeys(key for record in checks for key in record if key not in known)
    shares = [(key.removeprefix("eval_"), checks, key) for key in scores if _within_one(checks, key)]
    for begin in range(0, len(shares), 3):
        yield from _plot("Scores of answers during training", "", shares[begin : begin + 3])
    for key in scores:
        if not _within_one(checks, key):
            yield from _plot("Scores of answers during training", "", [(key.removeprefix("eval_"), checks, key)])


def _within_one(records: list[dict[str, Any]], key: str) -> bool:
    return all(0 <= value <= 1 for record in records if (value := finite(record.get(key))) is not None)


def _plot(title: str, unit: str, wanted: list[tuple[str, list[dict[str, Any]], str]]) -> Iterator[Plot]:
    series, lost = [], 0
    for name, records, key in wanted:
        found = [(record["step"], _value(record, key)) for record in records]
        there = [(float(step), value) for step, value in found if value is not None]
        lost += sum(_value(r, key) is None and r.get(key) is not None for r in records)
        if there:
            series.append(Series(name, there))
    if series:
        yield Plot(title, series, unit, lost)


def _value(record: dict[str, Any], key: str) -> float | None:
    if key == "speed":
        tokens, seconds = finite(record.get("tokens")), finite(record.get("seconds"))
        return None if tokens is None or not seconds else tokens / seconds
    if key == "memory":
        taken = finite(record.get("peak_memory_bytes"))
        return None if taken is None else taken / 1e9
    return finite(record.get(key))


# --- rows ---


def _data(report: Report) -> Iterator[Block]:
    yield Heading("Data")
    parts = report.manifest.get("rows", {})
    if not parts:
        yield Text("The run ended before its rows were read.", "dim")
        return
    heads = ["rows", "read", "kept", "refused", "set aside", "made", "repeated", "tokens", "trained tokens", "share"]
    rows = []
    for name, part in parts.items():
        share = part["trained_tokens"] / part["tokens"] if part.get("tokens") else 0.0
        rows.append([name, *(f"{part.get(key, 0):,}" for key in _COUNTS), f"{share:.1%}"])
    yield Table("Rows by part", heads, rows)
    reasons: Counter[str] = Counter()
    for part in parts.values():
        reasons.update(part.get("refused_by_reason", {}))
    if reasons:
        first = {row.get("reason"): row for row in reversed(report.rejects)}
        told = []
        for reason, count in reasons.most_common():
            row = first.get(reason, {})
            where = f"{row['file']}:{row['line']}" if row else "rejects.jsonl lists them"
            told.append([reason, f"{count:,}", where, row.get("message", ""), row.get("remedy") or ""])
        heads = ["reason", "rows", "the first", "what is wrong", "what to do"]
        yield Table("Refused rows", heads, told, words=True)
    else:
        yield Text("No row was refused.")
    notes = report.manifest.get("data_notes", [])
    if notes:
        yield Listing(notes)
    files = report.manifest.get("data", [])
    if files:
        yield Table(
            "Files", ["file", "SHA-256"], [[f["file"], f.get("sha256", "(of the hub)")] for f in files], words=True
        )
    else:
        yield Text("The rows came from Python, not from files.")


def _preflight(report: Report) -> Iterator[Block]:
    yield Heading("Pre-flight")
    if not report.preflight:
        yield Text("The run ended before its pre-flight.", "dim")
        return
    findings = report.preflight.get("findings", [])
    passed = report.preflight.get("passed")
    yield Text("passed" if passed else "refused the run", "good" if passed else "bad", "The check before step one:")
    if not findings:
        yield Text("Nothing was found.")
        return
    rows = []
    for found in findings:
        places = ", ".join(found.get("rows", []))
        count = f" (rows: {found['count']:,})" if found.get("count") else ""
        rows.append([found["severity"], found["code"], f"{found['message']}{count}", places, found.get("remedy", "")])
    yield Table("Findings", ["", "code", "what", "where", "what to do"], rows, words=True)


# --- use, environment, settings ---


def _use(report: Report) -> Iterator[Block]:
    from luthier.tasks import get_task

    yield Heading("How to use it")
    if report.saved is None or not report.finished:
        yield Text("Nothing is saved to be used yet; this goes on with the run, from its last checkpoint:")
        yield Code(f"luthier train {report.folder}/recipe.yaml --resume", "sh")
        return
    merges = bool(report.preflight.get("method", {}).get("merges"))
    yield Code("\n".join(get_task(report.task).next_steps(report.folder, report.saved.name, merges=merges)))


def _environment(report: Report) -> Iterator[Block]:
    yield Heading("Environment")
    manifest, env = report.manifest, report.manifest.get("environment", {})
    template = manifest.get("chat_template_sha256")
    done = report.training
    peak = finite(done.get("peak_memory_bytes"))
    seconds = finite(done.get("seconds")) or 0.0
    facts = {
        "started": manifest.get("started"),
        "ended": manifest.get("ended"),
        "seed": manifest.get("seed"),
        "device": ", ".join(env.get("gpus", []))
        or f"CPU ({env.get('cpu_capability')}, {env.get('cpu_threads')} threads)",
        "processes": manifest.get("processes"),
        "training time": f"{seconds:,.1f} s" if done else None,
        "speed": f"{done.get('tokens', 0) / seconds:,.0f} tokens/s" if seconds else None,
        "peak memory": None if peak is None else f"{peak / 1e9:.2f} GB",
        "stopped by": done.get("stopped"),
        "best step": done.get("best_step"),
        "system": env.get("system"),
        "Python": env.get("python"),
        **env.get("versions", {}),
        "base model": report.base,
        "base model, fingerprint": manifest.get("model", {}).get("fingerprint"),
        "chat template, SHA-256": None if template == NO_TEMPLATE else template,
    }
    rows = [[name, str(value)] for name, value in facts.items() if value is not None]
    yield Table("", ["what", "value"], rows, words=True)
    parity = manifest.get("parity", [])
    if parity:
        told = [
            [
                p["name"],
                "passed" if p["passed"] else "failed",
                ", ".join(f"{k} {v:.3g}" for k, v in p["numbers"].items()),
            ]
            for p in parity
        ]
        yield Table(
            "Parity: is what was written the model that was trained?", ["hand-over", "", "measured"], told, words=True
        )


def _settings(report: Report) -> Iterator[Block]:
    yield Heading("Recipe, as resolved")
    if report.recipe:
        yield Code(yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100).strip(), "yaml")
    else:
        yield Text("The run ended before its recipe was written.", "dim")
