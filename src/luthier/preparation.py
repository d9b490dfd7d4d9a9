"""What stands ready before step one: the rows, the wrapped model, and the way its loss is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from luthier.data.dataset import Dataset, prepare
from luthier.data.examples import TrainingExample
from luthier.errors import UserError
from luthier.evaluation.answering import local_answerer
from luthier.methods import method_of
from luthier.methods.base import TuningMethod, trainable_parameters
from luthier.methods.saved import fingerprint
from luthier.models.catalogue import CATALOGUE
from luthier.models.heads import Head, fresh_modules
from luthier.models.loading import (
    add_tokens,
    context_of,
    extend,
    grow,
    load_config,
    load_model,
    load_tokenizer,
    set_padding,
    set_stop_tokens,
    training_dtype,
)
from luthier.recipe import Recipe
from luthier.tasks import Task, get_task
from luthier.training.division import Replicas, Shards
from luthier.training.loss import LossFunction
from luthier.training.preflight import Preflight, preflight
from luthier.training.processes import Processes, deepspeed_asked_for, make_accelerator
from luthier.training.zero import Zero

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class Prepared:
    """Everything that stands ready before step one."""

    recipe: Recipe
    method: TuningMethod
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    base_fingerprint: str
    model: torch.nn.Module
    loss_function: LossFunction
    dataset: Dataset
    task: Task
    stop_tokens_added: list[int]
    accelerator: Accelerator
    processes: Processes
    shards: Shards | Zero | None
    """the model's pieces; None where this process holds the whole of it"""

    @property
    def base_name(self) -> str:
        """The base by a name that holds from any working folder."""
        name = self.recipe.model.name
        return name if name in CATALOGUE else str(self.base.name_or_path)

    def check(self) -> Preflight:
        """The pre-flight."""
        # Processes on CPUs share one memory; each GPU has its own.
        sharers = self.processes.local_count if self.accelerator.device.type == "cpu" else 1
        return (self.shards or Replicas(self.model, self.processes)).call(
            preflight,
            self.recipe,
            self.method,
            self.dataset,
            self.model,
            self.loss_function,
            found=self.task.findings(self.recipe, self.dataset),
            chance=self.task.chance(self.model),
            stop_tokens_added=self.stop_tokens_added,
            run_dir=Path(self.recipe.output_dir),
            processes=self.processes.count,
            sharers=sharers,
            pieces=1 if self.shards is None else self.processes.count,
        )

    def put_together(self) -> Prepared:
        """The same with the whole model, on the main process; all processes must call.

        The base is loaded and wrapped once more, and takes the trained weights of all.
        """
        if self.shards is None:
            return self
        trained = self.shards.whole(keep=self.processes.main)
        if not self.processes.main:
            return self
        spec = self.recipe.model
        self.shards = None
        base = _base(self.recipe, self.method, self.task.head(self.dataset), self.tokenizer, self.accelerator.device)
        new_tokens = add_tokens(base, load_tokenizer(spec.name, revision=spec.revision), spec.added_tokens)
        set_stop_tokens(base, self.tokenizer)
        model = self.method.wrap(base, self.recipe.method, new_tokens, self.task.type)
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                parameter.copy_(trained[name])
        return replace(self, base=base, model=model.to(self.accelerator.device))


def prepare_run(recipe: Recipe, given: Mapping[str, Sequence[TrainingExample]] | None = None) -> Prepared:
    """Load model and rows, wrap the model by its method, and choose how its loss is computed.

    Raises:
        UserError: anything that is wrong with model, data or method.
    """
    processes = Processes.join()
    accelerator = make_accelerator(recipe.training.report_to, Path(recipe.output_dir))
    method = method_of(recipe.method)
    task = get_task(recipe.task.name)
    task.check(recipe)
    method.check(recipe)
    if deepspeed_asked_for() and not method.divides:
        raise UserError(
            f"DeepSpeed cannot divide a model that is tuned by method {method.name}",
            where="method.name",
            remedy="leave DeepSpeed out of the Accelerate configuration, or use method.name=lora",
        )
    spec = recipe.model
    config = load_config(spec.name, revision=spec.revision)
    task.check_model(config, spec.name)
    tokenizer = load_tokenizer(spec.name, revision=spec.revision, chat_template=spec.chat_template, chats=task.writes)
    pieces = extend(tokenizer, spec.added_tokens)
    # What the model is loaded with may depend on the rows: a classifier's head on their classes.
    context = context_of(config, tokenizer)
    if context is not None:
        context -= method.virtual_tokens(recipe.method)
    # The others find encoded rows, and what a model has answered to augmenters, on disk.
    with processes.main_first() if recipe.data.cache and processes.count > 1 else contextlib.nullcontext():
        dataset = prepare(recipe, tokenizer, context=context, given=given, local=local_answerer)
    base = _base(recipe, method, task.head(dataset), tokenizer, accelerator.device)
    new_tokens = grow(base, tokenizer, pieces)
    added = set_stop_tokens(base, tokenizer)
    base_print = fingerprint(base)
    torch.manual_seed(recipe.seed)
    model = method.wrap(base, recipe.method, new_tokens, task.type)
    shards: Shards | Zero | None = None
    if deepspeed_asked_for():
        settings = recipe.training
        if settings.sharding == "full":
            raise UserError(
                "training.sharding=full and DeepSpeed both divide the model",
                where="training.sharding",
                remedy="set it to none, or leave DeepSpeed out of the Accelerate configuration",
            )
        if method.rates(trainable_parameters(model), recipe.method, fresh_modules(model)):
            raise UserError(
                "DeepSpeed's optimiser would let all parameters learn equally fast",
                where="method",
                remedy="leave method.loraplus_lr_ratio empty, set method.modules_to_save_lr_ratio to 1, or use "
                "training.sharding=full in the place of DeepSpeed",
            )
        shards = Zero(
            model,
            processes,
            accelerator.device,
            weight_decay=method.weight_decay if settings.weight_decay is None else settings.weight_decay,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
        )
    elif recipe.training.sharding == "full" and processes.count > 1:
        # Before anything runs on the device, which may not hold the whole model.
        shards = Shards(model, processes, accelerator.device)
    else:
        model.to(accelerator.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    division = shards or Replicas(model, processes)
    share = recipe.training.share_prefix != "never"
    loss_function = division.call(
        task.loss_function, model, dataset, batching=spec.batching, pad_token_id=pad, share_prefix=share
    )
    return Prepared(
        recipe,
        method,
        tokenizer,
        base,
        base_print,
        model,
        loss_function,
        dataset,
        task,
        added,
        accelerator,
        processes,
        shards,
    )


def _base(
    recipe: Recipe, method: TuningMethod, head: Head, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    """The untouched model, in the precision that it is trained in; a new head's weights follow from the seed."""
    spec = recipe.model
    torch.manual_seed(recipe.seed)
    model = load_model(
        spec.name,
        revision=spec.revision,
        dtype=training_dtype(spec.dtype, device),
        quantization=method.quantization(recipe.method),
        head=head,
    )
    set_padding(model, tokenizer)
    return model
