"""The main job from end to end: rows and a model in, a tuned, compared and saved model out.

The command line and the Python classes both call :func:`run`; there is no other way through the house.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from luthier.data.examples import TrainingExample
from luthier.deployment.merge import merge_model
from luthier.deployment.parity import ParityReport, check_parity, require
from luthier.errors import UserError
from luthier.methods.saved import load_saved, write_record
from luthier.models.loading import load_model, without_bars
from luthier.preparation import Prepared, prepare_run
from luthier.recipe import Recipe
from luthier.record import Record
from luthier.report import tell
from luthier.runfolder import RunFolder
from luthier.tasks import Judgement
from luthier.training.checkpoint import writing
from luthier.training.loop import Interrupted, Outcome, Trainer, rows_sha256
from luthier.training.preflight import render_preflight
from luthier.training.processes import Processes
from luthier.training.progress import Reporter, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class RunResult:
    """What a run leaves behind, beside its folder."""

    run_dir: Path
    saved: Path
    """``adapter/`` or ``model/``"""
    outcome: Outcome
    comparison: Judgement | None
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    parity_prompts: list[str]
    """Rendered held-out prompts that later hand-overs are checked with."""


def run(
    recipe: Recipe,
    *,
    given: Mapping[str, Sequence[TrainingExample]] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    reporter: Reporter | None = None,
) -> RunResult:
    """Train, save behind the parity gate, compare base and tuned, and merge where the recipe says so.

    Args:
        recipe: everything the run needs.
        given: rows by part that come from Python instead of files.
        resume: go on with the run in output_dir.
        overwrite: replace the run in output_dir.
        console: where tables are printed; None: nowhere.
        reporter: is told of the course of training.

    Raises:
        UserError: a mistake of the user's; what was trained so far is kept in output_dir.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    processes = Processes.join()
    with processes.telling(Interrupted):
        result = _run(recipe, processes, given, resume, overwrite, console or Console(quiet=True), reporter or Silent())
        processes.wait()
    return result


def _run(
    recipe: Recipe,
    processes: Processes,
    given: Mapping[str, Sequence[TrainingExample]] | None,
    resume: bool,
    overwrite: bool,
    console: Console,
    reporter: Reporter,
) -> RunResult:
    """What :func:`run` does; the run folder is the main process's."""
    folder = RunFolder(Path(recipe.output_dir).expanduser())
    if processes.main:
        folder.claim(resume=resume, overwrite=overwrite)
    processes.wait()
    ready = prepare_run(recipe, given)
    processes.agree("rows", rows_sha256(ready.dataset.train.encoded))
    processes.agree("base weights", ready.base_fingerprint)
    report = ready.check()
    record = Record(folder, ready) if processes.main else None
    if record is not None:
        for note in ready.dataset.notes:
            console.print(note, highlight=False, markup=False)
        console.print(render_preflight(report))
        if overwrite and not resume:
            # The earlier run stays where the new one is refused.
            report.require()
            folder.clear()
        record.start(report)
    comparison: Judgement | None = None
    kept = record.kept() if record is not None else contextlib.nullcontext()
    with kept, processes.telling(Interrupted), _memory_explained(folder):
        if processes.main:
            report.require()
        processes.wait()
        report.require()
        outcome = _train(ready, folder, resume, reporter)
        ready = ready.put_together()
        if record is not None:
            record.trained(outcome)
            parity = [_save(ready, folder)]
            if recipe.evaluation.enabled:
                comparison = _evaluate(ready, folder, console, record.manifest)
            if recipe.deployment.merge:
                parity.append(merge_run(ready, folder))
            record.manifest["parity"] = [p.to_dict() for p in parity]
            record.finish("finished")
    if record is not None:
        tell(folder.path, console)
    prompts = ready.task.parity_texts(ready.dataset, ready.tokenizer)
    return RunResult(folder.path, folder.saved, outcome, comparison, ready.model, ready.tokenizer, prompts)


@contextlib.contextmanager
def _memory_explained(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"memory ran out: {str(error).splitlines()[0] if str(error) else 'no more could be had'}",
            where=str(folder.path),
            remedy="lower training.per_device_train_batch_size and raise gradient_accumulation_steps by as much, or "
            "set training.gradient_checkpointing=true; --resume goes on from the last checkpoint",
        ) from None


def _train(ready: Prepared, folder: RunFolder, resume: bool, reporter: Reporter) -> Outcome:
    if ready.recipe.training.report_to:
        ready.accelerator.init_trackers(folder.path.name)
    trainer = Trainer(
        ready.model,
        ready.loss_function,
        ready.method,
        ready.recipe,
        ready.dataset.train.encoded,
        ready.dataset.validation.encoded,
        folder.path,
        ready.accelerator,
        reporter,
        ready.shards,
        ready.task.answers(ready.recipe, ready.dataset),
    )
    try:
        outcome = trainer.run(resume=resume)
    finally:
        # Not `end_training`, which would part the processes as well.
        for tracker in ready.accelerator.trackers:
            tracker.finish()
    ready.model.eval()
    ready.model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return outcome


def _evaluate(ready: Prepared, folder: RunFolder, console: Console, manifest: dict[str, Any]) -> Judgement | None:
    """Base against tuned, and the harm where the recipe asks for it.

    What was trained is saved by now, so a comparison that fails is told and costs no run.

    Returns:
        the comparison.
    """
    models: list[tuple[str, Callable[[], Any]]] = [
        ("base", _as_base(ready)),
        ("tuned", lambda: contextlib.nullcontext(ready.model)),
    ]
    found: Judgement | None = None
    try:
        target = folder.path / "evaluation/comparison.json"
        found = ready.task.judge(ready.recipe, ready.dataset, models, target, console)
        if ready.recipe.evaluation.harm:
            target = target.with_name("harm.json")
            ready.task.judge_harm(ready.recipe, ready.dataset, models, target, console, found)
    except UserError as error:
        manifest["evaluation_error"] = str(error)
        console.print(f"the model is saved, but could not be compared: {error}", style="yellow", highlight=False)
    return found


def _save(ready: Prepared, folder: RunFolder) -> ParityReport:
    """Save the tuned weights aside, load them again as a user would, and rename when both agree bit for bit."""
    kind = "adapter" if ready.method.adapter else "model"
    target, aside = folder.path / kind, folder.path / f".writing-{kind}"
    _remove(aside)
    try:
        with writing(target), without_bars():
            ready.method.save(ready.model, aside)
            ready.tokenizer.save_pretrained(aside)
            if ready.method.adapter:
                write_record(
                    aside,
                    ready.base,
                    ready.base_name,
                    base_fingerprint=ready.base_fingerprint,
                    method=ready.method,
                    recipe=ready.recipe,
                )
        reloaded = load_saved(aside, dtype=next(ready.model.parameters()).dtype)
        parity = check_parity(
            ready.model,
            reloaded.model,
            ready.tokenizer,
            ready.task.parity_texts(ready.dataset, ready.tokenizer),
            candidate_tokenizer=reloaded.tokenizer,
            name="saved and reloaded",
            exact=True,
        )
        require(parity)
        _remove(target)
        aside.rename(target)
    finally:
        _remove(aside)
    return parity


def merge_run(ready: Prepared, folder: RunFolder) -> ParityReport:
    """Merge the trained adapter into the base, behind the parity gate, into ``merged/``."""
    return merge_model(
        ready.model,
        ready.tokenizer,
        folder.path / "merged",
        prompts=ready.task.parity_texts(ready.dataset, ready.tokenizer),
    )


def _as_base(ready: Prepared) -> Callable[[], Any]:
    """A context in which the model is the untouched base: the adapter is off, or the base is loaded once more."""
    if ready.method.adapter:

        @contextlib.contextmanager
        def without_adapter() -> Iterator[torch.nn.Module]:
            with ready.model.disable_adapter():  # type: ignore[operator]
                yield ready.model

        return without_adapter

    @contextlib.contextmanager
    def loaded() -> Iterator[torch.nn.Module]:
        spec = ready.recipe.model
        head = ready.task.head(ready.dataset)
        dtype = next(ready.model.parameters()).dtype
        base = load_model(spec.name, revision=spec.revision, dtype=dtype, head=head)
        yield base.to(ready.accelerator.device)

    return loaded


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
