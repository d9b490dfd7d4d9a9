"""Models whose weights stay on disk: read one by one, or a block at a time while the model runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.models.heads import Head
from luthier.models.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Callable[[str], torch.Tensor]
"""The parameter of that name, from disk."""


@dataclass(frozen=True, slots=True)
class OffloadedModel:
    """A model without its weights, and where they lie."""

    model: PreTrainedModel
    """Its parameters are on the meta device, of the shapes and precision that they have once read."""
    stored: Mapping[str, torch.Tensor]
    """Parameters by name; each is read when it is asked for."""

    def read(self, name: str) -> torch.Tensor:
        """A parameter, in the model's precision.

        Raises:
            KeyError: its weights are nowhere.
        """
        return self.stored[name]


def load_offloaded(
    name: str | Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    head: Head | None = None,
) -> OffloadedModel:
    """A model, all of whose weights stay on disk; see :func:`luthier.models.loading.load_model`.

    Args:
        name: embedded name, folder or hub id; no GGUF file.
        folder: where weights are put that the model holds otherwise than its files do, as some mixtures of experts'
            are; used until the model is gone.
        dtype: precision that weights are read in; None: as stored.
        revision: branch, tag or commit of a hub model.
        head: what stands on its body; None: what it was saved with.
    """
    from accelerate.hooks import remove_hook_from_submodules

    told = logging.getLogger("accelerate.big_modeling")
    level = told.level
    told.setLevel(logging.ERROR)  # it warns that weights are on the disk, which is meant
    try:
        model: Any = load_model(name, dtype=dtype, revision=revision, head=head, offload_folder=folder)
    finally:
        told.setLevel(level)
    maps = (getattr(getattr(m, "_hf_hook", None), "weights_map", None) for m in model.modules())
    stored = next(m.dataset for m in maps if m is not None)
    # accelerate's hooks would read the weights of single layers, in their stored precision.
    remove_hook_from_submodules(model)
    del model.hf_device_map
    return OffloadedModel(model, stored)


@contextlib.contextmanager
def resident(module: torch.nn.Module, name: str, read: Read, *, recurse: bool = True) -> Iterator[None]:
    """A module with its weights in memory, for as long as the context lasts.

    Args:
        module: some of whose parameters are on the meta device.
        name: its own in the model, which its parameters' names begin with; empty: it is the model.
        read: gives a parameter by its name in the model.
        recurse: with the modules in it.
    """
    empty: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    try:
        for path, part in module.named_modules() if recurse else [("", module)]:
            for key, parameter in list(part._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    weight = read(".".join(filter(None, (name, path, key))))
                    empty.append((part, key, parameter))
                    part._parameters[key] = torch.nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for part, key, parameter in empty:
            part._parameters[key] = parameter


@contextlib.contextmanager
def block_by_block(model: torch.nn.Module, read: Read, whole: tuple[type, ...] = ()) -> Iterator[None]:
    """Let a model run with the weights of one block in memory: a layer of its stack, or what stands beside it.

    Args:
        model: its parameters are on the meta device.
        read: gives a parameter by its name in the model.
        whole: kinds of modules that use the weights of the modules in them.
    """
    with contextlib.ExitStack() as held:
        for name, block in _blocks(model, "", whole, held, read):
            inside = contextlib.ExitStack()

            def enter(module: torch.nn.Module, _: Any, name: str = name, inside: Any = inside) -> None:
                inside.enter_context(resident(module, name, read))

            def leave(*_: Any, inside: Any = inside) -> None:
                inside.close()

            held.callback(block.register_forward_pre_hook(enter).remove)
            held.callback(block.register_forward_hook(leave, always_call=True).remove)
        yield


def _blocks(
    module: torch.nn.Module, name: str, whole: tuple[type, ...], held: contextlib.ExitStack, read: Read
) -> Iterator[tuple[str, torch.nn.Module]]:
    stacks = any(isinstance(m, torch.nn.ModuleList) for m in module.modules())
    if isinstance(module, whole) or (module._parameters and not stacks):
        yield name, module
        return
    # What a model of many blocks holds itself is little, and stays.
    held.enter_context(resident(module, name, read, recurse=False))
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(module, torch.nn.ModuleList):
            yield path, child
        else:
            yield from _blocks(child, path, whole, held, read)
