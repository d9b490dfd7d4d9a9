"""The verbs for what becomes of a tuned model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import app
from luthier.cli.common import RunPath, named, open_console


@app.command()
def chat(
    model: Annotated[
        Path | None,
        typer.Argument(help="A run, adapter or model folder, or an embedded name.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER, in place of a model and once for each: adapters of one base, switched by /adapter NAME.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with base and tuned model, one by one.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
) -> None:
    """Talk to a tuned model. /reset forgets, /system TEXT sets the system message, /exit leaves."""
    from luthier.deployment.chat import chat as talk

    talk(
        None if model is None else str(model),
        adapters=_named(adapter or []),
        system=system,
        compare=compare,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        console=open_console(),
    )


def _named(adapters: list[str]) -> dict[str, str]:
    """Folders by name."""
    from luthier.errors import UserError

    named: dict[str, str] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder):
            raise UserError(f"{given!r} is no NAME=FOLDER", where="--adapter", remedy="write it as in orders=runs/a")
        if name in named:
            raise UserError(f"two adapters are named {name!r}", where="--adapter", remedy="choose another name")
        named[name] = folder
    return named


@app.command()
def merge(
    run: RunPath,
    output: Annotated[Path | None, typer.Argument(help="Folder of the merged model; RUN/merged by default.")] = None,
    shard_by_shard: Annotated[
        bool | None,
        typer.Option(
            "--shard-by-shard/--in-memory",
            help="Hold one layer of the model at a time. By default, where free memory would not hold the model.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Of one file of weights, as in 500MB or 5GB; goes with --shard-by-shard.")
    ] = None,
) -> None:
    """Merge a run's adapter into its base, behind the parity gate: one plain model folder."""
    from luthier.deployment.parity import render_parity
    from luthier.finished import merge_saved

    console = open_console()
    size = None if max_shard_size is None else _bytes(max_shard_size)
    target, report = merge_saved(run, output, shard_by_shard=shard_by_shard, max_shard_size=size)
    console.print(render_parity(report))
    console.print(f"merged into {target}", highlight=False)


def _bytes(size: str) -> int:
    from luthier.errors import UserError

    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", size.strip().upper())
    count = int(float(found[1]) * units[found[2]]) if found and found[2] in units else 0
    if count < 1:
        raise UserError(f"{size!r} is no size", where="--max-shard-size", remedy="write it as in 500MB or 5GB")
    return count


@app.command()
def combine(
    runs: Annotated[list[Path], typer.Argument(help="Run or adapter folders, two or more.", show_default=False)],
    weights: Annotated[str, typer.Option(help="One for each, as in 0.7,0.3; below 0 takes away.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.", show_default=False)],
    method: Annotated[
        str, typer.Option(help="linear (sum of updates), ties (mean of those that agree), dare_linear or dare_ties.")
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Share of each update that stays, but with linear; 0.5 by default.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of the new adapter; by default the sum of the parts', with --merge all that it takes."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what DARE drops; 0 by default.")] = None,
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
    console = open_console()
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
def serve(
    model: Annotated[Path, typer.Argument(help="A run, adapter or model folder, or an embedded name.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a further adapter of the same base; repeat.", show_default=False),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call it; its folder's name by default.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="llamacpp, vllm, or transformers (slow, the reference); vllm where there are a GPU and its program.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Weights: f32, bf16, f16; in llama.cpp also q8_0, q4_0, K-quants; by default 16 bits, the faster.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Beyond loopback only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key that requests must bring, or several: a,b.")
    ] = None,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Folder of adapters that may be loaded while the server runs.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=8, help="Longest prompt with its answer, in tokens; the model's, at most 4,096.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Answers written or waiting; more get status 429.")] = 256,
    max_body: Annotated[int, typer.Option(min=1024, help="Longest request, in bytes.")] = 2**20,
    slots: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Answers written at once; 16 by llama.cpp, vLLM decides itself."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of llama.cpp; one a core by default.")] = None,
    vllm: Annotated[
        str | None, typer.Option(help="The program vllm, of another environment; else the one that is found.")
    ] = None,
    vllm_args: Annotated[str, typer.Option(help="Further arguments of `vllm serve`, in quotes.")] = "",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of requests that name none.")] = 0.0,
) -> None:
    """Serve a tuned model, its base and other adapters behind OpenAI's API, by the model's name in the request."""
    from luthier.deployment.serving.run import serve as start

    start(
        str(model),
        adapters=named(adapter, "--adapter"),
        name=name,
        engine=engine,
        kind=kind,
        host=host,
        port=port,
        api_key_env=api_key_env,
        adapter_root=adapter_root,
        max_model_len=max_model_len,
        max_tokens=max_tokens,
        max_requests=max_requests,
        max_body=max_body,
        slots=slots,
        threads=threads,
        vllm=vllm,
        vllm_args=vllm_args,
        temperature=temperature,
        console=open_console(),
    )
