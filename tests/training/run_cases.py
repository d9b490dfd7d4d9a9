"""Training runs that one or two processes make alike: ``run_cases.py MODEL OUT`` under torchrun, or `run_case` here.

Each case leaves ``OUT/CASE.pt``: the whole gradient of every step, and the whole weights at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))
from bench import Bench

from luthier.training.division import Shards
from luthier.training.loop import Trainer
from luthier.training.processes import Processes

# 21 rows in steps of eight: the third step of an epoch has five, three on one process and two on the other. Of nine,
# the second step has one, and the other process none.
CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "lora-accumulated": {"method": "lora", "batch": 2, "gradient_accumulation_steps": 2, "rows": 13},
    "full-few": {"method": "full", "rows": 9},
    "lora-dora-plus": {"method": {"name": "lora", "use_dora": True, "loraplus_lr_ratio": 4}},
    "lora-pissa": {"method": {"name": "lora", "init_lora_weights": "pissa"}},
    "mixed": {"method": {"name": "mixed", "lora_dropout": 0.0, "modules_to_save": ["all-norms", "layers.1.mlp"]}},
    "ia3": {"method": "ia3"},
    "adapter": {"method": "adapter"},
}
SHARDED: dict[str, dict[str, Any]] = {
    "lora-rank-one": {"method": "lora", "r": 1},
    "lora-few": {"method": "lora", "rows": 9},
    "full-bfloat16": {"method": "full", "dtype": torch.bfloat16},
    "full-checkpointing": {"method": "full", "gradient_checkpointing": True},
}
STEPS, STOP = 7, 4


def make(model: Path, folder: Path, case: dict[str, Any], sharding: str, total: int = 8) -> Trainer:
    """A trainer of a case, with ``total`` rows a step over all processes."""
    case = dict(case)
    rows, dtype, rank = case.pop("rows", 21), case.pop("dtype", torch.float32), case.pop("r", 8)
    processes = Processes.join().count
    batch = case.pop("batch", 4) * 2 // processes
    recipe = Bench(model).recipe(
        case.pop("method"),
        max_steps=STEPS,
        eval_steps=2,
        save_steps=1,
        save_total_limit=STEPS,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=2,
        sharding=sharding,
        **case,
    )
    if recipe.method.name == "lora":
        recipe.method.r = rank
        # Its random numbers differ with the process; resuming keeps it on (see `main`).
        recipe.method.lora_dropout = 0.0
    return Bench(model).trainer(folder, recipe, rows=rows, dtype=dtype)


def whole(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the optimiser's, put together where they are pieces."""
    if not isinstance(trainer.division, Shards):
        return {name: tensor.clone() for name, tensor in tensors.items()}
    gathered = [None] * trainer.processes.count
    torch.distributed.all_gather_object(gathered, tensors)
    return {name: torch.cat([piece[name] for piece in gathered]) for name in tensors}


def run_case(trainer: Trainer, *, resume: bool = False, stop: int | None = None) -> dict[str, Any]:
    """Train; returns gradients by step (before clipping) and the weights."""
    gradients = []
    clip, step = trainer.optimiser.clip, trainer._step

    def keep(max_norm: float) -> float:
        gradients.append(whole(trainer, {n: m.grad for n, m in trainer.optimiser.masters.items()}))
        return clip(max_norm)

    def until() -> float:
        if trainer.state.step == stop:
            raise InterruptedError
        return step()

    trainer.optimiser.clip, trainer._step = keep, until
    try:
        trainer.run(resume=resume)
    except InterruptedError:
        # The main process has written its last checkpoint when it comes here; the others must not look for it before.
        trainer.processes.wait()
        return {}
    return {"gradients": gradients, "weights": whole(trainer, trainer.optimiser.weights()), "held": held(trainer)}


def held(trainer: Trainer) -> list[dict[str, int]]:
    """How many numbers each process holds, of all parameters and of the optimiser's; and how many there are."""

    def count(tensors: Iterable[Any]) -> int:
        # What is really allocated: a tensor may be a view of something larger.
        local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
        return sum(
            {s.data_ptr(): s.nbytes() // t.element_size() for t in local for s in [t.untyped_storage()]}.values()
        )

    parameters = list(trainer.model.parameters())
    mine = {
        "parameters": count(parameters),
        "all parameters": sum(p.numel() for p in parameters),
        "moments": count(m for name, m in trainer.optimiser.moments().items() if not name.endswith("step")),
    }
    return trainer.processes.gather(mine)


def main(model: Path, out: Path) -> None:
    main_process = Processes.join().main

    def keep(name: str, result: dict[str, Any]) -> None:
        if main_process:
            torch.save(result, out / f"{name}.pt")

    for sharding, cases in (("none", CASES), ("full", CASES | SHARDED)):
        for name, case in cases.items():
            result = run_case(make(model, out / f"{name}-{sharding}", case, sharding))
            keep(f"{name}-{sharding}", result)
        for name in ("lora", "full"):
            case = cases[name]
            trainers = [make(model, out / f"{name}-{sharding}-{part}", case, sharding) for part in ("whole", "cut")]
            again = make(model, out / f"{name}-{sharding}-cut", case, sharding)
            for trainer in (*trainers, again):
                for module in trainer.model.modules():
                    if isinstance(module, torch.nn.Dropout):
                        module.p = 0.1
            keep(f"{name}-{sharding}-whole", run_case(trainers[0]))
            run_case(trainers[1], stop=STOP)
            keep(f"{name}-{sharding}-resumed", run_case(again, resume=True))
    Processes.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
