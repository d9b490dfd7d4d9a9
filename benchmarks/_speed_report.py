"""The numbers of training_speed.py out of what its children returned, and their tables in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _harness import DISTURBED, Outcome, Settings, cell, spread, table

# Eight bits of mantissa through thirty layers: losses of one model computed in two ways differ by about this much.
FIRST_LOSS_TOLERANCE = {"bfloat16": 0.02, "float32": 1e-3}
# Packing changes which rows make a step, so its losses are those of other steps.
OTHER_STEPS = {"trl-packed"}


def speed(settings: Settings, outcome: Outcome, peak: float) -> dict[str, float]:
    """Rates over the timed steps of one side in one round."""
    timed = slice(settings["warmup_steps"], None)
    seconds = sum(outcome["seconds"][timed])
    tokens, trained = sum(outcome["tokens"][timed]), sum(outcome["trained_tokens"][timed])
    return {
        "tokens_per_second": tokens / seconds,
        "trained_tokens_per_second": trained / seconds,
        "share_of_peak": matmul_flops(settings, tokens, trained) / seconds / peak,
        "peak_memory_bytes": outcome["peak_memory_bytes"],
    }


def matmul_flops(settings: Settings, tokens: int, trained: int) -> float:
    """FLOPs of the matrix products with weights that training on these tokens can't do without."""
    parameters = settings["matmul_parameters"]
    weights = 4 if settings["method"] == "lora" else 6
    flops: float = weights * (tokens * parameters["body"] + trained * parameters["head"])
    return flops + 6 * tokens * parameters["lora"]


def make_report(settings: Settings, rounds: list[dict[str, Outcome]], reference: list[float] | None) -> dict[str, Any]:
    """Every number: rates, ratios, losses, distances.

    Args:
        settings: the run's.
        rounds: by round, by side, what the child returned.
        reference: losses of the float32 reference, one a step.
    """
    peaks = [flops for done in rounds for flops in done["peak"]["measured"]]
    speeds = {side: [speed(settings, done[side], max(peaks)) for done in rounds] for side in settings["sides"]}
    report: dict[str, Any] = {
        "settings": {k: v for k, v in settings.items() if k not in ("rows", "folder", "initial", "json", "peers")}
        | {"model": Path(settings["model"]).name, "data": Path(settings["data"]).name},
        "matmul_peak_flops": peaks,
        "speeds": speeds,
        "ratios": {},
        "disturbed": [
            f"round {number}, {side}: {done[side]['others_share']:.0%}"
            for number, done in enumerate(rounds, 1)
            for side in settings["sides"]
            if done[side]["others_share"] > DISTURBED
        ],
        "rounds": rounds,
    }
    if "luthier" in speeds:
        for peer in (side for side in settings["sides"] if side != "luthier"):
            pairs = list(zip(speeds["luthier"], speeds[peer], strict=True))
            report["ratios"][peer] = {
                key: [ours[key] / theirs[key] for ours, theirs in pairs]
                for key in ("tokens_per_second", "peak_memory_bytes")
            }
    return report | _compare_losses(settings, rounds, reference)


def _compare_losses(
    settings: Settings, rounds: list[dict[str, Outcome]], reference: list[float] | None
) -> dict[str, Any]:
    """Each side's first losses against Luthier's, and all of its losses against the reference's."""
    sides = [side for side in settings["sides"] if side not in OTHER_STEPS]
    first_differences = {
        peer: [done["luthier"]["losses"][0] - done[peer]["losses"][0] for done in rounds]
        for peer in sides
        if "luthier" in sides and peer != "luthier"
    }
    distances = {}
    for side in sides if reference is not None else ():
        apart = [abs(a - b) for a, b in zip(rounds[0][side]["losses"], reference or (), strict=True)]
        distances[side] = {"first": apart[0], "largest": max(apart), "mean": sum(apart) / len(apart)}
    first = [abs(d) for differences in first_differences.values() for d in differences]
    first += [distance["first"] for distance in distances.values()]
    return {
        "first_loss_differences": first_differences,
        "reference_losses": reference,
        "distances": distances,
        "first_losses_agree": all(d <= FIRST_LOSS_TOLERANCE[settings["dtype"]] for d in first),
    }


def tables(settings: Settings, rounds: list[dict[str, Outcome]], report: dict[str, Any]) -> str:
    """The report as Markdown."""
    peaks = report["matmul_peak_flops"]
    timed = settings["steps"] - settings["warmup_steps"]
    lines = [
        f"{Path(settings['model']).name}, {settings['method']}, "
        f"{settings['dtype']}, {settings['batch']} rows a step, {timed} timed steps, {settings['rounds']} rounds, "
        f"{settings['threads']} threads; {settings['tokens']:,} tokens in the rows, {settings['passed_over']} rows "
        "too long",
        f"{settings['dtype']} matmul peak: {max(peaks) / 1e9:.0f} GFLOP/s "
        f"(measured {len(peaks)} times: {spread(peaks, 1e9, 0)})",
    ]
    if settings["not_run"]:
        lines.append(f"not run, for no environment was named (--peer-python): {', '.join(settings['not_run'])}")
    lines += [f"{side}: {note}" for side in settings["sides"] for note in rounds[0][side].get("notes", [])]
    rows = []
    for side, speeds in report["speeds"].items():
        cells = [
            cell([s["tokens_per_second"] for s in speeds], 1, 1),
            cell([s["trained_tokens_per_second"] for s in speeds], 1, 1),
            cell([s["share_of_peak"] for s in speeds], 0.01, 1, " %"),
            cell([s["peak_memory_bytes"] for s in speeds], 2**20, 0),
        ]
        rows.append([f"{side} {rounds[0][side]['version']}", *cells])
    lines += ["", *table(["", "tokens/s", "trained tokens/s", "share of peak", "peak memory, MiB"], rows)]
    for peer, ratios in report["ratios"].items():
        rate, memory = ratios["tokens_per_second"], ratios["peak_memory_bytes"]
        lines += ["", f"luthier / {peer}: {cell(rate, 1, 2)} × tokens a second, {cell(memory, 1, 2)} × peak memory"]
    if report["disturbed"]:
        lines += ["", f"DISTURBED by other programs (share of processor time): {'; '.join(report['disturbed'])}"]
    lines += ["", *_loss_table(settings, rounds[0], report["reference_losses"])]
    if report["distances"]:
        apart = [
            [side, *(f"{distance[key]:.4f}" for key in ("mean", "largest"))]
            for side, distance in report["distances"].items()
        ]
        lines += ["", *table(["distance to the float32 reference's losses", "mean", "largest"], apart)]
    if report["first_loss_differences"]:
        differences = "; ".join(
            f"luthier - {peer}: {', '.join(f'{d:+.4f}' for d in ds)}"
            for peer, ds in report["first_loss_differences"].items()
        )
        verdict = "agree" if report["first_losses_agree"] else "DIFFER"
        lines += ["", f"first losses {verdict} ({differences})"]
    return "\n".join(lines)


def _loss_table(settings: Settings, done: dict[str, Outcome], reference: list[float] | None) -> list[str]:
    """The losses of one round, side by side; a side that packs has other steps, and perhaps fewer."""
    columns = {f"loss, {side}": done[side]["losses"] for side in settings["sides"]}
    if reference is not None:
        columns["loss, float32 reference"] = reference
    rows = [
        [str(step + 1), *(f"{losses[step]:.4f}" if step < len(losses) else "" for losses in columns.values())]
        for step in range(settings["steps"])
    ]
    return table(["step", *columns], rows)
