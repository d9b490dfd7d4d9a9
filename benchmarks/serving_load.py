"""A server under load: are all answers right, does memory stay, what do requests at once gain?

Starts ``luthier serve`` with a model (and adapters, as NAME=FOLDER), asks each question of each model alone, then by
many clients at once for a time. Every answer must be the one that was given alone, but where two tokens are as likely:
of each that departs it prints how much more likely, alone, the token was that it should have taken. Prints tokens a
second of one client and of sixteen, and the ratio.

    python benchmarks/serving_load.py smollm2 --clients 64 --seconds 120
    python benchmarks/serving_load.py smollm2 --vllm ~/vllm/bin/vllm
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter

import openai
import psutil

QUESTIONS = [f"Write one sentence about the number {number}." for number in range(2, 34)]


def ask(client: openai.OpenAI, model: str, question: str, tokens: int) -> tuple[str, int]:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=tokens, temperature=0
    )
    assert reply.usage is not None
    return reply.choices[0].message.content or "", reply.usage.completion_tokens


def gap(client: openai.OpenAI, model: str, question: str, tokens: int, other: str) -> float:
    """Where another answer departs from the one given alone: nats from its token to the likeliest; inf: not of 20."""
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=20,
    )
    said = ""
    for place in reply.choices[0].logprobs.content:
        if not other.startswith(said + place.token):
            likely = [o.logprob for o in place.top_logprobs if o.token and other.startswith(said + o.token)]
            return place.logprob - max(likely, default=-math.inf)
        said += place.token
    return math.inf


def crowd(clients: int, seconds: float, work) -> tuple[float, Counter]:
    """Tokens a second, and what was counted, of so many clients for a time."""
    counts: Counter = Counter()
    lock = threading.Lock()
    begun = time.monotonic()

    def loop(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() - begun < seconds:
            found = work(chance)
            with lock:
                counts.update(found)

    threads = [threading.Thread(target=loop, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts["tokens"] / (time.monotonic() - begun), counts


def held(process: psutil.Process) -> int:
    """Bytes of a process and of those that it has started."""
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--kind", help="of weights; default: as luthier serve chooses")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--vllm", help="its program: it is the engine then")
    parser.add_argument("--vllm-args", help="further arguments of `vllm serve`")
    chosen = parser.parse_args()
    command = [sys.executable, "-m", "luthier.cli", "serve", chosen.model, "--port", str(chosen.port)]
    for option in ("kind", "vllm", "vllm_args"):
        if value := getattr(chosen, option):
            command.append(f"--{option.replace('_', '-')}={value}")
    command += [f"--adapter={adapter}" for adapter in chosen.adapter]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            load(chosen, server.pid)
        finally:
            server.terminate()


def load(chosen: argparse.Namespace, pid: int) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{chosen.port}/v1", api_key="none", max_retries=0, timeout=600)
    while True:
        try:
            models = [model.id for model in client.models.list()]
            break
        except openai.APIConnectionError:
            time.sleep(1)
    alone = {(m, q): ask(client, m, q, chosen.tokens)[0] for m in models for q in QUESTIONS[:8]}
    departed: set[tuple[str, str, str]] = set()

    def work(chance: random.Random) -> dict[str, int]:
        model, question = chance.choice(list(alone))
        try:
            text, tokens = ask(client, model, question, chosen.tokens)
        except openai.APIError as error:
            print("error:", error)
            return {"errors": 1}
        same = text == alone[model, question]
        if not same:
            departed.add((model, question, text))
        strange = not same and any(text == other for (m, _), other in alone.items() if m != model)
        return {"tokens": tokens, "answers": 1, "same": same, "another model's": strange}

    process = psutil.Process(pid)
    one, _ = crowd(1, min(20, chosen.seconds), work)
    sixteen, _ = crowd(16, min(30, chosen.seconds), work)
    before = held(process)
    many, counts = crowd(chosen.clients, chosen.seconds, work)
    after = held(process)
    print(f"models {', '.join(models)}, {chosen.kind or 'default kind'}, {chosen.tokens} tokens an answer")
    print(f"tokens a second: 1 client {one:.1f}, 16 clients {sixteen:.1f} ({sixteen / one:.2f} times)")
    print(f"{chosen.clients} clients, {chosen.seconds:.0f} s: {many:.1f} tokens a second, {dict(counts)}")
    for model, question, text in sorted(departed):
        print(f"departed: {model}, {question!r}: {gap(client, model, question, chosen.tokens, text):.4f} nats")
    print(f"memory: {before / 1e6:,.0f} MB before, {after / 1e6:,.0f} MB after")


if __name__ == "__main__":
    main()
