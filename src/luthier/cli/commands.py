"""The verbs of the main job: from rows to a tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier import __version__
from luthier.cli import app
from luthier.cli.common import Overrides, RecipePath, open_console, read_recipe


def _version(value: bool) -> None:
    if value:
        typer.echo(f"luthier {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every verb."""


@app.command()
def init(
    data: Annotated[
        Path, typer.Argument(help="A file of examples, a folder of them, or a pattern", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the recipe.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="Embedded name, folder, GGUF file or hub id.")] = "smollm2",
    method: Annotated[str, typer.Option(help="lora, full or another (docs/methods.md)")] = "lora",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
) -> None:
    """Look at a file of examples and write a commented recipe for it."""
    from luthier.errors import UserError
    from luthier.proposal import propose_recipe

    if output.exists() and not force:
        raise UserError(f"{str(output)!r} exists", remedy="--force replaces it, or name another with --output")
    proposal = propose_recipe(data, model=model, method=method, recipe_dir=output.parent)
    try:
        output.write_text(proposal.text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{str(output)!r} cannot be written: {error.strerror}") from None
    console = open_console()
    for line in proposal.seen:
        console.print(line, highlight=False, markup=False)
    console.print(f"\nwrote {output}; next:\n  luthier check {output}\n  luthier train {output}", highlight=False)


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show with their trained tokens coloured.")] = 3,
) -> None:
    """Run the pre-flight: what would train, what would not, and what to do. Exits with 1 on errors."""
    from luthier.preparation import prepare_run
    from luthier.training.preflight import render_preflight
    from luthier.training.processes import Processes

    console = open_console(quiet=not Processes.join().main)
    settings = read_recipe(recipe, overrides)
    settings.training.report_to = []
    ready = prepare_run(settings)
    if rows:
        shown = ready.dataset.train.encoded[:rows]
        console.print(ready.task.show(shown, ready.dataset.encoder), "")
    for note in ready.dataset.notes:
        console.print(note, highlight=False, markup=False)
    report = ready.check()
    console.print(render_preflight(report))
    for reject in ready.dataset.rejects[:10]:
        console.print(f"refused {reject.file}:{reject.line}: {reject.message}", style="yellow", highlight=False)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine that train together: one a GPU.")] = 1,
) -> None:
    """Tune the model, prove what changed, save it. Ctrl-C saves a checkpoint; --resume goes on from it."""
    if nproc > 1:
        from luthier.cli.launch import launch

        # A mistake in the recipe is told once, before anything starts.
        read_recipe(recipe, overrides)
        flags = [flag for flag, given in (("--resume", resume), ("--overwrite", overwrite)) if given]
        raise typer.Exit(launch(["train", *flags, "--", str(recipe), *(overrides or ())], nproc))

    from luthier.methods import method_of
    from luthier.pipeline import run
    from luthier.tasks import get_task
    from luthier.training.loop import Interrupted
    from luthier.training.processes import Processes
    from luthier.training.progress import TerminalReporter

    processes = Processes.join()
    console = open_console(quiet=not processes.main)
    with processes.telling():
        settings = read_recipe(recipe, overrides)
    console.print(
        f"[bold]luthier[/bold] {__version__}: {settings.model.name}, {settings.method.name}, "
        f"into {settings.output_dir}",
        highlight=False,
    )
    try:
        result = run(settings, resume=resume, overwrite=overwrite, console=console, reporter=TerminalReporter(console))
    except Interrupted as stop:
        Processes.leave()
        console.print(f"{stop}\ngo on: luthier train {recipe} --resume", highlight=False)
        raise typer.Exit(128 + stop.number) from None
    Processes.leave()
    state = result.outcome.state
    console.print(
        f"\ntrained {state.tokens:,} tokens in {state.step:,} steps, {state.seconds:,.0f} s "
        f"({state.tokens / max(state.seconds, 1e-9):,.0f} tokens/s); saved {result.saved}",
        highlight=False,
    )
    if (saved := 1 - state.computed_tokens / max(state.tokens, 1)) > 0.02:
        console.print(f"{saved:.0%} of the tokens needed no computing: rows began alike, or ended untrained")
    merges = method_of(settings.method).merges
    lines = get_task(settings.task.name).next_steps(result.run_dir, result.saved.name, merges=merges)
    console.print("next:", *(f"  {line}" for line in lines), sep="\n", highlight=False, markup=False, soft_wrap=True)


@app.command()
def models(
    prepare: Annotated[str | None, typer.Option(help="Make an embedded model ready for use and exit.")] = None,
) -> None:
    """List the embedded models, or make one ready."""
    from rich.table import Table

    from luthier.models.catalogue import CATALOGUE, cached_folder, embedded_model_folder

    console = open_console()
    if prepare is not None:
        console.print(f"{prepare}: {embedded_model_folder(prepare)}", highlight=False, soft_wrap=True)
        return
    table = Table("name", "what", "licence", "ready in")
    for name, entry in CATALOGUE.items():
        folder = cached_folder(name)
        table.add_row(name, entry.description, entry.licence, str(folder) if folder.is_dir() else "not yet")
    console.print(table)
    console.print("Any local folder, GGUF file or hub id of a causal language model works as model.name too.")
