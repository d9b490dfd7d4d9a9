"""The verb that stores a tuned model in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import app
from luthier.cli.common import open_console


@app.command()
def quantize(
    model: Annotated[
        Path, typer.Argument(help="A run, adapter or model folder, or an embedded name.", show_default=False)
    ],
    output: Annotated[Path | None, typer.Argument(help="Its folder; RUN/KIND by default.", show_default=False)] = None,
    to: Annotated[
        str, typer.Option("--to", help="int8, int4 (torchao), nf4 (bitsandbytes), float16 or bfloat16.")
    ] = "int8",
    data: Annotated[
        Path | None,
        typer.Option(help="Rows to measure perplexity on; by default the run's held-out ones.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to measure perplexity on, at most.")] = 64,
) -> None:
    """Store a model in fewer bits, behind the parity gate: a folder that plain transformers loads."""
    from luthier.deployment.quantize import quantize_saved

    console = open_console()
    with console.status("quantising, loading again and comparing"):
        result = quantize_saved(model, output, to, data=data, max_rows=rows)
    console.print(result.render())
    console.print(f"{result.quantization} in {result.folder}", highlight=False, soft_wrap=True)
