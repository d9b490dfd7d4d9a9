"""What the verbs share. Heavy libraries load inside them, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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


def read_recipe(path: Path, overrides: list[str] | None) -> Recipe:
    from luthier.recipe import Recipe

    return Recipe.load(path, overrides or ())


def open_console(*, quiet: bool = False) -> Console:
    from rich.console import Console

    # A pipe or a log has no width of its own; 80 columns would break every table.
    return Console(width=None if sys.stdout.isatty() else 120, quiet=quiet)


def named(values: list[str] | None, where: str) -> dict[str, str]:
    """Values of the form NAME=VALUE, by their names.

    Raises:
        UserError: one is of another form, or a name comes twice.
    """
    from luthier.errors import UserError

    found: dict[str, str] = {}
    for text in values or ():
        name, given, value = text.partition("=")
        if not (name and given and value):
            raise UserError(f"{text!r} is not of the form NAME=FOLDER", where=where, remedy="write orders=runs/orders")
        if name in found:
            raise UserError(f"{name!r} comes twice", where=where, remedy="name them apart")
        found[name] = value
    return found
