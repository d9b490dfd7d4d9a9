"""The parity gate's further question after a merge out of a quantised base: is the merged change the trained one?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from luthier.deployment.parity import (
    FLOOR,
    MULTIPLE,
    ParityReport,
    base_log_probabilities,
    distance,
    likely_tokens,
    log_probabilities,
)
from luthier.deployment.tokens import limit_of, token_ids
from luthier.models.heads import Head
from luthier.models.quantized import unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The share of the trained change that a merge of a quantised base may miss beside its rounding, and at most. SmolLM2 in
# 4 bits, tuned for 3 and 30 steps in float32: right merges 1e-5 and less, one layer of thirty left out 0.12 and 0.04,
# the scale a tenth short 0.09 and 0.10, half of it 0.49 and 0.59, nothing 1, the wrong sign 1.9 and 1.1.
APART, MOST_APART = 0.02, 0.5


def weigh_merge(
    report: ParityReport,
    trained: Any,
    reference: Any,
    merged: Any,
    merged_quantized: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
) -> None:
    """Hold the change of the weights against what was trained, and measure what it costs to leave the quantised base.

    Between a quantised base and the stored one lies far more than what a young adapter learns, so neither model says
    whether the merge is right. The merged change of the weights does, beside the weights that the adapter was trained
    on: merged − stored + quantised must say what was trained says. ``change_apart`` is what differs, as a share of
    what training changed (mean |Δ log-probability|): 0 where the change is the trained one, 1 where nothing was merged.
    ``change_share`` is its projection on what training changed: 1, 0, and mostly below 0 where the sign is wrong. A
    change that lies farther away than rounding explains fails.

    ``loss_*`` are mean losses over the prompts, nats a token, of the quantised base with its adapter (what was
    trained), of the merged model, of the merged model quantised again, and of the stored base, where they are models
    that write; ``from_trained_*`` is how far each lies from what was trained, mean |Δ log-probability|.

    Args:
        report: of the merge itself, by :func:`check_parity` with a base; adds to it.
        trained: the quantised base with its adapter.
        reference: the stored base with the adapter.
        merged: the candidate.
        merged_quantized: the candidate, quantised as the base was.
        tokenizer: of all of them.
        prompts: rendered texts.
    """
    ids = token_ids(tokenizer, prompts, limit_of(reference, tokenizer))
    ours = [log_probabilities(trained, i) for i in ids]
    others = {
        "merged": [log_probabilities(merged, i) for i in ids],
        "merged_quantized": [log_probabilities(merged_quantized, i) for i in ids],
        "stored_base": base_log_probabilities(reference, ids),
    }
    if Head.of(trained).writes:
        for name, theirs in {"trained": ours, **others}.items():
            report.numbers[f"loss_{name}"] = _mean_loss(theirs, ids)
    for name, theirs in others.items():
        report.numbers[f"from_trained_{name}"] = distance(ours, theirs)["mean"]
    fine, layers = unpacked(trained)
    base, tuned = base_log_probabilities(fine, ids), [log_probabilities(fine, i) for i in ids]
    moved = _beside_quantized(merged, reference, fine, layers)
    share, apart = _change(base, tuned, [log_probabilities(moved, i) for i in ids])
    report.numbers |= {"change_share": share, "change_apart": apart}
    rounding = max(report.numbers.get("rounding_mean", 0.0), FLOOR["mean"])
    tuning = distance(base, tuned)["mean"]
    bound = min(APART + MULTIPLE * rounding / tuning, MOST_APART) if tuning else APART
    if not apart <= bound:
        report.reasons.append(
            f"the merged change is not the trained one: beside the quantised weights it lies {apart:.3g} of the tuning "
            f"away from it (the bound is {bound:.3g}), and {share:.3g} of it goes the same way"
        )
        report.passed = False


@torch.no_grad()
def _beside_quantized(merged: Any, stored: Any, quantized: Any, layers: Sequence[str]) -> Any:
    """A copy of the merged model, in float32, with quantised weights in the place of the stored ones under the merged
    change: merged − stored + quantised, in each of the layers."""
    from transformers.pytorch_utils import Conv1D

    made = copy.deepcopy(merged).float()
    for name in layers:
        here, before, instead = (_plain_layer(model, name) for model in (made, stored, quantized))
        here.weight += (instead.weight.T if isinstance(here, Conv1D) else instead.weight) - before.weight.float()
    return made


def _plain_layer(model: Any, name: str) -> Any:
    layer = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_submodule(name)
    return getattr(layer, "base_layer", layer)


def _change(base: list[torch.Tensor], tuned: list[torch.Tensor], moved: list[torch.Tensor]) -> tuple[float, float]:
    """``moved - base`` against ``tuned - base``, over likely tokens: its projection, and mean |Δ| of what differs as a
    share of the mean |Δ| of tuning."""
    along = squared = left = total = 0.0
    for a, b, c in zip(base, tuned, moved, strict=True):
        likely = likely_tokens(a, b)
        wanted, found = (b - a)[likely], (c - a)[likely]
        along += float((wanted * found).sum())
        squared += float((wanted * wanted).sum())
        left += float((wanted - found).abs().sum())
        total += float(wanted.abs().sum())
    return (along / squared, left / total) if total else (0.0, 1.0)


def _mean_loss(log_probabilities: Sequence[torch.Tensor], ids: Sequence[Sequence[int]]) -> float:
    """Nats a token, of all tokens but the first of each text."""
    pairs = zip(log_probabilities, ids, strict=True)
    losses = torch.cat([-a[range(len(i) - 1), i[1:]] for a, i in pairs])
    return float(losses.mean()) if len(losses) else 0.0
