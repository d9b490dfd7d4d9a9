"""The verbs that judge models: whether tuning helped."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import app
from luthier.cli.common import Fresh, Overrides, RunPath, open_console
from luthier.decoding import BATCH_SIZE


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
    found = evaluate_run(run, data=data, overrides=changes, harm=harm, console=open_console())
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
    console = open_console()
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

    console = open_console()
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
