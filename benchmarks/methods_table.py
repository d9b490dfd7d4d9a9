"""What each tuning method learns of one task, and what it costs: the table of docs/methods.md.

Every method trains on the same rows of the quickstart (free text to a strict JSON record), in a process of its own and
through the whole of `luthier train`: pre-flight, training, parity gate, comparison of base and tuned on held-out rows
of other sentences, names and items. Printed: the share of the parameters that is trained, seconds of training, peak
resident memory of the process, validation loss before and after, and how many held-out records are right in every
value.

    python benchmarks/methods_table.py --rows 600 --json methods.json
    python benchmarks/methods_table.py --only lora,ia3 --rows 64 --test-rows 16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parent.parent / "examples" / "records" / "recipe.yaml"

# What differs from the quickstart's recipe, by the name in the table. Its learning rate is higher than the methods'
# defaults, which are for longer runs and larger models; so are these, and none of them has been swept.
VARIANTS: dict[str, list[str]] = {
    "full": ["method={name: full}", "training.learning_rate=1e-4"],
    "lora": [],
    "lora, rsLoRA": ["method.use_rslora=true"],
    "lora, DoRA": ["method.use_dora=true"],
    "lora, LoRA+": ["method.loraplus_lr_ratio=8"],
    # The quickstart's recipe has no dropout, as PiSSA wants.
    "lora, PiSSA": ["method.init_lora_weights=pissa"],
    "mixed": ["method={name: mixed, r: 16, lora_alpha: 32, lora_dropout: 0.0}"],
    "qlora": ["method={name: qlora, r: 16, lora_alpha: 32, lora_dropout: 0.0}"],
    "prompt": ["method={name: prompt}", "training.learning_rate=1e-2"],
    "p_tuning": ["method={name: p_tuning}", "training.learning_rate=1e-3"],
    "prefix": ["method={name: prefix}", "training.learning_rate=1e-3"],
    "adapter": ["method={name: adapter}", "training.learning_rate=1e-3"],
    "adapter, Pfeiffer": ["method={name: adapter, placement: pfeiffer}", "training.learning_rate=1e-3"],
    "ia3": ["method={name: ia3}", "training.learning_rate=1e-2"],
}


def run(variant: str, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One method's run; its manifest, and how it ended where it did not."""
    target = folder / variant.replace(", ", "-").replace(" ", "-")
    overrides = [
        *VARIANTS[variant],
        f"data.max_examples={a.rows}",
        f"evaluation.max_examples={a.test_rows}",
        f"training.num_train_epochs={a.epochs}",
        f"output_dir={target}",
        "training.report_to=[]",
        *a.set,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads)}
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli", "train", str(RECIPE), "--overwrite", *overrides],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    facts = json.loads((target / "preflight.json").read_text(encoding="utf-8"))["facts"]
    compared = json.loads((target / "evaluation" / "comparison.json").read_text(encoding="utf-8"))["models"]
    training = manifest["training"]
    return {
        "trained": facts["parameters"]["trained"],
        "share": facts["parameters"]["trained"] / facts["parameters"]["all"],
        "learning_rate": facts["learning_rate"],
        "seconds": training["seconds"],
        "peak_memory_bytes": training["peak_memory_bytes"],
        "first_loss": training["first_eval_loss"],
        "best_loss": training["best_loss"],
        "base": compared["base"]["metrics"],
        "tuned": compared["tuned"]["metrics"],
    }


def line(variant: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in found:
        return f"| {variant} | did not finish: {found['error']} |"
    right = [f"{found[side]['json_exact']:.1%}" for side in ("base", "tuned")]
    return (
        f"| {variant} | {found['trained']:,} ({found['share']:.2%}) | {found['learning_rate']:g} "
        f"| {found['seconds']:,.0f} | {found['peak_memory_bytes'] / 2**20:,.0f} "
        f"| {found['first_loss']:.3f} → {found['best_loss']:.3f} | {found['tuned']['json_valid']:.1%} "
        f"| {right[0]} → {right[1]} |"
    )


def main() -> None:
    """Run every method in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of the table, separated by commas and no spaces; default: all")
    parser.add_argument("--rows", type=int, default=600, help="training rows")
    parser.add_argument("--test-rows", type=int, default=80, help="held-out rows that are asked")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="further settings of all runs")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    a = parser.parse_args()
    chosen = a.only.split(",") if a.only else list(VARIANTS)
    known = {name.replace(", ", "-"): name for name in VARIANTS}
    if unknown := [name for name in chosen if name not in VARIANTS and name not in known]:
        parser.error(f"unknown {unknown}; known: {', '.join(known)}")
    print(f"{a.rows} rows, {a.epochs:g} epochs, {a.threads} threads; {a.test_rows} held-out rows\n")
    print("| method | trained | learning rate | seconds | peak MiB | validation loss | valid JSON | all values right |")
    print("|---|---|---|---|---|---|---|---|")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            variant = known.get(name, name)
            results[variant] = run(variant, a, Path(folder))
            print(line(variant, results[variant]), flush=True)
            if a.json:
                a.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
