"""Checkpoints: whole or refused; a full disk, an altered byte and a kill at any moment lose no good one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from luthier.errors import UserError
from luthier.training.checkpoint import Checkpoints, TrainState


def save(store: Checkpoints, step: int, **state) -> Path:
    torch.manual_seed(step)
    weights = {"a": torch.randn(50, 20), "b": torch.randn(7)}
    moments = {"a/exp_avg": torch.randn(50, 20), "a/step": torch.tensor(float(step))}
    return store.save(TrainState(step=step, **state), weights, moments)


def test_what_is_saved_is_loaded(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints")
    save(store, 3, best_step=2, best_loss=0.25, course={"seed": 1})
    loaded = store.load(3)
    torch.manual_seed(3)
    assert torch.equal(loaded.weights["a"], torch.randn(50, 20))
    assert loaded.moments["a/step"].shape == () and loaded.state.best_loss == 0.25
    # An ordinary safetensors file, readable without this project.
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "checkpoints/step-3/weights.safetensors")["a"], loaded.weights["a"])


def test_the_newest_and_the_best_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        save(store, step, best_step=min(step, 2))
    assert store.steps() == [6, 5, 2]


def truncate(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def flip(name):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[-5] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def edit_state(folder):
    record = json.loads((folder / "state.json").read_text())
    record["state"]["tokens"] += 1
    (folder / "state.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip("weights.safetensors"),
        flip("optimizer.safetensors"),
        edit_state,
        lambda folder: (folder / "optimizer.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").unlink(),
    ],
    ids=["truncated", "weight bit", "moment bit", "state edited", "file gone", "state cut", "state gone"],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(tmp_path, damage):
    store = Checkpoints(tmp_path)
    save(store, 1)
    damage(save(store, 2))
    refused: list[str] = []
    found = store.newest(refused)
    assert found.state.step == 1 and len(refused) == 1 and "step-2" in refused[0]
    with pytest.raises(ValueError, match="step-2"):
        store.load(2)


def test_half_a_checkpoint_is_never_seen(tmp_path):
    store = Checkpoints(tmp_path)
    save(store, 1)
    (tmp_path / ".writing-step-2").mkdir()
    (tmp_path / ".writing-step-2" / "weights.safetensors").write_bytes(b"half")
    assert store.steps() == [1] and store.newest([]).state.step == 1
    save(store, 2)
    assert store.steps() == [2, 1]


def test_a_full_disk_is_a_clear_message_and_loses_nothing(tmp_path):
    """A limit on the size of files stands in for the disk: the system refuses the write in the same place."""
    script = """
import resource, signal, sys, torch
from pathlib import Path
from luthier.errors import UserError
from luthier.training.checkpoint import Checkpoints, TrainState
store = Checkpoints(Path(sys.argv[1]))
store.save(TrainState(step=1), {"a": torch.zeros(1000)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    store.save(TrainState(step=2), {"a": torch.zeros(1_000_000)}, {})
except UserError as error:
    print(error)
print(store.newest([]).state.step, sorted(p.name for p in Path(sys.argv[1]).iterdir()))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "step-2" in done.stdout and "to do:" in done.stdout and "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "1 ['step-1']"


def test_a_disk_without_room_is_told_apart(tmp_path):
    """On a file system of one megabyte, where mounting one is allowed."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = Checkpoints(tmp_path / "checkpoints")
        save(store, 1)
        with pytest.raises(UserError, match=r"full|space"):
            store.save(TrainState(step=2), {"a": torch.zeros(1_000_000)}, {})
        assert store.newest([]).state.step == 1
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


RUN = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
import torch
torch.set_num_threads(1)
from bench import Bench
bench = Bench(Path(sys.argv[1]))
recipe = bench.recipe("lora", max_steps=40, save_steps=1, eval_steps=7, save_total_limit=3)
folder = Path(sys.argv[2])
trainer = bench.trainer(folder, recipe, dtype=torch.bfloat16)
print("ready", flush=True)
trainer.run(resume=(folder / "checkpoints").exists())
torch.save(trainer.optimiser.weights(), folder / "final.pt")
"""


@pytest.mark.slow
def test_killed_at_twenty_random_moments_and_resumed(tiny_model_dir, tmp_path):
    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        arguments = [sys.executable, "-c", RUN, str(tiny_model_dir), str(folder), str(Path(__file__).parent)]
        return subprocess.Popen(
            arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    whole = start(tmp_path / "whole")
    whole.stdout.readline()
    began = time.monotonic()
    assert whole.wait() == 0
    length = time.monotonic() - began
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        process = start(tmp_path / "cut")
        if process.stdout.readline() != "ready\n":
            raise AssertionError("the run did not start")
        try:
            # Short enough that twenty kills fit into one run, long enough to get on.
            process.wait(timeout=rng.uniform(0.02, length / 8))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills >= 15, f"the run was over after {kills} kills"
    last = start(tmp_path / "cut")
    assert last.wait() == 0
    ours, theirs = (torch.load(tmp_path / name / "final.pt") for name in ("cut", "whole"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in map(json.loads, lines)]

    assert losses("cut") == losses("whole")
