"""Rows that begin with the same long prompt: Luthier with and without prefix sharing, in turn, in one run.

    python benchmarks/shared_prefix.py --json prefix.json

GSM8K's rows, each behind the system message of `shared_prefix.txt` (about 1,000 tokens). Both sides are Luthier's
public tuner in fresh child processes, on the same rows in the same order, by the same settings; they differ in
`training.share_prefix` alone (`auto` and `never`). Over the rounds the sides take turns at going first.

What is printed: tokens a second (of the rows, the prefix counted in each of them on both sides, so that the ratio is
that of the time for the same work), milliseconds a step, peak resident memory at the end of the last step, the ratios
with their spread, and the largest difference of the two sides' losses at any step. Sharing computes the same
gradients, so the losses must agree within the precision's rounding; where the first ones do not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import DISTURBED, GSM8K, Outcome, Settings, cell, run_child, say, table
from _speed_report import FIRST_LOSS_TOLERANCE

PREFIX = Path(__file__).with_name("shared_prefix.txt")
BASELINE = "never"


def main() -> None:
    settings = vars(_parser().parse_args())
    target = settings.pop("json")
    for key in ("data", "prefix"):
        if not settings[key].is_file():
            sys.exit(f"--{key} {settings[key]} does not exist")
        settings[key] = str(settings[key])
    if not 0 <= settings["warmup_steps"] < settings["steps"]:
        sys.exit(f"--warmup-steps {settings['warmup_steps']} leaves no step of {settings['steps']} to time")
    settings["system"] = Path(settings["prefix"]).read_text(encoding="utf-8").strip()
    settings["lr"] = settings["lr"] or (2e-4 if settings["method"] == "lora" else 2e-5)
    with tempfile.TemporaryDirectory() as scratch:
        settings["rows"] = str(Path(scratch) / "rows.jsonl")
        settings |= run_child("_prefix_sides", "prepare", settings, scratch)
        rounds = _rounds(settings, scratch)
    report = _report(settings, rounds)
    print(_tables(settings, report))
    if target:
        target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {target}")
    if not report["first_losses_agree"]:
        sys.exit("the first losses differ by more than rounding: the sides did not do the same work")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="embedded model's name, folder or hub id")
    add("--data", type=Path, default=GSM8K, help="JSONL of rows")
    add("--prompt-column", default="question")
    add("--response-column", default="answer")
    add("--prefix", type=Path, default=PREFIX, help="text file with the system message of every row")
    add("--sides", nargs="+", choices=("auto", BASELINE), default=["auto", BASELINE])
    add("--method", choices=("lora", "full"), default="lora")
    add("--batch", type=int, default=8, help="rows a step")
    add("--steps", type=int, default=6, help="optimiser steps, warm-up included")
    add("--warmup-steps", type=int, default=2, help="first steps that are not timed")
    add("--rounds", type=int, default=2)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--max-length", type=int, default=2048, help="longest row, prefix included")
    add("--r", type=int, default=8)
    add("--alpha", type=float, default=32)
    add("--dropout", type=float, default=0.0)
    add("--lr", type=float, help="default: 2e-4 for lora, 2e-5 for full")
    add("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of each side")
    add("--json", type=Path, help="write every number to this file")
    return parser


def _rounds(settings: Settings, scratch: str) -> list[dict[str, Outcome]]:
    rounds = []
    for number in range(settings["rounds"]):
        done: dict[str, Outcome] = {}
        for side in settings["sides"][:: -1 if number % 2 else 1]:
            say(f"round {number + 1} of {settings['rounds']}: share_prefix={side} ...")
            given = {**settings, "share_prefix": side, "output": str(Path(scratch) / f"{side}-{number}")}
            done[side] = run_child("_prefix_sides", "train", given, scratch)
        rounds.append(done)
    return rounds


def _report(settings: Settings, rounds: list[dict[str, Outcome]]) -> dict[str, Any]:
    timed = slice(settings["warmup_steps"], None)
    speeds = {
        side: [
            {
                "tokens_per_second": sum(done[side]["tokens"][timed]) / sum(done[side]["seconds"][timed]),
                "milliseconds_per_step": sum(done[side]["seconds"][timed]) / len(done[side]["seconds"][timed]) * 1e3,
                "peak_memory_bytes": done[side]["peak_memory_bytes"],
            }
            for done in rounds
        ]
        for side in settings["sides"]
    }
    report: dict[str, Any] = {
        "settings": {k: v for k, v in settings.items() if k not in ("rows", "folder", "system")}
        | {key: Path(settings[key]).name for key in ("model", "data", "prefix")},
        "speeds": speeds,
        "ratios": {},
        "largest_loss_difference": {},
        "first_losses_agree": True,
        "disturbed": [
            f"round {number}, {side}: {done[side]['others_share']:.0%}"
            for number, done in enumerate(rounds, 1)
            for side in settings["sides"]
            if done[side]["others_share"] > DISTURBED
        ],
        "rounds": rounds,
    }
    for side in settings["sides"]:
        if side == BASELINE or BASELINE not in speeds:
            continue
        pairs = list(zip(speeds[side], speeds[BASELINE], strict=True))
        report["ratios"][side] = {
            key: [shared[key] / alone[key] for shared, alone in pairs]
            for key in ("tokens_per_second", "peak_memory_bytes")
        }
        apart = [
            [abs(a - b) for a, b in zip(done[side]["losses"], done[BASELINE]["losses"], strict=True)] for done in rounds
        ]
        report["largest_loss_difference"][side] = max(map(max, apart))
        within = all(differences[0] <= FIRST_LOSS_TOLERANCE[settings["dtype"]] for differences in apart)
        report["first_losses_agree"] = report["first_losses_agree"] and within
    return report


def _tables(settings: Settings, report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{Path(settings['model']).name}, {settings['method']}, {settings['dtype']}, {settings['batch']} rows a step, "
        f"{settings['steps'] - settings['warmup_steps']} timed steps, {settings['rounds']} rounds, "
        f"{settings['threads']} threads; rows of {settings['mean_tokens']:,.0f} tokens on the mean, the first "
        f"{settings['prefix_tokens']:,} of them common to all",
        "",
    ]
    rows = [
        [
            side,
            cell([s["tokens_per_second"] for s in speeds], 1, 1),
            cell([s["milliseconds_per_step"] for s in speeds], 1, 0),
            cell([s["peak_memory_bytes"] for s in speeds], 2**20, 0),
        ]
        for side, speeds in report["speeds"].items()
    ]
    lines += table(["share_prefix", "tokens/s", "ms a step", "peak memory, MiB"], rows)
    for side, ratios in report["ratios"].items():
        rate, memory = ratios["tokens_per_second"], ratios["peak_memory_bytes"]
        lines += [
            "",
            f"{side} / {BASELINE}: {cell(rate, 1, 2)} × tokens a second, {cell(memory, 1, 2)} × peak memory; "
            f"losses differ by {report['largest_loss_difference'][side]:.2g} at most",
        ]
    if report["disturbed"]:
        lines += ["", f"DISTURBED by other programs (share of processor time): {'; '.join(report['disturbed'])}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
