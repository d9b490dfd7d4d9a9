"""Two mixtures of experts are compared with every token at the same experts.

A router takes the likeliest experts. Where two are nearly as likely, rounding a weight anywhere before it sends a token
elsewhere, and all that comes after differs by far more than rounding: of tiny Mixtrals that were merged rightly, two of
ten lay 2.8 times as far from their reference as rounding explained. So the candidate's tokens go where the reference's
went. Only those that would have gone elsewhere are led, and they are counted: the rest of the router's work is its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

# Choices that a right candidate may make otherwise: those that rounding makes otherwise, so many times, and a share.
_TIMES, _SHARE = 3, 0.05


@dataclass(slots=True)
class Detours:
    """Of the choices of experts in one model's answers, how many were other ones than the reference's."""

    choices: int = 0
    """One for each token and router."""
    other: int = 0

    @property
    def share(self) -> float:
        return self.other / self.choices if self.choices else 0.0

    def too_many(self, by_rounding: Detours) -> bool:
        """Whether they are more than rounding explains, which made some too."""
        return self.other > _TIMES * by_rounding.other + _SHARE * self.choices


@dataclass(slots=True)
class Routing:
    """Where a reference sends its tokens, call by call; empty for a model without routers."""

    _calls: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    @contextlib.contextmanager
    def recorded(self, model: Any) -> Iterator[None]:
        """Take down where a model's tokens go."""

        def record(_: torch.nn.Module, __: Any, output: Any) -> None:
            if _experts(output) is not None:
                self._calls.append(tuple(output))

        with _hooked(model, record):
            yield

    @contextlib.contextmanager
    def followed(self, model: Any) -> Iterator[Detours]:
        """Send a model's tokens, of the same texts in the same order, where the reference's went."""
        left, found = iter(self._calls), Detours()

        def lead(_: torch.nn.Module, __: Any, output: Any) -> Any:
            own = _experts(output)
            if own is None:
                return None
            said = next(left)
            wanted = _experts(said)
            assert wanted is not None
            elsewhere = (own.sort(-1).values != wanted.sort(-1).values).any(-1)  # [N]
            found.choices += len(elsewhere)
            found.other += int(elsewhere.sum())
            return tuple(
                torch.where(elsewhere.view(-1, *[1] * (mine.ndim - 1)), theirs.to(mine.dtype), mine)
                for mine, theirs in zip(output, said, strict=True)
            )

        with _hooked(model, lead):
            yield found


def _experts(output: Any) -> torch.Tensor | None:
    """Of what a router gives, ``[N, k] int64``: the experts of each token; None: it is no router of tokens."""
    if not isinstance(output, tuple) or not all(isinstance(t, torch.Tensor) for t in output):
        return None
    if len({len(t) for t in output}) != 1:
        return None
    return next((t for t in output if t.ndim == 2 and not t.is_floating_point()), None)


@contextlib.contextmanager
def _hooked(model: Any, hook: Any) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        for router in _routers(model):
            held.callback(router.register_forward_hook(hook).remove)
        yield


def _routers(model: Any) -> list[torch.nn.Module]:
    """The modules that transformers' models name as their routers."""
    recorders = [
        recorder
        for module in model.modules()
        for name, recorder in (getattr(module, "_can_record_outputs", None) or {}).items()
        if name == "router_logits"
    ]
    kinds = {kind for kind in (getattr(r, "target_class", r) for r in recorders) if isinstance(kind, type)}
    modules: list[torch.nn.Module] = list(model.modules())
    return [module for module in modules if isinstance(module, tuple(kinds))]
