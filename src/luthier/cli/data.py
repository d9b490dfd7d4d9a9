"""`luthier data`: judge the examples before they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from luthier.judging import Subject
    from luthier.rewriting import Outcome

app = typer.Typer(
    name="data",
    help="Judge, clean, enlarge, split and convert the examples.\n\n"
    "[bold]stats[/bold] and [bold]lint[/bold] say what the rows are made of and what is wrong with them, "
    "[bold]preview[/bold] shows what is trained. The other verbs write new files and never change yours.\n\n"
    "Each takes a data file, or a recipe (.yaml) whose files and settings it then uses.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

SubjectPath = Annotated[Path, typer.Argument(help="A data file, or a recipe (.yaml).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Recipe settings, as [bold]key=value[/bold]: data.max_length=1024", show_default=False),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Whose tokenizer and template measure: the recipe's, or smollm2.", show_default=False),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column", help="Which column holds what, as [bold]prompt=question[/bold]; repeat.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write a report with plots, one file.", show_default=False)]
Steps = Annotated[
    list[str] | None,
    typer.Option(
        "--step",
        help="A step in place of the recipe's: name, or '{name: {option: value}}'; repeat.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The file to write: beside the data.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]


def _subject(
    path: Path,
    overrides: list[str] | None = None,
    column: list[str] | None = None,
    model: str | None = None,
    *,
    clean: bool = False,
) -> Subject:
    from luthier.errors import UserError
    from luthier.judging import Subject

    columns = dict(pair.partition("=")[::2] for pair in column or ())
    if not all(columns.values()):
        raise UserError("--column wants part=column", where="--column", remedy="for example --column prompt=question")
    return Subject(path, overrides or (), columns=columns, model=model, clean=clean)


def _print(*shown: Any) -> None:
    from luthier.cli.common import open_console

    open_console().print(*shown, highlight=False, soft_wrap=False)


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


@app.command()
def stats(
    subject: SubjectPath,
    overrides: Overrides = None,
    model: ModelName = None,
    column: Column = None,
    every: Annotated[bool, typer.Option("--all", help="Tokenise every row, however many there are.")] = False,
    sample: Annotated[int, typer.Option(min=1, help="Rows to tokenise of a larger set.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    as_json: Json = False,
    html: Html = None,
    force: Force = False,
) -> None:
    """Lengths in tokens and what each max_length cuts, languages, turns, classes, vocabulary, copies."""
    from luthier.data.stats_view import render_stats
    from luthier.judging import stats_of

    opened = _subject(subject, overrides, column, model, clean=True)
    found = stats_of(opened, sample=None if every else sample, seed=seed)
    if html is not None:
        from luthier.data.report import write_report

        write_report(html, str(subject), stats=found, force=force)
    if as_json:
        _print_json({name: part.to_dict() for name, part in found.items()})
        return
    for name, part in found.items():
        _print(render_stats(part, name if opened.is_recipe else str(subject)), "")


@app.command()
def preview(
    subject: SubjectPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many of the first rows to show.")] = 5,
    row: Annotated[
        list[str] | None, typer.Option("--row", help="Show the row at FILE:LINE instead; repeat.", show_default=False)
    ] = None,
    model: ModelName = None,
    column: Column = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model reads them: trained tokens coloured, control tokens visible."""
    from luthier.data.preview import row_json
    from luthier.judging import rows_to_show

    opened = _subject(subject, overrides, column, model, clean=True)
    shown, refused, encoder = rows_to_show(opened, count=rows, places=row or ())
    if as_json:
        from dataclasses import asdict

        _print_json({"rows": [row_json(r, encoder) for r in shown], "refused": [asdict(r) for r in refused]})
        return
    _print(opened.task.show(shown, encoder))
    for reject in refused:
        _print(f"\nrefused {reject.file}:{reject.line}: {reject.message}", f"\n  to do: {reject.remedy or 'mend it'}")


@app.command()
def lint(
    subject: SubjectPath,
    overrides: Overrides = None,
    model: ModelName = None,
    column: Column = None,
    near: Annotated[bool, typer.Option(help="Look for near copies too.")] = True,
    as_json: Json = False,
    html: Html = None,
    force: Force = False,
) -> None:
    """Rank what is wrong with the rows, with the remedy of each, and say how much data the method wants.

    Exits with 1 on errors.
    """
    from luthier.data.lint_view import render_lint
    from luthier.judging import lint_of

    opened = _subject(subject, overrides, column, model, clean=True)
    found = lint_of(opened, near=near)
    if html is not None:
        from luthier.data.report import write_report

        write_report(html, str(subject), lint=found, force=force)
    if as_json:
        _print_json(found.to_dict())
    else:
        _print(render_lint(found, str(subject)))
    raise typer.Exit(1 if found.errors else 0)


@app.command()
def clean(
    subject: SubjectPath,
    overrides: Overrides = None,
    step: Steps = None,
    deduplicate: Annotated[
        str | None, typer.Option(help="exact or near: take copies out too.", show_default=False)
    ] = None,
    output: Output = None,
    model: ModelName = None,
    column: Column = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Write the rows cleaned, with an account of each step; what is refused goes into a file beside."""
    from luthier.rewriting import clean_rows, steps_from

    settings = [*(overrides or ()), *([f"data.deduplicate={deduplicate}"] if deduplicate else [])]
    opened = _subject(subject, settings, column, model)
    _print_outcome(clean_rows(opened, output, steps=steps_from(step or ()), force=force), as_json)


@app.command()
def augment(
    subject: SubjectPath,
    overrides: Overrides = None,
    step: Steps = None,
    ratio: Annotated[
        float | None, typer.Option(min=0, help="Variants, as a share of the rows.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of chance.", show_default=False)] = None,
    output: Output = None,
    column: Column = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Write the rows and variants of them. A recipe's data.augment does so by itself, after the split."""
    from luthier.rewriting import augment_rows, steps_from

    opened = _subject(subject, overrides, column)
    made = augment_rows(opened, output, steps=steps_from(step or ()), ratio=ratio, seed=seed, force=force)
    _print_outcome(made, as_json)


@app.command()
def generate(
    subject: SubjectPath,
    model: Annotated[str, typer.Option("--model", help="The model's name at the endpoint, or a local model.")],
    count: Annotated[int, typer.Option("--count", min=1, help="How many examples to make.")],
    base_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible endpoint, up to and with /v1; without: local.", show_default=False),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds its key.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of the endpoint's model.")] = 0.7,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at one time.")] = 8,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of chance.", show_default=False)] = None,
    output: Output = None,
    column: Column = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Write new examples that a model makes after being shown some of yours, without copies and the plainly bad."""
    from luthier.rewriting import generate_rows

    options = {"api_key_env": api_key_env, "temperature": temperature, "concurrency": concurrency}
    opened = _subject(subject, None, column)
    made = generate_rows(opened, model, count, output, base_url=base_url, options=options, seed=seed, force=force)
    _print_outcome(made, as_json)


@app.command()
def split(
    subject: SubjectPath,
    overrides: Overrides = None,
    validation: Annotated[float | None, typer.Option(help="Share of rows for validation.", show_default=False)] = None,
    test: Annotated[float | None, typer.Option(help="Share of rows for the test.", show_default=False)] = None,
    strategy: Annotated[str | None, typer.Option(help="random, stratified or time.", show_default=False)] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="Column of the time, or of the class.", show_default=False)
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="Column whose equal values stay together, or prompt or near_duplicates.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the shuffle.", show_default=False)] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the three files: the data's own.", show_default=False)
    ] = None,
    column: Column = None,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Write training, validation and test rows as three files."""
    from luthier.rewriting import split_rows

    named = {"validation": validation, "test": test, "strategy": strategy, "column": by, "group_by": group_by}
    settings = [f"data.split.{key}={value}" for key, value in named.items() if value is not None]
    settings += [f"seed={seed}"] if seed is not None else []
    opened = _subject(subject, [*(overrides or ()), *settings], column)
    _print_outcome(split_rows(opened, output_dir, force=force), as_json)


@app.command()
def convert(
    subject: SubjectPath,
    output: Annotated[
        Path,
        typer.Argument(
            help="The file to write: .jsonl .json .csv .tsv (also .gz .zst), .parquet .xlsx", show_default=False
        ),
    ],
    to: Annotated[
        str, typer.Option(help="openai, sharegpt, alpaca, prompt-completion, classification, text; auto: the simplest.")
    ] = "auto",
    column: Column = None,
    lossy: Annotated[
        bool,
        typer.Option("--lossy", help="Leave out unreadable rows, and let metadata change that the file can't hold."),
    ] = False,
    as_json: Json = False,
    force: Force = False,
) -> None:
    """Write the rows in another format or kind of file; what would be lost is refused."""
    from luthier.rewriting import convert_rows

    _print_outcome(convert_rows(_subject(subject, None, column), output, to, force=force, lossy=lossy), as_json)


def _print_outcome(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        _print_json(outcome.to_dict())
        return
    if outcome.shown is not None:
        _print(outcome.shown, "")
    for file, rows in outcome.files.items():
        _print(f"wrote {file}: {rows:,} rows")
    for note in outcome.notes:
        _print(f"  {note}")
