"""Whether a tuned encoder-decoder solves what can be solved exactly: a tiny random T5 learns to sort digits.

No pre-trained encoder-decoder is needed: the tokenizer and the model are made on the spot. Everything after that is an
ordinary run: its pre-flight, its loop, its comparison on rows that were never trained on, its folder. The saved model
is then loaded by transformers alone, in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from luthier import FullFineTuner, TrainingExample

_FRESH = """
import json, sys
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder, pairs = sys.argv[1], json.loads(sys.stdin.read())
model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer([source for source, _ in pairs], return_tensors="pt", padding=True)
made = model.generate(
    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=12
)
said = tokenizer.batch_decode(made, skip_special_tokens=True)
print(sum(text == target for text, (_, target) in zip(said, pairs)) / len(pairs))
assert "luthier" not in sys.modules
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of 64 rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as made:
        numbers = _run(Path(made), options.steps)
    print(
        f"\n| exact match on {numbers['held_out']} held-out rows | share |\n|---|---|\n"
        f"| random model | {numbers['before']:.1%} |\n| tuned | {numbers['after']:.1%} |\n"
        f"| the saved folder, loaded by transformers in a process of its own | {numbers['reloaded']:.1%} |\n\n"
        f"validation loss {numbers['first_loss']:.4f} to {numbers['loss']:.4f} nats a token (guessing a token of the "
        f"vocabulary: {numbers['chance']:.4f}), {options.steps:,} steps, {numbers['seconds']:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _run(folder: Path, steps: int) -> dict[str, float]:
    _make_model(folder / "model")
    rows = _rows(7_000)
    train, validation, test = rows[:6_600], rows[6_600:6_800], rows[6_800:]
    began = time.perf_counter()
    result = FullFineTuner(str(folder / "model"), dtype="float32").train(
        train,
        validation,
        folder / "run",
        test_examples=test,
        learning_rate=3e-3,
        weight_decay=0.0,
        max_steps=steps,
        eval_steps=max(1, steps // 6),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        logging_steps=50,
        report_to=[],
    )
    seconds = time.perf_counter() - began
    assert result.comparison is not None
    before, after = (model.metrics["exact_match"] for model in result.comparison.models)
    pairs = json.dumps([(row.input, row.output) for row in test])
    fresh = subprocess.run(
        [sys.executable, "-c", _FRESH, str(result.saved)], input=pairs, capture_output=True, text=True, check=True
    )
    return {
        "held_out": len(test),
        "before": before,
        "after": after,
        "reloaded": float(fresh.stdout.split()[-1]),
        "first_loss": result.outcome.first_eval_loss or math.nan,
        "loss": result.outcome.state.best_loss or math.nan,
        "chance": math.log(13),
        "seconds": seconds,
    }


def _rows(count: int) -> list[TrainingExample]:
    """Four to eight different digits in any order, and the same in ascending order; no source twice."""
    rng = random.Random(0)
    orders = set()
    while len(orders) < count:
        orders.add(tuple(rng.sample(range(10), rng.randint(4, 8))))
    return [
        TrainingExample(" ".join(map(str, order)), " ".join(map(str, sorted(order))), task_type="seq_to_seq")
        for order in sorted(orders, key=lambda _: rng.random())
    ]


def _make_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    names = itertools.chain(("<pad>", "</s>", "<unk>"), map(str, range(10)))
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
