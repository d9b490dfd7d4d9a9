"""The loop: accumulation, schedules, the optimiser, resuming, stopping, and what ends a run early."""

from __future__ import annotations

import json
import math
import threading

import pytest
import torch

from luthier.errors import UserError
from luthier.training.fused import kernels
from luthier.training.input import StepInput
from luthier.training.loop import Interrupted
from luthier.training.optimiser import MasterAdamW, learning_rate_factor
from luthier.training.progress import Silent


def snapshot(trainer):
    return {k: v.clone() for k, v in trainer.optimiser.weights().items()}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Said(Silent):
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def losses(folder):
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records(folder)]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- one step is one step, however it is cut ---


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulated_is_whole(bench, tmp_path, method, batch, accumulation):
    def run(name, batch, accumulation):
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        recipe = bench.recipe(method, **settings, max_grad_norm=0.0)
        if method == "lora":
            recipe.method.lora_dropout = 0.0
        trainer = bench.trainer(tmp_path / name, recipe)
        gradients = {}

        def keep(norm):
            gradients.update({k: m.grad.clone() for k, m in trainer.optimiser.masters.items()})
            return 0.0

        trainer.optimiser.clip = keep
        outcome = trainer.run()
        return outcome.last_loss, gradients

    whole_loss, whole = run("whole", 8, 1)
    loss, cut = run("cut", batch, accumulation)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_padded_trains_as_packed(bench, tmp_path):
    recipe = bench.recipe("lora", max_steps=4)
    recipe.method.lora_dropout = 0.0
    packed, padded = (bench.trainer(tmp_path / b, recipe, batching=b) for b in ("auto", "padded"))
    assert packed.loss_function.packed and not padded.loss_function.packed
    assert packed.run().last_loss == pytest.approx(padded.run().last_loss, rel=1e-5)
    for name, value in packed.optimiser.weights().items():
        torch.testing.assert_close(padded.optimiser.weights()[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kept", [True, "mlp"])
def test_gradient_checkpointing_changes_nothing(bench, tmp_path, method, kept):
    plain = bench.trainer(tmp_path / "plain", bench.recipe(method, max_steps=3))
    said = Said()
    recipe = bench.recipe(method, max_steps=3, gradient_checkpointing=kept)
    leaner = bench.trainer(tmp_path / "leaner", recipe, reporter=said)
    # The tiny model's layers are not fused: whole layers are recomputed, and the run says so.
    assert leaner.loss_function.fused is None
    assert len(said.lines) == (kept == "mlp") and all("whole layers" in line for line in said.lines)
    assert plain.run().last_loss == pytest.approx(leaner.run().last_loss, rel=1e-6)
    for name, value in plain.optimiser.weights().items():
        torch.testing.assert_close(leaner.optimiser.weights()[name], value, rtol=1e-4, atol=1e-6)


def test_every_row_is_seen_once_an_epoch(bench, tmp_path):
    trainer = bench.trainer(tmp_path, bench.recipe(max_steps=-1, num_train_epochs=2), rows=22)
    trainer.run()
    steps = [r for r in records(tmp_path) if "loss" in r]
    epoch = sum(len(r) for r in trainer.train_rows)
    assert len(steps) == 12 and sum(r["tokens"] for r in steps) == 2 * epoch
    assert sum(r["tokens"] for r in steps[:6]) == epoch


@pytest.mark.parametrize("stop", [None, 3])
def test_batches_made_ahead_train_alike(bench, tmp_path, stop):
    """Rows, their order and random numbers (dropout) are the same, over epochs and after an interruption."""
    recipe = bench.recipe("lora", max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2)
    assert recipe.method.lora_dropout > 0
    plain = bench.trainer(tmp_path / "plain", recipe, rows=22)
    ahead = bench.trainer(tmp_path / "ahead", recipe, rows=22)
    ahead.input = made_ahead(ahead)
    plain.run()
    if stop is not None:
        one_step = ahead._step

        def until():
            if ahead.state.step == stop:
                ahead._stops.received = 15
            return one_step()

        ahead._step = until
        with pytest.raises(Interrupted):
            ahead.run()
        ahead = bench.trainer(tmp_path / "ahead", recipe, rows=22)
        ahead.input = made_ahead(ahead)
    ahead.run(resume=stop is not None)
    assert losses(tmp_path / "plain") == losses(tmp_path / "ahead")
    same(snapshot(plain), snapshot(ahead))


def made_ahead(trainer):
    """As on a GPU, but for page-locked memory."""
    return StepInput(
        trainer.loss_function.batch,
        trainer.train_rows,
        trainer.order,
        0,
        steps=trainer.plan.steps,
        ahead=True,
        pin=False,
    )


def test_batches_are_made_in_a_thread_one_step_ahead(bench, tmp_path):
    trainer = bench.trainer(tmp_path, bench.recipe("lora", max_steps=3))
    makers = []

    def make(examples, *, draw):
        makers.append(threading.current_thread().name)
        return trainer.loss_function.batch(examples, draw=draw)

    source = StepInput(make, trainer.train_rows, trainer.order, 0, steps=3, ahead=True, pin=False)
    for step in range(3):
        (batch,) = source.take(step)
        expected = trainer.loss_function.batch([trainer.train_rows[i] for i in trainer.order.step(step)[0]])
        assert torch.equal(batch.input_ids, expected.input_ids)
    source.close()
    assert [name.startswith("batches") for name in makers] == [False, True, True]


def test_a_batch_that_cannot_be_made_ahead_stops_the_run(bench, tmp_path):
    trainer = bench.trainer(tmp_path, bench.recipe("lora", max_steps=4))
    make, count = trainer.loss_function.batch, []

    def fail_later(examples, *, draw):
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("this row is broken")
        return make(examples, draw=draw)

    trainer.input = StepInput(fail_later, trainer.train_rows, trainer.order, 0, steps=4, ahead=True, pin=False)
    with pytest.raises(RuntimeError, match="this row is broken"):
        trainer.run()
    assert trainer.state.step == 2


# --- repeatable ---


@pytest.mark.parametrize(("method", "dtype"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_the_same_seed_gives_the_same_bits(bench, tmp_path, method, dtype):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = bench.trainer(tmp_path / name, bench.recipe(method, seed=seed), dtype=dtype)
        trainer.run()
        runs.append(snapshot(trainer))
    same(runs[0], runs[1])
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert any(not torch.equal(runs[0][k], runs[2][k]) for k in runs[0])


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("lora", torch.bfloat16),
        ("full", torch.bfloat16),
        ("full", torch.float32),
        ({"name": "lora", "use_dora": True, "loraplus_lr_ratio": 4}, torch.float32),
        ("ia3", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [2, 7])
def test_resumed_is_uninterrupted(bench, tmp_path, method, dtype, stop):
    """In mid-epoch (5 steps an epoch), with dropout, through the schedule: the same bits."""
    recipe = bench.recipe(method, max_steps=11, save_steps=1, eval_steps=3)
    whole = bench.trainer(tmp_path / "whole", recipe, dtype=dtype)
    whole.run()

    broken = bench.trainer(tmp_path / "cut", recipe, dtype=dtype)
    step = broken._step

    def until():
        if broken.state.step == stop:
            raise RuntimeError("power cut")
        return step()

    broken._step = until
    with pytest.raises(RuntimeError, match="power cut"):
        broken.run()
    resumed = bench.trainer(tmp_path / "cut", recipe, dtype=dtype)
    resumed.run(resume=True)
    same(snapshot(whole), snapshot(resumed))
    same(whole.optimiser.moments(), resumed.optimiser.moments())
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    model, again = whole.model.state_dict(), resumed.model.state_dict()
    same(model, again)


def test_a_run_is_resumed_only_as_it_was_begun(bench, tmp_path):
    bench.trainer(tmp_path, bench.recipe(max_steps=2, save_steps=1)).run()
    for changed, name in (
        (bench.recipe(max_steps=2, save_steps=1, learning_rate=5e-4), "learning_rate"),
        (bench.recipe(max_steps=2, save_steps=1, seed=8), "seed"),
    ):
        with pytest.raises(UserError, match=name):
            bench.trainer(tmp_path, changed).run(resume=True)
    with pytest.raises(UserError, match="training rows"):
        bench.trainer(tmp_path, bench.recipe(max_steps=2, save_steps=1), rows=19).run(resume=True)


# --- schedules and the optimiser ---


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (7, 7), (1, 0)])
def test_schedules_are_transformers_own_after_their_dead_first_step(kind, total, warmup):
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=1.0)
    theirs = get_scheduler(name, optimiser, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        if step >= warmup:
            assert learning_rate_factor(kind, step, total, warmup) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        else:
            assert learning_rate_factor(kind, step, total, warmup) == pytest.approx((step + 1) / (warmup + 1))
        optimiser.step()
        theirs.step()


def test_the_optimiser_is_torchs_adamw_with_decay_on_matrices_alone():
    torch.manual_seed(0)
    ours = {"matrix": torch.nn.Parameter(torch.randn(8, 4)), "norm": torch.nn.Parameter(torch.randn(8))}
    theirs = {k: torch.nn.Parameter(v.detach().clone()) for k, v in ours.items()}
    master = MasterAdamW(ours, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    reference = torch.optim.AdamW(
        [{"params": [theirs["matrix"]], "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.99),
    )
    for step in range(20):
        for parameters in (ours, theirs):
            torch.manual_seed(step)
            sum((p * torch.randn_like(p)).sum() * 3 for p in parameters.values()).backward()
        master.clip(1.0)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        master.step(0.01)
        reference.step()
        reference.zero_grad()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backwards", [1, 3])
def test_one_pass_is_torchs_adamw(backwards):
    """Sizes that are no multiple of a vector, clipped gradients, several passes a step, bfloat16 and float32."""
    if kernels.load() is None:
        pytest.skip(kernels.why_not())
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    shapes = {"matrix": (37, 5), "norm": (19,), "large": (64, 48)}
    torch.manual_seed(0)
    made = {k: torch.randn(s).to(torch.float32 if k == "norm" else torch.bfloat16) for k, s in shapes.items()}
    one, other = ({k: torch.nn.Parameter(v.clone()) for k, v in made.items()} for _ in range(2))
    ours, theirs = MasterAdamW(one, **settings), MasterAdamW(other, **settings, one_pass=False)
    assert ours._kernels is not None and theirs._kernels is None
    for step in range(12):
        norms = []
        for parameters, optimiser in ((one, ours), (other, theirs)):
            torch.manual_seed(step)
            for _ in range(backwards):
                sum((p * torch.randn_like(p)).sum() * 3 for p in parameters.values()).backward()
            norms.append(optimiser.clip(1.0))
            optimiser.step(0.01 / (step + 1))
        assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 1
        for name, master in theirs.weights().items():
            torch.testing.assert_close(ours.weights()[name], master, rtol=1e-5, atol=1e-6, msg=name)
            assert torch.equal(one[name].detach(), ours.weights()[name].to(one[name].dtype))
    for name, moment in theirs.moments().items():
        torch.testing.assert_close(ours.moments()[name], moment, rtol=1e-4, atol=1e-7, msg=name)


def test_updates_below_bfloat16s_step_are_not_lost():
    weight = torch.nn.Parameter(torch.full((4, 4), 0.5, dtype=torch.bfloat16))
    master = MasterAdamW({"w": weight}, lr=1e-5, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    for _ in range(300):
        weight.sum().backward()
        master.step(1e-5)
    # 300 steps of 1e-5: one bfloat16 step at 0.5 is 0.002, which each of them alone could never make.
    assert (
        float(weight.detach().mean()) == pytest.approx(0.5 - 300e-5, abs=2e-3) and float(weight.detach().mean()) < 0.5
    )
    assert float(master.weights()["w"].mean()) == pytest.approx(0.497, abs=1e-5)


def test_no_norm_or_bias_decays(bench, tmp_path):
    trainer = bench.trainer(tmp_path, bench.recipe("full", weight_decay=0.5))
    groups = trainer.optimiser.adamw.param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert all(p.ndim == 2 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])


# --- ends ---


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_with_the_last_good_weights(bench, tmp_path, bad):
    trainer = bench.trainer(tmp_path, bench.recipe("full", max_steps=8, save_steps=100, eval_steps=100))
    step = trainer._step

    def poisoned():
        if trainer.state.step == 3:
            good.update(snapshot(trainer))
            if bad == "loss":
                logits = trainer.loss_function.logits
                trainer.loss_function.head = False
                trainer.loss_function.logits = lambda batch: logits(batch) * math.nan
            else:
                trainer.model.model.norm.weight.register_hook(lambda g: g * math.inf)
        return step()

    good: dict = {}
    trainer._step = poisoned
    with pytest.raises(UserError, match=r"step 4 is (nan|inf).*step 3 are kept") as caught:
        trainer.run()
    assert "learning_rate" in str(caught.value)
    kept = trainer.checkpoints.load(3).weights
    assert all(torch.isfinite(v).all() for v in kept.values())
    same(good, kept)


def test_early_stopping_keeps_the_best(bench, tmp_path):
    # A rate that makes the validation loss worse soon.
    recipe = bench.recipe("full", max_steps=60, eval_steps=2, early_stopping_patience=2, learning_rate=0.02)
    trainer = bench.trainer(tmp_path, recipe)
    outcome = trainer.run()
    evaluations = [(r["eval_loss"], r["step"]) for r in records(tmp_path) if "eval_loss" in r]
    assert outcome.stopped == "early stopping" and outcome.state.step < 60
    best_loss, best_step = min(evaluations)
    assert (outcome.state.best_loss, outcome.state.best_step) == (best_loss, best_step)
    if best_step:
        same(snapshot(trainer), trainer.checkpoints.load(best_step).weights)
        assert trainer.validation_loss()[0] == pytest.approx(best_loss, rel=1e-6)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_save_and_leave(bench, tmp_path, name):
    import os
    import signal

    number = getattr(signal, name)
    recipe = bench.recipe(max_steps=8, save_steps=100, eval_steps=100)
    trainer = bench.trainer(tmp_path / "cut", recipe)
    step = trainer._step

    def signalled():
        loss = step()
        if trainer.state.step == 3:
            os.kill(os.getpid(), number)
        return loss

    trainer._step = signalled
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        trainer.run()
    assert caught.value.number == number and trainer.checkpoints.steps() == [3]
    assert signal.getsignal(number) is before
    whole = bench.trainer(tmp_path / "whole", recipe)
    whole.run()
    resumed = bench.trainer(tmp_path / "cut", recipe)
    resumed.run(resume=True)
    same(snapshot(whole), snapshot(resumed))


def test_validation_is_the_mean_over_tokens(bench, tmp_path):
    trainer = bench.trainer(tmp_path, bench.recipe(per_device_eval_batch_size=2))
    loss, trained = trainer.validation_loss()
    total = count = 0.0
    with torch.no_grad():
        for row in trainer.validation_rows:
            ids = torch.from_numpy(row.input_ids.astype("int64"))[None]
            logits = trainer.model(input_ids=ids).logits[0, :-1].double()
            picked = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            total -= float(picked[torch.from_numpy(row.trained[1:])].sum())
            count += int(row.trained.sum())
    assert trained == count and loss == pytest.approx(total / count, rel=1e-6)
