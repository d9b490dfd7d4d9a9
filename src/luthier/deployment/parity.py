"""The parity gate: a model handed over must read and answer as the one it was made from.

The same prompts must give the same tokens through the candidate's own tokenizer and template, and logits that differ
by no more than rounding the weights does. Both models are computed in float32 for this, so that the rounding of
activations hides nothing, and how much rounding the weights does is measured: the reference's own are moved by a
random half of their last place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

from luthier.deployment.routing import Detours, Routing
from luthier.deployment.tokens import left_behind, limit_of, token_ids
from luthier.errors import UserError
from luthier.models.heads import Head
from luthier.models.virtual import own_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many times the measured rounding a candidate may differ. Honest merges of SmolLM2 in bfloat16 came to 0.8 to 1.1
# times; one layer forgotten of thirty to 1.8 and more, a scale a tenth short to 2.5 (tests/deployment).
MULTIPLE = 1.5
# Rounding in float32 itself, where sums are taken in another order: mean |Δ log-probability| and KL divergence.
FLOOR = {"mean": 2e-4, "kl": 1e-6, "max": 5e-2}
NAMES = {"mean": "the mean |Δ log-probability|", "kl": "the mean KL divergence"}
_LIKELY = -9.2  # log 1e-4


@dataclass(slots=True)
class ParityReport:
    """What was measured at one hand-over."""

    name: str
    passed: bool
    reasons: list[str]
    """Why it fails, in words."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Mean and greatest |Δ log-probability| of candidate and of rounding, mean KL divergence (nats), share of
    positions with the same likeliest token; where a base was given, how far tuning has moved the model; and where the
    base was quantised, what :func:`~luthier.deployment.quantized_merge.weigh_merge` measures."""
    prompts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What the manifest holds."""
        return asdict(self)


def check_parity(
    reference: Any,
    candidate: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    base: Any | None = None,
    candidate_tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "candidate",
    exact: bool = False,
) -> ParityReport:
    """Compare a candidate with the model it was made from.

    Args:
        reference: the model that was tested; plain or PEFT.
        candidate: the model to hand over.
        tokenizer: the reference's tokenizer.
        prompts: rendered texts.
        base: the untuned model, or a PEFT model whose adapter is switched off to get it; where given, the
            candidate must be nearer to the reference than the base is.
        candidate_tokenizer: the tokenizer that travels with the candidate.
        name: of the hand-over, for the report.
        exact: the same weights in the same precision: logits must be equal bit for bit, in that precision.

    Returns:
        the report; :func:`require` raises where it fails.
    """
    if not prompts:
        raise UserError("the parity gate has no prompt to ask", remedy="give at least one row")
    travelled = candidate_tokenizer if candidate_tokenizer is not None else tokenizer
    head = Head.of(reference)
    limit = limit_of(reference, tokenizer)
    reasons = left_behind(head, candidate, tokenizer, travelled, prompts, limit)
    numbers: dict[str, float] = {}
    ids = token_ids(tokenizer, prompts, limit)
    if exact:
        ours, theirs = ([log_probabilities(m, i) for i in ids] for m in (reference, candidate))
        if not all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
            reasons.append("logits differ where they must be equal bit for bit")
        if ours[0].shape == theirs[0].shape:
            numbers |= {f"candidate_{k}": v for k, v in distance(ours, theirs).items()}
        return ParityReport(name, not reasons, reasons, numbers, len(prompts))
    fine = copy.deepcopy(reference).float()
    routing = Routing()
    with routing.recorded(fine):
        ours = [log_probabilities(fine, i) for i in ids]
    untouched = None if base is None else base_log_probabilities(fine if base is reference else base, ids)
    _jitter(fine, next(candidate.parameters()).dtype)
    with routing.followed(fine) as by_rounding:
        jittered = [log_probabilities(fine, i) for i in ids]
    del fine
    fine = copy.deepcopy(candidate).float()
    with routing.followed(fine) as detours:
        theirs = [log_probabilities(fine, i) for i in ids]
    report = judge(name, len(prompts), reasons, ours, jittered, theirs, untouched)
    judge_routing(report, detours, by_rounding)
    return report


def judge(
    name: str,
    prompts: int,
    reasons: list[str],
    ours: list[torch.Tensor],
    jittered: list[torch.Tensor],
    theirs: list[torch.Tensor],
    untouched: list[torch.Tensor] | None,
) -> ParityReport:
    """The verdict on log-probabilities ``[n, V]`` of the same tokens.

    Args:
        name: of the hand-over.
        prompts: their number.
        reasons: that are known already why it fails.
        ours: the reference's.
        jittered: the reference's, its weights moved as rounding moves them.
        theirs: the candidate's.
        untouched: the base's; None: it is not known.
    """
    if ours[0].shape[-1] != theirs[0].shape[-1]:
        reasons.append(f"the vocabulary has {theirs[0].shape[-1]:,} rows, it had {ours[0].shape[-1]:,}")
        return ParityReport(name, False, reasons, {}, prompts)
    apart = distance(ours, theirs)
    numbers = {f"candidate_{k}": v for k, v in apart.items()}
    noise = distance(ours, jittered)
    numbers |= {f"rounding_{k}": v for k, v in noise.items()}
    noise = {k: max(v, FLOOR.get(k, 0.0)) for k, v in noise.items()}
    for key in ("mean", "kl"):
        # A divergence grows with the square of the difference.
        multiple = MULTIPLE if key == "mean" else MULTIPLE**2
        if not apart[key] <= multiple * noise[key]:
            reasons.append(
                f"{NAMES[key]} is {apart[key]:.3g}, {apart[key] / noise[key]:.1f} times rounding "
                f"({noise[key]:.3g}); the bound is {multiple:g} times"
            )
    flipped = _flipped(ours, theirs, MULTIPLE * noise["max"])
    if flipped:
        reasons.append(f"the likeliest token changes at {flipped} positions where rounding cannot change it")
    if untouched is not None:
        moved = distance(ours, untouched)["mean"]
        numbers["tuning_mean"] = moved
        if moved == 0:
            reasons.append("the tuned model does not differ from its base: nothing was learnt, or the adapter is off")
        elif not moved > apart["mean"]:
            reasons.append(
                f"the candidate lies as far from the tuned model ({apart['mean']:.3g}) as the base does ({moved:.3g}): "
                "what was learnt is lost in its rounding"
            )
    return ParityReport(name, not reasons, reasons, numbers, prompts)


def judge_routing(report: ParityReport, detours: Detours, by_rounding: Detours) -> None:
    """Add to a report how many tokens a candidate's routers would have sent to other experts, where it has routers."""
    if not detours.choices:
        return
    report.numbers |= {"candidate_rerouted": detours.share, "rounding_rerouted": by_rounding.share}
    if detours.too_many(by_rounding):
        report.passed = False
        report.reasons.append(
            f"{detours.share:.1%} of the choices of experts are other ones; rounding changes {by_rounding.share:.1%}"
        )


def require(report: ParityReport) -> None:
    """Let a hand-over go on, or not.

    Raises:
        UserError: the report has not passed.
    """
    if not report.passed:
        raise UserError(
            f"the parity gate refuses the {report.name} model: {'; '.join(report.reasons)}",
            remedy="nothing was written; the model it was made from is untouched",
        )


@torch.no_grad()
def log_probabilities(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """``[n, V] float32`` on CPU, computed with plain attention, whatever the model uses otherwise."""
    was, native = model.training, model.config._attn_implementation
    model.eval()
    if native != "sdpa":
        model.set_attn_implementation("sdpa")
    try:
        device = next(model.parameters()).device
        logits = own_logits(model, torch.tensor([list(ids)], device=device))[0]
        return logits.float().log_softmax(-1).cpu()
    finally:
        if native != "sdpa":
            model.set_attn_implementation(native)
        model.train(was)


def base_log_probabilities(base: Any, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    if hasattr(base, "disable_adapter"):
        with base.disable_adapter():
            return [log_probabilities(base, i) for i in ids]
    return [log_probabilities(base, i) for i in ids]


@torch.no_grad()
def _jitter(model: Any, dtype: torch.dtype) -> None:
    """Move each weight that a merge would round by a random amount within half its last place in ``dtype``.

    Those are the weights under an adapter, or all matrices where there is none. The variance is that of rounding.
    """
    # Around fused experts (PEFT's ParamWrapper) the adapted weight is a parameter of another name.
    adapted = [
        m.get_param() if hasattr(m, "get_param") else m.base_layer.weight
        for m in model.modules()
        if hasattr(m, "base_layer")
    ]
    generator = torch.Generator().manual_seed(0)
    for weight in adapted or [p for p in model.parameters() if p.ndim >= 2]:
        jitter(weight, dtype, generator)


@torch.no_grad()
def jitter(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Move a float32 weight, in place, by a random amount within half its last place in ``dtype``."""
    last_place = torch.exp2(torch.floor(torch.log2(weight.abs().clamp(min=1e-30)))) * torch.finfo(dtype).eps
    weight += (torch.rand(weight.shape, generator=generator).to(weight.device) - 0.5) * last_place


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[str, float]:
    """Mean and greatest |Δ log-probability| over likely tokens, and mean KL divergence.

    Tokens that neither model would say are left out: their log-probabilities are large, noisy and of no consequence.
    """
    total, count, greatest, kl, positions, same = 0.0, 0, 0.0, 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        likely = likely_tokens(a, b)
        differences = (a - b).abs()[likely]
        total += float(differences.sum())
        count += len(differences)
        greatest = max(greatest, float(differences.max()))
        kl += float((a.exp() * (a - b)).sum())
        positions += len(a)
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return {"mean": total / count, "max": greatest, "kl": max(0.0, kl / positions), "same_top": same / positions}


def likely_tokens(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of ``[L, V]`` log-probabilities of two models, which tokens either would say: with 1e-4 and above, and whatever
    is likeliest at its place."""
    most = torch.maximum(a, b)
    return most >= most.amax(-1, keepdim=True).clamp(max=_LIKELY)


def _flipped(ours: list[torch.Tensor], theirs: list[torch.Tensor], bound: float) -> int:
    """Positions whose likeliest token changes although it led by more than the bound."""
    count = 0
    for a, b in zip(ours, theirs, strict=True):
        top = a.topk(2, -1).values
        sure = top[:, 0] - top[:, 1] > 2 * bound
        count += int((sure & (a.argmax(-1) != b.argmax(-1))).sum())
    return count


def render_parity(report: ParityReport) -> Table:
    """The report as a table."""
    table = Table(title=f"parity: {report.name}, {report.prompts} prompts", title_justify="left")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for key, value in report.numbers.items():
        table.add_row(key.replace("_", " "), f"{value:.4g}")
    verdict = Text("passed", style="green") if report.passed else Text("; ".join(report.reasons), style="red")
    table.add_row("verdict", verdict)
    return table
