"""Training speed and memory: TRL's SFTTrainer and Luthier in turn, on the same rows, in one run of this script.

    python benchmarks/training_speed.py --json speed.json

Each side trains in a fresh child process, so that its peak memory is its own; over the rounds the sides take turns
at going first. Both get the same rows in the same order, encoded once by neutral code, the same model, LoRA
settings, batch, learning rate (constant, no warm-up), AdamW without decay, and gradients clipped at 1. The script
stops where Luthier's own encoding differs in one token id or label from what TRL was given.

What is printed:

- tokens a second: tokens of the rows, padding not counted, over the seconds of the timed steps (forward, backward,
  optimiser), the first `--warmup-steps` left out;
- share of the peak: model FLOP/s over the machine's bfloat16 matmul peak: the fastest large product of this run,
  measured before and after each side. FLOPs are those of the matrix products that training cannot do without. A
  parameter takes part in 2 FLOPs a token forward, 2 for the gradient of its input and, where it is trained, 2 for its
  own gradient: full fine-tuning costs 6·P a token; LoRA costs 4·P plus 6 for each parameter of its matrices. The
  output head counts for trained tokens alone (no other position needs logits). Attention scores and the embedding's
  look-up don't count;
- peak resident memory of the process at the end of the last step (not of saving or checking after it);
- which rounds other programs disturbed, by the processor time that was not the child's: run those again;
- the loss of every step of the first round side by side. LoRA starts as the base model whatever the seed (B = 0),
  so the first losses must agree within bfloat16 rounding; where they do not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
SHIPPED = ROOT / "examples" / "records" / "train.jsonl"
MAX_LENGTH = 1024
# Other programs' share of all processor time above which a round's numbers are marked as disturbed.
DISTURBED = 0.05
# Eight bits of mantissa through thirty layers: losses of one model computed in two ways differ by about this much.
FIRST_LOSS_TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}

Settings = dict[str, Any]
Outcome = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
        return
    settings = _settings(_parser().parse_args())
    with tempfile.TemporaryDirectory() as scratch:
        settings["rows"] = str(Path(scratch) / "rows.jsonl")
        settings |= _run("prepare", settings, scratch)
        settings |= _sizes(Path(settings["rows"]))
        rounds = _rounds(settings, scratch)
    report = _report(settings, rounds)
    print(_tables(settings, rounds, report))
    if settings["json"]:
        Path(settings["json"]).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {settings['json']}")
    if not report["first_losses_agree"]:
        sys.exit("the first losses differ by more than rounding: the sides did not do the same work")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="embedded model's name, folder or hub id")
    add("--data", type=Path, help="JSONL of rows (default: GSM8K where it is at hand, else the shipped example)")
    add("--prompt-column", help="default: question, or prompt for the shipped example")
    add("--response-column", help="default: answer, or response for the shipped example")
    add("--method", choices=("lora", "full"), default="lora")
    add("--batch", type=int, default=8, help="rows a step")
    add("--steps", type=int, default=12, help="optimiser steps, warm-up included")
    add("--warmup-steps", type=int, default=2, help="first steps that are not timed")
    add("--rounds", type=int, default=2)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--r", type=int, default=8)
    add("--alpha", type=float, default=32)
    add("--dropout", type=float, default=0.0)
    add("--lr", type=float, help="default: 2e-4 for lora, 2e-5 for full")
    add("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of each side")
    add("--sides", nargs="+", choices=("trl", "luthier"), default=["trl", "luthier"], help="for trials of one side")
    add("--with-packing", action="store_true", help="also TRL with packing")
    add("--json", type=Path, help="write every number to this file")
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = vars(arguments)
    shipped = arguments.data is None and not GSM8K.exists()
    settings["data"] = arguments.data or (SHIPPED if shipped else GSM8K)
    settings["prompt_column"] = arguments.prompt_column or ("prompt" if shipped else "question")
    settings["response_column"] = arguments.response_column or ("response" if shipped else "answer")
    settings["lr"] = arguments.lr or (2e-4 if arguments.method == "lora" else 2e-5)
    settings["max_length"] = MAX_LENGTH
    settings["sides"] = [*arguments.sides, *(["trl-packed"] if arguments.with_packing else [])]
    if not 0 <= arguments.warmup_steps < arguments.steps:
        sys.exit(f"--warmup-steps {arguments.warmup_steps} leaves no step of {arguments.steps} to time")
    if not Path(settings["data"]).is_file():
        sys.exit(f"--data {settings['data']} does not exist")
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def _sizes(rows: Path) -> dict[str, int]:
    lengths = [len(json.loads(line)["input_ids"]) for line in rows.read_text(encoding="utf-8").splitlines()]
    return {"tokens": sum(lengths), "longest": max(lengths)}


def _rounds(settings: Settings, scratch: str) -> list[dict[str, Outcome]]:
    rounds = []
    for number in range(settings["rounds"]):
        done: dict[str, Outcome] = {}
        peaks = [_run("peak", settings, scratch)["flops"]]
        for side in settings["sides"][:: -1 if number % 2 else 1]:
            print(f"round {number + 1} of {settings['rounds']}: {side} ...", file=sys.stderr, flush=True)
            output = str(Path(scratch) / f"{side}-{number}")
            done[side] = _run(side, {**settings, "output": output}, scratch)
            peaks.append(_run("peak", settings, scratch)["flops"])
        done["peak"] = {"measured": peaks}
        rounds.append(done)
    return rounds


def _run(name: str, settings: Settings, scratch: str) -> Outcome:
    """One child, and what it returned; what it printed is shown only where it failed."""
    given, returned = Path(scratch) / "given.json", Path(scratch) / "returned.json"
    given.write_text(json.dumps(settings), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings["threads"]),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = _processor_seconds()
    child = subprocess.run(
        [sys.executable, __file__, "--child", name, str(given), str(returned)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if child.returncode:
        sys.exit(f"{child.stdout[-4000:]}\n{name} failed (status {child.returncode}); see above")
    result: Outcome = json.loads(returned.read_text(encoding="utf-8"))
    every, own, idle = (after - then for after, then in zip(_processor_seconds(), before, strict=True))
    return result | {"others_share": max(0.0, (every - idle - own) / every) if every else 0.0}


def _processor_seconds() -> tuple[float, float, float]:
    """Seconds of all processors since the machine started: in all, used by finished children, idle."""
    times = psutil.cpu_times()
    # On Linux, guests' seconds are counted in user and nice already.
    every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    own = os.times()
    return every, own.children_user + own.children_system, times.idle + getattr(times, "iowait", 0.0)


def _child(name: str, given: str, returned: str) -> None:
    from _speed_sides import CHILDREN

    result = CHILDREN[name](json.loads(Path(given).read_text(encoding="utf-8")))
    Path(returned).write_text(json.dumps(result), encoding="utf-8")


def _speed(settings: Settings, outcome: Outcome, peak: float) -> dict[str, float]:
    """Rates over the timed steps of one side in one round."""
    timed = slice(settings["warmup_steps"], None)
    seconds = sum(outcome["seconds"][timed])
    tokens, trained = sum(outcome["tokens"][timed]), sum(outcome["trained_tokens"][timed])
    parameters = settings["matmul_parameters"]
    weights = 4 if settings["method"] == "lora" else 6
    flops = weights * (tokens * parameters["body"] + trained * parameters["head"]) + 6 * tokens * parameters["lora"]
    return {
        "tokens_per_second": tokens / seconds,
        "trained_tokens_per_second": trained / seconds,
        "share_of_peak": flops / seconds / peak,
        "peak_memory_bytes": outcome["peak_memory_bytes"],
    }


def _report(settings: Settings, rounds: list[dict[str, Outcome]]) -> dict[str, Any]:
    peaks = [flops for done in rounds for flops in done["peak"]["measured"]]
    speeds = {side: [_speed(settings, done[side], max(peaks)) for done in rounds] for side in settings["sides"]}
    report: dict[str, Any] = {
        "settings": {k: v for k, v in settings.items() if k not in ("rows", "folder", "json")}
        | {"model": Path(settings["model"]).name, "data": Path(settings["data"]).name},
        "matmul_peak_flops": peaks,
        "speeds": speeds,
        "ratios": {},
        "first_losses_agree": True,
        "disturbed": [
            f"round {number}, {side}: {done[side]['others_share']:.0%}"
            for number, done in enumerate(rounds, 1)
            for side in settings["sides"]
            if done[side]["others_share"] > DISTURBED
        ],
        "rounds": rounds,
    }
    if "luthier" not in speeds:
        return report
    for peer in (side for side in settings["sides"] if side != "luthier"):
        pairs = list(zip(speeds["luthier"], speeds[peer], strict=True))
        report["ratios"][peer] = {
            key: [ours[key] / theirs[key] for ours, theirs in pairs]
            for key in ("tokens_per_second", "peak_memory_bytes")
        }
    if "trl" in speeds:
        first = [done["luthier"]["losses"][0] - done["trl"]["losses"][0] for done in rounds]
        report["first_loss_differences"] = first
        report["first_losses_agree"] = max(map(abs, first)) <= FIRST_LOSS_TOLERANCE[settings["dtype"]]
    return report


def _tables(settings: Settings, rounds: list[dict[str, Outcome]], report: dict[str, Any]) -> str:
    """The report as Markdown."""
    peaks = report["matmul_peak_flops"]
    timed = settings["steps"] - settings["warmup_steps"]
    lines = [
        f"{Path(settings['model']).name}, {settings['method']}, "
        f"{settings['dtype']}, {settings['batch']} rows a step, {timed} timed steps, {settings['rounds']} rounds, "
        f"{settings['threads']} threads; {settings['tokens']:,} tokens in the rows, {settings['passed_over']} rows "
        "too long",
        f"bfloat16 matmul peak: {max(peaks) / 1e9:.0f} GFLOP/s (measured {len(peaks)} times: {_spread(peaks, 1e9, 0)})",
        "",
        "| | tokens/s | trained tokens/s | share of peak | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for side, speeds in report["speeds"].items():
        cells = [
            _cell([s["tokens_per_second"] for s in speeds], 1, 1),
            _cell([s["trained_tokens_per_second"] for s in speeds], 1, 1),
            _cell([s["share_of_peak"] for s in speeds], 0.01, 1, " %"),
            _cell([s["peak_memory_bytes"] for s in speeds], 2**20, 0),
        ]
        lines.append(f"| {side} {rounds[0][side]['version']} | {' | '.join(cells)} |")
    for peer, ratios in report["ratios"].items():
        speed, memory = ratios["tokens_per_second"], ratios["peak_memory_bytes"]
        lines += ["", f"luthier / {peer}: {_cell(speed, 1, 2)} × tokens a second, {_cell(memory, 1, 2)} × peak memory"]
    if report["disturbed"]:
        lines += ["", f"DISTURBED by other programs (share of processor time): {'; '.join(report['disturbed'])}"]
    lines += ["", *_loss_table(settings, rounds[0])]
    if "first_loss_differences" in report:
        differences = ", ".join(f"{d:+.4f}" for d in report["first_loss_differences"])
        verdict = "agree" if report["first_losses_agree"] else "DIFFER"
        lines += ["", f"first losses {verdict} (luthier - trl, each round: {differences})"]
    return "\n".join(lines)


def _loss_table(settings: Settings, done: dict[str, Outcome]) -> list[str]:
    lines = [
        f"| step | {' | '.join(f'loss, {s}' for s in settings['sides'])} |",
        "|---|" + "---|" * len(settings["sides"]),
    ]
    for step in range(settings["steps"]):
        losses = [done[side]["losses"] for side in settings["sides"]]
        lines.append(
            f"| {step + 1} | {' | '.join(f'{loss[step]:.4f}' if step < len(loss) else '' for loss in losses)} |"
        )
    return lines


def _cell(values: list[float], unit: float, digits: int, suffix: str = "") -> str:
    """The median over the rounds, with its spread where there are several."""
    middle = f"{statistics.median(values) / unit:,.{digits}f}{suffix}"
    return middle if len(values) == 1 else f"{middle} ({_spread(values, unit, digits)})"


def _spread(values: list[float], unit: float, digits: int) -> str:
    return f"{min(values) / unit:,.{digits}f} to {max(values) / unit:,.{digits}f}"


if __name__ == "__main__":
    main()
