"""How fast rows become token ids: Luthier's preparation beside TRL's, and how its cost grows with the rows.

    python benchmarks/data_speed.py --json data.json
    python benchmarks/data_speed.py --rows 10000 100000 --peer-rows 5000

Rows are GSM8K's, again and again with other numbers, in one JSONL file. Luthier's side reads them into its store on
disk, looks for near copies, judges them (what `luthier data lint` does, near copies aside), and encodes them (chat
template, tokens, trained spans) into its cache, each stage timed by itself; then it finds the encoded rows again, as a
second run would. TRL's side reads the file with `datasets`, maps it to prompt and completion, and has SFTTrainer
tokenise it and make the labels, by one process (its default) and by all cores. Its cost a row does not depend on their
number, so it gets fewer.

Printed: rows a second, microseconds a row, and peak memory of each stage; the ratio is that of reading and encoding,
which is what TRL does too. The ids of the first rows are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import DISTURBED, GSM8K, Outcome, Settings, run_child, say, table

STAGES = ("read", "near copies", "lint", "encode", "find again")
TIMED = ("read", "encode")
"""The stages that TRL has too."""


def main() -> None:
    settings = vars(_parser().parse_args())
    target = settings.pop("json")
    from luthier.models.catalogue import embedded_model_folder

    settings |= {"model": str(embedded_model_folder("smollm2")), "gsm8k": str(GSM8K), "threads": 1}
    with tempfile.TemporaryDirectory(dir=settings["scratch"]) as scratch:
        os.environ["LUTHIER_CACHE"] = str(Path(scratch) / "cache")
        ours = {count: _ours(count, settings, scratch) for count in settings["rows"]}
        theirs = {f"TRL, {_by(n)}": _theirs(n, settings, scratch) for n in settings["peer_processes"]}
        same = _same(next(iter(theirs.values())), settings, scratch) if theirs else None
    print(_report(ours, theirs, same))
    if target:
        for side in theirs.values():
            side.pop("first")
        target.write_text(json.dumps({"luthier": ours, "peers": theirs}, indent=2) + "\n", encoding="utf-8")
    if same is False:
        sys.exit("the sides' first rows differ")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="Luthier's side, once for each")
    add("--peer-rows", type=int, default=10_000)
    add("--peer-processes", type=int, nargs="*", default=[1, os.cpu_count() or 1], help="of TRL; none: without it")
    add("--max-length", type=int, default=2048)
    add("--compared", type=int, default=200, help="first rows whose ids are compared")
    add("--lint", action=argparse.BooleanOptionalAction, default=True, help="the stage that judges the rows")
    add("--scratch", type=Path, help="a folder for the rows and caches: some gigabytes for a million")
    add("--json", type=Path, help="write every number to this file")
    return parser


def _by(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"


def _ours(count: int, settings: Settings, scratch: str) -> Outcome:
    file = _rows(count, settings, scratch)
    say(f"luthier, {count:,} rows ...")
    return run_child("_data_sides", "luthier", settings | {"file": file}, scratch)


def _theirs(processes: int, settings: Settings, scratch: str) -> Outcome:
    file = _rows(settings["peer_rows"], settings, scratch)
    say(f"TRL, {_by(processes)}, {settings['peer_rows']:,} rows ...")
    given = {"file": file, "num_proc": None if processes == 1 else processes, "cache": str(Path(scratch) / "trl")}
    return run_child("_data_sides", "trl", {**settings, **given, "rows": None}, scratch)


def _rows(count: int, settings: Settings, scratch: str) -> str:
    file = str(Path(scratch) / f"{count}.jsonl")
    if not Path(file).exists():
        run_child("_data_sides", "make", settings | {"file": file, "rows": count}, scratch)
    return file


def _same(theirs: Outcome, settings: Settings, scratch: str) -> bool:
    """Whether the first rows have the same ids, and the same trained tokens but for what follows the end of turn."""
    file = _rows(settings["peer_rows"], settings, scratch)
    ours = run_child("_data_sides", "first_rows", settings | {"file": file}, scratch)
    for number, (ids, trained) in enumerate(zip(ours["input_ids"], ours["trained"], strict=True)):
        labels = theirs["first"]["labels"][number]
        last = max(i for i, kept in enumerate(trained) if kept)
        if theirs["first"]["input_ids"][number] != ids:
            return False
        if [label != -100 for label in labels[: last + 1]] != trained[: last + 1]:
            return False
    return True


def _report(ours: dict[int, Outcome], theirs: dict[str, Outcome], same: bool | None) -> str:
    header = ["rows", "stage", "rows/s", "µs a row", "peak memory, MiB", "largest child, MiB"]
    rows: list[list[str]] = []
    for count, side in ours.items():
        for name in filter(side["stages"].__contains__, STAGES):
            stage = side["stages"][name]
            rows.append(
                [
                    f"{count:,}",
                    name,
                    f"{count / stage['seconds']:,.0f}",
                    f"{stage['seconds'] / count * 1e6:,.0f}",
                    f"{stage['peak_memory_bytes'] / 2**20:,.0f}",
                    f"{stage['child_peak_memory_bytes'] / 2**20:,.0f}",
                ]
            )
    lines = table(header, rows)
    rates = {f"Luthier, {count:,} rows": count / _seconds(side) for count, side in ours.items()}
    rates |= {name: side["rows"] / side["seconds"] for name, side in theirs.items()}
    lines += ["", *table(["read and encode", "rows/s"], [[name, f"{rate:,.0f}"] for name, rate in rates.items()]), ""]
    for name in theirs:
        for count, side in ours.items():
            lines.append(f"Luthier, {count:,} rows / {name}: {count / _seconds(side) / rates[name]:.1f} ×")
    if same is not None:
        lines.append(f"the first rows' ids and trained tokens are {'the same' if same else 'DIFFERENT'} on both sides")
    sides: dict[str, dict[str, Any]] = {f"{count:,} rows": side for count, side in ours.items()} | theirs
    disturbed = [f"{name} {s['others_share']:.0%}" for name, s in sides.items() if s["others_share"] > DISTURBED]
    if disturbed:
        lines.append(f"DISTURBED by other programs (share of processor time): {'; '.join(disturbed)}")
    return "\n".join(lines)


def _seconds(side: Outcome) -> float:
    return sum(side["stages"][name]["seconds"] for name in TIMED)


if __name__ == "__main__":
    main()
