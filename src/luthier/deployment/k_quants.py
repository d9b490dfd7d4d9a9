"""GGUF's K-quants: blocks of 256 weights with scales of their own, by llama.cpp's quantiser.

The ``gguf`` library reads them and does not make them; the binding ``llama-cpp-python`` does, where it is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from safetensors.numpy import save_file

from luthier.errors import UserError

K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
"""Kinds, the finest first. In those with _m some matrices are finer than the rest (llama.cpp's choice)."""
_OLDEST = "0.3.36"
_COMPLAINT = re.compile("error|failed|assert|requires", re.IGNORECASE)
Importance = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
"""Of a matrix ``[out, in]``, by its name: ``[in]``, the mean square of each input."""


def require_quantiser() -> None:
    """Refuse K-quants where nothing that makes them is installed.

    Raises:
        UserError: nothing is, or it is too old.
    """
    try:
        found = version("llama_cpp_python")
    except PackageNotFoundError:
        found = ""
    if not found or Version(found) < Version(_OLDEST):
        is_there = f"of {found}, and {_OLDEST} is needed" if found else "not installed"
        raise UserError(
            f"K-quants are made by llama.cpp's quantiser, and its binding llama-cpp-python is {is_there}",
            where="--kind",
            remedy="pip install -U 'luthier[kquants]' (it is compiled then: a C++ compiler is needed), or choose q8_0 "
            "or q4_0",
        )


def quantise(source: Path, target: Path, kind: str, importance: Importance | None = None) -> None:
    """Write a GGUF file of float32 or bfloat16 once more, as a K-quant.

    llama.cpp runs in a process of its own: it ends its process where something is wrong, and writes to the terminal.

    Args:
        source: the file.
        target: replaced where it is there.
        kind: one of :data:`K_QUANTS`. Rows that 256 does not divide become the nearest kind with blocks of 32.
        importance: by llama.cpp's names; rounding errors count by it. None: all inputs count alike.

    Raises:
        UserError: the binding is missing or older, or llama.cpp refuses.
    """
    require_quantiser()
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        words = [str(source), str(target), kind, str(torch.get_num_threads())]
        if importance:
            words.append(str(Path(beside) / "importance.safetensors"))
            save_file(dict(importance), words[-1])
        done = subprocess.run(
            [sys.executable, "-P", "-m", "luthier.deployment.llamacpp_quantiser", *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if _COMPLAINT.search(line)]
        raise UserError(
            f"llama.cpp cannot write {kind}: {said[-1] if said else f'it ended with {done.returncode}'}",
            where="--kind",
            remedy="see to free disk space and memory, or choose q8_0 or q4_0",
        )


@torch.no_grad()
def importance_of(model: Any, rows: Iterable[torch.Tensor]) -> Importance:
    """How much each input of each matrix of a layer carries, over texts: what llama.cpp calls an importance matrix.

    A rounding error in a weight reaches the output times its input, so over texts it counts by the input's mean square.

    Args:
        model: a transformers model, float32.
        rows: ``[L] int64`` each: tokens of texts that the model is for.

    Returns:
        by the names of the model's weights. Not of the output head, as llama.cpp's own tool does by default.
    """
    sums: dict[str, torch.Tensor] = {}
    read = 0

    def watched(name: str) -> Any:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            square = inputs[0].double().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + square if name in sums else square

        return add

    head = model.get_output_embeddings()
    matrices = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    hooks = [m.register_forward_pre_hook(watched(f"{n}.weight")) for n, m in matrices.items()]
    try:
        for row in rows:
            model(input_ids=row[None], use_cache=False, logits_to_keep=1)
            read += len(row)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / max(read, 1)).float().numpy() for name, total in sums.items()}
