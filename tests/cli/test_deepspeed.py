"""DeepSpeed by an Accelerate configuration: two processes train as one. Skipped where DeepSpeed is not installed."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_launch import alone, assert_same, records, start, train, workplace  # noqa: F401

installed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not installed, reason="DeepSpeed is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture
def launcher(workplace):  # noqa: F811
    """The start line of a ZeRO stage."""

    def of(stage: int) -> tuple[str, ...]:
        path = workplace / f"zero-{stage}.yaml"
        settings = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"zero_stage": stage},
            "machine_rank": 0,
            "main_training_function": "main",
            "mixed_precision": "no",
            "num_machines": 1,
            "num_processes": 2,
            "use_cpu": False,
        }
        path.write_text(yaml.safe_dump(settings))
        return ("-m", "accelerate.commands.launch", "--config_file", str(path))

    return of


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_train_as_one(train, workplace, launcher, method, stage):  # noqa: F811
    # Nine rows: of the second step, one process has none.
    settings = (f"method.name={method}", "data.max_examples=9", "training.max_steps=5")
    settings += ("method.lora_dropout=0",) if method == "lora" else ()
    passes = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2")
    train(*settings, *passes, launcher=launcher(stage))
    assert json.loads((workplace / "run" / "manifest.json").read_text())["processes"] == 2
    kind = "adapter/adapter_model" if method == "lora" else "model/model"
    assert_same(alone(workplace, *settings), workplace / "run", kind)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_has_float32_masters(train, workplace, launcher, stage):  # noqa: F811
    settings = ("model.dtype=bfloat16", "training.learning_rate=1e-5")
    train(*settings, launcher=launcher(stage))
    one, two = records(alone(workplace, *settings)), records(workplace / "run")
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=0.03)
    assert [r["grad_norm"] for r in two] == pytest.approx([r["grad_norm"] for r in one], rel=0.05)
    weights = load_file(max((workplace / "run" / "checkpoints").iterdir()) / "weights.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    # Steps of 1e-5 are lost in bfloat16.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_stopped_and_resumed_is_uninterrupted(train, start, workplace, launcher, stage):  # noqa: F811
    """Bit for bit, with dropout."""
    settings = ("method.name=lora", "training.max_steps=40", "training.save_steps=1000")
    train(*settings, "output_dir=whole", launcher=launcher(stage))
    started = start("train", "recipe.yaml", *settings, launcher=launcher(stage))
    started.until_step(workplace / "run", 2)
    started.process.terminate()
    assert started.end() != 0
    (checkpoint,) = (workplace / "run" / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 2 <= stopped < 40
    assert f"going on from step {stopped}" in train(*settings, "--resume", launcher=launcher(stage))
    whole, resumed = (load_file(workplace / f / "adapter" / "adapter_model.safetensors") for f in ("whole", "run"))
    for key, weight in whole.items():
        assert torch.equal(resumed[key], weight), key


@needs_deepspeed
def test_one_process_goes_on_where_deepspeed_stopped(train, workplace, launcher):  # noqa: F811
    """The checkpoint is a plain one."""
    settings = ("training.save_steps=3", "training.save_total_limit=5")
    train(*settings, launcher=launcher(3))
    shutil.copytree(workplace / "run", workplace / "alone")
    shutil.rmtree(workplace / "alone" / "checkpoints" / "step-6")
    shutil.rmtree(workplace / "alone" / "model")
    assert_same(alone(workplace, *settings, resume=True), workplace / "run")


@pytest.mark.skipif(installed, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_told_once(start):  # noqa: F811
    started = start("train", "recipe.yaml", "--nproc", 2, ACCELERATE_USE_DEEPSPEED="true")
    assert started.end() == 2
    assert started.said().count("error:") == 1 and "pip install deepspeed" in started.said()
