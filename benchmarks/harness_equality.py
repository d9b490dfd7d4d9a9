"""Whether tasks of lm-evaluation-harness score the same through Luthier as through the harness's own backend `hf`.

    python benchmarks/harness_equality.py --data ../shared/data --json equality.json

Real rows of GSM8K (which of two results is right), of takeaway reviews (good or bad, in Chinese) and of a Chinese
instruction set (perplexity): gsm8k_test.jsonl, waimai_10k.csv and alpaca_zh_demo.json. And a few written answers. Both
sides have the same weights in float32. How far scores are apart is relative to those above 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM

from luthier.evaluation.harness.model import HarnessModel
from luthier.evaluation.harness.tasks import Tasks, load_tasks
from luthier.models.loading import load_model, load_tokenizer

REVIEWS = """
task: reviews
dataset_path: csv
dataset_kwargs: {data_files: {test: reviews.csv}}
output_type: multiple_choice
test_split: test
doc_to_text: "评论：{{review}}\\n评价："
doc_to_choice: ["差", "好"]
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="where the three files are")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=500, help="of choices and texts together")
    parser.add_argument("--answers", type=int, default=16, help="written ones")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = load_model(args.model, dtype=torch.float32)
    tokenizer = load_tokenizer(args.model)
    with tempfile.TemporaryDirectory() as folder:
        asked = tasks(Path(folder), args.data, args.rows, args.answers)
    ours, our_seconds = scores(HarnessModel(model, tokenizer, batch_size=args.batch_size), asked)
    theirs, their_seconds = scores(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size), asked)
    found = compared(ours, theirs)
    print("| task | metric | luthier | lm_eval's hf | apart |\n|---|---|---|---|---|")
    for row in found["scores"]:
        print(f"| {row['task']} | {row['metric']} | {row['luthier']:.6f} | {row['hf']:.6f} | {row['apart']:.1e} |")
    print(
        f"\n{found['rows']} rows, {found['requests']:,} log-probabilities, at most {found['largest']:.1e} apart "
        f"(relative {found['relative']:.1e}); likeliest told the same: {found['greedy']}; "
        f"answers the same: {found['answers']}\n{our_seconds:,.0f} s and {their_seconds:,.0f} s: "
        f"ratio {their_seconds / our_seconds:.2f}"
    )
    if args.json:
        args.json.write_text(json.dumps(found | {"seconds": [our_seconds, their_seconds]}, indent=2) + "\n")


def tasks(folder: Path, data: Path, rows: int, answers: int) -> Tasks:
    """The tasks, with a fifth of the rows as texts and the rest as choices of both kinds; short ones, to save time."""
    sums = [json.loads(line) for line in (data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()]
    sums.sort(key=lambda row: len(row["question"]))
    results = [row["answer"].rpartition("#### ")[2] for row in sums]
    texts, choices = rows // 5, (rows - rows // 5) // 2
    numbers = []
    for at in range(choices):
        others = [results[at], next(r for r in results[at + 1 :] if r != results[at])]
        numbers.append({"question": sums[at]["question"], "choices": others, "answer": results[at]})
    _lines(folder / "numbers.jsonl", numbers)
    _lines(folder / "sums.jsonl", sums[:answers])
    with (data / "waimai_10k.csv").open(encoding="utf-8", newline="") as stream:
        reviews = [row for row in csv.DictReader(stream) if len(row["review"]) <= 20]
    # Good ones come first in the file.
    chosen = reviews[:: len(reviews) // (rows - texts - choices)][: rows - texts - choices]
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["label", "review"])
        writer.writeheader()
        writer.writerows(chosen)
    written = json.loads((data / "alpaca_zh_demo.json").read_text(encoding="utf-8"))[:texts]
    _lines(folder / "texts.jsonl", [{"text": row["output"][:60]} for row in written])
    (folder / "reviews.yaml").write_text(REVIEWS, encoding="utf-8")
    found = load_tasks([str(folder / "reviews.yaml")])
    for name, rows_of in (("choices_local", "numbers"), ("text_local", "texts"), ("gsm8k_local", "sums")):
        found.tasks |= load_tasks([name], data=str(folder / f"{rows_of}.jsonl")).tasks
    found.tasks["gsm8k_local"].config.generation_kwargs["max_gen_toks"] = 32
    return found


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def scores(model: Any, asked: Tasks) -> tuple[dict[str, Any], float]:
    begin = time.perf_counter()
    found = evaluator.evaluate(model, {"tasks": asked.tasks, "groups": {}}, bootstrap_iters=0)
    return found, time.perf_counter() - begin


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Every score, and every request's answer, of both sides."""
    rows = []
    for task, values in ours["results"].items():
        for key, value in values.items():
            if "," in key and "_stderr" not in key:
                other = theirs["results"][task][key]
                apart = abs(value - other) / max(1, abs(other))
                rows.append({"task": task, "metric": key, "luthier": value, "hf": other, "apart": apart})
    pairs, said = [], []
    for task, samples in ours["samples"].items():
        for one, other in zip(samples, theirs["samples"][task], strict=True):
            for (mine,), (its,) in zip(one["resps"], other["resps"], strict=True):
                if isinstance(mine, str):
                    said.append(mine == its)
                else:
                    pairs.append((mine, its) if isinstance(mine, tuple) else ((mine, None), (its, None)))
    return {
        "scores": rows,
        "rows": sum(len({s["doc_id"] for s in samples}) for samples in ours["samples"].values()),
        "requests": len(pairs),
        "largest": max(abs(mine[0] - its[0]) for mine, its in pairs),
        "relative": max(abs(mine[0] - its[0]) / abs(its[0]) for mine, its in pairs),
        "greedy": all(mine[1] == its[1] for mine, its in pairs),
        "answers": all(said),
    }


if __name__ == "__main__":
    main()
