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

from luthier.data.render import RenderError, end_of_turn_ids, template_text
from luthier.errors import UserError
from luthier.models.heads import Head
from luthier.models.loading import context_of
from luthier.models.quantized import unpacked
from luthier.models.virtual import own_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many times the measured rounding a candidate may differ. Honest merges of SmolLM2 in bfloat16 came to 0.8 to 1.1
# times; one layer forgotten of thirty to 1.8 and more, a scale a tenth short to 2.5 (tests/deployment).
MULTIPLE = 1.5
# Rounding in float32 itself, where sums are taken in another order: mean |Δ log-probability| and KL divergence.
FLOOR = {"mean": 2e-4, "kl": 1e-6, "max": 5e-2}
# The share of the trained change that a merge of a quantised base may miss beside its rounding, and at most. SmolLM2 in
# 4 bits, tuned for 3 and 30 steps in float32: right merges 1e-5 and less, one layer of thirty left out 0.12 and 0.04,
# the scale a tenth short 0.09 and 0.10, half of it 0.49 and 0.59, nothing 1, the wrong sign 1.9 and 1.1.
APART, MOST_APART = 0.02, 0.5
_TOKENS = 512
_LIKELY = -9.2  # log 1e-4

_TURNS = [
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "It is 42.\n\n  是的。 🙂"},
    {"role": "user", "content": "Why?"},
]


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
    base was quantised, what :func:`weigh_merge` measures."""
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
    ours = [log_probabilities(fine, i) for i in ids]
    untouched = None if base is None else base_log_probabilities(fine if base is reference else base, ids)
    _jitter(fine, next(candidate.parameters()).dtype)
    jittered = [log_probabilities(fine, i) for i in ids]
    del fine
    theirs = [log_probabilities(copy.deepcopy(candidate).float(), i) for i in ids]
    return judge(name, len(prompts), reasons, ours, jittered, theirs, untouched)


def left_behind(
    head: Head,
    candidate: Any,
    tokenizer: PreTrainedTokenizerBase,
    travelled: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    limit: int | None,
) -> list[str]:
    """What should have travelled with a candidate beside its weights and has not, in words.

    Args:
        head: the reference's.
        candidate: the model to hand over; its weights are not looked at.
        tokenizer: the reference's.
        travelled: the candidate's.
        prompts: rendered texts.
        limit: see :func:`limit_of`.
    """
    reasons = tokens_differ(tokenizer, travelled, prompts, limit, targets=head.pairs)
    if head.writes or head.pairs:
        reasons += stops_missing(candidate, travelled, head)
    if Head.of(candidate).classes != head.classes:
        reasons.append("the classes' names or numbers were lost")
    return reasons


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
        likely = _likely(a, b)
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


def limit_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Up to how many tokens a model that does not write reads texts here; None: it writes, and reads prompts."""
    if Head.of(model).writes:
        return None
    return min(_TOKENS, context_of(model.config, tokenizer) or _TOKENS)


def token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int | None) -> list[list[int]]:
    """Token ids of the prompts. A rendered prompt holds its control tokens; other texts get the tokenizer's own."""
    if limit is None:
        return [tokenizer(p, add_special_tokens=False).input_ids[-_TOKENS:] for p in prompts]
    # Rows that were cut in training come whole.
    return [tokenizer(p, truncation=True, max_length=limit).input_ids for p in prompts]


def tokens_differ(
    tokenizer: PreTrainedTokenizerBase,
    travelled: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    limit: int | None,
    *,
    targets: bool,
) -> list[str]:
    """Whether prompts and conversations give other tokens, or other texts, on the other side."""
    if travelled is tokenizer:
        return []
    reasons = []
    if limit is None and not travelled.chat_template:
        return ["the chat template was lost"]
    for prompt in prompts:
        ids = [token_ids(t, [prompt], limit) for t in (tokenizer, travelled)]
        if ids[0] != ids[1]:
            reasons.append("the tokenizer gives other tokens for the same text")
            break
    if targets:
        ids = [t(text_target=list(prompts))["input_ids"] for t in (tokenizer, travelled)]
        if ids[0] != ids[1]:
            reasons.append("the tokenizer gives other tokens for the same target")
    if limit is not None:
        return reasons
    for turns in (_TURNS[:1], _TURNS):
        texts = []
        for t in (tokenizer, travelled):
            try:
                texts.append(template_text(t, turns, add_generation_prompt=True))
            except RenderError as error:
                texts.append(str(error))
        if texts[0] != texts[1]:
            reasons.append("the chat template renders another text")
            break
    return reasons


def stops_missing(candidate: Any, tokenizer: PreTrainedTokenizerBase, head: Head) -> list[str]:
    """Whether a model's own generation config does not stop where an answer ends."""
    eos = getattr(candidate.generation_config, "eos_token_id", None)
    known = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    ends = end_of_turn_ids(tokenizer) if head.writes else [tokenizer.eos_token_id]
    missing = [i for i in ends if i not in known]
    if not missing:
        return []
    names = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(missing))
    return [f"generation does not stop at {names}, which ends an answer"]


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
        likely = _likely(a, b)
        differences = (a - b).abs()[likely]
        total += float(differences.sum())
        count += len(differences)
        greatest = max(greatest, float(differences.max()))
        kl += float((a.exp() * (a - b)).sum())
        positions += len(a)
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return {"mean": total / count, "max": greatest, "kl": max(0.0, kl / positions), "same_top": same / positions}


def _likely(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
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


NAMES = {"mean": "the mean |Δ log-probability|", "kl": "the mean KL divergence"}


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
