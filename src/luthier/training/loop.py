"""The training loop. It reads from top to bottom: set up, then step, validate, save, until done."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.data.batch import Batch, Order
from luthier.data.encode import EncodedExample
from luthier.errors import UserError
from luthier.methods.base import TuningMethod
from luthier.models.heads import fresh_modules
from luthier.recipe import Recipe
from luthier.training.allocator import keep_freed_memory
from luthier.training.checkpoint import Checkpoint, Checkpoints, TrainState
from luthier.training.division import Replicas, Shards
from luthier.training.input import StepInput
from luthier.training.loss import LossFunction
from luthier.training.optimiser import MasterAdamW, learning_rate_factor
from luthier.training.plan import Plan
from luthier.training.processes import Processes
from luthier.training.progress import Reporter, Silent
from luthier.training.runlog import MetricsLog, peak_memory
from luthier.training.saver import Saver
from luthier.training.sharded_checkpoint import ShardedCheckpoints
from luthier.training.signals import STOPS, StopSignals
from luthier.training.zero import GatheredCheckpoints, Zero

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings that may change between an interruption and its resumption without changing the weights that come out.
_FREE = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "per_device_eval_batch_size",
    "load_best_model_at_end",
    # How a step is divided; the rows of a step must stay the same ones (see `_course`).
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "sharding",
}


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C or SIGTERM), saved a checkpoint and left."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; saved {checkpoint}")
        self.number = number
        self.checkpoint = checkpoint


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    plan: Plan
    stopped: str
    """``finished`` or ``early stopping``"""
    first_eval_loss: float | None
    last_loss: float


class Trainer:
    """Trains a wrapped model on encoded rows.

    Args:
        model: wrapped by its method: the parameters that require gradients are trained.
        loss_function: how its loss is computed.
        method: for its default learning rate and weight decay.
        recipe: training settings and seed.
        train_rows: rows to train on.
        validation_rows: rows to validate on; may be empty.
        run_dir: the run folder.
        accelerator: devices, processes and trackers.
        reporter: is told of the course.
        shards: the model in pieces; None: this process holds the whole of it.
        answers: scores what a model answers at each validation; None: the loss is all that is measured.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_function: LossFunction,
        method: TuningMethod,
        recipe: Recipe,
        train_rows: Sequence[EncodedExample],
        validation_rows: Sequence[EncodedExample],
        run_dir: Path,
        accelerator: Accelerator,
        reporter: Reporter | None = None,
        shards: Shards | Zero | None = None,
        answers: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    ) -> None:
        settings = recipe.training
        if accelerator.device.type == "cpu":
            keep_freed_memory()
        self.accelerator = accelerator
        self.processes = Processes.join()
        self.model = model if shards is not None else model.to(accelerator.device)
        self.division: Replicas | Shards | Zero = shards or Replicas(self.model, self.processes)
        self.loss_function = loss_function
        self.recipe = recipe
        self.settings = settings
        self.train_rows = train_rows
        self.validation_rows = validation_rows
        self.answers = answers
        self.run_dir = run_dir
        self.reporter: Reporter = reporter if reporter is not None and accelerator.is_main_process else Silent()
        self.plan = Plan.of(recipe, method, len(train_rows), accelerator.num_processes)
        self.order = Order(
            len(train_rows),
            batch_size=settings.per_device_train_batch_size,
            accumulation=settings.gradient_accumulation_steps,
            processes=accelerator.num_processes,
            seed=recipe.seed,
            shuffle=recipe.data.shuffle,
        )
        on_gpu = accelerator.device.type == "cuda"
        self.input = StepInput(
            loss_function.batch,
            train_rows,
            self.order,
            accelerator.process_index,
            steps=self.plan.steps,
            ahead=on_gpu,
            pin=on_gpu,
        )
        self.optimiser: Any = (
            shards
            if isinstance(shards, Zero)
            else MasterAdamW(
                self.division.parameters,
                lr=self.plan.learning_rate,
                weight_decay=self.plan.weight_decay,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_epsilon,
                rates=method.rates(self.division.parameters, recipe.method, fresh_modules(loss_function.model)),
                add_squares=None if shards is None else shards.add_squares,
            )
        )
        folder, keep = run_dir / "checkpoints", settings.save_total_limit
        self.checkpoints = (
            Checkpoints(folder, keep=keep)
            if shards is None
            else GatheredCheckpoints(folder, self.processes, keep=keep)
            if isinstance(shards, Zero)
            else ShardedCheckpoints(folder, shards.shapes, self.processes, keep=keep)
        )
        self.saver = Saver(self.checkpoints)
        self.state = TrainState(course=self._course())
        self._stops = StopSignals(self.reporter.say)
        self._signal: int | None = None
        self._log: MetricsLog | None = None
        if instead := loss_function.recompute_activations(settings.gradient_checkpointing):
            self.reporter.say(
                f"[yellow]training.gradient_checkpointing={settings.gradient_checkpointing}:[/yellow] {instead}"
            )

    def run(self, *, resume: bool = False) -> Outcome:
        """Train to the end, or go on from the newest whole checkpoint.

        Raises:
            UserError: the loss is no longer a number, the disk is full, or the checkpoint is of another run.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
        """
        if resume:
            self._resume()
        if self.accelerator.is_main_process:
            self._log = MetricsLog(self.run_dir / "metrics.jsonl", resume_step=self.state.step if resume else None)
        stopped = "finished"
        first_eval, loss = None, math.nan
        self._stops.catch()
        self.reporter.start(self.plan.steps, self.state.step)
        try:
            if self.state.step == 0 and self.validation_rows:
                first_eval = self._validate()
            while self.state.step < self.plan.steps:
                loss = self._step()
                self._signal = self._agreed_signal()
                step = self.state.step
                last = step == self.plan.steps
                if self.validation_rows and (step % self.plan.eval_steps == 0 or last):
                    self._validate()
                    patience = self.settings.early_stopping_patience
                    if patience is not None and self.state.evaluations_without_gain >= patience:
                        stopped = "early stopping"
                if step % self.plan.save_steps == 0 or last or stopped != "finished" or self._signal is not None:
                    self._save()
                if self._signal is not None and not last:
                    self.saver.wait()
                    raise Interrupted(self._signal, self.checkpoints.folder / f"step-{step}")
                if stopped != "finished":
                    break
            self.saver.wait()
            # The best checkpoint must be whole before any process reads it.
            self.processes.wait()
            self._take_best()
        finally:
            self.reporter.stop()
            self.input.close()
            self._stops.release()
            self.optimiser.close()
            if self._log is not None:
                self._log.close()
            # Last, for it takes as long as the disk does.
            if (error := self.saver.close()) is not None:
                self.reporter.say(f"[yellow]the last checkpoint was not saved:[/yellow] {error}")
        return Outcome(self.state, self.plan, stopped, first_eval, loss)

    def _step(self) -> float:
        """One optimiser step; returns its loss, the mean over all trained tokens of all its forward passes."""
        began = time.perf_counter()
        step = self.state.step
        self.model.train()
        self._seed(step)
        batches = self.input.take(step)
        # One count for the whole step, over all forward passes and processes: each trained token weighs the same.
        trained, tokens, computed = self._sum(
            [sum(getattr(b, key) for b in batches) for key in ("trained_tokens", "tokens", "computed")]
        )
        total = torch.zeros((), device=self.accelerator.device)
        passes = len(self.order.step(step, 0))
        self.division.begin_step(passes)
        for batch, share in self._in_lockstep(batches, passes):
            loss = self._loss(batch) * share / trained
            loss.backward()
            total += loss.detach()
        loss_value = self._sum([float(total)])[0]
        if not math.isfinite(loss_value):
            self._stop_for("loss", loss_value)
        self.division.add_gradients(lambda: self.optimiser.gradients)
        norm = self.optimiser.clip(self.settings.max_grad_norm)
        if not math.isfinite(norm):
            self._stop_for("gradient norm", norm)
        rate = self.plan.learning_rate * learning_rate_factor(
            self.settings.lr_scheduler_type, step, self.plan.steps, self.plan.warmup
        )
        self.saver.before_update()
        self.optimiser.step(rate)
        seconds = time.perf_counter() - began
        state = self.state
        state.step += 1
        state.tokens += int(tokens)
        state.trained_tokens += int(trained)
        state.computed_tokens += int(computed)
        state.seconds += seconds
        record = {
            "step": state.step,
            "epoch": round(state.step / self.plan.steps_per_epoch, 4),
            "loss": loss_value,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": int(tokens),
            "trained_tokens": int(trained),
            "computed_tokens": int(computed),
            "seconds": round(seconds, 4),
            "peak_memory_bytes": peak_memory(self.accelerator.device),
        }
        self.reporter.step(record)
        if state.step % self.settings.logging_steps == 0 or state.step == self.plan.steps:
            self._record(record)
        return loss_value

    @torch.no_grad()
    def validation_loss(self) -> tuple[float, int]:
        """Mean loss over the trained tokens of all validation rows, with the weights as they are; and their count."""
        self.model.eval()
        mine = self.validation_rows[self.accelerator.process_index :: self.accelerator.num_processes]
        total, count = 0.0, 0.0
        size = self.settings.per_device_eval_batch_size
        batches = (self.loss_function.batch(list(mine[i : i + size])) for i in range(0, len(mine), size))
        most = math.ceil(math.ceil(len(self.validation_rows) / self.processes.count) / size)
        for batch, share in self._in_lockstep(batches, most):
            total += share * float(self._loss(batch))
            count += share * batch.trained_tokens
        total, count = self._sum([total, count])
        return total / count, int(count)

    def _validate(self) -> float:
        """Measure, keep track of the best, and save it."""
        began = time.perf_counter()
        loss, count = self.validation_loss()
        state = self.state
        # Every process answers the same rows, for the pieces of a divided model must be at hand all the time.
        scores = {} if self.answers is None else self._mean(self.division.call(self.answers, self.model))
        score = scores.get(self.settings.metric_for_best_model)
        best = state.best_loss is None or self._is_better(loss, score)
        if best:
            state.best_loss, state.best_score = loss, score
            state.best_step, state.evaluations_without_gain = state.step, 0
        else:
            state.evaluations_without_gain += 1
        record: dict[str, Any] = {
            "step": state.step,
            "eval_loss": loss,
            "eval_trained_tokens": count,
            "eval_seconds": round(time.perf_counter() - began, 4),
            "best": best,
        }
        record |= {f"eval_{name}": value for name, value in scores.items()}
        if score is not None:
            record["best_by"] = self.settings.metric_for_best_model
        if self.loss_function.of_tokens:
            record["eval_perplexity"] = math.exp(min(loss, 700))
        self.reporter.evaluation(record)
        self._record(record)
        if best and state.step and self.settings.load_best_model_at_end:
            self._save()
        return loss

    def _is_better(self, loss: float, score: float | None) -> bool:
        """Whether a validation is better than the best one so far."""
        assert self.state.best_loss is not None
        if score is None or self.state.best_score is None:
            return loss < self.state.best_loss
        return (score, -loss) > (self.state.best_score, -self.state.best_loss)

    def _mean(self, scores: dict[str, float]) -> dict[str, float]:
        """The same numbers on all processes, whose sums may be rounded differently."""
        sums = self._sum(list(scores.values()))
        return {name: total / self.processes.count for name, total in zip(scores, sums, strict=True)}

    def _save(self) -> None:
        """Begin a checkpoint of this step, once; pieces of a sharded one are written by all processes together."""
        if isinstance(self.checkpoints, ShardedCheckpoints):
            if self.saver.step != self.state.step:
                self.checkpoints.save(self.state, self.optimiser.weights(), self.optimiser.moments())
                self.saver.step = self.state.step
        elif self.accelerator.is_main_process:
            self.saver.save(self.state, self.optimiser.weights(), self.optimiser.moments())

    def _resume(self) -> None:
        refused: list[str] = []
        checkpoint = self._newest(refused)
        for reason in refused:
            self.reporter.say(f"[yellow]checkpoint refused:[/yellow] {reason}")
        if checkpoint is None:
            self.reporter.say("no whole checkpoint to go on from; starting at step 0")
            return
        ours, theirs = self.state.course, checkpoint.state.course
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"the checkpoint was made with {key}={theirs.get(key)!r}, this run has {ours.get(key)!r}",
                    where=str(checkpoint.path),
                    remedy="resume with the same data and settings, or start a new run in another output_dir",
                )
        try:
            self.optimiser.restore(checkpoint.weights, checkpoint.moments)
        except ValueError as error:
            raise UserError(str(error), where=str(checkpoint.path), remedy="start a new run") from None
        self.state = checkpoint.state
        self.saver.step = self.state.step
        self.reporter.say(f"going on from step {self.state.step} ({checkpoint.path})")

    def _newest(self, refused: list[str]) -> Checkpoint | None:
        """The newest checkpoint that is whole for every process.

        Raises:
            UserError: the processes do not see the same ones.
        """
        checkpoint = self.checkpoints.newest(refused)
        steps = self.processes.gather(checkpoint.state.step if checkpoint else None)
        if any(step != steps[0] for step in steps):
            raise UserError(
                f"the processes find different checkpoints: of steps {', '.join(str(s) for s in steps)}",
                where=str(self.checkpoints.folder),
                remedy="put output_dir on a file system that all machines share",
            )
        return checkpoint

    def _take_best(self) -> None:
        """Leave the model with the weights of the best validation."""
        best = self.state.best_step
        if not self.settings.load_best_model_at_end or best is None or best == self.state.step:
            return
        if best == 0:
            self.reporter.say(
                "[yellow]no validation was better than the base model's[/yellow]; the last weights are kept"
            )
            return
        self.optimiser.restore(self.checkpoints.load(best).weights)
        self.reporter.say(f"taking the weights of step {best}, the best validation ({self._best_said()})")

    def _best_said(self) -> str:
        state = self.state
        if state.best_score is None:
            return f"{state.best_loss:.4f}"
        return f"{self.settings.metric_for_best_model} {state.best_score:.4f}, loss {state.best_loss:.4f}"

    def _stop_for(self, what: str, value: float) -> None:
        """The weights are still those of the last good step: save them, and stop.

        Raises:
            UserError: always.
        """
        if self.state.step:
            self._save()
            self.saver.wait()
        good = f"the weights of step {self.state.step} are kept in {self.checkpoints.folder}"
        raise UserError(
            f"the {what} of step {self.state.step + 1} is {value}; "
            + (good if self.state.step else "no step was trained"),
            where=str(self.run_dir),
            remedy="lower training.learning_rate, lengthen training.warmup_ratio, or look for broken rows with "
            "`luthier check`",
        )

    def _course(self) -> dict[str, Any]:
        settings = {k: v for k, v in self.settings.model_dump().items() if k not in _FREE}
        return {
            **{f"training.{k}": v for k, v in settings.items()},
            **{f"method.{k}": v for k, v in self.recipe.method.model_dump().items()},
            **{f"task.{k}": v for k, v in self.recipe.task.model_dump(exclude={"name"}).items()},
            "model.name": Path(self.recipe.model.name).name,
            "seed": self.recipe.seed,
            "data.shuffle": self.recipe.data.shuffle,
            "training rows (SHA-256)": rows_sha256(self.train_rows),
            "rows a step": self.order.per_step,
        }

    def _record(self, record: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(record)
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
        self.accelerator.log(numbers, step=record["step"])

    def _sum(self, values: list[float]) -> list[float]:
        """Numbers added up over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        reduced: Any = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.accelerator.device), "sum"
        )
        return [float(v) for v in reduced]

    def _agreed_signal(self) -> int | None:
        """The signal that any process has received: all stop after the same step."""
        counts = self._sum([float(self._stops.received == number) for number in STOPS])
        return next((number for number, count in zip(STOPS, counts, strict=True) if count), None)

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Summed loss of a batch."""
        loss: torch.Tensor = self.division.call(self.loss_function, batch.to(self.accelerator.device))
        return loss

    def _in_lockstep(self, batches: Iterable[Batch], most: int) -> Iterator[tuple[Batch, float]]:
        """This process's batches, each with the share 1; then, where all must run the model together and others have
        more of them (``most``), stand-ins whose share is 0."""
        own = 0
        for batch in batches:
            own += 1
            yield batch, 1.0
        if self.division.lockstep:
            for _ in range(own, most):
                yield self.loss_function.batch([min(self.train_rows, key=len)]), 0.0

    def _seed(self, step: int) -> None:
        """Random numbers of a step (dropout) follow from seed, step and process: resuming needs no saved state."""
        words = np.random.SeedSequence([self.recipe.seed, step, self.accelerator.process_index]).generate_state(2)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def rows_sha256(rows: Sequence[EncodedExample]) -> str:
    """SHA-256 of encoded rows: their ids, trained tokens, what else belongs to them, and order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.input_ids.tobytes())
        digest.update(row.trained.tobytes())
        digest.update(np.array(row.extra, dtype=np.int32).tobytes())
    return digest.hexdigest()
