"""AdamW whose weights, gradients and moments are float32, whatever precision the model computes in.

A bfloat16 weight of 0.04 moves in steps of 0.0002, so that updates of that size (a LoRA at a learning rate of 2e-4)
are lost or doubled by rounding. The float32 masters keep them; the model gets their rounded copy. What this costs and
gains was measured: docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from luthier.training.fused.kernels import Kernels, load


class MasterAdamW:
    """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) over float32 masters of a model's trained parameters.

    The gradient of a step's first backward pass is kept as the model made it; those of further ones are added to it in
    float32. On CPUs with bfloat16 instructions a step is one pass over memory: gradient scaled, moments, master and the
    model's rounded copy (`fused/kernels.cpp`); elsewhere it is PyTorch's own fused AdamW.

    Args:
        parameters: trained parameters by name.
        weight_decay: applies to matrices; norms, biases and other vectors never decay.
        rates: factors of the learning rate by parameter name; 1 where there is none.
        one_pass: False: PyTorch's AdamW in any case.
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
        rates: Mapping[str, float] | None = None,
        one_pass: bool = True,
        add_squares: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.parameters = parameters
        self._add_squares = add_squares
        self.masters = {
            name: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
            for name, p in parameters.items()
        }
        groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
        for name, master in self.masters.items():
            groups.setdefault((master.ndim < 2, (rates or {}).get(name, 1.0)), []).append(master)
        self.adamw = torch.optim.AdamW(
            [
                {"params": members, "weight_decay": 0.0 if vectors else weight_decay, "factor": factor}
                for (vectors, factor), members in sorted(groups.items(), key=lambda group: group[0])
            ],
            lr=lr,
            betas=betas,
            eps=eps,
            fused=all(m.device.type in ("cpu", "cuda") for m in self.masters.values()),
        )
        self._kernels = _kernels_for(parameters, self.masters) if one_pass else None
        # First gradients in the model's precision, by name; and the factor that clipping found for this step's.
        self._first: dict[str, torch.Tensor] = {}
        self._times = 1.0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._collector(name))
            for name, parameter in parameters.items()
            if self.masters[name] is not parameter
        ]

    def _collector(self, name: str):  # type: ignore[no-untyped-def]
        master = self.masters[name]

        def collect(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if master.grad is not None:
                master.grad += gradient
            elif name in self._first:
                master.grad = self._first.pop(name).float().add_(gradient)
            else:
                self._first[name] = gradient

        return collect

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Float32 gradients so far; a parameter that got none has zeros (every process must hold the same list)."""
        for name, master in self.masters.items():
            if name in self._first:
                master.grad = self._first.pop(name).float()
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def _as_they_are(self) -> dict[str, torch.Tensor]:
        """Gradients by name, in the precision they have; those that there are."""
        found = {name: self._first.get(name, master.grad) for name, master in self.masters.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Have the next step scale the gradients down to ``max_norm`` (0: never); returns their norm before."""
        gradients = list(self._as_they_are().values())
        norms = torch._foreach_norm(gradients, 2, torch.float32) if gradients else [torch.zeros(())]
        total = torch.stack(list(norms)).norm()
        norm = float(total if self._add_squares is None else self._add_squares(total.square()).sqrt())
        self._times = max_norm / (norm + 1e-6) if 0 < max_norm < norm and math.isfinite(norm) else 1.0
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at the learning rate ``lr``; gradients are cleared."""
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["factor"]
        if self._kernels is not None:
            self._step_in_one_pass(self._kernels)
        else:
            gradients = self.gradients
            if self._times != 1.0:
                torch._foreach_mul_(gradients, self._times)
            self.adamw.step()
            self.publish()
        self.adamw.zero_grad(set_to_none=True)
        self._first.clear()
        self._times = 1.0

    def _step_in_one_pass(self, kernels: Kernels) -> None:
        names = {id(master): name for name, master in self.masters.items()}
        gradients = self._as_they_are()
        for group in self.adamw.param_groups:
            for master in group["params"]:
                name = names[id(master)]
                state = self.adamw.state[master]
                if not state:
                    state |= {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(master),
                        "exp_avg_sq": torch.zeros_like(master),
                    }
                state["step"] += 1
                gradient = gradients.get(name)
                parameter = self.parameters[name]
                kernels.adamw_(
                    *(master, state["exp_avg"], state["exp_avg_sq"]),
                    torch.zeros_like(master) if gradient is None else gradient.contiguous(),
                    None if parameter is master else parameter,
                    step=int(state["step"]),
                    **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")},
                    times=self._times,
                )

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


def _kernels_for(parameters: dict[str, torch.nn.Parameter], masters: dict[str, torch.nn.Parameter]) -> Kernels | None:
    """The kernels, where every parameter is a plain one that they can take."""
    plain = all(
        t.device.type == "cpu" and type(t) is torch.nn.Parameter and t.is_contiguous() and t.dtype in dtypes
        for tensors, dtypes in ((parameters, (torch.bfloat16, torch.float32)), (masters, (torch.float32,)))
        for t in tensors.values()
    )
    return load() if plain else None


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
