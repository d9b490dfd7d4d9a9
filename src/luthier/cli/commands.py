"""The verbs. Heavy libraries load inside them, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier import __version__
from luthier.cli import app
from luthier.decoding import BATCH_SIZE

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(help="The recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that win over the recipe's, as [bold]key=value[/bold]: training.learning_rate=1e-4"),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Ask every question anew, whatever an interrupted evaluation has kept.")
]
RunPath = Annotated[Path, typer.Argument(help="A run folder (the recipe's output_dir).", show_default=False)]


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
    console = _console()
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

    console = _console(quiet=not Processes.join().main)
    settings = _recipe(recipe, overrides)
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
        _recipe(recipe, overrides)
        flags = [flag for flag, given in (("--resume", resume), ("--overwrite", overwrite)) if given]
        raise typer.Exit(launch(["train", *flags, "--", str(recipe), *(overrides or ())], nproc))

    from luthier.methods import method_of
    from luthier.pipeline import run
    from luthier.tasks import get_task
    from luthier.training.loop import Interrupted
    from luthier.training.processes import Processes
    from luthier.training.progress import TerminalReporter

    processes = Processes.join()
    console = _console(quiet=not processes.main)
    with processes.telling():
        settings = _recipe(recipe, overrides)
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
def evaluate(
    run: RunPath,
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option(help="Rows to ask instead of the run's own held-out ones.")] = None,
    harm: Annotated[
        bool, typer.Option("--harm", help="Measure what was forgotten, memorised, is refused now or drifts.")
    ] = False,
    fresh: Fresh = False,
) -> None:
    """Compare base, tuned and merged model on held-out rows."""
    from luthier.evaluation.comparison import Comparison
    from luthier.finished import evaluate_run

    changes = [*(overrides or ()), *(["evaluation.resume=false"] if fresh else [])]
    found = evaluate_run(run, data=data, overrides=changes, harm=harm, console=_console())
    if isinstance(found, Comparison):
        found.require_judged()


@app.command()
def report(
    run: RunPath,
    formats: Annotated[
        str, typer.Option("--format", help="Some of html, md, json and card (a Hugging Face model card).")
    ] = "html,md,json",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A folder, or a file of one format; by default the run folder, and of a card the saved model's.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a run's report, finished or not: one page with plots, tables and rows side by side. Loads no model."""
    from luthier.report import write_reports

    wanted = [name.strip() for name in formats.split(",") if name.strip()]
    for path in write_reports(run, wanted, output):
        typer.echo(f"wrote {path}")


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more: a run, adapter or model folder, an embedded name, a hub id, or URL#MODEL of an "
            "OpenAI-compatible endpoint; [bold]NAME=[/bold] before one names it. The first is the one to beat.",
            show_default=False,
        ),
    ],
    data: Annotated[str, typer.Option(help="A file of rows with answers.", show_default=False)],
    column: Annotated[
        list[str] | None,
        typer.Option(help="Which column holds what, as [bold]prompt=question[/bold]; repeat.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message for rows that have none.")] = None,
    max_examples: Annotated[int, typer.Option(min=1, help="The file's first rows.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = BATCH_SIZE,
    samples: Annotated[int, typer.Option(min=0, help="Answers shown side by side.")] = 3,
    num_beams: Annotated[int, typer.Option(min=1, help="Beginnings followed at once; 1: no beam search.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Draw answers by chance, at this temperature; none: the likeliest tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn by chance.")] = 42,
    fresh: Fresh = False,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="Environment variable with the endpoints' key; none: no key is sent.", show_default=False),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="URL#MODEL of an OpenAI-compatible endpoint that says which answers are better.", show_default=False
        ),
    ] = None,
    judge_prompt: Annotated[
        Path | None,
        typer.Option(
            help="What it is asked, in place of luthier's words: a file with {question}, {answer_a}, {answer_b} and, "
            "if wanted, {reference}.",
            show_default=False,
        ),
    ] = None,
    judge_examples: Annotated[
        int | None, typer.Option(min=1, help="First rows that are judged; none: all.", show_default=False)
    ] = None,
    judge_max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest reply of the judge, in tokens; 2,048 by default.")
    ] = None,
    judge_api_key_env: Annotated[
        str | None,
        typer.Option(
            help="Environment variable with the judge's key; none: --api-key-env where no compared endpoint is "
            "elsewhere.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric beside those that apply: a name, or file.py:function; repeat.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write everything there, as JSON.", show_default=False)
    ] = None,
) -> None:
    """Ask any models the same questions: scores with intervals, what changed and how surely, rows side by side."""
    from luthier.comparing import compare_models, judge_at
    from luthier.decoding import Decoding
    from luthier.errors import UserError
    from luthier.training.runlog import write_json

    columns = dict(pair.partition("=")[::2] for pair in column or ())
    if not all(columns.values()):
        raise UserError("--column wants part=column", where="--column", remedy="for example --column prompt=question")
    chosen = None
    if judge is not None:
        chosen = judge_at(
            judge,
            models,
            prompt=judge_prompt,
            examples=judge_examples,
            **({} if judge_max_tokens is None else {"max_tokens": judge_max_tokens}),
            resume=not fresh,
            api_key_env=judge_api_key_env,
            models_key_env=api_key_env,
        )
    elif judge_prompt or judge_examples or judge_max_tokens or judge_api_key_env:
        raise UserError("nobody is named to judge", where="--judge", remedy="name URL#MODEL, or leave its options out")
    console = _console()
    chance = temperature is not None
    decoding = Decoding(
        do_sample=chance, temperature=1.0 if temperature is None else temperature, seed=seed, num_beams=num_beams
    )
    with console.status("reading") as status:
        found = compare_models(
            models,
            data,
            columns=columns,
            system=system,
            max_examples=max_examples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            samples=samples,
            more_metrics=metric or (),
            decoding=decoding,
            resume=not fresh,
            api_key_env=api_key_env,
            judge=chosen,
            progress=lambda name, done, total: status.update(f"{name}: {done} of {total} rows"),
        )
    if output is not None:
        write_json(output, found.to_json())
    console.print(found.render())
    found.require_judged()


@app.command()
def classify(
    model: Annotated[Path, typer.Argument(help="A run, adapter or model folder of a classification task.")],
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: the lines of standard input.")] = None,
) -> None:
    """Give texts their classes: one JSON record a text."""
    import json

    from luthier.evaluation.classifier import Classifier

    given = texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for text, classes in zip(given, Classifier(model).classify(given), strict=True):
        found = [{"label": name, "score": round(score, 6)} for name, score in classes]
        typer.echo(json.dumps({"text": text, "classes": found}, ensure_ascii=False))


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="A run, adapter or model folder, or an embedded name.")],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with base and tuned model, one by one.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
) -> None:
    """Talk to a tuned model. /reset forgets, /system TEXT sets the system message, /exit leaves."""
    from luthier.deployment.chat import chat as talk

    talk(
        str(model),
        system=system,
        compare=compare,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        console=_console(),
    )


@app.command()
def merge(
    run: RunPath,
    output: Annotated[Path | None, typer.Argument(help="Folder of the merged model; RUN/merged by default.")] = None,
) -> None:
    """Merge a run's adapter into its base, behind the parity gate: one plain model folder."""
    from luthier.deployment.parity import render_parity
    from luthier.finished import merge_saved

    console = _console()
    target, report = merge_saved(run, output)
    console.print(render_parity(report))
    console.print(f"merged into {target}", highlight=False)


@app.command()
def combine(
    runs: Annotated[list[Path], typer.Argument(help="Run or adapter folders, two or more.", show_default=False)],
    weights: Annotated[str, typer.Option(help="One for each, as in 0.7,0.3; below 0 takes away.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.", show_default=False)],
    method: Annotated[
        str, typer.Option(help="linear (sum of updates), ties (mean of those that agree), dare_linear or dare_ties.")
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Share of each update that stays, but with linear.  [default: 0.5]")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of the new adapter.  [default: the sum of the parts'; with --merge, all that it takes]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what DARE drops.  [default: 0]")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write one plain model in place of an adapter.")] = False,
) -> None:
    """Combine several adapters of one base into one, behind the parity gate: an adapter folder, or a whole model."""
    from luthier.deployment.parity import render_parity
    from luthier.errors import UserError
    from luthier.finished import combine_saved, render_combined

    try:
        shares = [float(share) for share in weights.split(",")]
    except ValueError:
        raise UserError(
            f"weights {weights!r} are no numbers", where="--weights", remedy="write them as in 0.7,0.3"
        ) from None
    console = _console()
    result = combine_saved(
        runs,
        shares,
        output,
        combination=method,  # type: ignore[arg-type]  # an unknown one is refused by its name
        density=density,
        rank=rank,
        seed=seed,
        merge=merge,
    )
    console.print(render_combined(result, [str(run) for run in runs]), render_parity(result.parity))
    console.print(f"{'merged' if merge else 'combined'} into {output}", highlight=False)


@app.command()
def models(
    prepare: Annotated[str | None, typer.Option(help="Make an embedded model ready for use and exit.")] = None,
) -> None:
    """List the embedded models, or make one ready."""
    from rich.table import Table

    from luthier.models.catalogue import CATALOGUE, cached_folder, embedded_model_folder

    console = _console()
    if prepare is not None:
        console.print(f"{prepare}: {embedded_model_folder(prepare)}", highlight=False, soft_wrap=True)
        return
    table = Table("name", "what", "licence", "ready in")
    for name, entry in CATALOGUE.items():
        folder = cached_folder(name)
        table.add_row(name, entry.description, entry.licence, str(folder) if folder.is_dir() else "not yet")
    console.print(table)
    console.print("Any local folder, GGUF file or hub id of a causal language model works as model.name too.")


def _recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from luthier.recipe import Recipe

    return Recipe.load(path, overrides or ())


def _console(*, quiet: bool = False) -> Console:
    from rich.console import Console

    # A pipe or a log has no width of its own; 80 columns would break every table.
    return Console(width=None if sys.stdout.isatty() else 120, quiet=quiet)
