"""Checkpoints written beside training: what is saved is the step's, errors are heard, nothing ends before its save."""

from __future__ import annotations

import math
import os
import signal
import threading
import time

import pytest
import torch
from bench import weights

from luthier.errors import UserError
from luthier.training.checkpoint import Checkpoints, TrainState
from luthier.training.loop import Interrupted
from luthier.training.saver import Saver


class SlowDisk(Checkpoints):
    """A store that begins to write when it is let, or a moment later."""

    def __init__(self, folder, *, keep=100, seconds=0.0):
        super().__init__(folder, keep=keep)
        self.seconds = seconds
        self.gate = threading.Event()
        if seconds:
            self.gate.set()

    def save(self, state, weights, moments):
        self.gate.wait()
        time.sleep(self.seconds)
        return super().save(state, weights, moments)


def tensors(value):
    return {"w": torch.full((10, 3), float(value))}, {"w/exp_avg": torch.full((10, 3), -float(value))}


def test_a_small_checkpoint_is_that_of_its_step_whatever_training_does_meanwhile(tmp_path):
    disk = SlowDisk(tmp_path)
    saver = Saver(disk)
    weights, moments = tensors(1)
    state = TrainState(step=1)
    saver.save(state, weights, moments)
    saver.before_update()
    assert disk.steps() == []  # nothing waited for the disk
    weights["w"].zero_()
    moments["w/exp_avg"].zero_()
    state.step = 2
    disk.gate.set()
    saver.wait()
    loaded = disk.load(1)
    assert torch.equal(loaded.weights["w"], tensors(1)[0]["w"])
    assert torch.equal(loaded.moments["w/exp_avg"], tensors(1)[1]["w/exp_avg"])


def test_a_large_checkpoint_is_written_before_its_tensors_change(tmp_path):
    disk = SlowDisk(tmp_path)
    saver = Saver(disk, copied=0)
    weights, moments = tensors(1)
    saver.save(TrainState(step=1), weights, moments)
    assert disk.steps() == []
    threading.Timer(0.05, disk.gate.set).start()
    saver.before_update()
    assert disk.steps() == [1]


def test_one_checkpoint_is_in_flight_at_most(tmp_path):
    disk = SlowDisk(tmp_path)
    saver = Saver(disk)
    saver.save(TrainState(step=1), *tensors(1))
    saver.save(TrainState(step=1), *tensors(1))  # the best and the last at once: nothing to do, nothing to wait for
    assert disk.steps() == []
    threading.Timer(0.05, disk.gate.set).start()
    saver.save(TrainState(step=2), *tensors(2))
    assert 1 in disk.steps()
    saver.wait()
    assert disk.steps() == [2, 1]


def test_an_error_is_raised_once_by_the_next_save_and_the_step_can_be_saved_again(tmp_path):
    blocked = tmp_path / "checkpoints"
    blocked.write_text("a file where the folder should be")
    saver = Saver(Checkpoints(blocked))
    saver.save(TrainState(step=1), *tensors(1))
    with pytest.raises(UserError, match=r"cannot be written.*"):
        saver.save(TrainState(step=2), *tensors(2))
    blocked.unlink()
    saver.save(TrainState(step=1), *tensors(1))
    saver.wait()
    assert saver.store.steps() == [1]


def test_a_run_ends_with_the_error_of_its_last_checkpoint(bench, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    trainer = bench.trainer(tmp_path, bench.recipe(max_steps=2, save_steps=100, eval_steps=100))
    with pytest.raises(UserError, match="cannot be written"):
        trainer.run()
    # With one more save to come, the run ends there and trains no further.
    trainer = bench.trainer(tmp_path, bench.recipe(max_steps=6, save_steps=2, eval_steps=100))
    with pytest.raises(UserError, match="cannot be written"):
        trainer.run()
    assert trainer.state.step == 4


@pytest.mark.parametrize("copied", [0, 1 << 30], ids=["in use", "copied"])
@pytest.mark.parametrize(("method", "dtype"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_every_checkpoint_of_a_run_on_a_slow_disk_holds_its_own_step(bench, tmp_path, method, dtype, copied):
    recipe = bench.recipe(method, max_steps=5, save_steps=1, eval_steps=100)
    trainer = bench.trainer(tmp_path, recipe, dtype=dtype)
    trainer.checkpoints = SlowDisk(tmp_path / "checkpoints", seconds=0.1)
    trainer.saver = Saver(trainer.checkpoints, copied=copied)
    step = trainer._step
    expected = {}

    def noted():
        loss = step()
        moments = {k: v.clone() for k, v in trainer.optimiser.moments().items()}
        expected[trainer.state.step] = (weights(trainer), moments)
        return loss

    trainer._step = noted
    trainer.run()
    assert trainer.checkpoints.steps() == [5, 4, 3, 2, 1]
    for number, (masters, moments) in expected.items():
        loaded = trainer.checkpoints.load(number)
        assert loaded.state.step == number
        for ours, theirs in ((loaded.weights, masters), (loaded.moments, moments)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("blocked", [False, True])
def test_ctrl_c_waits_for_its_checkpoint(bench, tmp_path, blocked):
    trainer = bench.trainer(tmp_path, bench.recipe(max_steps=8, save_steps=100, eval_steps=100))
    trainer.checkpoints = SlowDisk(tmp_path / "checkpoints", seconds=0.2)
    trainer.saver = Saver(trainer.checkpoints)
    if blocked:
        (tmp_path / "checkpoints").write_text("a file where the folder should be")
    step = trainer._step

    def signalled():
        loss = step()
        if trainer.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    trainer._step = signalled
    # It never says "saved" of what could not be.
    with pytest.raises(UserError if blocked else Interrupted):
        trainer.run()
    assert trainer.checkpoints.steps() == ([] if blocked else [3])


def test_a_crash_waits_for_the_checkpoint_in_flight(bench, tmp_path):
    trainer = bench.trainer(tmp_path, bench.recipe(max_steps=8, save_steps=1, eval_steps=100))
    trainer.checkpoints = SlowDisk(tmp_path / "checkpoints", seconds=0.2)
    trainer.saver = Saver(trainer.checkpoints)
    step = trainer._step

    def crashes():
        if trainer.state.step == 1:
            raise RuntimeError("power cut")
        return step()

    trainer._step = crashes
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.run()
    assert trainer.checkpoints.steps() == [1]


def test_a_damaged_checkpoint_is_written_anew_when_its_step_comes_again(bench, tmp_path):
    recipe = bench.recipe(max_steps=4, save_steps=1, save_total_limit=3, load_best_model_at_end=False)
    first = bench.trainer(tmp_path, recipe)
    first.run()
    damaged = tmp_path / "checkpoints/step-4/weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    again = bench.trainer(tmp_path, recipe)
    again.run(resume=True)
    loaded = again.checkpoints.load(4).weights
    assert all(torch.equal(loaded[k], v) for k, v in first.optimiser.weights().items())


def test_a_step_that_was_resumed_is_not_written_again(bench, tmp_path):
    bench.trainer(tmp_path, bench.recipe(max_steps=4, save_steps=2, eval_steps=100)).run()
    (tmp_path / "checkpoints/step-4/state.json").unlink()
    written = tmp_path / "checkpoints/step-2/weights.safetensors"
    before = written.stat().st_ino
    again = bench.trainer(tmp_path, bench.recipe(max_steps=4, save_steps=2, eval_steps=100))
    again.loss_function.head = False
    logits = again.loss_function.logits
    again.loss_function.logits = lambda batch: logits(batch) * math.nan
    with pytest.raises(UserError, match=r"step 3 is nan.*step 2 are kept"):
        again.run(resume=True)
    assert written.stat().st_ino == before


def test_a_loss_that_is_no_number_is_not_said_to_be_kept_where_it_could_not_be(bench, tmp_path):
    trainer = bench.trainer(tmp_path, bench.recipe("full", max_steps=8, save_steps=100, eval_steps=100))
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    trainer.state.step = 3
    with pytest.raises(UserError, match="cannot be written"):
        trainer._stop_for("loss", math.nan)
