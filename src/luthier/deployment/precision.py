"""The parity gate for quantised models.

Rounding to 8 or 4 bits moves a model farther than any mistake that a gate is there to find, so no bound on the answers
alone tells the two apart. Four questions do, each with its own yardstick:

1. Are the layers that should be packed packed, and no others?
2. Is each packed matrix what rounding to nearest makes of the reference's, and is every other parameter the reference's
   own? Rounding is worked out here from its definition, by no library's kernels.
3. Does the candidate compute what its weights say? They are unpacked into a float copy of the reference, whose answers
   it must give but for the rounding of activations, which the copy itself is measured to have.
4. Is what was learnt still there? The copy must lie nearer to the tuned model than the base does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
from luthier.deployment.tokens import limit_of, stops_missing, token_ids, tokens_differ
from luthier.errors import UserError
from luthier.models.heads import Head
from luthier.models.packed import Packing, is_packed, multiplied_in, packed_layers, plain_weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How many times farther than rounding to nearest a packed matrix may lie from its own. Means over the layers: 1.00 for
# all kinds on a random model in float32, 1.02 for SmolLM2 in int8. A scale a tenth short adds 0.1 of the weights' size
# at a right angle to rounding's 0.092 (nf4) and 0.095 (int4) there: about 1.5 times.
_ROUNDING = 1.15


def layers_to_pack(model: Any, packing: Packing) -> tuple[list[str], list[str]]:
    """Names of the linear layers that are packed, and of those whose rows cannot be cut into blocks; not of the output
    head, which mostly shares the embeddings' matrix."""
    head = model.get_output_embeddings()
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    packed = [name for name, layer in linear.items() if packing.fits(layer)]
    return packed, [name for name in linear if name not in packed]


def check_packed(
    reference: Any,
    candidate: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    packing: Packing,
    *,
    base: Any | None = None,
    candidate_tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "quantised",
) -> ParityReport:
    """Compare a quantised model, loaded as any user would, with the model it was made from.

    Args:
        reference: the model that was tested, plain, in float32.
        candidate: the model to hand over.
        tokenizer: the reference's tokenizer.
        prompts: rendered texts.
        packing: how the candidate is meant to be stored.
        base: the untuned model, or a PEFT model whose adapter is switched off to get it.
        candidate_tokenizer: the tokenizer that travels with the candidate.
        name: of the hand-over, for the report.

    Returns:
        the report; ``require`` raises where it fails. Its numbers are ``weights_apart`` and ``weights_rounding`` (mean
        ‖W packed - W‖ / ‖W‖ over the layers, and the same for rounding to nearest), ``candidate_*`` (candidate to its
        own weights in float32), ``noise_*`` (what the rounding of activations explains of that), ``precision_*`` (those
        weights to the reference: the price of the precision) and ``tuning_mean`` (reference to its base).
    """
    if not prompts:
        raise UserError("the parity gate has no prompt to ask", remedy="give at least one row")
    travelled = candidate_tokenizer if candidate_tokenizer is not None else tokenizer
    limit = limit_of(reference, tokenizer)
    reasons = tokens_differ(tokenizer, travelled, prompts, limit, targets=False)
    reasons += stops_missing(candidate, travelled, Head.of(reference))
    numbers: dict[str, float] = {}
    wrong = _wrong_layers(reference, candidate, packing) or _wrong_weights(reference, candidate, packing, numbers)
    if wrong:
        return ParityReport(name, False, [*reasons, *wrong], numbers, len(prompts))
    ids = token_ids(tokenizer, prompts, limit)
    unpacked = _unpacked(reference, candidate)
    ours = [log_probabilities(reference, i) for i in ids]
    kept = [log_probabilities(unpacked, i) for i in ids]
    theirs = [log_probabilities(candidate, i) for i in ids]
    # The copy in the precision of the candidate's own products.
    coarse = unpacked.to(multiplied_in(candidate))
    noise = distance(kept, [log_probabilities(coarse, i) for i in ids])
    del unpacked, coarse
    apart, price = distance(kept, theirs), distance(ours, kept)
    for label, measured in (("candidate", apart), ("noise", noise), ("precision", price)):
        numbers |= {f"{label}_{k}": v for k, v in measured.items()}
    for key in ("mean", "kl"):
        # A divergence grows with the square of the difference.
        bound = (MULTIPLE if key == "mean" else MULTIPLE**2) * max(noise[key], FLOOR[key])
        if not apart[key] <= bound:
            reasons.append(
                f"{NAMES[key]} between it and its own weights in float32 is {apart[key]:.3g}; the rounding of "
                f"activations explains {bound:.3g}"
            )
    if base is not None:
        reasons += _lost_in_precision(base, ids, ours, theirs, numbers)
    return ParityReport(name, not reasons, reasons, numbers, len(prompts))


def _wrong_layers(reference: Any, candidate: Any, packing: Packing) -> list[str]:
    wanted, found = set(layers_to_pack(reference, packing)[0]), set(packed_layers(candidate))
    reasons = []
    for names, told in ((wanted - found, "is not quantised"), (found - wanted, "is quantised and should not be")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            reasons.append(f"the layer {min(names)}{more} {told}")
    return reasons


@torch.no_grad()
def _wrong_weights(reference: Any, candidate: Any, packing: Packing, numbers: dict[str, float]) -> list[str]:
    """Parameters that are not what they should be; the mean distances go to ``numbers``."""
    apart, rounding, reasons = [], [], []
    for name, layer in packed_layers(candidate).items():
        weight = reference.get_submodule(name).weight.float()
        size = float(weight.norm()) or 1.0
        apart.append(float((plain_weight(layer) - weight).norm()) / size)
        rounding.append(float((packing.rounded(weight.to(candidate.dtype)) - weight).norm()) / size)
        if not apart[-1] <= _ROUNDING * rounding[-1] + 1e-6:
            reasons.append(
                f"the weights of {name} lie {apart[-1]:.3g} of their size from the tuned ones, where rounding to "
                f"nearest would leave {rounding[-1]:.3g}"
            )
    numbers["weights_apart"], numbers["weights_rounding"] = (sum(v) / len(v) for v in (apart, rounding))
    plain = {n: p for n, p in candidate.named_parameters() if not is_packed(p)}
    for name, parameter in plain.items():
        if not torch.equal(parameter, reference.get_parameter(name).to(parameter.dtype)):
            reasons.append(f"{name}, which is not quantised, is not the tuned model's")
    return reasons if len(reasons) < 4 else [*reasons[:3], f"and {len(reasons) - 3} more parameters"]


@torch.no_grad()
def _unpacked(reference: Any, candidate: Any) -> Any:
    """A float32 copy of the reference with the candidate's weights: packed ones unpacked, the others rounded."""
    made = copy.deepcopy(reference).to(candidate.dtype).float()
    for name, layer in packed_layers(candidate).items():
        made.get_submodule(name).weight.copy_(plain_weight(layer))
    return made


def _lost_in_precision(
    base: Any,
    ids: Sequence[Sequence[int]],
    ours: list[torch.Tensor],
    theirs: list[torch.Tensor],
    numbers: dict[str, float],
) -> list[str]:
    untouched = base_log_probabilities(base, ids)
    # Tokens that were added in training are none of the base's.
    rows = min(ours[0].shape[-1], untouched[0].shape[-1])
    moved, from_tuned = (
        distance([a[:, :rows] for a in ours], [b[:, :rows] for b in others])["mean"] for others in (untouched, theirs)
    )
    numbers["tuning_mean"] = moved
    if moved == 0:
        return ["the tuned model does not differ from its base: nothing was learnt, or the adapter is off"]
    if not moved > from_tuned:
        return [
            f"it lies as far from the tuned model ({from_tuned:.3g}) as the base does ({moved:.3g}): what was learnt "
            "is lost in its precision"
        ]
    return []
