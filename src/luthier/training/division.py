"""How the processes of a run divide the model: each holds all of it, or each holds a piece of every parameter.

In both cases each process computes the gradient of its own rows, divided by the trained tokens of the whole step, and
the gradient of the step is their sum, not their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from luthier.errors import UserError
from luthier.methods.base import trainable_parameters
from luthier.training.processes import Processes


class Division(Protocol):
    """What the training loop asks of a divided model.

    Attributes:
        parameters: what the optimiser of this process updates, by name.
        lockstep: whether every forward and backward pass must be made by all processes together.
    """

    parameters: dict[str, torch.nn.Parameter]
    lockstep: bool

    def begin_step(self, passes: int) -> None:
        """Say how many forward and backward passes the coming step has."""
        ...

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function that runs the model."""
        ...

    def add_gradients(self, gradients: Callable[[], list[torch.Tensor]]) -> None:
        """Make the gradients of ``parameters`` those of all processes' rows."""
        ...

    def add_squares(self, squares: torch.Tensor) -> torch.Tensor:
        """The sum of squares of the whole gradient, from that of this process's ``parameters``."""
        ...


class Replicas:
    """Every process holds the whole model (data parallel)."""

    lockstep = False

    def __init__(self, model: torch.nn.Module, processes: Processes) -> None:
        self.parameters = trainable_parameters(model)
        self._processes = processes

    def begin_step(self, passes: int) -> None:
        pass

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(*args, **options)

    def add_gradients(self, gradients: Callable[[], list[torch.Tensor]]) -> None:
        self._processes.add_up(gradients())

    def add_squares(self, squares: torch.Tensor) -> torch.Tensor:
        return squares


class Shards:
    """Every process holds a piece of each parameter, its gradient and its moments (ZeRO stage 3, arXiv:1910.02054).

    PyTorch's FSDP2 (``torch.distributed.fsdp.fully_shard``) gathers a layer's weights when it is about to run and lets
    go of them afterwards. Trained parameters are float32 pieces, the optimiser's masters themselves; they are gathered
    in the precision that the model computes in, and gradients are added up in float32.

    Args:
        model: wrapped by its method, whole, on the CPU or on ``device``; it is changed in place.
        processes: at least two.
        device: where the pieces go.

    Raises:
        UserError: the model has no layers to divide, or what was divided is not.
    """

    lockstep = True

    def __init__(self, model: torch.nn.Module, processes: Processes, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        dtype = next(model.parameters()).dtype
        layers = repeated_layers(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (processes.count,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
        }
        for layer in layers:
            fully_shard(layer, **settings)
        self._root = Root(model)
        fully_shard(self._root, **settings)
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                # FSDP2 takes the mean over the processes by default.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        require_sharded(model, processes.count)
        self._trained: dict[str, Any] = dict(trainable_parameters(model))
        # The local pieces, sharing memory with the model's: the optimiser needs to know nothing of the others.
        self.parameters = {n: torch.nn.Parameter(p.to_local().detach()) for n, p in self._trained.items()}
        self.shapes = {name: list(p.shape) for name, p in self._trained.items()}

    def begin_step(self, passes: int) -> None:
        pass

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """All processes must call together: their pieces are gathered on the way."""
        result = self._root(function, *args, **options)
        if not (isinstance(result, torch.Tensor) and result.requires_grad):
            # FSDP2 keeps the root's weights gathered for a backward pass. None follows, and they would be old ones
            # after a checkpoint is taken up.
            self._root.reshard()  # type: ignore[operator]
        return result

    def add_gradients(self, gradients: Callable[[], list[torch.Tensor]]) -> None:
        """The backward pass has added them up; hand over the pieces."""
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                self.parameters[name].grad = parameter.grad.to_local()
                parameter.grad = None

    def add_squares(self, squares: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(squares)
        return squares

    def whole(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """The trained parameters put together, float32, on the CPU; all processes must call.

        Args:
            keep: whether this process wants them; an empty dictionary where not.
        """
        found = {}
        for name, parameter in self._trained.items():
            full = parameter.detach().full_tensor()
            if keep:
                found[name] = full.cpu()
        return found


class Root(torch.nn.Module):
    """Runs any function of the model under FSDP's root hooks, so that parameters outside the layers (embeddings, norm,
    head) are whole for all of it: the loss takes the head's weight without calling the head."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(*args, **options)


def require_sharded(model: torch.nn.Module, count: int) -> None:
    """Refuse a model that was to be divided and is not: it would train, and take the memory of the whole.

    Raises:
        UserError: a parameter is whole on this process.
    """
    from torch.distributed.tensor import DTensor

    whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    every = sum(p.numel() for p in model.parameters())
    if whole or (count > 1 and held == every):
        raise UserError(
            f"parameters were not divided among the {count} processes: {whole[0] if whole else 'all of them'}",
            where="training.sharding",
            remedy="set training.sharding=none, and report it with the model's name",
        )


def repeated_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks of a transformers model: what it says must stay on one device."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    odd = next((n for n, p in model.named_parameters() if not p.is_floating_point()), None)
    if not layers or odd is not None:
        raise UserError(
            f"this model cannot be divided: {odd + ' is quantised' if odd else 'it names no repeated layers'}",
            where="training.sharding",
            remedy="set training.sharding=none",
        )
    return layers
