"""DeepSpeed's ZeRO, where an Accelerate configuration asks for it: optimiser, gradients and, at stage 3, weights in
pieces (arXiv:1910.02054).

DeepSpeed owns what it has divided, so its engine takes the optimiser's place as well. Rows, loss, learning rate,
checkpoints and all that is saved stay Luthier's; of the configuration, its ZeRO section counts (stage, off-loading,
bucket sizes).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from luthier.errors import UserError
from luthier.methods.base import trainable_parameters
from luthier.training.checkpoint import Checkpoints, TrainState
from luthier.training.division import Root, repeated_layers
from luthier.training.processes import Processes
from luthier.training.sharded_checkpoint import ShardedCheckpoints

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """A model divided by DeepSpeed, and the optimiser that updates it.

    It is both the division and the optimiser of the training loop (see :class:`luthier.training.division.Division` and
    :class:`luthier.training.optimiser.MasterAdamW`).

    Args:
        model: wrapped by its method, whole; it is changed in place.
        processes: at least two.
        device: where the pieces go.
        weight_decay: of matrices; vectors never decay.
        betas: AdamW's.
        eps: AdamW's.

    Raises:
        UserError: the configuration asks for what is not built, or nothing was divided.
    """

    lockstep = True

    def __init__(
        self,
        model: torch.nn.Module,
        processes: Processes,
        device: torch.device,
        *,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        import deepspeed

        self._api: Any = deepspeed
        self._processes = processes
        self._device = device
        dtype = next(model.parameters()).dtype
        config = _configuration(dtype)
        self.stage: int = config["zero_optimization"]["stage"]
        model.to(device)
        self.parameters = trainable_parameters(model)
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        whole = sum(p.numel() for p in self.parameters.values())
        root = Root(model)
        if self.stage == 3:
            layers = repeated_layers(model)
            # Whole while a layer runs, as the fused layers and the loss read weights without calling their modules.
            deepspeed.utils.set_z3_leaf_modules(root, list({type(layer) for layer in layers}))
            # Without a gradient at a layer's input it lets go of the layer's weights before the backward pass is done.
            model.get_input_embeddings().register_forward_hook(_needs_gradient)  # type: ignore[operator]
            inside = {id(p) for layer in layers for p in layer.parameters()}
            for parameter in model.parameters():
                if id(parameter) not in inside:
                    deepspeed.zero.register_external_parameter(root, parameter)
        self.engine, self._optimiser, _, _ = deepspeed.initialize(
            model=root,
            optimizer=torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=eps),
            config=config,
            dist_init_required=False,
        )
        self._require_divided(model, whole)
        self._make_state()
        self._passes = self._done = 0
        self._steps = 0

    def begin_step(self, passes: int) -> None:
        """Say how many forward and backward passes the coming step has."""
        self._passes, self._done = passes, 0

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """All processes must call together: weights are gathered on the way."""
        if torch.is_grad_enabled():
            self._done += 1
            self.engine.set_gradient_accumulation_boundary(self._done >= self._passes)
        results = []

        def run() -> Any:
            results.append(function(*args, **options))
            # Stage 3 looks for tensors in what comes out, and takes nothing but tensors.
            return results[0] if isinstance(results[0], torch.Tensor) else ()

        output = self.engine(run)
        if not isinstance(output, torch.Tensor):
            return results[0]
        # DeepSpeed takes the mean over the processes.
        return _ScaledGradient.apply(output, float(self._processes.count)) if output.requires_grad else output

    def add_gradients(self, gradients: Callable[[], list[torch.Tensor]]) -> None:
        """The backward pass has added them up."""

    def clip(self, max_norm: float) -> float:
        """Have the next step scale the gradients down to ``max_norm`` (0: never); returns their norm before."""
        total = torch.zeros((), dtype=torch.float64)
        for parameter in self.parameters.values():
            # Whole, one at a time: DeepSpeed knows its norm only when it has made the step, too late to refuse it.
            gradient = self._api.utils.safe_get_full_grad(parameter)
            if gradient is not None:
                total += gradient.float().norm().double().cpu() ** 2
        self._optimiser.clip_grad = max_norm
        return math.sqrt(float(total)) if torch.isfinite(total) else math.inf

    def step(self, lr: float) -> None:
        """One update at the learning rate ``lr``; gradients are cleared."""
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        self.engine.step()
        self._steps += 1

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights, whole, float32, on the main process; all must call."""
        get = self._api.utils.safe_get_full_fp32_param
        return self._kept({name: lambda p=p: get(p) for name, p in self.parameters.items()})

    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's state as named tensors, as :meth:`weights`."""
        get = self._api.utils.safe_get_full_optimizer_state
        calls = {f"{n}/{key}": lambda p=p, key=key: get(p, key) for n, p in self.parameters.items() for key in _MOMENTS}
        found = self._kept(calls)
        if found:
            found |= {f"{name}/step": torch.tensor(float(self._steps)) for name in self.parameters}
        return found

    def whole(self, *, keep: bool) -> dict[str, torch.Tensor]:
        """As :meth:`weights`; ``keep`` is true on the main process."""
        return self.weights()

    @torch.no_grad()
    def restore(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor] | None = None) -> None:
        """Take up whole weights and, where given, the optimiser's state; all processes must call with the same.

        Raises:
            ValueError: the names are those of another model or method.
        """
        if weights.keys() != self.parameters.keys():
            odd = sorted(weights.keys() ^ self.parameters.keys())[0]
            raise ValueError(f"other parameters are trained now than were saved: {odd}")
        if moments is not None:
            self._steps = int(next(value for key, value in moments.items() if key.endswith("/step")))
            for state in self._optimiser.optimizer.state.values():
                state["step"].fill_(self._steps)
        for name, parameter in self.parameters.items():
            value = weights[name].to(self._device)
            with self._gathered(parameter):
                parameter.data.copy_(value)
            self._api.utils.safe_set_full_fp32_param(parameter, value)
            for key in _MOMENTS if moments is not None else ():
                moment = moments[f"{name}/{key}"].to(self._device)  # type: ignore[index]
                self._api.utils.safe_set_full_optimizer_state(parameter, moment, key)

    def close(self) -> None:
        """Nothing is held beyond the model."""

    def _make_state(self) -> None:
        """Make AdamW's moments before its first step: saved ones need a place, and stages 1 and 2 find those of the
        first group alone where they are made by the step."""
        sharded = self._optimiser
        pieces = sharded.fp32_partitioned_groups_flat if self.stage == 3 else sharded.single_partition_of_fp32_groups
        for piece in pieces:
            moments = {key: torch.zeros_like(piece, requires_grad=False) for key in _MOMENTS}
            sharded.optimizer.state[piece] = {"step": torch.zeros(()), **moments}
        if self.stage < 3:
            sharded._lazy_init_hp_params_optimizer_state()

    def _gathered(self, parameter: torch.nn.Parameter) -> Any:
        if self.stage < 3:
            return contextlib.nullcontext()
        return self._api.zero.GatheredParameters([parameter], modifier_rank=0)

    def _kept(self, calls: Mapping[str, Callable[..., torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What the calls give, on the main process's host memory; all processes make them."""
        found = {}
        for name, call in calls.items():
            value = call()
            if self._processes.main:
                found[name] = value.detach().float().cpu().clone()
        return found

    def _require_divided(self, model: torch.nn.Module, whole: int) -> None:
        """Refuse what was to be divided and is not."""
        held = sum(p.numel() for group in self._optimiser.optimizer.param_groups for p in group["params"])
        if self.stage == 3:
            pieces: list[Any] = [getattr(p, "ds_tensor", None) for p in model.parameters() if p.requires_grad]
            held = sum(whole if piece is None else piece.numel() for piece in pieces)
        if held > 0.75 * whole and whole > 1000:
            raise UserError(
                f"DeepSpeed did not divide the optimiser among the {self._processes.count} processes",
                where="ACCELERATE_USE_DEEPSPEED",
                remedy="choose plain multi-GPU there and training.sharding=full in the recipe",
            )


class GatheredCheckpoints(ShardedCheckpoints):
    """Checkpoints that the main process writes alone, in the plain form, from what all processes hand over."""

    def __init__(self, folder: Path, processes: Processes, *, keep: int = 2) -> None:
        super().__init__(folder, {}, processes, keep=keep)

    def save(self, state: TrainState, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> Path:
        if self._processes.main:
            Checkpoints.save(self, state, weights, moments)
        self._processes.wait()
        return self.folder / f"step-{state.step}"

    def _tensors(self, path: Path, record: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return Checkpoints._tensors(self, path, record)


def _needs_gradient(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


def _configuration(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's settings: the ZeRO section of Accelerate's configuration, and what the recipe says."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    asked = DeepSpeedPlugin().deepspeed_config
    # Else transformers would load the next model in pieces.
    unset_hf_deepspeed_config()
    zero = {key: value for key, value in asked.get("zero_optimization", {}).items() if value != "auto"}
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(
            f"DeepSpeed's ZeRO stage {zero.get('stage')} divides nothing",
            where="ACCELERATE_DEEPSPEED_ZERO_STAGE",
            remedy="choose stage 1, 2 or 3, or plain multi-GPU",
        )
    if any(section.get("device") == "nvme" for section in zero.values() if isinstance(section, dict)):
        raise UserError(
            "DeepSpeed's off-loading to NVMe is not built in",
            where="ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE, ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
            remedy="choose none or cpu",
        )
    if dtype == torch.float16:
        raise UserError("DeepSpeed is not used with float16", where="model.dtype", remedy="choose bfloat16 or float32")
    return {
        # Luthier divides rows itself; the engine's own count of passes is not used.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
        **({"bf16": {"enabled": True}, "communication_data_type": "fp32"} if dtype == torch.bfloat16 else {}),
    }
