"""`luthier data`: judge the examples before they are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from luthier.judging import Subject

app = typer.Typer(
    name="data",
    help="Judge, clean, split and convert the examples.\n\n"
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
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]


def _subject(
    path: Path, overrides: list[str] | None = None, column: list[str] | None = None, model: str | None = None
) -> Subject:
    from luthier.errors import UserError
    from luthier.judging import Subject

    columns = dict(pair.partition("=")[::2] for pair in column or ())
    if not all(columns.values()):
        raise UserError("--column wants part=column", where="--column", remedy="for example --column prompt=question")
    return Subject(path, overrides or (), columns=columns, model=model)


def _print(*shown: Any) -> None:
    from luthier.cli.commands import _console

    _console().print(*shown, highlight=False, soft_wrap=False)


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

    opened = _subject(subject, overrides, column, model)
    found = stats_of(opened, sample=None if every else sample, seed=seed)
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
    from luthier.data.preview import render_encoded, row_json
    from luthier.judging import rows_to_show

    opened = _subject(subject, overrides, column, model)
    shown, refused = rows_to_show(opened, count=rows, places=row or ())
    if as_json:
        from dataclasses import asdict

        _print_json({"rows": [row_json(r, opened.tokenizer) for r in shown], "refused": [asdict(r) for r in refused]})
        return
    _print(render_encoded(shown, opened.tokenizer))
    for reject in refused:
        _print(f"\nrefused {reject.file}:{reject.line}: {reject.message}", f"\n  to do: {reject.remedy or 'mend it'}")


@app.command()
def convert(
    subject: SubjectPath,
    output: Annotated[
        Path, typer.Argument(help="The file to write: .jsonl .json .csv .tsv .parquet", show_default=False)
    ],
    to: Annotated[
        str, typer.Option(help="openai, sharegpt, alpaca, prompt-completion, classification, text; auto: the simplest.")
    ] = "auto",
    column: Column = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Let metadata change where the file cannot hold it.")] = False,
    force: Force = False,
) -> None:
    """Write the rows in another format or kind of file; what would be lost is refused."""
    from luthier.judging import convert_rows

    opened = _subject(subject, None, column)
    for line in convert_rows(opened, output, to, force=force, lossy=lossy):
        _print(line)
