"""New examples in the manner of a few: self-instruct (Wang et al., 2022, arXiv:2212.10560)."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rapidfuzz.distance import LCSseq

from luthier.data.augmentation.filters import declines, talks_about_itself
from luthier.data.augmentation.text import dominant_language
from luthier.data.examples import TrainingExample
from luthier.endpoint import Answerer
from luthier.errors import UserError

REASONS = {
    "no_examples": "an answer of the model that holds no example that can be read",
    "no_prompt": "the prompt is missing or no text",
    "no_answer": "the answer is missing or no text",
    "too_short": "the prompt is shorter than min_length",
    "too_long": "the prompt or the answer is longer than max_length",
    "language": "the prompt is in a language that no seed is in",
    "meta": "the prompt or the answer talks about itself, or declines",
    "echo": "the answer repeats the prompt",
    "label": "the answer is none of the seeds' classes",
    "impossible": "the prompt wants pictures, sound or files, which a text has none of",
    "like_a_seed": "nearly a seed, by ROUGE-L",
    "like_another": "nearly an earlier new example, by ROUGE-L",
}

# Wang et al. leave out what a language model cannot do (section 2.2).
_IMPOSSIBLE = re.compile(
    r"\b(?:images?|pictures?|graphs?|photos?|videos?|audio|attached|attachment|draw|plot)\b|图片|图像|视频|音频|附件|画一|如图",
    re.IGNORECASE,
)
_TOKEN = re.compile("[\u3400-\u9fff]|\\w+?(?=[\u3400-\u9fff]|\\W|$)")
_REQUEST = {
    "en": (
        "Here are {shown} examples of a task, one JSON object a line:\n\n{lines}\n\nWrite {wanted} new examples of the "
        "same task, different from these and from each other in subject, wording and difficulty. The answers must be "
        "right and complete. Reply with {wanted} lines and nothing else, each a JSON object with "
        "the keys prompt and answer."
    ),
    "zh": (
        "下面是同一任务的 {shown} 个例子，每行一个 JSON 对象：\n\n{lines}\n\n请为同一任务再写 {wanted} 个新例子，"
        "题材、措辞和难度都要与上面的例子以及彼此不同，答案必须正确而完整。只输出 {wanted} 行，每行一个 JSON 对象，"
        "键为 prompt 和 answer。"
    ),
}


@dataclass(slots=True)
class Generated:
    """New examples, and what became of everything that the model wrote."""

    examples: list[TrainingExample] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """How many were refused, by the reasons of :data:`REASONS`."""
    samples: dict[str, list[str]] = field(default_factory=dict)
    """A few of the refused, by reason."""
    failed: list[str] = field(default_factory=list)
    """Requests that got no answer, and why."""
    requests: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The counts, as ``report.json`` holds them."""
        return {
            "kept": len(self.examples),
            "refused": dict(self.refused),
            "failed": self.failed,
            "requests": self.requests,
        }


def self_instruct(
    seeds: Sequence[TrainingExample],
    answerer: Answerer,
    count: int,
    *,
    seed: int = 42,
    shown: int = 6,
    wanted: int = 4,
    at_once: int = 8,
    max_requests: int | None = None,
    min_length: int = 6,
    max_length: int = 4000,
    most_alike: float = 0.7,
) -> Generated:
    """New examples that a model writes after being shown some, without duplicates and without the plainly bad.

    Each request shows seeds and, once there are some, new examples (three to one, as Wang et al. have it). What comes
    back is refused where its prompt is alike to a seed's or an earlier one's: ROUGE-L of words, and of Chinese
    characters, above ``most_alike``. Where the seeds carry labels, the answer must be one of them.

    Args:
        seeds: examples with an answer or a label, of one exchange.
        answerer: the model.
        count: how many new examples to make.
        seed: where chance comes from; the same seeds, number and answers give the same examples.
        shown: examples in a request.
        wanted: new examples that a request asks for.
        at_once: requests of one round; what a round brings is shown in the next ones.
        max_requests: most requests; None: four times as many as there would be if nothing were refused.
        min_length: fewest characters of a prompt.
        max_length: most characters of a prompt or an answer.
        most_alike: highest ROUGE-L (F1) of two prompts.

    Returns:
        ``count`` examples or fewer, the refusals counted by reason. Each example's metadata says where it comes from.

    Raises:
        UserError: no seed has both a prompt and an answer, a number is out of range, or the model cannot be asked.
    """
    for name, value in (("count", count), ("shown", shown), ("wanted", wanted), ("at_once", at_once)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r} is not a whole number above 0")
    if not 0 < most_alike <= 1:
        raise UserError(f"most_alike={most_alike!r} is no share between 0 and 1", remedy="for example 0.7")
    good = [(i, p) for i, p in enumerate(map(_pair, seeds)) if p is not None]
    if not good:
        raise UserError("no seed is a prompt with its answer", remedy="give examples of one exchange, with an answer")
    state = _State(seeds, good, min_length, max_length, most_alike)
    limit = max_requests if max_requests is not None else 4 * -(-count // wanted)
    made = state.made
    while len(made.examples) < count and made.requests < limit:
        # No more requests than the missing examples need: what is refused, the next round makes up for.
        needed = -(-(count - len(made.examples)) // wanted)
        number = min(at_once, needed, limit - made.requests)
        rngs = [random.Random(f"{seed}:{made.requests + i}") for i in range(number)]
        picks = [state.pick(rng, shown) for rng in rngs]
        conversations = [_request([pair for _, pair in pick], wanted, state.language) for pick in picks]
        answers = answerer(conversations, [rng.getrandbits(31) for rng in rngs])
        for pick, answer in zip(picks, answers, strict=True):
            if isinstance(answer, UserError):
                made.failed.append(answer.what)
            else:
                state.take(answer, [i for i, _ in pick if i >= 0], count)
        made.requests += number
    return made


class _State:
    """What was made so far, and what new examples are held against."""

    def __init__(
        self,
        seeds: Sequence[TrainingExample],
        good: list[tuple[int, tuple[str, str]]],
        min_length: int,
        max_length: int,
        most_alike: float,
    ) -> None:
        self.good, self.min_length, self.max_length, self.most_alike = good, min_length, max_length, most_alike
        self.made = Generated()
        self.example = seeds[good[0][0]]
        self.origins = {i: str(seeds[i].source or f"seed {i + 1}") for i, _ in good}
        # Labels are classes: seeds that carry one each want answers among them.
        labelled = [seeds[i].label for i, _ in good]
        self.labels = {str(x): x for x in labelled} if all(x is not None for x in labelled) else None
        self.languages = {dominant_language(prompt) for _, (prompt, _) in good}
        self.language = "zh" if sum(dominant_language(p) == "zh" for _, (p, _) in good) * 2 > len(good) else "en"
        self.seed_tokens = [_tokens(prompt) for _, (prompt, _) in good]
        self.new_tokens: list[list[str]] = []

    def pick(self, rng: random.Random, shown: int) -> list[tuple[int, tuple[str, str]]]:
        """Examples to show: seeds by their index, and new ones (index -1), a quarter of all at most."""
        new = [(-1, _pair(e)) for e in self.made.examples]
        few = min(len(new), shown // 4)
        picked = rng.sample(self.good, min(len(self.good), shown - few))
        picked += [(i, p) for i, p in rng.sample(new, few) if p is not None]
        rng.shuffle(picked)
        return picked

    def take(self, answer: str, origins: list[int], count: int) -> None:
        """Keep the good examples of one answer of the model."""
        found = _parsed(answer)
        if not found:
            self._refuse("no_examples", answer)
        for item in found:
            if len(self.made.examples) == count:
                return
            reason = self._fault(item)
            if reason:
                self._refuse(reason, json.dumps(item, ensure_ascii=False))
                continue
            prompt, output = item["prompt"].strip(), str(item["answer"]).strip()
            self.new_tokens.append(_tokens(prompt))
            metadata = {
                "augmented_by": "self_instruct",
                "augmented_from": [self.origins[i] for i in origins],
                "augmented_index": len(self.made.examples),
            }
            label = self.labels[output] if self.labels else None
            self.made.examples.append(
                TrainingExample(
                    prompt,
                    None if label is not None and self.example.output is None else output,
                    label=label,
                    metadata=metadata,
                    task_type=self.example.task_type,
                )
            )

    def _refuse(self, reason: str, text: str) -> None:
        self.made.refused[reason] += 1
        samples = self.made.samples.setdefault(reason, [])
        if len(samples) < 3:
            samples.append(text[:300])

    def _fault(self, item: dict[str, Any]) -> str | None:
        prompt, answer = item.get("prompt"), item.get("answer")
        if not isinstance(prompt, str) or not prompt.strip():
            return "no_prompt"
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = item["answer"] = str(answer)
        if not isinstance(answer, str) or not answer.strip():
            return "no_answer"
        prompt, answer = prompt.strip(), answer.strip()
        if len(prompt) < self.min_length:
            return "too_short"
        if max(len(prompt), len(answer)) > self.max_length:
            return "too_long"
        if dominant_language(prompt) not in self.languages:
            return "language"
        if talks_about_itself(prompt) or declines(answer):
            return "meta"
        if prompt.lower() == answer.lower():
            return "echo"
        if self.labels is not None and answer not in self.labels:
            return "label"
        if _IMPOSSIBLE.search(prompt) and not any(_IMPOSSIBLE.search(p) for _, (p, _) in self.good):
            return "impossible"
        tokens = _tokens(prompt)
        if any(rouge_l(tokens, other) > self.most_alike for other in self.seed_tokens):
            return "like_a_seed"
        if any(rouge_l(tokens, other) > self.most_alike for other in self.new_tokens):
            return "like_another"
        return None


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """ROUGE-L's F1 of two lists of tokens (Lin, 2004): twice their longest common subsequence over their lengths."""
    total = len(one) + len(other)
    if not total:
        return 1.0
    return float(2 * LCSseq.similarity(one, other) / total)


def _tokens(text: str) -> list[str]:
    """Words in lower case, and each Chinese character."""
    return _TOKEN.findall(text.lower())


def _pair(example: TrainingExample) -> tuple[str, str] | None:
    """Prompt and answer of an example of one exchange."""
    if example.messages is not None:
        turns = [m for m in example.messages if m["role"] not in ("system", "developer")]
        if [m["role"] for m in turns] != ["user", "assistant"]:
            return None
        prompt, answer = turns[0].get("content"), turns[1].get("content")
    else:
        prompt = example.input
        answer = example.output if example.label is None else str(example.label)
    if isinstance(prompt, str) and prompt.strip() and isinstance(answer, str) and answer.strip():
        return prompt, answer
    return None


def _request(pairs: list[tuple[str, str]], wanted: int, language: str) -> list[dict[str, Any]]:
    lines = "\n".join(json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) for p, a in pairs)
    text = _REQUEST[language].format(shown=len(pairs), lines=lines, wanted=wanted)
    return [{"role": "user", "content": text}]


def _parsed(answer: str) -> list[dict[str, Any]]:
    """Every JSON object of an answer that has a prompt: one a line, in a list, in a fence, or spread over lines."""
    found: list[dict[str, Any]] = []
    decoder = json.JSONDecoder(strict=False)
    at = answer.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            at = answer.find("{", at + 1)
            continue
        if isinstance(value, dict) and "prompt" in value:
            found.append(value)
            at = answer.find("{", end)
        else:  # an object around the list, such as {"examples": […]}
            at = answer.find("{", at + 1)
    return found
