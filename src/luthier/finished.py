"""What is done with a finished run: judge it again, on its own held-out rows or on others, and merge it."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from luthier.data.dataset import prepare
from luthier.deployment.adapters import AdapterSet, CombinedAdapter, require_unused
from luthier.deployment.merge import PROMPTS, claim, merge_adapter
from luthier.deployment.parity import ParityReport
from luthier.errors import UserError
from luthier.evaluation.comparison import Comparison
from luthier.methods import method_of
from luthier.methods.answering import load_to_answer
from luthier.methods.combination import CombinationType
from luthier.methods.saved import AdapterFolder, adapter_dtype
from luthier.models.loading import context_of, load_model, load_tokenizer, training_dtype
from luthier.recipe import Recipe
from luthier.report import CARD, Report, write_card, write_reports
from luthier.runfolder import QUANTIZED, RunFolder
from luthier.tasks import Judgement, get_task
from luthier.training.checkpoint import writing
from luthier.training.runlog import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMBINED = "luthier_combine.json"


def evaluate_run(
    path: str | Path,
    *,
    data: str | None = None,
    overrides: Sequence[str] = (),
    harm: bool = False,
    console: Console,
) -> Judgement:
    """Compare base, tuned and (where they exist) merged and quantised of a finished run, on its held-out rows or on
    another file.

    Args:
        path: the run folder.
        data: a file of rows to ask instead of the held-out ones.
        overrides: settings that win over the recipe's.
        harm: measure what tuning has cost too, as ``evaluation.harm`` of the recipe does.
        console: where tables are printed.

    Raises:
        UserError: the folder holds no finished run, or no row has an answer to compare with.
    """
    folder = RunFolder.of(path)
    changes = [*overrides, *([f"data.test={Path(data).absolute()}"] if data else [])]
    recipe = Recipe.load(folder.path / "recipe.yaml", changes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As it was trained and compared then.
    saved = load_to_answer(folder.path, dtype=training_dtype(recipe.model.dtype, device))
    if not recipe.data.train and not recipe.data.test:
        raise UserError(
            "this run's rows came from Python, so they cannot be read again",
            where=str(folder.path),
            remedy="name a file of rows: `luthier evaluate RUN --data FILE`",
        )
    if data:
        recipe.data.train, recipe.data.validation = recipe.data.test, []
        recipe.data.test = []
        recipe.data.split.validation = recipe.data.split.test = 0.0
    context = context_of(saved.model.config, saved.tokenizer)
    dataset = prepare(recipe, saved.tokenizer, context=context, classes=saved.head.classes)
    if data:
        dataset.train, dataset.test = dataset.test, dataset.train
        dataset.test.name = "given"
    for reject in dataset.test.rejects[:5]:
        console.print(f"refused {reject.file}:{reject.line}: {reject.message}", style="yellow", highlight=False)
    models: list[tuple[str, Callable[[], Any]]] = [
        ("base", saved.as_base),
        ("tuned", lambda: contextlib.nullcontext(saved.model)),
    ]
    for made in ("merged", *QUANTIZED):
        if (folder.path / made).is_dir():
            models.append((made, functools.partial(_made, folder.path / made, saved.model)))
    name = Path(data).stem if data else "comparison"
    task = get_task(recipe.task.name)
    task.check(recipe)
    if harm and not task.writes:
        raise UserError(
            f"harm is measured of models that answer prompts, and task={task.type} makes none",
            where="--harm",
            remedy="leave it out",
        )
    target = folder.path / "evaluation" / f"{name}.json"
    comparison = task.judge(recipe, dataset, models, target, console)
    if isinstance(comparison, Comparison) and (note := _other_template(folder, saved.tokenizer)):
        comparison.notes.insert(0, note)
        write_json(target, comparison.to_json())
        console.print(f"! {note}", style="yellow", highlight=False)
    if harm or recipe.evaluation.harm:
        task.judge_harm(recipe, dataset, models, target.with_name("harm.json"), console, comparison)
    write_reports(folder.path)
    if comparison is None:
        raise UserError(
            "no held-out row has a right answer to compare with", where=str(folder.path), remedy="give --data"
        )
    return comparison


def _made(place: Path, beside: Any) -> contextlib.nullcontext[Any]:
    """A run's merged or quantised model, in the precision and on the device of another one."""
    return contextlib.nullcontext(load_model(place, dtype=beside.dtype).to(beside.device))


def _other_template(folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A note where a run's saved chat template is not the one of its training."""
    trained = folder.manifest.get("chat_template_sha256") if folder.manifest else None
    if trained is None or trained == sha256(str(tokenizer.chat_template).encode()).hexdigest():
        return None
    return (
        "the saved chat template is not the one that the run was trained with (chat_template_sha256 in manifest.json), "
        "so scores are those of another prompt; put the template of the training back beside the saved tokenizer"
    )


def merge_saved(
    run_dir: str | Path,
    output: Path | None = None,
    *,
    shard_by_shard: bool | None = None,
    max_shard_size: int | None = None,
) -> tuple[Path, ParityReport]:
    """Merge the adapter of a finished run into its base; ``RUN/merged`` where no folder is named.

    ``shard_by_shard`` and ``max_shard_size`` (bytes) are those of :func:`luthier.deployment.merge.merge_adapter`.

    Raises:
        UserError: the folder holds no finished run with an adapter, or the merged model answers otherwise.
    """
    folder = RunFolder.of(run_dir)
    recipe = Recipe.load(folder.path / "recipe.yaml")
    method_of(recipe.method).require_merging()
    target = output or folder.path / "merged"
    parity = merge_adapter(
        folder.saved,
        target,
        prompts=_prompts(folder) or None,
        shard_by_shard=shard_by_shard,
        max_shard_size=max_shard_size,
    )
    write_card(Report.of(folder.path), target / CARD)
    return target, parity


def _prompts(folder: RunFolder) -> list[str]:
    """Rendered rows of a run for the parity gate; none where its rows came from Python."""
    recipe = Recipe.load(folder.path / "recipe.yaml")
    if not recipe.data.train and not recipe.data.test:
        return []
    task = get_task(recipe.task.name)
    tokenizer = load_tokenizer(folder.saved, chats=task.writes)
    return task.parity_texts(prepare(recipe, tokenizer), tokenizer)


def held_out_prompts(path: str | Path) -> list[str] | None:
    """Rendered held-out rows of a run, for the gate of what is made from it; None where there are none to be read.

    Args:
        path: a run, adapter or model folder.
    """
    if not RunFolder(Path(path).expanduser()).manifest:
        return None
    return _prompts(RunFolder.of(path)) or None


def model_to_serve(path: str | Path, output: Path) -> tuple[Path, ParityReport | None]:
    """A folder of plain weights: the one that there is, or ``output``, where an adapter is merged.

    Args:
        path: a run, adapter or model folder.
        output: where a merged model is written.

    Returns:
        the folder, and what the gate says of the merge, if there was one.

    Raises:
        UserError: there is no model, or the merged one answers otherwise.
    """
    own = Path(path).expanduser()
    if (own / "config.json").is_file():
        return own, None
    if not RunFolder(own).manifest:
        return output, merge_adapter(own, output)
    folder = RunFolder.of(own)
    if (folder.saved / "config.json").is_file():
        return folder.saved, None
    return merge_saved(own, output)


@dataclass(frozen=True, slots=True)
class CombineResult:
    """What :func:`combine_saved` has made."""

    combined: CombinedAdapter
    answers: dict[str, float]
    """Mean |Δ log-probability| between the combination and each part, and ``base``."""
    parity: ParityReport


def combine_saved(
    paths: Sequence[str | Path],
    weights: Sequence[float],
    output: Path,
    *,
    combination: CombinationType = "linear",
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    merge: bool = False,
) -> CombineResult:
    """Combine the adapters of finished runs, or adapter folders, into one adapter or one merged model.

    Args:
        paths: run or adapter folders, two or more.
        weights: one for each.
        output: a new or empty folder.
        combination: see :meth:`AdapterSet.weigh`, as for density, rank and seed.
        density: see there.
        rank: see there; None: the sum of the parts' ranks, or what loses nothing where the result is merged.
        seed: see there.
        merge: write a whole model in place of an adapter.

    Raises:
        UserError: the adapters cannot be combined, an argument cannot be used, or the parity gate refuses.
    """
    if len(paths) < 2:
        raise UserError("one adapter alone is nothing to combine", remedy="name two or more runs")
    if len(paths) != len(weights):
        raise UserError(
            f"{len(paths)} adapters have {len(weights)} weights", where="weights", remedy="give one weight for each"
        )
    folders = [AdapterFolder.read(path).folder for path in paths]
    if len(set(map(Path.resolve, folders))) < len(folders):
        raise UserError("an adapter is named twice", remedy="name each once, with its whole weight")
    # Before anything long: a folder in use would be found only at the end.
    (claim if merge else require_unused)(output.expanduser())
    names = [f"{number}-{_own_name(path)}" for number, path in enumerate(paths, 1)]
    runs = [RunFolder.of(path) for path in paths if RunFolder(Path(path).expanduser()).manifest]
    adapters = dict(zip(names, folders, strict=True))
    held = AdapterSet.load(adapters)
    # In a base's coarser precision, an adapter would be rounded before anything is added.
    dtypes = [dtype for folder in folders if (dtype := adapter_dtype(folder)) is not None]
    finest = functools.reduce(torch.promote_types, dtypes, held.model.dtype)
    if finest != held.model.dtype:
        del held
        held = AdapterSet.load(adapters, dtype=finest)
    combined = held.weigh(
        dict(zip(names, weights, strict=True)),
        combination,
        name="combined",
        density=density,
        rank="full" if merge and rank is None else rank,
        seed=seed,
    )
    prompts = [prompt for run in runs for prompt in _prompts(run)] or list(PROMPTS)
    answers = {name: held.distance("combined", name, prompts) for name in names}
    answers["base"] = held.distance("combined", None, prompts)
    hand_over = held.merge if merge else held.save
    parity = hand_over("combined", output, prompts=prompts)
    told = combined.to_dict() | {"folders": [str(path) for path in paths], "answers": answers}
    with writing(output):
        (output.expanduser() / COMBINED).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return CombineResult(combined, answers, parity)


def _own_name(path: str | Path) -> str:
    """A run's name, from its folder's."""
    folder = Path(path).expanduser().resolve()
    return re.sub(r"[^\w-]+", "-", folder.parent.name if folder.name == "adapter" else folder.name)


def render_combined(result: CombineResult, paths: Sequence[str]) -> Group:
    """What was combined, how far the result lies from each part, and what its rank loses.

    Args:
        result: what was made.
        paths: of the parts, as the user wrote them.
    """
    combined, asked = result.combined, result.combined.combination
    kept = 0.5 if asked.density is None else asked.density
    how = "" if asked.combination_type == "linear" else f", density {kept:g}"
    table = Table(title=f"combined: {asked.combination_type}{how}", title_justify="left")
    table.add_column("part")
    for column in ("weight", "‖ΔW - part‖ / ‖part‖", "cosine", "mean |Δ log-probability|"):
        table.add_column(column, justify="right")
    for path, (name, (apart, cosine)) in zip(paths, combined.parts.items(), strict=True):
        table.add_row(
            Text(path), f"{asked.weights[name]:g}", f"{apart:.3f}", f"{cosine:.3f}", f"{result.answers[name]:.4g}"
        )
    table.add_row("the base", "", "", "", f"{result.answers['base']:.4g}")
    least, most = combined.ranks
    ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
    lines = [f"{ranks}: {combined.lost:.2%} of the combined update is lost (‖wanted - held‖ / ‖wanted‖)"]
    if combined.lost > 0.05:
        lines.append("a higher --rank loses less, and --merge without --rank nothing")
    return Group(table, *lines)
