"""The parity gate for models that another program runs: llama.cpp, onnxruntime, a server.

Such a program is asked what a user of it asks: which tokens a text is, how likely each next token is, and what it
answers. Its arithmetic is its own, so it is held against the weights as they were exported, computed by transformers
in float32; how far those lie from the tuned model is what the export's precision costs, and is told beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from luthier.deployment.parity import (
    FLOOR,
    MULTIPLE,
    NAMES,
    ParityReport,
    base_log_probabilities,
    distance,
    log_probabilities,
)
from luthier.deployment.tokens import token_ids
from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A divergence grows with the square of the difference.
_MULTIPLES = {"mean": MULTIPLE, "kl": MULTIPLE**2, "max": 2 * MULTIPLE}
_NAMES = NAMES | {"max": "the greatest |Δ log-probability|"}
PLACES = 4
"""Positions of each prompt at which the next token is compared: its end, and others before it at equal distances."""
_READINGS = (
    "In 2024, 12345 people paid $1,299.50 for 7 lamps.",
    "It's what they'LL say: we're   DONE!\n\n\n  def f(x):\n\treturn x  # 100%\n",
    "今天气温是25度，明天呢？Ça va très bien — naïve café, Ελληνικά, русский текст, हिन्दी, العربية 🙂👍🏽",
)
"""Texts that tokenizers which cut differently before they merge read as different tokens."""


class Runtime(Protocol):
    """A program that runs an exported model."""

    @property
    def name(self) -> str:
        """As messages call it."""

    def tokens(self, text: str) -> list[int] | None:
        """The text's tokens by the program's own tokenizer, control tokens read as such, none added; None: it has
        no tokenizer of its own."""

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """``[V] float32``: log-probability of each next token; -inf for those that the program does not tell, which
        are the unlikeliest ones."""

    def greedy(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The likeliest continuation, by tokens, up to and without a stop token."""


class Stopping(Protocol):
    """A program that can be asked where answers end."""

    @property
    def name(self) -> str:
        """As messages call it."""

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends at a token."""


def check_runtime(
    reference: Any,
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    noise: Mapping[str, float],
    stored: Any | None = None,
    base: Any | None = None,
    stops: Sequence[int] = (),
    name: str = "exported",
    max_new_tokens: int = 24,
) -> ParityReport:
    """Compare a program's reading, next tokens and answers with transformers'.

    Args:
        reference: the model that was tested; plain or PEFT.
        runtime: the program, with the exported model in it.
        tokenizer: the reference's tokenizer.
        prompts: rendered texts; the program must read them as the same tokens.
        noise: ``mean`` and ``max`` |Δ log-probability| and ``kl`` (nats) that the program's own arithmetic explains;
            where a key is missing, that of float32.
        stored: the exported weights in a transformers model, dequantised; None: the reference's own.
        base: the untuned model, or a PEFT model whose adapter is switched off to get it; the program must lie
            nearer to the reference than it does.
        stops: ids that end an answer.
        name: of the hand-over, for the report.
        max_new_tokens: of the greedy answers that are compared.

    Returns:
        the report; ``require`` raises where it fails. Its numbers are ``candidate_*`` (program to the stored
        weights), ``bound_*``, ``precision_*`` (stored weights to the reference), ``answers_same`` (share of greedy
        answers that are the same to the last token) and ``tuning_mean`` (reference to its base).
    """
    if not prompts:
        raise UserError("the parity gate has no prompt to ask", remedy="give at least one row")
    ids = token_ids(tokenizer, prompts, None)
    reasons = _read_otherwise(runtime, tokenizer, prompts)
    places = [_places(len(i)) for i in ids]
    tuned = at_places(reference, ids)
    kept = tuned if stored is None else at_places(stored, ids)
    told = [
        torch.stack([_told(runtime.log_probabilities(i[: p + 1]), ours[k]) for k, p in enumerate(at)])
        for i, at, ours in zip(ids, places, kept, strict=True)
    ]
    apart = distance(kept, told)
    bound = {k: v * max(noise.get(k, 0.0), FLOOR[k]) for k, v in _MULTIPLES.items()}
    numbers = {f"candidate_{k}": v for k, v in apart.items()} | {f"bound_{k}": v for k, v in bound.items()}
    for key, most in bound.items():
        if not apart[key] <= most:
            reasons.append(f"{_NAMES[key]} is {apart[key]:.3g}; the bound is {most:.3g}")
    if stored is not None:
        numbers |= {f"precision_{k}": v for k, v in distance(tuned, kept).items()}
    same = 0
    for i in ids:
        answer = runtime.greedy(i, max_new_tokens)
        if passed := [token for token in answer if token in stops]:
            reasons.append(f"it does not stop at {tokenizer.convert_ids_to_tokens(passed[0])!r}, which ends an answer")
            break
        differs = _departs(stored if stored is not None else reference, i, answer, stops, max_new_tokens)
        same += differs is None
        if differs is not None and not differs <= bound["max"]:
            reasons.append(
                f"a greedy answer departs where the likeliest token leads by {differs:.3g}, more than the bound on "
                f"|Δ log-probability|, {bound['max']:.3g}"
            )
            break
    numbers["answers_same"] = same / len(ids)
    if base is not None:
        untouched = [a[at] for a, at in zip(base_log_probabilities(base, ids), places, strict=True)]
        moved, from_tuned = distance(tuned, untouched)["mean"], distance(tuned, told)["mean"]
        numbers["tuning_mean"] = moved
        if moved == 0:
            reasons.append("the tuned model does not differ from its base: nothing was learnt, or the adapter is off")
        elif not moved > from_tuned:
            reasons.append(
                f"it lies as far from the tuned model ({from_tuned:.3g}) as the base does ({moved:.3g}): what was "
                "learnt is lost in its precision"
            )
    return ParityReport(name, not reasons, reasons, numbers, len(prompts))


def stops_lost(runtime: Stopping, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> list[str]:
    """Whether a program goes on behind a token that ends an answer, as a reason."""
    lost = [tokenizer.convert_ids_to_tokens(stop) for stop in stops if not runtime.ends_at(stop)]
    return [f"{runtime.name} does not stop at {', '.join(map(repr, lost))}, which ends an answer"] if lost else []


def at_places(model: Any, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What the gate compares of a transformers model: of each prompt the log-probabilities ``[places, V]``."""
    return [log_probabilities(model, i)[_places(len(i))] for i in ids]


def _read_otherwise(runtime: Runtime, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    for prompt in [*prompts, *_READINGS]:
        read = runtime.tokens(prompt)
        if read is None:
            return []
        if read != tokenizer(prompt, add_special_tokens=False).input_ids:
            return [f"{runtime.name} reads the same text as other tokens: {prompt[:60]!r}"]
    return []


def _places(length: int) -> list[int]:
    """Positions in a text of so many tokens, ascending, its last one among them."""
    return sorted({length - 1 - (length * k) // PLACES for k in range(PLACES)} & set(range(length)))


def _told(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """The program's log-probabilities; of those that it does not tell it is known that they are none of the likelier
    ones. Rows that pad the vocabulary on either side are nobody's tokens."""
    theirs = theirs[: len(ours)]
    theirs = torch.nn.functional.pad(theirs, (0, len(ours) - len(theirs)), value=-torch.inf)
    least = theirs[theirs.isfinite()].min()
    return torch.where(theirs.isfinite(), theirs, ours.clamp(max=float(least)))


def _departs(
    model: Any, prompt: Sequence[int], answer: Sequence[int], stops: Sequence[int], limit: int
) -> float | None:
    """By how much the model's likeliest token leads where a greedy answer takes another; None: it never does."""
    text = [*prompt, *answer]
    rows = log_probabilities(model, text)[len(prompt) - 1 :]
    for row, token in zip(rows, answer, strict=False):
        if int(row.argmax()) != token:
            return float(row.max() - row[token])
    if len(answer) >= limit:
        return None
    ending = max((float(rows[-1][stop]) for stop in stops), default=-torch.inf)
    lead = float(rows[-1].max()) - ending
    return lead or None
