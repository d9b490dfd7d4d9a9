"""How Luthier's cost grows with length, vocabulary, batch and model size.

    python benchmarks/growth.py --json growth.json
    python benchmarks/growth.py --tables vocabulary --method full

Models have random weights in SmolLM2's shapes, made from a config (no download); rows are random tokens of one exact
length, the later half of each trained. Every point trains in a fresh child process by Luthier's own preparation and
loop.

- length: rows of 256 to 8,192 tokens, `--tokens` in all a step; the 135M shape
- vocabulary: an output head of 49 to 256 thousand on the 135M body; 8 rows of `--length` tokens a step
- batch: 1 to 16 rows of `--length` tokens a step; the 135M shape
- size: the shapes of 135M, 360M and 1.7B; 8 rows of `--length` tokens a step

What is printed for each point, and in brackets how many times the first row's: tokens a second, milliseconds a step,
peak resident memory from the first step on (the model's loading is left out), and the share of the machine's matmul
peak: by the products with weights alone (as training_speed.py counts them), and with those of causal
attention, 6·L²·(heads × head size) FLOPs a layer for a row of L tokens, forward and backward. A point whose weights,
gradients and moments alone are more than the free memory isn't run, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import psutil
from _growth_sides import SHAPES
from _harness import DISTURBED, Outcome, Settings, measure_peak, run_child, say, spread, table
from _speed_report import matmul_flops

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
VOCABULARIES = (49_152, 98_304, 151_936, 256_000)
BATCHES = (1, 2, 4, 8, 16)
ROWS = 8
Point = dict[str, Any]


def main() -> None:
    settings = vars(_parser().parse_args())
    target = settings.pop("json")
    points = {name: _points(name, settings)[: settings["points"]] for name in settings["tables"]}
    with tempfile.TemporaryDirectory() as scratch:
        peaks = [measure_peak(settings, scratch)]
        for name, listed in points.items():
            for point in listed:
                _measure(name, point, settings, scratch, peaks)
            # Models of one table are of no use to the next: the disk is not asked to hold all of them.
            for folder in Path(scratch).glob("model-*"):
                shutil.rmtree(folder)
    report = {
        "settings": settings,
        "matmul_peak_flops": peaks,
        "tables": {name: [_numbers(p, settings, max(peaks)) for p in listed] for name, listed in points.items()},
        "points": points,
    }
    print(_tables(settings, report, points))
    if target:
        target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    names = ("length", "vocabulary", "batch", "size")
    add("--tables", nargs="+", choices=names, default=list(names))
    add("--method", choices=("lora", "full"), default="lora")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--steps", type=int, default=4, help="optimiser steps, warm-up included")
    add("--warmup-steps", type=int, default=1, help="first steps that are not timed")
    add("--rounds", type=int, default=1, help="times each point is measured; medians are printed with their range")
    add("--tokens", type=int, default=8192, help="tokens a step of the length table")
    add("--length", type=int, default=256, help="row length of the other tables")
    add("--points", type=int, help="only the first so many points of each table, for a trial")
    add("--r", type=int, default=8, help="LoRA's rank")
    add("--threads", type=int, default=os.cpu_count(), help="OMP_NUM_THREADS of each point")
    add("--json", type=Path, help="write every number to this file")
    return parser


def _points(name: str, settings: Settings) -> list[Point]:
    """The points of a table: what differs, and what is asked of the children."""
    base = {"shape": "135M", "vocabulary": VOCABULARIES[0], "length": settings["length"], "rows": ROWS}
    if name == "length":
        return [
            {"name": f"{n:,}", **base, "length": n, "rows": max(1, settings["tokens"] // n)}
            for n in LENGTHS
            if n <= settings["tokens"]
        ]
    if name == "vocabulary":
        return [{"name": f"{n:,}", **base, "vocabulary": n} for n in VOCABULARIES]
    if name == "batch":
        return [{"name": str(n), **base, "rows": n} for n in BATCHES]
    return [{"name": shape, **base, "shape": shape} for shape in SHAPES]


def _measure(name: str, point: Point, settings: Settings, scratch: str, peaks: list[float]) -> None:
    """Run one point as often as asked and put what came of it into it."""
    asked = settings | point
    folder = Path(scratch) / f"model-{point['shape']}-{point['vocabulary']}-{max(8192, point['length'])}"
    asked["folder"] = str(folder)
    kept = folder / "sizes.json"
    if not folder.exists():
        say(f"{name}, {point['name']}: making the model ...")
        sizes = run_child("_growth_sides", "build", asked, scratch)
        kept.write_text(json.dumps(sizes), encoding="utf-8")
    point |= json.loads(kept.read_text(encoding="utf-8"))
    point["runs"] = []
    needed = _least_memory(point, settings["method"], 2 if settings["dtype"] == "bfloat16" else 4)
    if needed > psutil.virtual_memory().available:
        point["why_not"] = f"not run: needs {needed / 2**30:.0f} GiB before any activation"
        return
    for number in range(settings["rounds"]):
        say(f"{name}, {point['name']}, round {number + 1} of {settings['rounds']} ...")
        run = Path(scratch) / "run"
        point["runs"].append(run_child("_growth_sides", "train", {**asked, "output": str(run)}, scratch))
        shutil.rmtree(run)
        peaks.append(measure_peak(settings, scratch))


def _least_memory(point: Point, method: str, size: int) -> int:
    """Bytes of weights of ``size`` bytes and, where all are trained, of float32 masters, gradients, two moments."""
    return int(point["parameters"] * (size if method == "lora" else size + 4 * 4))


def _numbers(point: Point, settings: Settings, peak: float) -> list[dict[str, float]]:
    """Rates of each run of a point."""
    numbers = []
    for run in point["runs"]:
        timed = slice(settings["warmup_steps"], None)
        seconds, tokens = sum(run["seconds"][timed]), sum(run["tokens"][timed])
        steps = len(run["seconds"][timed])
        weights = matmul_flops(
            {**settings, "matmul_parameters": point["matmul_parameters"]}, tokens, sum(run["trained_tokens"][timed])
        )
        attention = 6 * steps * point["rows"] * point["length"] ** 2 * point["attention_width"]
        numbers.append(
            {
                "tokens_per_second": tokens / seconds,
                "milliseconds_per_step": seconds / steps * 1e3,
                "peak_memory_bytes": run["peak_memory_bytes"],
                "share_of_peak": weights / seconds / peak,
                "share_of_peak_with_attention": (weights + attention) / seconds / peak,
            }
        )
    return numbers


def _tables(settings: Settings, report: dict[str, Any], points: dict[str, list[Point]]) -> str:
    peaks = report["matmul_peak_flops"]
    lines = [
        f"{settings['method']}, {settings['dtype']}, {settings['steps'] - settings['warmup_steps']} timed steps, "
        f"{settings['rounds']} rounds, {settings['threads']} threads",
        f"{settings['dtype']} matmul peak: {max(peaks) / 1e9:.0f} GFLOP/s "
        f"(measured {len(peaks)} times: {spread(peaks, 1e9, 0)})",
    ]
    header = ["tokens/s", "ms a step", "peak memory, MiB", "share of peak", "with attention"]
    for name, listed in points.items():
        rows = []
        measured = report["tables"][name]
        for point, numbers in zip(listed, measured, strict=True):
            size = f"{point['rows']} × {point['length']:,}"
            if not numbers:
                rows.append([point["name"], size, point["why_not"], *[""] * (len(header) - 1)])
                continue
            cells = [
                _relative(numbers, measured[0], "tokens_per_second", 1, 0),
                _relative(numbers, measured[0], "milliseconds_per_step", 1, 0),
                _relative(numbers, measured[0], "peak_memory_bytes", 2**20, 0),
                f"{_median(numbers, 'share_of_peak'):.1%}",
                f"{_median(numbers, 'share_of_peak_with_attention'):.1%}",
            ]
            rows.append([point["name"], size, *cells])
        lines += ["", *table([name, "rows × tokens", *header], rows)]
    disturbed = [_share(name, point, run) for name in points for point in points[name] for run in point["runs"]]
    if any(disturbed):
        lines += ["", f"DISTURBED by other programs (share of processor time): {'; '.join(filter(None, disturbed))}"]
    return "\n".join(lines)


def _median(numbers: list[dict[str, float]], key: str) -> float:
    return statistics.median(n[key] for n in numbers)


def _relative(
    numbers: list[dict[str, float]], first: list[dict[str, float]], key: str, unit: float, digits: int
) -> str:
    """A median, its range over the rounds, and how many times the first row's it is."""
    values = [n[key] for n in numbers]
    text = f"{statistics.median(values) / unit:,.{digits}f}"
    if len(values) > 1:
        text += f" ({spread(values, unit, digits)})"
    return f"{text} [{statistics.median(values) / _median(first, key):.2f} ×]" if first else text


def _share(name: str, point: Point, run: Outcome) -> str:
    share = run["others_share"]
    return f"{name} {point['name']}: {share:.0%}" if share > DISTURBED else ""


if __name__ == "__main__":
    main()
