"""Pre-flight checks that need the model: stop tokens, memory, disk, and the first loss."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.data.dataset import Dataset
from luthier.data.encode import EncodedExample
from luthier.data.encoded import lengths_of
from luthier.methods.base import TuningMethod, method_of, parameter_counts
from luthier.models.memory import free_memory
from luthier.models.quantized import held_bytes
from luthier.recipe import Recipe
from luthier.training.fused.layer import Recompute
from luthier.training.loss import LossFunction
from luthier.training.plan import Plan
from luthier.training.preflight.findings import Finding
from luthier.training.saver import COPIED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Libraries' own buffers, the logits of a chunk and what the allocator cannot use again.
_WORKSPACE = 600_000_000


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run is predicted to take, in bytes."""

    weights: int
    optimiser: int
    activations: int
    disk: int

    @property
    def memory(self) -> int:
        """Peak of what is still to be allocated: the weights are loaded already."""
        return self.optimiser + self.activations


def predict(
    recipe: Recipe, model: torch.nn.Module, rows: Sequence[EncodedExample], loss_function: LossFunction
) -> Needs:
    """Predicted memory and disk of a run with a wrapped model.

    Optimiser: float32 master weight, gradient and two moments a trained parameter, beside the gradient in the
    weights' own precision, and the copy that a small checkpoint is written from. Activations: what the backward pass
    keeps of each layer for the tokens of one forward pass (fused layers know; the model's own keep about 8
    hidden-sized and 4 intermediate-sized tensors), the heaviest batch of the rows taken, and a constant. Rows that
    share a beginning need less. Disk: float32 weights and two moments a checkpoint, those kept and the one being
    written, and the saved model.
    """
    trained, every = parameter_counts(model)
    size = next(model.parameters()).element_size()
    lengths = np.sort(lengths_of(rows))[::-1] if rows else np.zeros(1, dtype=int)
    batch = recipe.training.per_device_train_batch_size
    # The heaviest batch seen over a few thousand shuffled steps lies near its mean plus four deviations.
    spread = float(lengths.mean() * batch + 4 * lengths.std() * math.sqrt(batch))
    tokens = min(int(lengths[:batch].sum()), int(spread) + 1)
    tokens += batch * loss_function.virtual.count
    layers = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
    recompute = recipe.training.gradient_checkpointing
    kept = layers * _kept_a_layer(recipe, model, loss_function, recompute)
    if recompute:  # a layer holds everything while its backward pass runs
        kept += _kept_a_layer(recipe, model, loss_function, False)
    checkpoint = trained * 12
    copied = checkpoint if checkpoint <= COPIED else 0
    saved = (trained if method_of(recipe.method).adapter else every) * size
    merged = every * size if recipe.deployment.merge else 0
    return Needs(
        weights=held_bytes(model),
        optimiser=trained * (16 + size) + copied,
        activations=tokens * kept + _WORKSPACE,
        disk=checkpoint * (recipe.training.save_total_limit + 2) + 2 * saved + 2 * merged,
    )


def _kept_a_layer(recipe: Recipe, model: torch.nn.Module, loss_function: LossFunction, recompute: Recompute) -> int:
    """Bytes a token that a layer keeps for the backward pass."""
    if loss_function.fused is not None:
        return loss_function.fused.kept_bytes(recompute)
    size = next(model.parameters()).element_size()
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    hidden = int(config.hidden_size)
    if recompute:  # whole layers, whatever was asked for
        return hidden * size
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    values = 8 * hidden + 4 * inner
    return (values + method_of(recipe.method).kept_values(recipe.method, hidden, inner)) * size


def check_room(needs: Needs, run_dir: Path, device: torch.device, sharers: int = 1) -> Iterator[Finding]:
    """Findings where the prediction for each of ``sharers`` processes does not fit what is free for all of them."""
    free = free_memory(device) // sharers
    if needs.memory > free:
        yield Finding(
            "memory",
            "error" if needs.memory > 1.3 * free else "warning",
            f"training is predicted to need {_size(needs.memory)} beside the loaded weights "
            f"({_size(needs.optimiser)} optimiser, {_size(needs.activations)} activations); {_size(free)} are free",
            "lower training.per_device_train_batch_size and raise gradient_accumulation_steps by as much, set "
            "training.gradient_checkpointing=true, lower data.max_length, or use method.name=lora",
        )
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder).free
    if needs.disk > disk:
        yield Finding(
            "disk",
            "error",
            f"checkpoints and the saved model are predicted to need {_size(needs.disk)}; {folder} has {_size(disk)}",
            "name another output_dir, free space, or lower training.save_total_limit",
        )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:,.1f} {unit}" if unit == "GB" else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def check_settings(recipe: Recipe, method: TuningMethod, plan: Plan, rows: int) -> Iterator[Finding]:
    """Learning rate, rank, epochs and amount of data outside what usually works for the method."""
    advice = method.advice
    low, high = advice.learning_rate
    if not low <= plan.learning_rate <= high:
        yield Finding(
            "learning_rate",
            "warning",
            f"learning rate {plan.learning_rate:g} is outside {low:g} to {high:g}, which usually works for "
            f"{method.name}",
            f"leave training.learning_rate empty for the default, {method.learning_rate:g}, or compare both",
        )
    epochs = plan.steps / max(plan.steps_per_epoch, 1)
    if epochs > advice.epochs[1] + 1e-9:
        yield Finding(
            "epochs",
            "warning",
            f"{epochs:.1f} passes over {rows:,} rows: above {advice.epochs[1]:g} a model tends to memorise",
            "watch the validation loss (the best checkpoint is kept), or add rows",
        )
    rank = getattr(recipe.method, "r", None)
    if advice.rank and rank is not None and not advice.rank[0] <= rank <= advice.rank[1]:
        yield Finding(
            "rank",
            "warning",
            f"rank {rank} is outside {advice.rank[0]} to {advice.rank[1]}, which usually works for {method.name}",
            "a higher rank wants more rows; compare it with method.r=8",
        )
    if 0 < rows < advice.examples[0]:
        other = "" if method.adapter else ", or use method.name=lora, which wants fewer"
        yield Finding(
            "few_rows",
            "warning",
            f"{rows:,} training rows are few for {method.name}, which wants {advice.examples[0]:,} at the least",
            "add rows" + other,
        )


def check_stop_tokens(added: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[Finding]:
    """Says which end-of-turn tokens generation lacked; loading has added them to what will be saved."""
    if added:
        names = ", ".join(repr(t) for t in tokenizer.convert_ids_to_tokens(added))
        yield Finding(
            "end_of_turn_not_stop",
            "info",
            f"the model's generation config does not stop at {names}, where this template ends an answer; the saved "
            "model's config will",
        )


@torch.no_grad()
def first_loss(
    model: torch.nn.Module, loss_function: LossFunction, dataset: Dataset, rows: int = 4
) -> tuple[float, float] | None:
    """Mean loss of a few rows: by the training path, and by the model's own forward, one row at a time.

    Returns:
        ``(trained, plain)``, nats a token; None where there is no row.
    """
    first = sorted(dataset.train.encoded[: 50 * rows], key=len)
    examples = first[: 10 * rows : 10] or first[:1]
    if not examples:
        return None
    device = next(model.parameters()).device
    was, attention = model.training, model.config._attn_implementation  # type: ignore[union-attr]
    model.eval()
    try:
        batch = loss_function.batch(examples).to(device)
        ours = float(loss_function(batch)) / batch.trained_tokens
        total = 0.0
        model.set_attn_implementation("eager")  # type: ignore[operator]
        for row in examples:
            total += float(loss_function.own_loss(row))
        return ours, total / batch.trained_tokens
    finally:
        model.set_attn_implementation(attention)  # type: ignore[operator]
        model.train(was)


def check_first_loss(losses: tuple[float, float] | None, chance: float | None, coarse: bool) -> Iterator[Finding]:
    """The first loss must be the base model's own, and better than guessing where the model should know something.

    ``coarse``: products are in half precision, or of inputs rounded to 8 bits.
    """
    if losses is None:
        return
    ours, plain = losses
    # bfloat16 rounds logits by about 1/256 of their size; means over tokens differ by far less than this. Of 8-bit
    # weights, SmolLM2 in float32: 1.2%, for which columns of a product stay whole depends on all rows in it.
    bound = (0.03 if coarse else 1e-3) * max(plain, 1.0)
    if not math.isfinite(ours) or abs(ours - plain) > bound:
        yield Finding(
            "first_loss",
            "error",
            f"the first loss is {ours:.4f}, the untouched model's own is {plain:.4f} (bound {bound:.3g})",
            "the training path does not compute this model rightly: set model.batching=padded and report it",
        )
    elif chance is not None and plain > chance:
        yield Finding(
            "loss_above_chance",
            "warning",
            f"the base model's loss, {plain:.2f}, is above that of guessing, {chance:.2f}",
            "the text is in a language or a form unknown to the model; check the chat template and the files' encoding",
        )
