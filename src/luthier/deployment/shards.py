"""Safetensors files written one tensor at a time, each in its place, with the index that transformers reads.

The format is an 8-byte length, a JSON header that names each tensor's place, and the tensors' bytes
(https://github.com/huggingface/safetensors#format): once all shapes are known, the bytes may come in any order.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class ShardWriter(contextlib.AbstractContextManager["ShardWriter"]):
    """A model's weights as files of a size at most; a context.

    Args:
        folder: where they are written.
        tensors: what is to come, by name; their shapes and precision count, and they may be on the meta device.
        max_shard_size: of one file, in bytes; a larger tensor has a file of its own.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_size: int) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        self._folder = folder
        self._split = split_torch_state_dict_into_shards(
            dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self._parameters = sum(t.numel() for t in tensors.values())
        self._files = contextlib.ExitStack()
        self._due: dict[str, tuple[BinaryIO, int, torch.Tensor]] = {}
        """Of each tensor that has not come yet: its file, its place in it and what it will be."""
        try:
            for file, names in self._split.filename_to_tensors.items():
                self._begin(folder / file, {name: tensors[name] for name in names})
        except BaseException:
            self._files.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one of them into its place."""
        file, place, expected = self._due.pop(name)
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not as was announced")
        file.seek(place)
        if tensor.numel():
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._files.close()
        if kind is not None:
            return
        if self._due:
            raise ValueError(f"{next(iter(self._due))} and {len(self._due) - 1} more tensors never came")
        if self._split.is_sharded:
            index = {
                "metadata": {"total_parameters": self._parameters, **self._split.metadata},
                "weight_map": self._split.tensor_to_filename,
            }
            path = self._folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _begin(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Write a file's header, and leave room for its tensors."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end, places = 0, {}
        # Wide types first, as the library does: whatever follows lies at a multiple of its own size.
        for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
            tensor, start = tensors[name], end
            end += tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            places[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = self._files.enter_context(path.open("wb"))
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        file.truncate(begin + end)
        self._due |= {name: (file, begin + place, tensors[name]) for name, place in places.items()}
