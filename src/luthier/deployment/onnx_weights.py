"""The weights of a graph that holds them in blocks of few bits, as onnxruntime's ``MatMulNBits`` reads them
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.errors import UserError

# ‖stored - exported‖ / ‖exported‖ of a matrix, and how much of its projection on what was exported may be lost.
_APART, _SHARE = 0.2, 0.05
_OTHER = "choose --kind f32, or --format gguf"
_PACKED = {"MatMulNBits", "GatherBlockQuantized"}


def stored_model(folder: Path, reference: Any) -> tuple[Any, list[str], float]:
    """A copy of a model with a graph's weights in few bits, dequantised, in place of its own.

    Args:
        folder: holds ``model.onnx``.
        reference: the model that it was made from, float32.

    Returns:
        the copy, why its weights are not the reference's, rounded, in words, and the greatest share of a matrix's
        length that rounding has moved it by.

    Raises:
        UserError: the graph has a weight in few bits whose place in the model is not known.
    """
    model = copy.deepcopy(reference)
    own = dict(model.named_parameters(remove_duplicate=False))
    reasons, worst = [], 0.0
    with torch.no_grad():
        for name, weight in _unpacked(folder, own):
            exported = own[name].detach().clone()
            length = float(exported.norm()) or 1.0
            apart = float((exported - weight).norm()) / length
            share = float((exported * weight).sum()) / length**2
            worst = max(worst, apart)
            if not (apart <= _APART and abs(share - 1) <= _SHARE):
                reasons.append(f"{name} lies {apart:.3g} of its length away from what was exported")
            # A head that is the embeddings becomes one of its own where the graph rounds them apart.
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model, reasons[:3], worst


def _unpacked(folder: Path, own: dict[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
    """``[out, in]`` of each weight in few bits, by the model's own name."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(folder / "model.onnx")).graph
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    for node in (n for n in graph.node if n.op_type in _PACKED):
        options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        gathers = node.op_type == "GatherBlockQuantized"
        data, scales = (node.input[0], node.input[2]) if gathers else (node.input[1], node.input[2])
        if len(node.input) > 3 and node.input[3]:
            raise UserError(f"{data} has zero points, which are not read here", where="--kind", remedy=_OTHER)
        place = "model.embed_tokens" if gathers else data.partition(".MatMul.")[0].replace(".attn.", ".self_attn.")
        names = _parts(place)
        if any(name not in own for name in names):
            raise UserError(f"the place of {data} in the model is not known here", where="--kind", remedy=_OTHER)
        packed, scale = to_array(arrays[made.get(data, data)]), to_array(arrays[scales])
        rows = [own[name].shape[0] for name in names]
        whole = _dequantised(packed, scale.reshape(sum(rows), -1), int(options["block_size"]), int(options["bits"]))
        yield from zip(names, whole[:, : own[names[0]].shape[1]].split(rows), strict=True)


def _parts(place: str) -> list[str]:
    """The weights that a graph's one matrix holds, one below the other."""
    layer, _, last = place.rpartition(".")
    split = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(last, (last,))
    return [f"{layer}.{name}.weight" if layer else f"{name}.weight" for name in split]


def _dequantised(packed: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], block: int, bits: int) -> torch.Tensor:
    """``[out, blocks · block] float32`` of scales ``[out, blocks]``: unsigned values about their middle, low bits
    first."""
    values = packed.astype(np.uint8)
    if bits == 4:
        values = np.stack([values & 15, values >> 4], -1)
    whole = torch.from_numpy(values.reshape(*scales.shape, block)).float() - 2 ** (bits - 1)
    return (whole * torch.tensor(scales).float()[..., None]).flatten(-2)
