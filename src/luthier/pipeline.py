"""The main job from end to end: rows and a model in, a tuned, compared and saved model out.

The command line and the Python classes both call :func:`run`; there is no other way through the house.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from luthier.data.dataset import Dataset, prepare
from luthier.data.examples import TrainingExample
from luthier.data.render import prompt_messages, prompt_text
from luthier.deployment.merge import merge_model
from luthier.deployment.parity import ParityReport, check_parity, require
from luthier.errors import UserError
from luthier.evaluation.comparison import Comparison, compare, render_comparison
from luthier.methods import get_method
from luthier.methods.base import TuningMethod
from luthier.methods.saved import fingerprint, load_saved, write_fingerprint
from luthier.models.catalogue import CATALOGUE
from luthier.models.loading import add_tokens, load_model, load_tokenizer, set_stop_tokens, training_dtype, without_bars
from luthier.recipe import Recipe
from luthier.runfolder import RunFolder
from luthier.training.checkpoint import writing
from luthier.training.loop import Interrupted, Outcome, Trainer
from luthier.training.loss import LossFunction
from luthier.training.preflight import Preflight, preflight, render_preflight
from luthier.training.progress import Reporter, Silent
from luthier.training.runlog import environment, write_json, write_rejects

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PARITY_PROMPTS = 8


@dataclass(slots=True)
class Prepared:
    """Everything that stands ready before step one."""

    recipe: Recipe
    method: TuningMethod
    tokenizer: PreTrainedTokenizerBase
    base: PreTrainedModel
    model: torch.nn.Module
    loss_function: LossFunction
    dataset: Dataset
    stop_tokens_added: list[int]
    accelerator: Accelerator

    def check(self) -> Preflight:
        """The pre-flight."""
        return preflight(
            self.recipe,
            self.method,
            self.dataset,
            self.model,
            self.loss_function,
            stop_tokens_added=self.stop_tokens_added,
            run_dir=Path(self.recipe.output_dir),
            processes=self.accelerator.num_processes,
        )


@dataclass(slots=True)
class RunResult:
    """What a run leaves behind, beside its folder."""

    run_dir: Path
    saved: Path
    """``adapter/`` or ``model/``"""
    outcome: Outcome
    comparison: Comparison | None
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    parity_prompts: list[str]
    """Rendered held-out prompts that later hand-overs are checked with."""


def prepare_run(recipe: Recipe, given: Mapping[str, Sequence[TrainingExample]] | None = None) -> Prepared:
    """Load model and rows, wrap the model by its method, and choose how its loss is computed.

    Raises:
        UserError: anything that is wrong with model, data or method.
    """
    from accelerate import Accelerator

    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"started as one of {processes} processes, each of which would train the whole run alone",
            where="WORLD_SIZE",
            remedy="start `luthier` directly: a run of several processes is not built yet",
        )
    trackers = recipe.training.report_to
    folder = Path(recipe.output_dir)
    try:
        accelerator = Accelerator(log_with=trackers or None, project_dir=str(folder / "tracking"))
    except ValueError as error:
        raise UserError(
            f"training.report_to={trackers}: {str(error).splitlines()[0]}",
            where="training.report_to",
            remedy="name trackers whose package is installed, or [] for none",
        ) from None
    method = get_method(recipe.method.name)
    spec = recipe.model
    tokenizer = load_tokenizer(spec.name, revision=spec.revision, chat_template=spec.chat_template)
    base = load_model(spec.name, revision=spec.revision, dtype=training_dtype(spec.dtype, accelerator.device))
    new_tokens = add_tokens(base, tokenizer, spec.added_tokens)
    added = set_stop_tokens(base, tokenizer)
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    dataset = prepare(recipe, tokenizer, context=context, given=given)
    torch.manual_seed(recipe.seed)
    model = method.wrap(base, recipe.method, new_tokens).to(accelerator.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    share = recipe.training.share_prefix != "never"
    loss_function = LossFunction(model, batching=spec.batching, pad_token_id=pad, share_prefix=share)
    return Prepared(recipe, method, tokenizer, base, model, loss_function, dataset, added, accelerator)


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
    folder = RunFolder(Path(recipe.output_dir).expanduser())
    folder.claim(resume=resume, overwrite=overwrite)
    console = console or Console(quiet=True)
    reporter = reporter or Silent()
    ready = prepare_run(recipe, given)
    report = ready.check()
    console.print(render_preflight(report))
    if overwrite and not resume:
        # The earlier run stays where the new one is refused.
        report.require()
        folder.clear()
    manifest = _manifest(ready)
    _write_start(folder, ready, manifest)
    write_json(folder.path / "preflight.json", report.to_dict())
    try:
        report.require()
        outcome = _train(ready, folder, resume, reporter)
        manifest["training"] = {**_outcome(outcome), "peak_memory_bytes": _peak_memory(ready.accelerator.device)}
        parity = [_save(ready, folder)]
        comparison = _evaluate(ready, folder, console, manifest) if recipe.evaluation.enabled else None
        if recipe.deployment.merge:
            parity.append(merge_run(ready, folder))
    except Interrupted:
        _finish(folder, manifest, "interrupted")
        raise
    except UserError as error:
        _finish(folder, manifest, "failed", error=str(error))
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        _finish(folder, manifest, "failed", error=str(error))
        raise UserError(
            f"memory ran out: {str(error).splitlines()[0] if str(error) else 'no more could be had'}",
            where=str(folder.path),
            remedy="lower training.per_device_train_batch_size and raise gradient_accumulation_steps by as much, or "
            "set training.gradient_checkpointing=true; --resume goes on from the last checkpoint",
        ) from None
    manifest["parity"] = [p.to_dict() for p in parity]
    write_report(folder, report, comparison)
    _finish(folder, manifest, "finished")
    prompts = parity_prompts(ready.dataset, ready.tokenizer)
    return RunResult(folder.path, folder.saved, outcome, comparison, ready.model, ready.tokenizer, prompts)


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
    )
    try:
        outcome = trainer.run(resume=resume)
    finally:
        if ready.recipe.training.report_to:
            ready.accelerator.end_training()
    ready.model.eval()
    ready.model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return outcome


def _evaluate(ready: Prepared, folder: RunFolder, console: Console, manifest: dict[str, Any]) -> Comparison | None:
    """Base against tuned. What was trained is saved by now, so a comparison that fails is told and costs no run."""
    models: list[tuple[str, Callable[[], Any]]] = [
        ("base", _as_base(ready)),
        ("tuned", lambda: contextlib.nullcontext(ready.model)),
    ]
    try:
        return compare_on_rows(ready.recipe, ready.dataset, models, folder.path / "evaluation/comparison.json", console)
    except UserError as error:
        manifest["evaluation_error"] = str(error)
        console.print(f"the model is saved, but could not be compared: {error}", style="yellow", highlight=False)
        return None


def parity_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Rendered prompts for the parity gate: of the held-out rows where there are any."""
    part = next((p for p in reversed(dataset.parts) if p.examples), dataset.train)
    system = dataset.renderer.system
    return [
        e.input if e.is_plain_text else prompt_text(tokenizer, prompt_messages(e, system), e.tools)
        for e in part.examples[:_PARITY_PROMPTS]
    ]


def _save(ready: Prepared, folder: RunFolder) -> ParityReport:
    """Save the tuned weights aside, load them again as a user would, and rename when both agree bit for bit."""
    kind = "adapter" if ready.method.adapter else "model"
    target, aside = folder.path / kind, folder.path / f".writing-{kind}"
    _remove(aside)
    try:
        with writing(target), without_bars():
            ready.model.save_pretrained(aside)  # type: ignore[operator]
            ready.tokenizer.save_pretrained(aside)
            if ready.method.adapter:
                write_fingerprint(aside, ready.base, _base_name(ready))
        reloaded = load_saved(aside, dtype=next(ready.model.parameters()).dtype)
        parity = check_parity(
            ready.model,
            reloaded.model,
            ready.tokenizer,
            parity_prompts(ready.dataset, ready.tokenizer),
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
    if not ready.method.merges:
        raise UserError(
            f"method {ready.method.name} has nothing to merge", where="deployment.merge", remedy="set it to false"
        )
    return merge_model(
        ready.model,
        ready.tokenizer,
        folder.path / "merged",
        prompts=parity_prompts(ready.dataset, ready.tokenizer),
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
        base = load_model(spec.name, revision=spec.revision, dtype=next(ready.model.parameters()).dtype)
        yield base.to(ready.accelerator.device)

    return loaded


def compare_on_rows(
    recipe: Recipe,
    dataset: Dataset,
    models: list[tuple[str, Callable[[], Any]]],
    target: Path,
    console: Console,
) -> Comparison | None:
    """Ask each model the same held-out rows, print the table and write it to ``target``.

    Args:
        recipe: its evaluation section.
        dataset: the test rows are asked; the validation rows where there are none.
        models: names, and context managers that give the model.
        target: the JSON file to write.
        console: where the table is printed.

    Returns:
        None where no held-out row has an answer.
    """
    settings = recipe.evaluation
    part = dataset.test if dataset.test.examples else dataset.validation
    chosen = [i for i, e in enumerate(part.examples) if not e.is_plain_text][: settings.max_examples]
    if not chosen:
        return None
    wanted = set(chosen)
    with console.status(f"answering {len(chosen)} {part.name} rows") as status:
        comparison = compare(
            models,
            dataset.renderer.tokenizer,
            [part.examples[i] for i in chosen],
            system=dataset.renderer.system,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            samples=settings.samples,
            encoded=[row for row in part.encoded if row.index in wanted],
            progress=lambda name, done, total: status.update(f"{name}: {done} of {total} {part.name} rows answered"),
        )
    write_json(target, comparison.to_json())
    console.print(render_comparison(comparison))
    return comparison


def write_report(folder: RunFolder, report: Preflight, comparison: Comparison | None) -> None:
    """``report.html``: what the terminal showed, to keep and to send."""
    console = Console(record=True, width=110, file=io.StringIO())
    console.rule(str(folder.path.name))
    console.print(render_preflight(report))
    if comparison is not None:
        console.print(render_comparison(comparison))
    with writing(folder.path / "report.html"):
        (folder.path / "report.html").write_text(console.export_html(), encoding="utf-8")


def _manifest(ready: Prepared) -> dict[str, Any]:
    recipe = ready.recipe
    template = ready.tokenizer.chat_template
    return {
        "luthier_run": 1,
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "method": recipe.method.name,
        "seed": recipe.seed,
        "model": {"name": _base_name(ready), "fingerprint": fingerprint(ready.base)},
        "chat_template_sha256": sha256(str(template).encode()).hexdigest(),
        "data": [{"file": file, "sha256": _file_sha256(Path(file))} for file in ready.dataset.files],
        "rows": {part.name: part.summary() for part in ready.dataset.parts},
        "environment": environment(),
    }


def _base_name(ready: Prepared) -> str:
    """The base by a name that holds from any working folder."""
    name = ready.recipe.model.name
    return name if name in CATALOGUE else str(ready.base.name_or_path)


def _write_start(folder: RunFolder, ready: Prepared, manifest: dict[str, Any]) -> None:
    write_json(folder.path / "manifest.json", manifest)
    with writing(folder.path):
        (folder.path / "recipe.yaml").write_text(ready.recipe.with_paths_from(Path.cwd()).to_yaml(), encoding="utf-8")
    write_rejects(folder.path / "rejects.jsonl", ready.dataset.rejects)


def _finish(folder: RunFolder, manifest: dict[str, Any], status: str, **more: Any) -> None:
    manifest |= {"status": status, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **more}
    write_json(folder.path / "manifest.json", manifest)


def _outcome(outcome: Outcome) -> dict[str, Any]:
    state = {k: v for k, v in asdict(outcome.state).items() if k != "course"}
    return {
        **state,
        "stopped": outcome.stopped,
        "first_eval_loss": outcome.first_eval_loss,
        "last_loss": outcome.last_loss,
        "plan": asdict(outcome.plan),
    }


def _file_sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
