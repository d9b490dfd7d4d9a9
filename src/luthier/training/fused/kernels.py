"""The fused kernels: `kernels.cpp`, compiled once for this machine, behind the signatures of `reference.py`.

They are built with the system's C++ compiler at their first use and kept in the cache folder, under a name that
follows from the sources, the compiler and the processor. Where there is no compiler, or the processor has no
bfloat16 instructions (AVX512-BF16), there are none, and training takes transformers' own modules.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from luthier.runfolder import cache_root
from luthier.training.fused.reference import Segments

_SOURCES = ("simd.hpp", "attention.hpp", "kernels.cpp")
# Wide loads of bfloat16 pairs are written as casts, hence no strict aliasing.
_FLAGS = ["-O3", "-march=native", "-mavx512bf16", "-std=c++17", "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-shared"]
_COMPILER_SECONDS = 120


def load() -> Kernels | None:
    """The compiled kernels; None where this machine has none, see :func:`why_not`."""
    return _build()[0]


def why_not() -> str:
    """In words for the user, why there are no kernels; empty where there are."""
    return _build()[1]


def compilable() -> bool:
    """Whether this processor could run the kernels."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@lru_cache(maxsize=1)
def _build() -> tuple[Kernels | None, str]:
    if not compilable():
        return None, "this processor has no AVX512-BF16 instructions"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        return None, "there is no C++ compiler (g++ or clang++)"
    folder = Path(__file__).parent
    key = hashlib.sha256(" ".join([compiler, *_FLAGS, _processor()]).encode())
    for name in _SOURCES:
        key.update((folder / name).read_bytes())
    target = cache_root() / "kernels" / f"{key.hexdigest()[:16]}.so"
    try:
        if not target.is_file():
            _compile(compiler, folder / "kernels.cpp", target)
        return Kernels(ctypes.CDLL(str(target))), ""
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} could not build them: {str(output).strip().splitlines()[0]}"


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Build aside and rename, so that processes that build at the same time do not disturb each other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        made = Path(aside) / target.name
        command = [compiler, *_FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILER_SECONDS)
        made.rename(target)


def _processor() -> str:
    """What `-march=native` looks at: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Kernels:
    """The compiled functions. Tensors are contiguous bfloat16 on the CPU, their rows a multiple of 16 long."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def _call(self, name: str, *arguments: Any) -> None:
        """Numbers become C longs and floats; tensors, their addresses."""
        converted = [
            ctypes.c_long(a) if isinstance(a, int) else ctypes.c_float(a) if isinstance(a, float) else _at(a)
            for a in arguments
        ]
        getattr(self._library, name)(*converted)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, inverse = torch.empty_like(x), torch.empty(len(x))
        self._call("rms_norm", x, weight, out, inverse, *x.shape, eps)
        return out, inverse

    def rms_norm_backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        inverse: torch.Tensor,
        residual: torch.Tensor | None = None,
        *,
        wants_weight: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        dx = torch.empty_like(x)
        sums = torch.empty(64, x.shape[1]) if wants_weight else None
        self._call("rms_norm_backward", grad, x, weight, inverse, residual, dx, sums, *x.shape)
        return dx, None if sums is None else sums.sum(0).to(weight.dtype)

    def rotate_(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        self._call("rotate", x, cosine, sine, *x.shape, -1.0 if back else 1.0)
        return x

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(gate)
        self._call("swiglu", gate, up, out, gate.numel())
        return out

    def swiglu_backward_(self, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
        self._call("swiglu_backward", grad, gate, up, grad.numel())

    def dropout(self, x: torch.Tensor, seed: int, keep: float) -> torch.Tensor:
        out = torch.empty_like(x)
        self._call("dropout", x, out, x.numel(), seed, keep)
        return out

    def cross_entropy_(self, logits: torch.Tensor, targets: torch.Tensor, *, gradient: bool) -> torch.Tensor:
        losses = torch.empty(len(targets))
        self._call("cross_entropy", logits, targets, losses, *logits.shape, int(gradient))
        return losses

    def adamw_(
        self,
        master: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        gradient: torch.Tensor,
        copy: torch.Tensor | None,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        times: float,
    ) -> None:
        """One step of AdamW in one pass; see `kernels.cpp`. Its reference is ``torch.optim.AdamW``."""
        corrections = (1 - betas[0] ** step, 1 - betas[1] ** step)
        half = int(gradient.dtype == torch.bfloat16)
        tensors = (master, mean, variance, gradient, half, copy, master.numel())
        self._call("adamw", *tensors, lr, *betas, eps, weight_decay, times, *corrections)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, heads, d = q.shape
        out, lse = torch.empty_like(q), torch.empty(heads, tokens)
        split = _split(segments, k)
        self._call(
            "attention",
            *(q, k, v, out, lse, segments, len(segments)),
            *(tokens, heads, k.shape[1], d, window or 0, scale, split),
        )
        return out, lse

    def attention_backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        *,
        scale: float,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, heads, d = q.shape
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        split = _split(segments, k)
        keys = int((segments[:, 1] - segments[:, 0] + segments[:, 3]).sum())
        partial = torch.empty(2 * keys * (heads if split else k.shape[1]) * d)
        sums = torch.empty(2 * tokens * k.shape[1] * d)
        self._call(
            "attention_backward",
            *(q, k, v, out, grad, lse, dq, dk, dv, partial, sums, segments, len(segments)),
            *(tokens, heads, k.shape[1], d, window or 0, scale, split),
        )
        return dq, dk, dv


def _split(segments: Segments, k: torch.Tensor) -> int:
    """1 where a task is one query head, 0 where it is all that share a key head: few tasks leave threads idle."""
    return int(len(segments) * k.shape[1] < 8 * torch.get_num_threads())
