"""Training speed and memory on one GPU: Luthier and TRL with Liger's kernels in turn, in one run of this script.

    pip install -e ".[bench]" liger-kernel bitsandbytes
    python benchmarks/gpu_speed.py --json gpu.json
    python benchmarks/gpu_speed.py --workloads lora --rounds 3
    python benchmarks/gpu_speed.py --smoke

Models have random weights in the shape of a Llama (no download), in bfloat16; rows are random tokens, `--length` each,
all of them trained, so that a peer which computes every logit computes none for nothing. Three workloads:

- lora: LoRA of rank 16 beside every linear layer of an 8B shape
- qlora: the same over the base in four bits (bitsandbytes, nf4)
- full: full tuning of a 1B shape

Each side trains in a fresh child process; over the rounds the sides take turns at going first. Both have the same
weights, rows, order, LoRA settings, constant rate, AdamW without decay, clipping at 1, and both recompute nothing in
the backward pass, or what `--recompute` says (TRL knows whole layers alone). TRL's LoRA matrices and autocast are what
its users get (`bf16=True`); full tuning by TRL keeps its weights and moments in bfloat16, by Luthier in float32.

What is printed for each workload:

- tokens a second over the timed steps. A step lasts from the end of the one before, when the device was done with it,
  to its own: fetching rows, the optimiser and logging are inside. The first `--warmup-steps` are left out: kernels are
  compiled in them;
- share of the peak: model FLOP/s over the device's bfloat16 matmul peak, the fastest large product of this run,
  measured before and after each side. FLOPs a token: a parameter in a matrix product costs 2 forward, 2 for the
  gradient of its input and, where it is trained, 2 for its own: 4 for each of a frozen base's and the head's, 6 for
  each of LoRA's matrices, 6 for each in full tuning. Causal attention costs 6·L·(layers × heads × head size) more a
  token of a row of L. Nothing that is computed twice counts twice, nor does reading four bits;
- peak memory that the device had allocated at the end of the last step, weights included;
- the loss of every step of the first round side by side. LoRA starts as the base model (B = 0), so the first losses
  must agree within bfloat16 rounding, and where they do not, the exit status is 1. Random tokens teach nothing: the
  losses show that the sides compute the same, not that they learn;
- Luthier's tokens a second over the peer's, with the spread over the rounds.

`--smoke` runs all of it on a CPU with a tiny shape, to see that the script works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from _gpu_sides import SHAPES
from _harness import Outcome, Settings, cell, run_child, say, spread, table
from _speed_report import FIRST_LOSS_TOLERANCE

WORKLOADS = {"lora": "8B", "qlora": "8B", "full": "1B"}
SIDES = ("trl", "luthier")
SMOKE = {"length": 48, "rows": 2, "steps": 3, "warmup_steps": 1, "rounds": 2}
Round = dict[str, Outcome]


def main() -> None:
    settings = _settings(_parser().parse_args())
    target = settings.pop("json")
    reports = {}
    with tempfile.TemporaryDirectory(dir=settings.pop("scratch")) as scratch:
        for workload in settings["workloads"]:
            reports[workload] = _workload(settings, workload, scratch)
            print(_tables(reports[workload]), "\n", flush=True)
            if target:
                # After each workload: what is measured is kept, whatever becomes of the next.
                target.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    if not all(report["first_losses_agree"] for report in reports.values()):
        sys.exit("the first losses differ by more than rounding: the sides did not do the same work")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="for trials of one side")
    add("--length", type=int, default=4096, help="tokens a row")
    add("--rows", type=int, default=1, help="rows a step")
    add("--steps", type=int, default=12, help="optimiser steps, warm-up included")
    add("--warmup-steps", type=int, default=4, help="first steps that are not timed")
    add("--rounds", type=int, default=3)
    add("--r", type=int, default=16)
    add("--lr", type=float, default=1e-5)
    add("--recompute", choices=("none", "mlp", "layers"), default="none", help="what the backward pass recomputes")
    add("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of each side")
    add("--scratch", type=Path, help="folder for what children write: the model in four bits takes 16 GB before it is")
    add("--smoke", action="store_true", help="everything on a CPU with a tiny shape, to see that it works")
    add("--json", type=Path, help="write every number to this file")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = vars(arguments)
    settings["gpu"] = not settings["smoke"]
    if settings["smoke"]:
        settings |= SMOKE
    if not 0 <= settings["warmup_steps"] < settings["steps"]:
        sys.exit(f"--warmup-steps {settings['warmup_steps']} leaves no step of {settings['steps']} to time")
    return settings


def _workload(settings: Settings, workload: str, scratch: str) -> dict[str, Any]:
    """Run all sides of one workload, and make its report."""
    given: Settings = {
        **settings,
        "workload": workload,
        "shape": "tiny" if settings["smoke"] else WORKLOADS[workload],
        "folder": str(Path(scratch) / "model"),
    }

    def child(function: str, **more: Any) -> Outcome:
        return run_child("_gpu_sides", function, given | more, scratch, gpu=settings["gpu"])

    given |= child("describe")
    if workload == "qlora" and not Path(given["folder"]).exists():
        say("writing the model that is read in four bits ...")
        child("save")
    rounds: list[Round] = []
    peaks = [child("peak")["flops"]]
    skipped: dict[str, str] = {}
    for number in range(settings["rounds"]):
        done: Round = {}
        for side in settings["sides"][:: -1 if number % 2 else 1]:
            if side in skipped:
                continue
            say(f"{workload}, round {number + 1} of {settings['rounds']}: {side} ...")
            outcome = child("side", side=side, output=str(Path(scratch) / f"{workload}-{side}-{number}"))
            if "skipped" in outcome:
                say(f"{side} is skipped: {outcome['skipped']}")
                skipped[side] = outcome["skipped"]
                continue
            done[side] = outcome
            peaks.append(child("peak")["flops"])
        rounds.append(done)
    # A side that failed in a later round has no numbers to compare.
    rounds = [{side: outcome for side, outcome in done.items() if side not in skipped} for done in rounds]
    return _report(given, rounds, peaks, skipped)


def flops_per_token(settings: Settings) -> float:
    """FLOPs of the matrix products that training can't do without, see the script's text."""
    parameters = settings["matmul_parameters"]
    weights = 6 if settings["workload"] == "full" else 4
    products = weights * (parameters["body"] + parameters["head"]) + 6 * parameters["lora"]
    return float(products + 6 * settings["length"] * settings["attention_width"])


def _report(settings: Settings, rounds: list[Round], peaks: list[float], skipped: dict[str, str]) -> dict[str, Any]:
    sides = [side for side in settings["sides"] if side not in skipped]
    tokens = settings["rows"] * settings["length"]
    speeds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for done in rounds:
        for side in sides:
            seconds = done[side]["seconds"][settings["warmup_steps"] :]
            rate = tokens * len(seconds) / sum(seconds)
            speeds[side].append(
                {
                    "tokens_per_second": rate,
                    "share_of_peak": rate * flops_per_token(settings) / max(peaks),
                    "peak_memory_bytes": done[side]["peak_memory_bytes"],
                }
            )
    ratios, differences = {}, []
    if len(sides) == len(SIDES):
        pairs = list(zip(speeds["luthier"], speeds["trl"], strict=True))
        ratios = {key: [a[key] / b[key] for a, b in pairs] for key in ("tokens_per_second", "peak_memory_bytes")}
        differences = [done["luthier"]["losses"][0] - done["trl"]["losses"][0] for done in rounds]
    # Where a base is quantised, the sides also round what they read from it differently.
    bound = FIRST_LOSS_TOLERANCE["bfloat16"] * (2 if settings["workload"] == "qlora" else 1)
    return {
        "settings": {k: v for k, v in settings.items() if k not in ("folder", "smoke")},
        "matmul_peak_flops": peaks,
        "flops_per_token": flops_per_token(settings),
        "skipped": skipped,
        "speeds": speeds,
        "ratios": ratios,
        "first_loss_differences": differences,
        "first_losses_agree": all(abs(d) <= bound for d in differences),
        "rounds": rounds,
    }


def _tables(report: dict[str, Any]) -> str:
    """The report of a workload as Markdown."""
    settings, peaks, rounds = report["settings"], report["matmul_peak_flops"], report["rounds"]
    hidden, layers, *_ = SHAPES[settings["shape"]]
    timed = settings["steps"] - settings["warmup_steps"]
    method = "full tuning" if settings["workload"] == "full" else f"{settings['workload']} r={settings['r']} all-linear"
    lines = (
        []
        if settings["gpu"]
        else ["SMOKE: a tiny shape on a CPU, to see that the script works; these numbers mean nothing."]
    )
    lines += [
        f"**{method}**, {settings['shape']} shape ({layers} layers of {hidden}, {settings['parameters'] / 1e9:.2f} "
        f"billion parameters), bfloat16, {settings['rows']} × {settings['length']:,} tokens a step, {timed} timed "
        f"steps, {settings['rounds']} rounds, recomputed: {settings['recompute']}; {settings['device']}, torch "
        f"{settings['versions']['torch']}, transformers {settings['versions']['transformers']}",
        f"bfloat16 matmul peak: {max(peaks) / 1e12:,.3g} TFLOP/s (measured {len(peaks)} times: "
        f"{spread(peaks, 1e12, 2)}); {report['flops_per_token'] / 1e9:,.3g} GFLOP a token",
    ]
    lines += [f"{side}: NOT RUN ({why})" for side, why in report["skipped"].items()]
    lines += [f"{side}: {note}" for side, outcome in rounds[0].items() for note in outcome["notes"]]
    rows = [
        [
            f"{side} {rounds[0][side]['version']}",
            cell([s["tokens_per_second"] for s in speeds], 1, 0),
            cell([s["share_of_peak"] for s in speeds], 0.01, 1, " %"),
            cell([s["peak_memory_bytes"] for s in speeds], 2**30, 2),
        ]
        for side, speeds in report["speeds"].items()
    ]
    lines += ["", *table(["", "tokens/s", "share of peak", "peak memory, GiB"], rows)]
    if report["ratios"]:
        rate, memory = report["ratios"]["tokens_per_second"], report["ratios"]["peak_memory_bytes"]
        lines += ["", f"luthier / trl: {cell(rate, 1, 2)} × tokens a second, {cell(memory, 1, 2)} × peak memory"]
    columns = {f"loss, {side}": rounds[0][side]["losses"] for side in report["speeds"]}
    steps = [[str(n + 1), *(f"{c[n]:.4f}" for c in columns.values())] for n in range(settings["steps"])]
    lines += ["", *table(["step", *columns], steps)]
    if report["first_loss_differences"]:
        verdict = "agree" if report["first_losses_agree"] else "DIFFER"
        apart = ", ".join(f"{d:+.4f}" for d in report["first_loss_differences"])
        lines += ["", f"first losses {verdict} (luthier - trl: {apart})"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
