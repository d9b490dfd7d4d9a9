"""Several processes started as a user starts them: they train as one, stop as one, fail as one, and tell it once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import luthier
from luthier.pipeline import run
from luthier.recipe import Recipe

ROWS = 21  # of steps of eight: the third has five rows, three for one process and two for the other
PATIENCE = 240
TORCHRUN = ("-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture
def workplace(tmp_path, terse_model_dir) -> Path:
    """A folder with ``rows.jsonl`` and ``recipe.yaml``: the tiny model, full tuning without dropout, eight rows a step
    on two processes."""
    rows = [{"question": f"What colour is thing {i}?", "answer": "blue " * (1 + i % 5) + f"{i}"} for i in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"name": str(terse_model_dir), "dtype": "float32"},
        "data": {"train": "rows.jsonl", "split": {"validation": 0.0, "test": 0.0}},
        "method": {"name": "full"},
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": []},
        "evaluation": {"enabled": False},
        "output_dir": "run",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


class Started:
    """A command line running in the background; it is ended with the test."""

    def __init__(self, folder: Path, arguments: list[object], launcher: tuple[str, ...], extra: dict[str, str]) -> None:
        source = str(Path(luthier.__file__).parents[1])
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
        environment |= {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"} | extra
        self._log = (folder / "log").open("w+b")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "luthier.cli", *map(str, arguments)],
            cwd=folder,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._seen: set[psutil.Process] = set()

    def children(self) -> dict[int, psutil.Process]:
        """The processes that train, by their number."""
        found: dict[int, psutil.Process] = {}
        if self.process.poll() is not None:
            return found
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if rank := child.environ().get("RANK"):
                    found[int(rank)] = child
            except psutil.Error:
                continue
        self._seen |= set(found.values())
        return found

    def until_step(self, folder: Path, step: int) -> None:
        """Wait until ``step`` is in the metrics."""
        deadline = time.monotonic() + PATIENCE
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= step):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        self.children()

    def end(self) -> int:
        """Wait for the end; returns the exit code. Nothing of it may be left."""
        code = self.process.wait(timeout=PATIENCE)
        _, left = psutil.wait_procs(list(self._seen), timeout=30)
        assert not left, self.said()
        return int(code)

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    def close(self) -> None:
        self.children()
        for process in (self.process, *self._seen):
            if not isinstance(process, psutil.Process) or process.is_running():
                process.kill()
        self.process.wait()
        self._log.close()


@pytest.fixture
def start(workplace):
    """Starts ``luthier ARGUMENTS`` in the workplace."""
    running: list[Started] = []

    def begin(*arguments: object, launcher: tuple[str, ...] = ("-P",), **environment: str) -> Started:
        running.append(Started(workplace, list(arguments), launcher, environment))
        return running[-1]

    yield begin
    for each in running:
        each.close()


@pytest.fixture
def train(start):
    """Runs ``luthier train recipe.yaml ARGUMENTS`` to its good end; returns what it said."""

    def whole(*arguments: object, launcher: tuple[str, ...] = ("-P",), **environment: str) -> str:
        started = start("train", "recipe.yaml", *arguments, launcher=launcher, **environment)
        code = started.end()
        assert code == 0, started.said()
        return started.said()

    return whole


def alone(workplace: Path, *overrides: str, resume: bool = False) -> Path:
    """One process, eight rows a step, in this process; returns the run folder."""
    here = Path.cwd()
    os.chdir(workplace)
    try:
        settings = ["training.per_device_train_batch_size=8", "output_dir=alone", *overrides]
        return workplace / run(Recipe.load(Path("recipe.yaml"), settings), resume=resume).run_dir
    finally:
        os.chdir(here)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(one: Path, two: Path, kind: str = "model/model") -> None:
    """Weights and losses of two runs, within what the order of additions may change."""
    first, second = (load_file(folder / f"{kind}.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for key, weight in first.items():
        torch.testing.assert_close(second[key], weight, rtol=1e-3, atol=3e-4, msg=key)
    for a, b in zip(records(one), records(two), strict=True):
        assert (a["step"], a["tokens"], a["trained_tokens"]) == (b["step"], b["tokens"], b["trained_tokens"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        # AdamW trains almost the same with gradients of half the size; their norm does not.
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def moved(model_dir: Path, folder: Path) -> float:
    """How far full tuning went from the model that it began with."""
    base, tuned = load_file(model_dir / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    return max(float((tuned[key] - weight).abs().max()) for key, weight in base.items())


def test_nproc_trains_as_one_process(train, workplace, terse_model_dir):
    (workplace / "yaml.py").write_text("raise SystemExit('a file of the user was imported')")
    said = train("--nproc", 2)
    assert said.count("pre-flight: passed") == 1 and said.count("saved run/model") == 1
    assert json.loads((workplace / "run" / "manifest.json").read_text())["processes"] == 2
    assert_same(alone(workplace), workplace / "run")
    assert moved(terse_model_dir, workplace / "run") > 1e-3


def test_a_killed_process_ends_the_run(start, workplace):
    """No hang, no orphan, one message, and what was saved is there to go on from."""
    started = start("train", "recipe.yaml", "--nproc", 2, "training.max_steps=5000", "training.save_steps=1")
    started.until_step(workplace / "run", 2)
    began = time.monotonic()
    started.children()[1].kill()
    code = started.end()
    assert code == 128 + signal.SIGKILL
    assert time.monotonic() - began < 60
    said = started.said()
    assert "process 1 of 2 was ended by SIGKILL" in said and "--resume" in said
    assert said.count("error:") == 1 and "Traceback" not in said
    assert json.loads((workplace / "run" / "manifest.json").read_text())["status"] == "failed"
    assert list((workplace / "run" / "checkpoints").glob("step-*"))


@pytest.fixture
def elsewhere(workplace) -> dict[str, str]:
    """An environment in which process 1 works in an empty folder, as on a machine that has not the same files."""
    (workplace / "site").mkdir()
    (workplace / "empty").mkdir()
    (workplace / "site" / "sitecustomize.py").write_text(
        f"import os\nif os.environ.get('RANK') == '1':\n    os.chdir({str(workplace / 'empty')!r})\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(workplace / "site"), str(Path(luthier.__file__).parents[1])])}


def test_a_mistake_that_one_process_finds_is_told_once(start, elsewhere):
    started = start("train", "recipe.yaml", "--nproc", 2, **elsewhere)
    assert started.end() == 2
    said = started.said()
    assert said.count("error:") == 1 and "recipe.yaml" in said and "does not exist" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_mistake_that_the_main_process_finds_is_told_once(start, train, workplace):
    train()
    started = start("train", "recipe.yaml", "--nproc", 2)
    assert started.end() == 2
    said = started.said()
    assert said.count("error:") == 1 and "holds a finished run" in said and "Traceback" not in said


@pytest.mark.slow
def test_torchrun_trains_as_one_process(train, workplace):
    train(launcher=TORCHRUN)
    assert json.loads((workplace / "run" / "manifest.json").read_text())["processes"] == 2
    assert_same(alone(workplace), workplace / "run")


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_told_once(start, elsewhere):
    started = start("train", "recipe.yaml", launcher=TORCHRUN, **elsewhere)
    assert started.end() != 0
    assert started.said().count("error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_stopped_and_resumed_is_uninterrupted(train, start, workplace, sharding):
    """Bit for bit, with dropout."""
    settings = (
        "method.name=lora",
        f"training.sharding={sharding}",
        "training.max_steps=40",
        "training.save_steps=1000",
    )
    train("--nproc", 2, *settings, "output_dir=whole")
    started = start("train", "recipe.yaml", "--nproc", 2, *settings)
    started.until_step(workplace / "run", 2)
    started.process.terminate()
    assert started.end() == 128 + signal.SIGTERM
    said = started.said()
    assert "stopped by SIGTERM" in said and "--resume" in said and "Traceback" not in said
    assert not (workplace / "run" / "adapter").exists()
    (checkpoint,) = (workplace / "run" / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 2 <= stopped < 40
    said = train("--nproc", 2, *settings, "--resume")
    assert f"going on from step {stopped}" in said
    whole, resumed = (load_file(workplace / f / "adapter" / "adapter_model.safetensors") for f in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    for key, weight in whole.items():
        assert torch.equal(resumed[key], weight), key
    losses = [[(r["step"], r["loss"]) for r in records(workplace / f)] for f in ("whole", "run")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_killed_main_process_ends_the_run(start, workplace):
    started = start("train", "recipe.yaml", "--nproc", 2, "training.max_steps=5000", "training.sharding=full")
    started.until_step(workplace / "run", 2)
    started.children()[0].kill()
    assert started.end() == 128 + signal.SIGKILL
    said = started.said()
    assert "process 0 of 2 was ended by SIGKILL" in said and said.count("error:") == 1 and "Traceback" not in said


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process(start, workplace):
    started = start("train", "recipe.yaml", "--nproc", 2, "training.max_steps=5000")
    started.until_step(workplace / "run", 2)
    started.process.kill()
    assert started.end() == -signal.SIGKILL
    assert (workplace / "run" / "checkpoints").is_dir()


@pytest.mark.slow
def test_a_sharded_model_is_a_plain_one_in_the_end(train, workplace, terse_model_dir):
    from transformers import AutoModelForCausalLM

    train("--nproc", 2, "training.sharding=full")
    assert_same(alone(workplace), workplace / "run")
    model, info = AutoModelForCausalLM.from_pretrained(workplace / "run" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert moved(terse_model_dir, workplace / "run") > 1e-3


@pytest.mark.slow
def test_a_sharded_adapter_is_a_plain_one_in_the_end(train, workplace, terse_model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = ("method.name=lora", "method.lora_dropout=0")
    train("--nproc", 2, "training.sharding=full", *lora)
    assert_same(alone(workplace, *lora), workplace / "run", "adapter/adapter_model")
    base = AutoModelForCausalLM.from_pretrained(terse_model_dir)
    ids = torch.tensor([[1, 2, 3]])
    before = base(ids).logits
    tuned = PeftModel.from_pretrained(base, workplace / "run" / "adapter")(ids).logits
    assert float((tuned - before).detach().abs().max()) > 1e-3
