"""AdamW whose weights, gradients and moments are float32, whatever precision the model computes in.

A bfloat16 weight of 0.04 moves in steps of 0.0002, so that updates of that size (a LoRA at a learning rate of 2e-4)
are lost or doubled by rounding. The float32 masters keep them; the model gets their rounded copy. What this costs and
gains was measured: docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


class MasterAdamW:
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) over float32 masters of a model's trained parameters.

    Gradients are moved into the masters' as soon as the backward pass has made them, so that those of several
    forward passes add up in float32 and the model's own are freed at once.

    Args:
        parameters: trained parameters by name.
        weight_decay: applies to matrices; norms, biases and other vectors never decay.
        add_squares: adds up the squared norm over processes that hold other parameters; None: these are all.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        add_squares: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.parameters = parameters
        self._add_squares = add_squares
        self.masters = {
            name: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
            for name, p in parameters.items()
        }
        matrices = [m for m in self.masters.values() if m.ndim >= 2]
        vectors = [m for m in self.masters.values() if m.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=lr,
            betas=betas,
            eps=eps,
            fused=all(m.device.type in ("cpu", "cuda") for m in matrices),
        )
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._collector(self.masters[name]))
            for name, parameter in parameters.items()
            if self.masters[name] is not parameter
        ]

    @staticmethod
    def _collector(master: torch.nn.Parameter):  # type: ignore[no-untyped-def]
        def collect(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        return collect

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Float32 gradients so far; a parameter that got none has zeros (every process must hold the same list)."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [m.grad for m in self.masters.values() if m.grad is not None]

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Scale the gradients down to ``max_norm`` (0: never); returns their norm before."""
        total = torch.stack(torch._foreach_norm(self.gradients)).norm()
        norm = float(total if self._add_squares is None else self._add_squares(total.square()).sqrt())
        if 0 < max_norm < norm and math.isfinite(norm):
            torch._foreach_mul_(self.gradients, max_norm / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at the learning rate ``lr``; gradients are cleared."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the masters' values."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter:
                parameter.copy_(master)

    def close(self) -> None:
        """Let go of the model's parameters."""
        for hook in self._hooks:
            hook.remove()

    def weights(self) -> dict[str, torch.Tensor]:
        """The masters, float32, by parameter name."""
        return {name: m.detach() for name, m in self.masters.items()}

    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's state as named tensors: ``NAME/exp_avg``, ``NAME/exp_avg_sq``, ``NAME/step``."""
        state = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                state[f"{name}/{key}"] = torch.as_tensor(value)
        return state

    @torch.no_grad()
    def restore(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor] | None = None) -> None:
        """Take up saved masters and, where given, the optimiser's state.

        Raises:
            ValueError: the names or shapes are those of another model or method.
        """
        if weights.keys() != self.masters.keys():
            odd = sorted(weights.keys() ^ self.masters.keys())[0]
            raise ValueError(f"other parameters are trained now than were saved: {odd}")
        for name, master in self.masters.items():
            if weights[name].shape != master.shape:
                raise ValueError(f"{name} has shape {tuple(master.shape)}, saved was {tuple(weights[name].shape)}")
            master.copy_(weights[name])
        if moments is not None:
            self.adamw.state.clear()
            for key, value in moments.items():
                name, _, field = key.rpartition("/")
                master = self.masters[name]
                # AdamW's fused step wants its counter where the weights are.
                self.adamw.state[master][field] = value.to(master.device, copy=True)
        self.publish()


def learning_rate_factor(kind: str, step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at optimiser step ``step`` (from 0): linear warm-up, then the schedule.

    Step s of a warm-up of w steps has (s + 1) / (w + 1) of the peak; transformers' schedules have s / w, so that
    their first step trains nothing.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if kind == "linear":
        return max(0.0, 1 - done)
    return 1.0
