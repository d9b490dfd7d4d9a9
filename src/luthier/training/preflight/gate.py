"""The pre-flight as a whole: every check in turn, on the real rows and the real model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from luthier.data.dataset import Dataset
from luthier.data.findings import Finding
from luthier.methods.base import TuningMethod, parameter_counts
from luthier.models.quantized import rounds_inputs
from luthier.recipe import Recipe
from luthier.training.fused import cuda, kernels
from luthier.training.loss import LossFunction
from luthier.training.plan import Plan
from luthier.training.preflight import model_checks as checks
from luthier.training.preflight.findings import Preflight


def preflight(
    recipe: Recipe,
    method: TuningMethod,
    dataset: Dataset,
    model: torch.nn.Module,
    loss_function: LossFunction,
    *,
    found: Iterable[Finding],
    chance: float | None,
    stop_tokens_added: list[int],
    run_dir: Path,
    processes: int = 1,
    sharers: int = 1,
    pieces: int = 1,
) -> Preflight:
    """Check rows, settings and model before step one.

    Args:
        recipe: the run's settings.
        method: the tuning method in use.
        dataset: the encoded rows.
        model: wrapped by the method, on its device.
        loss_function: the loss that training will use.
        found: what the task has found in the rows.
        chance: the loss of guessing, nats a target; None: the first loss says nothing of what the model knows.
        stop_tokens_added: what `set_stop_tokens` had to add.
        run_dir: where the run will write.
        processes: how many processes train together.
        sharers: how many of them share this one's memory.
        pieces: among how many the optimiser's state is divided.
    """
    began = time.perf_counter()
    device = next(model.parameters()).device
    rows = dataset.train.encoded
    findings: list[Finding] = list(found)
    findings += checks.check_stop_tokens(stop_tokens_added, dataset.tokenizer)
    trained, every = parameter_counts(model)
    facts: dict[str, object] = {
        "rows": {part.name: part.summary() for part in dataset.parts},
        "method": {"name": method.name, "trains": method.trains, "merges": method.merges},
        "parameters": {"trained": trained, "all": every},
        "packed": loss_function.packed,
        "fused": loss_function.fused is not None,
        "fused_reason": loss_function.fused_reason,
    }
    dtype = next(model.parameters()).dtype
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        facts |= (used := cuda.facts(device, dtype))
        remedy = "slower, the same loss; install what is missing"
        findings += [Finding("no_kernels", "info", what, remedy) for what in used.values() if what.startswith("plain")]
    if device.type == "cpu" and not kernels.load() and kernels.compilable():
        findings.append(
            Finding(
                "no_kernels", "info", f"training takes slower kernels: {kernels.why_not()}", "install g++ or clang++"
            )
        )
    if not loss_function.packed:
        findings.append(
            Finding("padded", "info", f"batches are right-padded: {loss_function.reason}", "slower, the same loss")
        )
    if rows:
        plan = Plan.of(recipe, method, len(rows), processes)
        findings += checks.check_settings(recipe, method, plan, len(rows))
        needs = checks.predict(recipe, model, rows, loss_function)
        needs = replace(needs, optimiser=needs.optimiser // pieces)
        findings += checks.check_room(needs, run_dir, device, sharers)
        losses = checks.first_loss(model, loss_function, dataset)
        half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
        findings += checks.check_first_loss(losses, chance, half or rounds_inputs(model))
        facts |= {
            "steps": plan.steps,
            "learning_rate": plan.learning_rate,
            "predicted_bytes": {
                "weights": needs.weights,
                "optimiser": needs.optimiser,
                "activations": needs.activations,
                "disk": needs.disk,
            },
            "first_loss": None if losses is None else {"training": losses[0], "plain": losses[1]},
        }
    order = {"error": 0, "warning": 1, "info": 2}
    findings.sort(key=lambda f: order[f.severity])
    return Preflight(findings, facts, time.perf_counter() - began)
