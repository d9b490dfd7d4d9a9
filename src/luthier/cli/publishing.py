"""The verb that gives a tuned model to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import app
from luthier.cli.common import open_console


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run folder, or that of an adapter or a model.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the hub.", show_default=False)],
    what: Annotated[
        str | None,
        typer.Option(help="Of a run: adapter, merged or model. By default what it has trained.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="The base, where this machine knows it as a folder.", show_default=False
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload an adapter or a model with its card to the Hugging Face hub: nothing else of the run."""
    from luthier.deployment.hub import push as upload
    from luthier.errors import UserError

    if what not in (None, "adapter", "merged", "model"):
        raise UserError(f"{what!r} is nothing a run holds", where="--what", remedy="adapter, merged or model")
    address = upload(run, repository, what=what, base=base, private=private)  # type: ignore[arg-type]  # looked at above
    open_console().print(f"uploaded: {address}", highlight=False)
