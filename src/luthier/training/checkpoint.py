"""Checkpoints that can be trusted: written aside, hashed, flushed to disk and renamed when whole.

A checkpoint folder ``checkpoints/step-N`` holds ``weights.safetensors`` (float32 masters of the trained parameters),
``optimizer.safetensors`` and ``state.json`` with the SHA-256 of both. No pickle. The order of samples and all random
numbers follow from the seed and the step, so nothing else is needed to go on bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from luthier.errors import UserError

FORMAT = 1
_FILES = ("weights.safetensors", "optimizer.safetensors")


@dataclass(slots=True)
class TrainState:
    """Where a run stands."""

    step: int = 0
    """optimiser steps done"""
    best_step: int | None = None
    best_loss: float | None = None
    best_score: float | None = None
    """of ``training.metric_for_best_model``, where that is not the loss"""
    evaluations_without_gain: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    computed_tokens: int = 0
    """tokens that the model computed: fewer than ``tokens`` where rows shared their beginnings"""
    seconds: float = 0.0
    course: dict[str, Any] = field(default_factory=dict)
    """what shapes the course of training: settings and the hash of the training rows; a run goes on only with the
    same ones"""


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    state: TrainState
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: ``RUN/checkpoints``; made when the first is saved.
        keep: newest ones kept; the best one is kept besides.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: TrainState, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> Path:
        """Write a checkpoint; the older ones stay until it is whole.

        Raises:
            UserError: the disk is full or cannot be written; the checkpoints there were stay.
        """
        target = self.folder / f"step-{state.step}"
        aside = self.folder / f".writing-step-{state.step}"
        with writing(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                hashes: dict[str, str] = {}
                for name, tensors in zip(_FILES, (weights, moments), strict=True):
                    hashes[name] = write_flushed(aside / name, safetensors_bytes(tensors))
                self._seal(aside, target, state, hashes)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
        self._prune(state)
        return target

    def steps(self) -> list[int]:
        """Steps with a checkpoint, newest first; nothing is said of whether they are whole."""
        found = [p.name.removeprefix("step-") for p in self.folder.glob("step-*")]
        return sorted((int(s) for s in found if s.isdigit()), reverse=True)

    def load(self, step: int) -> Checkpoint:
        """Read one checkpoint.

        Raises:
            ValueError: it is truncated, altered or of another version; the message says which file.
        """
        path = self.folder / f"step-{step}"
        try:
            record = json.loads((path / "state.json").read_bytes())
            if record["format"] != FORMAT:
                raise ValueError(f"{path}: written by another version (format {record['format']})")
            if sha256_of(record["state"]) != record["sha256"]["state"]:
                raise ValueError(f"{path / 'state.json'}: altered (its SHA-256 is not the recorded one)")
            weights, moments = self._tensors(path, record)
            state = TrainState(**record["state"])
        except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: incomplete ({error})") from error
        if state.step != step:
            raise ValueError(f"{path}: holds step {state.step}")
        return Checkpoint(path, state, weights, moments)

    def newest(self, refused: list[str]) -> Checkpoint | None:
        """The newest checkpoint that is whole; what was wrong with newer ones is added to ``refused``."""
        for step in self.steps():
            try:
                return self.load(step)
            except ValueError as error:
                refused.append(str(error))
        return None

    def _seal(
        self, aside: Path, target: Path, state: TrainState, hashes: dict[str, str], shards: dict[str, Any] | None = None
    ) -> None:
        """Record what was written aside, and give it its name."""
        hashes = {**hashes, "state": sha256_of(asdict(state))}
        record = {"format": FORMAT, "state": asdict(state), "sha256": hashes, **({"shards": shards} if shards else {})}
        write_flushed(aside / "state.json", [json.dumps(record, indent=1).encode()])
        sync_folder(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        sync_folder(self.folder)

    def _tensors(self, path: Path, record: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights and moments, each tensor whole, whether or not they were saved in pieces.

        Raises:
            ValueError: a file is truncated or altered, or the pieces do not make a whole.
        """
        if "shards" not in record:
            weights, moments = (read_hashed(path / name, record["sha256"][name]) for name in _FILES)
            return weights, moments
        shapes, count = record["shards"]["shapes"], record["shards"]["count"]
        names = [shard_files(i, count) for i in range(count)]
        weights, moments = (
            _joined([read_hashed(path / pair[kind], record["sha256"][pair[kind]]) for pair in names]) for kind in (0, 1)
        )
        for name, tensor in (*weights.items(), *moments.items()):
            shape = shapes.get(name) or shapes[name.rpartition("/")[0]]
            if tensor.ndim and list(tensor.shape) != shape:
                raise ValueError(f"{path}: the pieces of {name} make {list(tensor.shape)}, not {shape}")
        return weights, moments

    def _prune(self, state: TrainState) -> None:
        for step in self.steps()[self.keep :]:
            if step != state.best_step:
                shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)
        for leftover in self.folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn a failing disk into a clear message.

    Raises:
        UserError: the disk is full, or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"the disk is full ({error.strerror}); what was saved before is intact",
                where=str(target),
                remedy="free some space, then go on with --resume",
            ) from None
        raise UserError(
            f"cannot be written: {error.strerror or error}",
            where=str(target),
            remedy="check the folder's permissions and the disk",
        ) from None


def shard_files(index: int, count: int) -> tuple[str, str]:
    """Names of the two files of one process of a checkpoint in pieces."""
    weights, moments = (name.removesuffix(".safetensors") for name in _FILES)
    return f"{weights}-{index:05d}-of-{count:05d}.safetensors", f"{moments}-{index:05d}-of-{count:05d}.safetensors"


def _joined(pieces: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pieces in the order of their processes, end to end along the first dimension; numbers are the same in all."""
    return {
        name: torch.cat([piece[name] for piece in pieces]) if tensor.ndim else tensor
        for name, tensor in pieces[0].items()
    }


def read_hashed(path: Path, sha256: str) -> dict[str, torch.Tensor]:
    """A safetensors file.

    Raises:
        ValueError: it is truncated or altered.
    """
    from safetensors.torch import load

    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path}: truncated or altered (its SHA-256 is not the recorded one)")
    return load(content)


def safetensors_bytes(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Tensors in the safetensors format, piece by piece.

    The library's `save` holds a second copy of everything, and its `save_file` hides a full disk behind an error of
    its own; the format is a length, a JSON header and the bytes.
    """
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_flushed(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write and flush to disk; returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        for piece in pieces:
            stream.write(piece)
            digest.update(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder survive a power cut; some file systems cannot, which is no error."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
