"""Classifiers beside what must be beaten: the most frequent class, and TF-IDF with logistic regression.

Every model trains on the same rows through the whole of `luthier train` (pre-flight, training, parity gate, judging on
held-out rows); the baselines get the same rows. TF-IDF counts runs of one to three characters, which need no words and
so serve Chinese too; its strength of regularisation is chosen on the validation rows.

    python benchmarks/classification.py --data reviews.csv --rows 2000 --test-rows 1000
    python benchmarks/classification.py --data reviews.csv --model BERT_FOLDER --method full --learning-rate 5e-5
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np

from luthier.data.dataset import Dataset, prepare
from luthier.data.examples import TrainingExample
from luthier.evaluation.classification import class_metrics
from luthier.models.loading import load_tokenizer
from luthier.pipeline import run
from luthier.recipe import Recipe


def rows_of(data: Path, rows: int, test_rows: int, seed: int) -> dict[str, list[TrainingExample]]:
    """Training, validation and test rows, stratified; the same for every model."""
    recipe = Recipe.from_dict(
        {
            "task": "classification",
            "data": {"train": str(data), "split": {"strategy": "stratified", "validation": 0.1, "test": 0.2},
                     "truncation": "cut", "max_length": 512, "deduplicate": "exact"},
            "seed": seed,
        }
    )  # fmt: skip
    found: Dataset = prepare(recipe, load_tokenizer("smollm2"))
    # Splits keep the file's order, which is often that of the classes.
    parts = {part.name: list(part.examples) for part in found.parts}
    for examples in parts.values():
        random.Random(seed).shuffle(examples)
    most = {"train": rows, "validation": max(100, test_rows // 4), "test": test_rows}
    return {name: examples[: most[name]] for name, examples in parts.items()}


def tf_idf(given: dict[str, list[TrainingExample]]) -> dict[str, float]:
    """Accuracy and F1 of logistic regression on TF-IDF of characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    names = sorted({str(row.label) for row in given["train"]})
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    inputs = {"train": vectors.fit_transform([row.input for row in given["train"]])}
    inputs |= {part: vectors.transform([row.input for row in given[part]]) for part in ("validation", "test")}
    right = {part: np.array([names.index(str(row.label)) for row in rows]) for part, rows in given.items()}
    models = [LogisticRegression(C=c, max_iter=1_000).fit(inputs["train"], right["train"]) for c in (0.3, 1, 3, 10, 30)]
    best = max(models, key=lambda m: m.score(inputs["validation"], right["validation"]))
    table = np.eye(len(names), dtype=bool)
    return class_metrics(table[right["test"]], table[best.predict(inputs["test"])], names)[0]


def main() -> None:
    """Train, judge, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a file of texts with their class")
    parser.add_argument("--rows", type=int, default=2_000, help="training rows")
    parser.add_argument("--test-rows", type=int, default=1_000)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    a = parser.parse_args()
    given = rows_of(a.data, a.rows, a.test_rows, a.seed)
    print(", ".join(f"{len(rows):,} {part} rows" for part, rows in given.items()))
    baseline = tf_idf(given)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.from_dict(
            {
                "task": "classification",
                "model": {"name": a.model},
                "method": a.method,
                "data": {"truncation": "cut", "max_length": a.max_length},
                "training": {
                    "num_train_epochs": a.epochs,
                    "per_device_train_batch_size": 16,
                    "learning_rate": a.learning_rate,
                    "report_to": [],
                },
                "evaluation": {"max_examples": a.test_rows},
                "output_dir": f"{folder}/run",
                "seed": a.seed,
            }
        )
        begin = time.perf_counter()
        result = run(recipe, given=given)
        seconds = time.perf_counter() - begin
        models = json.loads((result.run_dir / "evaluation" / "comparison.json").read_text())["models"]
    rate = result.outcome.plan.learning_rate
    print("\n| classifier | accuracy | macro-F1 | seconds |\n|---|---|---|---|")
    print(f"| always the most frequent class | {_scores(models['majority']['metrics'])} | |")
    print(f"| TF-IDF, logistic regression | {_scores(baseline)} | |")
    name = f"{Path(a.model).name}, {a.method}, {a.epochs:g} epochs at {rate:g}"
    print(f"| {name} | {_scores(models['tuned']['metrics'])} | {seconds:,.0f} |")


def _scores(metrics: dict[str, float]) -> str:
    return f"{metrics['accuracy']:.1%} | {metrics['macro_f1']:.1%}"


if __name__ == "__main__":
    main()
