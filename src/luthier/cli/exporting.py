"""The verb that hands a tuned model to other programs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli import app
from luthier.cli.common import open_console
from luthier.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.table import Table

_FORMATS = ("gguf", "onnx", "genai", "safetensors")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run, adapter or model folder.", show_default=False)],
    output: Annotated[
        Path | None, typer.Argument(help="A new folder, or an earlier export's; RUN/FORMAT by default.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="gguf (llama.cpp, Ollama), onnx (onnxruntime), genai (onnxruntime-genai), safetensors (vLLM, SGLang)."
        ),
    ] = "gguf",
    kind: Annotated[
        str | None,
        typer.Option(
            help="Of the weights. GGUF: f32, bf16, f16, q8_0 (default), q4_0, or a K-quant such as q4_k_m; genai: f32 "
            "(default) or int4.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Leave a LoRA beside its base, in place of one merged model.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Rows that a K-quant's rounding heeds, such as the training file.", show_default=False),
    ] = None,
) -> None:
    """Export a tuned model for another program, behind the parity gate of that program's own answers."""
    if format not in _FORMATS:
        raise UserError(f"there is no format {format!r}", where="--format", remedy=f"choose {', '.join(_FORMATS)}")
    if adapter and format in ("onnx", "genai"):
        raise UserError("ONNX files hold whole models", where="--adapter", remedy="leave it out: the adapter is merged")
    target, console = output or run / format, open_console()
    if format == "gguf":
        _gguf(run, target, kind or "q8_0", adapter, calibration, console)
        return
    if calibration is not None:
        raise UserError(
            f"--format {format} is rounded without rows",
            where="--calibration",
            remedy="leave it out, or choose a K-quant of --format gguf",
        )
    if format == "genai":
        _genai(run, target, kind or "f32", console)
        return
    if kind is not None:
        raise UserError(
            f"--format {format} keeps the precision that it has",
            where="--kind",
            remedy="leave it out, or choose --format gguf or genai",
        )
    {"onnx": _onnx, "safetensors": _safetensors}[format](run, target, adapter, console)


def _gguf(run: Path, output: Path, kind: str, adapter: bool, calibration: Path | None, console: Console) -> None:
    from luthier.deployment.gguf import export_gguf
    from luthier.deployment.parity import render_parity
    from luthier.finished import held_out_prompts

    prompts = held_out_prompts(run)
    made = export_gguf(run, output, kind=kind, adapter=adapter, prompts=prompts, calibration=calibration)
    console.print(_sizes(made.sizes), render_parity(made.report))
    weights, lora = made.files[0], " --lora " + shlex.quote(str(output / "adapter.gguf")) if adapter else ""
    _say(
        console,
        f"exported to {output}",
        f"llama.cpp:  llama-server -m {shlex.quote(str(weights))}{lora} --jinja",
        f"Ollama:     cd {shlex.quote(str(output))} && ollama create NAME -f Modelfile && ollama run NAME",
    )


def _onnx(run: Path, output: Path, adapter: bool, console: Console) -> None:
    from luthier.deployment.onnx import export_onnx
    from luthier.deployment.parity import render_parity
    from luthier.finished import held_out_prompts

    made = export_onnx(run, output, prompts=held_out_prompts(run))
    console.print(_sizes(made.sizes), render_parity(made.report))
    _say(console, f"exported to {output}", *(f"onnxruntime:  {file}" for file in made.files if file.suffix == ".onnx"))


def _genai(run: Path, output: Path, kind: str, console: Console) -> None:
    from luthier.deployment.genai import export_genai
    from luthier.deployment.parity import render_parity
    from luthier.finished import held_out_prompts

    made = export_genai(run, output, kind=kind, prompts=held_out_prompts(run))
    console.print(_sizes(made.sizes), render_parity(made.report))
    _say(console, f"exported to {output}", f"onnxruntime-genai:  onnxruntime_genai.Model({str(output)!r})")


def _safetensors(run: Path, output: Path, adapter: bool, console: Console) -> None:
    from luthier.deployment.parity import render_parity
    from luthier.finished import model_to_serve

    if adapter:
        from luthier.deployment.vllm import lora_rank, room_for_rank
        from luthier.methods.saved import AdapterFolder
        from luthier.models.loading import resolve_model

        read = AdapterFolder.read(run)
        rank = room_for_rank(lora_rank(read))
        # The embedded model's name says nothing to other programs; its folder does.
        base, lora = shlex.quote(str(resolve_model(read.base_name))), shlex.quote(str(read.folder))
        _say(
            console,
            f"the adapter is served as it is, as the model `tuned`, beside its base {read.base_name}:",
            f"vLLM:    vllm serve {base} --enable-lora --lora-modules tuned={lora} --max-lora-rank {rank}",
            f"SGLang:  python -m sglang.launch_server --model-path {base} --lora-paths tuned={lora}",
        )
        return
    folder, report = model_to_serve(run, output)
    if report is not None:
        console.print(render_parity(report))
    quoted = shlex.quote(str(folder))
    _say(
        console,
        f"ready to serve: {folder}",
        f"vLLM:    vllm serve {quoted}",
        f"SGLang:  python -m sglang.launch_server --model-path {quoted}",
    )


def _sizes(sizes: Mapping[str, int]) -> Table:
    from rich.table import Table

    table = Table(title="files", title_justify="left")
    table.add_column("file")
    table.add_column("MB", justify="right")
    for name, size in sizes.items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    return table


def _say(console: Console, *lines: str) -> None:
    # A command that wraps is no longer one that can be pasted.
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
