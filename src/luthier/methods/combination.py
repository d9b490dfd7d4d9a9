"""Updates of several adapters become one: the weighted sum, TIES and DARE, on whole updates ΔW of a layer.

- ``linear``: Σ wᵢ·ΔWᵢ, task arithmetic (Ilharco et al., 2023, arXiv:2212.04089).
- ``ties``: of each ΔWᵢ the largest entries stay; of each entry the sign that the sum of what stays has is elected; the
  mean of the wᵢ·ΔWᵢ that agree with it (Yadav et al., 2023, arXiv:2306.01708; equal weights w are the paper's λ = w).
- ``dare_linear``, ``dare_ties``: entries of each ΔWᵢ are dropped at random and the others divided by the share that
  stays (Yu et al., 2024, arXiv:2311.03099); then as above, without choosing by size.

Entries are computed by ``peft.utils.merge_utils``. PEFT's ``add_weighted_adapter`` is not used: its ``linear``,
``ties`` and ``dare_*`` combine the factors A and B apart, so that the result holds products of one adapter's B with the
other's A and is not the sum of what they do; with ``use_rslora`` PEFT 0.21 gives √rank times the right result in every
type; and it leaves out layers that the first adapter's ``layers_to_transform`` does not name.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from luthier.errors import UserError
from luthier.methods.base import peft_warnings_apart

CombinationType = Literal["linear", "ties", "dare_linear", "dare_ties"]
_DENSITY = 0.5


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to the weight of one layer: ``b @ a``, ``[out, in]``."""

    b: torch.Tensor
    """``[out, r] float32``"""
    a: torch.Tensor
    """``[r, in] float32``"""

    @property
    def rank(self) -> int:
        """The number of columns of b, which the rank of the product does not pass."""
        return len(self.a)

    def whole(self) -> torch.Tensor:
        """``[out, in]``: ΔW."""
        return self.b @ self.a


@dataclass(frozen=True, slots=True)
class Combination:
    """How adapters are combined.

    Args:
        weights: of each adapter, by name; negative: what it has learnt is taken away.
        combination_type: ``linear``, ``ties``, ``dare_linear`` or ``dare_ties``.
        density: share of entries of each update that stays; None: half of them. Not with ``linear``.
        rank: of the result; None: the sum of the parts' ranks, which loses nothing of ``linear``; ``full``: what loses
            nothing of any type.
        seed: of what DARE drops; None: 0. Only with ``dare_linear`` and ``dare_ties``.

    Raises:
        UserError: a value that cannot be used, or would change nothing.
    """

    weights: Mapping[str, float]
    combination_type: CombinationType = "linear"
    density: float | None = None
    rank: int | Literal["full"] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        kind = self.combination_type
        if kind not in (known := get_args(CombinationType)):
            raise UserError(
                f"unknown combination {kind!r}", where="combination_type", remedy=f"known: {', '.join(known)}"
            )
        for name, weight in self.weights.items():
            if not math.isfinite(weight) or weight == 0:
                raise UserError(
                    f"the weight of {name!r} is {weight}",
                    where="weights",
                    remedy="give a number that is not 0, or leave the adapter out",
                )
        if not self.weights:
            raise UserError("no adapter is to be combined", where="weights", remedy="name at least one")
        if self.density is not None and kind == "linear":
            raise UserError("linear drops no entries", where="density", remedy="leave it out, or use ties or dare_ties")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(
                f"density is {self.density}", where="density", remedy="give a share above 0 and up to 1, such as 0.5"
            )
        if self.seed is not None and not self.drops:
            raise UserError(f"{kind} draws nothing at random", where="seed", remedy="leave it out, or use dare_linear")
        if self.rank is not None and self.rank != "full" and self.rank < 1:
            raise UserError(f"rank is {self.rank}", where="rank", remedy="give 1 or more, or full")

    @property
    def drops(self) -> bool:
        """Whether entries are dropped at random."""
        return self.combination_type.startswith("dare")

    def whole(self, updates: Mapping[str, Update]) -> torch.Tensor:
        """``[out, in] float32``: what the combination adds to a layer's weight.

        DARE draws from torch's generator of the CPU; who calls has seeded it.

        Args:
            updates: of the adapters that have one for the layer, by name.
        """
        from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties

        # TIES elects signs before weights count. What is taken away votes as such.
        signed = [update.whole() * math.copysign(1.0, self.weights[name]) for name, update in updates.items()]
        weights = torch.tensor([abs(self.weights[name]) for name in updates], dtype=torch.float32)
        if self.combination_type == "linear":
            return task_arithmetic(signed, weights)
        combine = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties}[self.combination_type]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The density")  # all of them stay where it is 1
            return combine(signed, weights, _DENSITY if self.density is None else self.density)

    def factors(self, whole: torch.Tensor, updates: Mapping[str, Update]) -> Update:
        """The combination of a layer as a product of two matrices, as near to it as its rank allows.

        Args:
            whole: what :meth:`whole` gives of the same updates.
            updates: see there.
        """
        ranks = sum(update.rank for update in updates.values())
        full = min(whole.shape)
        rank = min(full, ranks if self.rank is None else full if self.rank == "full" else self.rank)
        if self.combination_type == "linear" and rank >= min(full, ranks):
            if ranks < full:
                # [w₁·B₁ w₂·B₂] · [A₁; A₂]
                columns = [self.weights[name] * update.b for name, update in updates.items()]
                return Update(torch.cat(columns, 1), torch.cat([update.a for update in updates.values()]))
            rank = full
        return factored(whole, rank)


def factored(whole: torch.Tensor, rank: int) -> Update:
    """The product of that rank that is nearest to a matrix, by the sum of squares (Eckart and Young, 1936)."""
    if rank >= min(whole.shape):
        out, inner = whole.shape
        return Update(whole, torch.eye(inner)) if inner <= out else Update(torch.eye(out), whole)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    return Update(u[:, :rank] * s[:rank], v[:rank])


@dataclass(slots=True)
class Account:
    """Sums of squares over all layers, from which distances between updates are told."""

    wanted: float = 0.0
    lost: float = 0.0
    own: float = 0.0
    parts: dict[str, tuple[float, float, float]] | None = None
    """Of each adapter: ‖ΔWᵢ‖², ‖ΔW − ΔWᵢ‖² and ⟨ΔW, ΔWᵢ⟩."""

    def add(self, wanted: torch.Tensor, got: torch.Tensor, parts: Mapping[str, Update], names: Sequence[str]) -> None:
        """Count one layer.

        Args:
            wanted: ``[out, in]`` what the combination adds.
            got: ``[out, in]`` what the new adapter adds, as it is held.
            parts: of the adapters that have an update for the layer.
            names: of all adapters.
        """
        self.wanted += _square(wanted)
        self.lost += _square(wanted - got)
        self.own += _square(got)
        self.parts = self.parts or dict.fromkeys(names, (0.0, 0.0, 0.0))
        for name in names:
            part = parts[name].whole() if name in parts else torch.zeros_like(got)
            new = (_square(part), _square(got - part), float((got * part).sum(dtype=torch.float64)))
            size, apart, dot = (a + b for a, b in zip(self.parts[name], new, strict=True))
            self.parts[name] = (size, apart, dot)

    def share_lost(self) -> float:
        """‖ΔW wanted − ΔW of the adapter‖ / ‖ΔW wanted‖ (Frobenius, over all layers)."""
        return math.sqrt(self.lost / self.wanted) if self.wanted else 0.0

    def of_part(self, name: str) -> tuple[float, float]:
        """``(distance, cosine)`` of the combined update and one adapter's: ‖ΔW − ΔWᵢ‖ / ‖ΔWᵢ‖, and of the angle."""
        size, apart, dot = (self.parts or {})[name]
        return (math.sqrt(apart / size), dot / math.sqrt(size * self.own)) if size and self.own else (math.nan, 0.0)


def add_combined(model: Any, combination: Combination, adapter_name: str) -> Account:
    """Add the combination of a model's LoRA adapters to it, as one more LoRA adapter; it isn't switched to.

    Args:
        model: a PEFT model.
        combination: of adapters that :func:`require_combinable` lets through.
        adapter_name: of the new one.
    """
    names = list(combination.weights)
    account, made = Account(), {}
    # Other draws of the process go on as if nothing had been drawn here; PEFT draws where it makes an adapter.
    with peft_warnings_apart(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(combination.seed or 0)
        for layer, updates in _updates(model, names).items():
            whole = combination.whole(updates)
            factors = combination.factors(whole, updates)
            dtype = _matrices(model.get_base_model().get_submodule(layer), next(iter(updates)))[0].dtype
            made[layer] = Update(factors.b.to(dtype), factors.a.to(dtype))
            held = Update(made[layer].b.float(), made[layer].a.float())
            account.add(whole, held.whole(), updates, names)
        config = _config([model.peft_config[name] for name in names], {n: u.rank for n, u in made.items()})
        model.add_adapter(adapter_name, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for layer, update in made.items():
            b, a = _matrices(model.get_base_model().get_submodule(layer), adapter_name)
            b.copy_(update.b)
            a.copy_(update.a)
    return account


def require_combinable(configs: Mapping[str, Any]) -> None:
    """Refuse adapters that have more than an update of weights, or none.

    Args:
        configs: of PEFT, by the adapters' names.

    Raises:
        UserError: an adapter's is of such a kind; the message says of which.
    """
    from peft import PeftType

    for name, config in configs.items():
        more = next((what for field, what in _MORE.items() if getattr(config, field, None)), None)
        if config.peft_type is not PeftType.LORA:
            more = "of the method " + config.peft_type.value.lower()
        elif config.bias != "none":
            more = "trained with the biases of the base"
        if more is not None:
            raise UserError(
                f"the adapter {name!r} cannot be combined: it is {more}, and only updates B·A of weights add up",
                remedy="switch between the adapters, or train it as a plain LoRA (method.name=lora)",
            )


_MORE = {
    "use_dora": "a DoRA, whose magnitudes are no sum",
    "modules_to_save": "trained with whole layers (modules_to_save)",
    "trainable_token_indices": "trained with embeddings of tokens (model.added_tokens)",
    "lora_bias": "trained with biases",
    "target_parameters": "an update of bare parameters",
    "layer_replication": "on a base whose layers are repeated",
    "alora_invocation_tokens": "an activated LoRA, which is not on at every token",
}


def _config(parts: Sequence[Any], ranks: Mapping[str, int]) -> Any:
    """The LoRA whose update is B·A itself: alpha is the rank in every layer."""
    from peft import LoraConfig

    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {layer: rank for layer, rank in ranks.items() if rank != common}
    return LoraConfig(
        task_type=parts[0].task_type,
        base_model_name_or_path=parts[0].base_model_name_or_path,
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        fan_in_fan_out=any(part.fan_in_fan_out for part in parts),
        inference_mode=True,
    )


def _updates(model: Any, names: Sequence[str]) -> dict[str, dict[str, Update]]:
    """What the adapters add to each layer, by the layer's name in the base and the adapter's; in the model's order."""
    found: dict[str, dict[str, Update]] = {}
    for layer, module in model.get_base_model().named_modules():
        for name in names:
            if hasattr(module, "lora_A") and (name in module.lora_A or name in module.lora_embedding_A):
                b, a = (matrix.detach().cpu().float() for matrix in _matrices(module, name))
                found.setdefault(layer, {})[name] = Update(b * module.scaling[name], a)
    return found


def _matrices(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``B [out, r]`` and ``A [r, in]`` of an adapter in a layer; of an embedding, ``in`` is the vocabulary."""
    if name in module.lora_A:
        return module.lora_B[name].weight, module.lora_A[name].weight
    return module.lora_embedding_B[name], module.lora_embedding_A[name]


def _square(matrix: torch.Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))
