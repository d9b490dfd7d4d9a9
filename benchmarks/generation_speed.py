"""Answers a second: Luthier's loop beside transformers' ``generate``, on GSM8K's test questions.

Three sides in one process take turns on the same batches of the same prompts, greedily: transformers' ``generate``,
Luthier's loop with transformers' cache of keys and values, and Luthier's loop as it is. The exit status is 1 where the
answers differ.

    python benchmarks/generation_speed.py --data gsm8k_test.jsonl --rows 64 --max-new-tokens 64
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.data.render import prompt_text
from luthier.decoding import BATCH_SIZE
from luthier.evaluation import generation, growing
from luthier.models.catalogue import embedded_model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's test questions, JSONL with `question`")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = embedded_model_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[args.dtype]).eval()
    lines = args.data.read_text(encoding="utf-8").splitlines()[: args.rows]
    prompts = [prompt_text(tokenizer, [{"role": "user", "content": json.loads(line)["question"]}]) for line in lines]

    def ours() -> list[list[int]]:
        said = generation.generate_answers(
            model, tokenizer, prompts, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size
        )
        return [answer.token_ids for answer in said]

    def with_their_cache() -> list[list[int]]:
        kept, growing.grow = growing.grow, lambda cache: None
        try:
            return ours()
        finally:
            growing.grow = kept

    def theirs() -> list[list[int]]:
        found: dict[int, list[int]] = {}
        order = sorted(range(len(prompts)), key=lambda i: -len(tokenizer(prompts[i])["input_ids"]))
        stops = generation.stop_tokens(model, tokenizer)
        for begin in range(0, len(order), args.batch_size):
            rows = order[begin : begin + args.batch_size]
            batch = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False)
            out = model.generate(**batch, do_sample=False, max_new_tokens=args.max_new_tokens, eos_token_id=stops)
            for i, ids in zip(rows, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                found[i] = ids[: next((at for at, token in enumerate(ids) if token in stops), len(ids) - 1) + 1]
        return [found[i] for i in range(len(prompts))]

    sides: dict[str, Callable[[], list[list[int]]]] = {
        "transformers": theirs,
        "luthier, transformers' cache": with_their_cache,
        "luthier": ours,
    }
    model.generate(**tokenizer("warm", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    answers: dict[str, list[list[int]]] = {}
    for number in range(args.rounds):
        for name, side in sides.items():
            begin = time.perf_counter()
            answers[name] = side()
            seconds = time.perf_counter() - begin
            tokens = sum(map(len, answers[name]))
            rates[name].append(tokens / seconds)
            print(
                f"round {number + 1}, {name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f}/s",
                flush=True,
            )
    for name in list(sides)[:2]:
        ratios = [a / b for a, b in zip(rates["luthier"], rates[name], strict=True)]
        print(f"luthier / {name}: {sum(ratios) / len(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    same = [sum(a == b for a, b in zip(answers["luthier"], answers[n], strict=True)) for n in list(sides)[:2]]
    print(f"equal answers of {len(prompts)}: {same[0]} beside transformers, {same[1]} beside its cache")
    return 0 if same == [len(prompts)] * 2 else 1


if __name__ == "__main__":
    sys.exit(main())
