"""``luthier benchmark``: tasks of lm-evaluation-harness."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import app
from luthier.cli.commands import _console
from luthier.decoding import BATCH_SIZE


@app.command()
def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            help="One or more: a run, adapter or model folder, an embedded name or a hub id; [bold]NAME=[/bold] before "
            "one names it. The first is the one to beat.",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Folders of task files, such files, or names (gsm8k_local, choices_local, answers_local, text_local, "
            "or lm_eval's own), with commas between them.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="A file of rows to ask in place of a task's own.", show_default=False)
    ] = None,
    shots: Annotated[
        str | None, typer.Option(help="A file of rows that examples are taken from.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; none given: as each task says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first rows of each task; none given: all.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask through each model's chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = BATCH_SIZE,
    download: Annotated[
        bool, typer.Option("--download", help="Let data sets and models be fetched from the hub.")
    ] = False,
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm-run-unsafe-code", help="Let tasks run code that the model writes.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write everything there, as JSON.", show_default=False)
    ] = None,
) -> None:
    """Ask models standard tasks through lm-evaluation-harness, from local files: scores, errors, and what changed."""
    # Read when the libraries load. Without a network a look at the hub takes minutes to fail.
    for library in ("HUB", "EVALUATE"):
        os.environ.setdefault(f"HF_{library}_OFFLINE", "0" if download else "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from luthier.benchmarking import benchmark_models
    from luthier.training.runlog import write_json

    console = _console()
    with console.status("reading the tasks") as status:
        found = benchmark_models(
            models,
            [name.strip() for name in tasks.split(",") if name.strip()],
            data=data,
            shots=shots,
            num_fewshot=num_fewshot,
            limit=limit,
            chat=apply_chat_template,
            system=system,
            batch_size=batch_size,
            unsafe_code=confirm_run_unsafe_code,
            progress=lambda name, done, total: status.update(f"{name}: {done} of {total} requests"),
        )
    if output is not None:
        write_json(output, found.to_json())
    console.print(found.render())
