"""A transformers model as one ONNX graph, traced by transformers' own exporter.

The graph of a model that writes takes the keys and values of the tokens before and gives them back with those of the
new ones, so that each further token costs one token. Its inputs and outputs have the names that ONNX programs know
(``past_key_values.0.key`` in, ``present.0.key`` out); batch and lengths are free. Where a layer looks back over a
window alone, the graph is given the keys of all tokens, as for the others, and its mask leaves out the rest.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import UserError
from luthier.models.heads import Head
from luthier.models.virtual import cache_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
"""Beside the graph, for a graph's own file can hold 2 GB at most."""
# Traced with these lengths. All differ, and none is 0 or 1, lest two of them are taken for one or one for a constant.
_BATCH, _PAST, _NEW = 2, 5, 3
# How a layer may mix tokens: all of these keep keys and values and nothing else.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def require_onnx() -> None:
    """Refuse where a library that makes or runs ONNX is not installed.

    Raises:
        UserError: one is missing, or transformers is of a version without an exporter.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {' and '.join(missing)}, which is not installed", remedy="pip install 'luthier[onnx]'"
        )
    try:
        from transformers.exporters import OnnxExporter  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"this version of transformers has no ONNX exporter that works here: {error}",
            remedy="pip install 'luthier[onnx]' -U",
        ) from None


def write_graph(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write ``model.onnx`` and ``model.onnx.data``, in the model's own precision.

    Args:
        model: a plain model on the CPU, in eval mode, that writes, fills in words or classifies.
        tokenizer: says which inputs a model without a writing head reads.
        folder: an existing one.

    Raises:
        UserError: the model is of a kind that is not exported, or transformers' exporter fails on it.
    """
    require_exportable(model)
    if not Head.of(model).writes:
        # A decoder under a classifier's head would give back keys and values that nobody asks for.
        model.config.use_cache = False
    inputs = _decoder_inputs(model) if Head.of(model).writes else _encoder_inputs(model, tokenizer)
    from transformers.exporters import OnnxConfig, OnnxExporter

    try:
        with _quietly():
            # Guards on lengths that the traced ones happen to pass are dropped; the gate runs other lengths.
            config = OnnxConfig(
                dynamic=True,
                dynamic_shapes=_free_lengths(inputs),
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program = OnnxExporter().export(model, inputs, config).program
    except OSError:
        raise
    except Exception as error:  # whatever a tracer meets in a model's code
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"transformers' exporter cannot make an ONNX graph of {type(model).__name__}: {first}",
            remedy="export it as GGUF, or serve the merged folder itself",
        ) from error
    _rename(program.graph)
    OnnxExporter.save_program(program, folder / GRAPH)


def require_exportable(model: Any) -> None:
    """Refuse kinds of models whose graph would not do what their users need.

    Raises:
        UserError: it is an encoder beside a decoder, or keeps another state than keys and values.
    """
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    head = Head.of(model)
    if head.pairs:
        raise UserError(
            f"{name} is an encoder beside a decoder, which takes two graphs; those are not exported to ONNX",
            remedy="use the saved folder in transformers",
        )
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION
    if head.writes and others:
        raise UserError(
            f"{name} has layers that keep another state than keys and values ({', '.join(sorted(others))}), "
            "which are not exported to ONNX",
            remedy="export it as GGUF, or serve the merged folder itself",
        )


def _decoder_inputs(model: Any) -> dict[str, Any]:
    """New tokens after some that the model has read."""
    from transformers import DynamicCache

    reads = inspect.signature(model.forward).parameters
    ids = torch.arange(_BATCH * (_PAST + _NEW)).reshape(_BATCH, -1) % model.config.get_text_config().vocab_size
    cache = DynamicCache()
    with torch.no_grad(), _quietly():
        model(input_ids=ids[:, :_PAST], use_cache=True, **{cache_name(model): cache})
    kept: list[Any] = [getattr(layer, "keys", None) for layer in cache.layers]  # [B, heads, L, head size] each
    if not all(keys is not None and keys.ndim == 4 for keys in kept):
        raise UserError(
            f"{type(model).__name__} keeps another state than keys and values, which is not exported to ONNX",
            remedy="export it as GGUF, or serve the merged folder itself",
        )
    inputs = {"input_ids": ids[:, _PAST:], "attention_mask": torch.ones_like(ids)}
    if "position_ids" in reads:
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, -1).contiguous()
    return inputs | {cache_name(model): cache}


def _encoder_inputs(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    reads = set(inspect.signature(model.forward).parameters) & {*tokenizer.model_input_names, "attention_mask"}
    ids = torch.arange(_BATCH * _PAST).reshape(_BATCH, -1) % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in reads:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def _free_lengths(inputs: dict[str, Any]) -> dict[str, Any]:
    """Which axes of each input are free. All layers' caches have one length: with one for each, the tracer would have
    to find out that they are equal, which takes it a third longer. Other lengths may have a limit of the model's."""
    from torch.export import Dim

    batch, past = Dim("batch_size"), Dim("past_sequence_length")
    free: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            free[name] = {0: Dim.AUTO, 1: Dim.AUTO}
        else:
            free[name] = [{0: batch, 2: past}] * (2 * len(value.layers))
    return free


def _rename(graph: Any) -> None:
    """Give keys, values and free lengths the names that programs know; the tracer's are ``s44`` and the like."""
    import onnx_ir

    symbols: dict[str, str] = {}
    for value, made in [(v, "past_key_values") for v in graph.inputs] + [(v, "present") for v in graph.outputs]:
        cached = re.search(r"layers\.(\d+)\.(key|value)s$", value.name)
        if made == "past_key_values":
            if cached:
                lengths = {0: "batch_size", 2: "past_sequence_length"}
            else:
                whole = value.name == "attention_mask" and any("layers." in v.name for v in graph.inputs)
                lengths = {0: "batch_size", 1: "total_sequence_length" if whole else "sequence_length"}
            symbols |= {str(value.shape[axis]): name for axis, name in lengths.items()}
        if cached:
            value.name = f"{made}.{cached[1]}.{cached[2]}"
    for value in [*graph.inputs, *(v for node in graph.all_nodes() for v in node.outputs)]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_renamed(size, symbols) for size in value.shape])


def _renamed(size: Any, symbols: dict[str, str]) -> int | str | None:
    """A dimension of a value's shape: a number, or an expression of free lengths."""
    if isinstance(size, int) or size.value is None or str(size).isdigit():
        return int(str(size)) if str(size).isdigit() else None
    return re.sub(r"\bs\d+\b", lambda found: symbols.get(found[0], found[0]), str(size))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch's and transformers' exporters tell their own developers."""
    from transformers.utils import logging as transformers_logging

    told, level = transformers_logging.get_verbosity(), logging.getLogger("torch.onnx").level
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
        transformers_logging.set_verbosity(told)
