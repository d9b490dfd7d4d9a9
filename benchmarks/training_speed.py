"""Training speed and memory: Luthier and its peers in turn, on the same rows, in one run of this script.

    python benchmarks/training_speed.py --with-reference --json speed.json
    python benchmarks/training_speed.py --peer-python litgpt=/path/to/environment

TRL runs in this script's environment; LLaMA-Factory, ms-swift and LitGPT each in its own, where one is named. Each
side trains in a fresh child process, so that its peak memory is its own; over the rounds the sides take turns at
going first. All get the same rows in the same order, encoded once by neutral code, the same model, LoRA settings,
batch, learning rate (constant, no warm-up), AdamW without decay, and gradients clipped at 1. The script stops where
Luthier's own encoding differs in one token id or label from what its peers were given.

What is printed:

- tokens a second: tokens of the rows, padding not counted, over the seconds of the timed steps (forward, backward,
  optimiser), the first `--warmup-steps` left out;
- share of the peak: model FLOP/s over the machine's matmul peak in this precision: the fastest large product of this
  run, measured before and after each side. FLOPs are those of the matrix products that training cannot do without. A
  parameter takes part in 2 FLOPs a token forward, 2 for the gradient of its input and, where it is trained, 2 for its
  own gradient: full fine-tuning costs 6·P a token; LoRA costs 4·P plus 6 for each parameter of its matrices. The
  output head counts for trained tokens alone (no other position needs logits). Attention scores and the embedding's
  look-up don't count;
- peak resident memory of the process at the end of the last step (not of saving or checking after it);
- which rounds other programs disturbed, by the processor time that was not the child's: run those again;
- the loss of every step of the first round side by side, and with `--with-reference` the loss of the same steps in
  float32 (plain transformers and torch, one row at a time) with each side's distance to it. LoRA starts as the base
  model whatever its matrices (B = 0), so the first losses must agree within its rounding; where they do not, the
  exit status is 1. Every side that can starts from the same LoRA matrices; which did not is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from _harness import GSM8K, ROOT, Outcome, Settings, measure_peak, run_child, say
from _speed_report import make_report, tables

SHIPPED = ROOT / "examples" / "records" / "train.jsonl"
MAX_LENGTH = 1024
# Where each side is: module and function. Peers of the second kind run in environments of their own.
HERE = {
    "trl": ("_speed_sides", "trl"),
    "trl-packed": ("_speed_sides", "trl_packed"),
    "trl-checkpointed": ("_speed_sides", "trl_checkpointed"),
    "luthier": ("_speed_sides", "luthier"),
}
ELSEWHERE = {
    "llamafactory": ("_peer_llamafactory", "llamafactory"),
    "ms-swift": ("_peer_msswift", "msswift"),
    "litgpt": ("_peer_litgpt", "litgpt"),
}


def main() -> None:
    settings = _settings(_parser().parse_args())
    with tempfile.TemporaryDirectory() as scratch:
        settings["rows"] = str(Path(scratch) / "rows.jsonl")
        settings |= run_child("_prepare", "prepare", settings, scratch)
        settings |= _sizes(Path(settings["rows"]))
        reference = None
        if settings["with_reference"]:
            say("float32 reference ...")
            reference = run_child("_speed_sides", "reference", settings, scratch)["losses"]
        rounds = _rounds(settings, scratch)
    report = make_report(settings, rounds, reference)
    print(tables(settings, rounds, report))
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
    add("--sides", nargs="*", choices=("trl", "luthier"), default=["trl", "luthier"], help="for trials of one side")
    add("--with-packing", action="store_true", help="also TRL with packing")
    add("--with-checkpointing", action="store_true", help="also TRL with gradient checkpointing, its default")
    add("--with-reference", action="store_true", help="also the same steps in float32, for the losses")
    add(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PLACE",
        help=f"also run a peer ({', '.join(ELSEWHERE)}) by the Python of its environment: the interpreter or the "
        "environment's folder; may be given several times",
    )
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
    settings["peers"] = dict(_peer(text) for text in arguments.peer_python)
    more = [
        f"trl-{kind}"
        for kind, on in (("packed", arguments.with_packing), ("checkpointed", arguments.with_checkpointing))
        if on
    ]
    settings["sides"] = [*arguments.sides, *more, *settings["peers"]]
    settings["not_run"] = sorted(ELSEWHERE.keys() - settings["peers"].keys())
    del settings["peer_python"]
    if not 0 <= arguments.warmup_steps < arguments.steps:
        sys.exit(f"--warmup-steps {arguments.warmup_steps} leaves no step of {arguments.steps} to time")
    if not Path(settings["data"]).is_file():
        sys.exit(f"--data {settings['data']} does not exist")
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def _peer(text: str) -> tuple[str, str]:
    """A peer's name and the path of its Python, from ``name=interpreter`` or ``name=environment``."""
    name, _, place = text.partition("=")
    if name not in ELSEWHERE or not place:
        sys.exit(f"--peer-python {text}: give PEER=PLACE, PEER one of {', '.join(ELSEWHERE)}")
    python = Path(place) / "bin" / "python" if Path(place).is_dir() else Path(place)
    if not python.is_file():
        sys.exit(f"--peer-python {text}: there is no {python}")
    # Not resolved: an environment's Python is a link, and which environment it is follows from the link's place.
    return name, str(python.absolute())


def _sizes(rows: Path) -> dict[str, int]:
    lengths = [len(json.loads(line)["input_ids"]) for line in rows.read_text(encoding="utf-8").splitlines()]
    return {"tokens": sum(lengths), "longest": max(lengths)}


def _rounds(settings: Settings, scratch: str) -> list[dict[str, Outcome]]:
    rounds = []
    for number in range(settings["rounds"]):
        done: dict[str, Outcome] = {}
        peaks = [measure_peak(settings, scratch)]
        for side in settings["sides"][:: -1 if number % 2 else 1]:
            say(f"round {number + 1} of {settings['rounds']}: {side} ...")
            given = {**settings, "output": str(Path(scratch) / f"{side}-{number}")}
            module, function = (HERE | ELSEWHERE)[side]
            done[side] = run_child(module, function, given, scratch, settings["peers"].get(side, sys.executable))
            peaks.append(measure_peak(settings, scratch))
        done["peak"] = {"measured": peaks}
        rounds.append(done)
    return rounds


if __name__ == "__main__":
    main()
