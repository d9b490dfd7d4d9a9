"""An adapter on a base that stays on disk: each layer comes into memory when it is merged or asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.errors import UserError
from luthier.methods.base import peft_warnings_apart
from luthier.methods.saved import AdapterFolder
from luthier.models.offloaded import OffloadedModel, Read, resident

IN_MEMORY = "merge it on a machine whose memory holds the model, without shard_by_shard"
"""What to do where an adapter cannot be read so."""
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class OffloadedTuned:
    """A base with its adapter, both on disk."""

    model: Any
    """PEFT's, on the meta device."""
    sources: Mapping[str, Read]
    """What reads each parameter, by its name in PEFT's model."""
    dtype: torch.dtype
    """All is rounded to this, as it is where the base is loaded in it."""

    @classmethod
    def load(cls, adapter: AdapterFolder, base: OffloadedModel) -> OffloadedTuned:
        """An adapter's layers on its base.

        Raises:
            UserError: it does not fit, or some of its weights lie nowhere.
        """
        from peft import PeftConfig, get_peft_model

        dtype = next(base.model.parameters()).dtype
        with adapter.fitting(), peft_warnings_apart():
            config = PeftConfig.from_pretrained(str(adapter.folder))
            config.inference_mode = True
            model = get_peft_model(base.model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True).eval()
        trained = _adapter_tensors(model, adapter)
        sources: dict[str, Read] = {}
        by_parameter: dict[int, Read] = {}
        named = list(model.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            source = trained.get(name)
            if source is None and (plain := _plain_name(name)) in base.stored:
                _require_rows(model, plain, parameter, base, adapter)
                source = _reading(base.stored, plain, len(parameter) if parameter.ndim else 0)
            if source is not None:
                sources[name] = by_parameter[id(parameter)] = source
        for name, parameter in named:  # tied ones lie under one name
            if name not in sources and id(parameter) not in by_parameter:
                raise UserError(
                    f"neither the adapter nor its base holds {_plain_name(name)}",
                    where=str(adapter.folder),
                    remedy=f"save the adapter again; or {IN_MEMORY}",
                )
            sources.setdefault(name, by_parameter.get(id(parameter), _nothing))
        return cls(model, sources, dtype)

    def read(self, name: str) -> torch.Tensor:
        """A parameter in float32."""
        tensor = self.sources[name](name)
        return tensor.to(self.dtype).float() if tensor.is_floating_point() else tensor

    def layers(self) -> dict[str, Any]:
        """The modules under an adapter, by their names in the base; none lies in another."""
        found: dict[str, Any] = {}
        for name, module in self.model.get_base_model().named_modules():
            if isinstance(module, adapter_layers()) and owner_of(name, found) is None:
                found[name] = module
        return found

    def merged(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters of the merged model by their names in it, in float32, those of a layer together."""
        layers = self.layers()
        wanted: dict[str, list[str]] = {}
        for name in names:
            owner = owner_of(name, layers)
            if owner is None:
                yield name, self.read(_PREFIX + name)
            else:
                wanted.setdefault(owner, []).append(name)
        for owner, inside in wanted.items():
            with resident(layers[owner], _PREFIX + owner, self.read):
                state = _merge_layer(layers[owner])
            for name in inside:
                yield name, state.pop(name.removeprefix(f"{owner}."))


def adapter_layers() -> tuple[type, ...]:
    """PEFT's kinds of modules that hold an adapter and use the weights of the module under it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer, AuxiliaryTrainingWrapper)


def owner_of(name: str, layers: Mapping[str, Any]) -> str | None:
    """Which of the layers a name lies in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in layers), None)


def _nothing(name: str) -> torch.Tensor:
    raise KeyError(name)


def _plain_name(name: str) -> str:
    """A base's parameter, by its name in PEFT's model."""
    name = name.removeprefix(_PREFIX)
    for part in (".token_adapter", ".base_layer", ".original_module"):
        name = name.replace(part, "")
    return name


def _reading(stored: Mapping[str, torch.Tensor], name: str, rows: int) -> Read:
    """Reads a base's parameter, with rows of zeros for tokens whose own come with the adapter."""

    def read(_: str) -> torch.Tensor:
        tensor = stored[name]
        missing = rows - len(tensor) if tensor.ndim else 0
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing > 0 else tensor

    return read


def _adapter_tensors(model: Any, adapter: AdapterFolder) -> dict[str, Read]:
    """What the adapter's file holds, by its name in PEFT's model.

    Raises:
        UserError: it is no safetensors file, or some of it has no place.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors import safe_open

    path = adapter.folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(
            "the adapter is not stored as safetensors", where=str(adapter.folder), remedy="save it again with PEFT"
        )
    # PEFT says under which name it would save each parameter: one is marked for each.
    marks = {name: torch.empty(0) for name, _ in model.named_parameters(remove_duplicate=False)}
    names = {id(mark): name for name, mark in marks.items()}
    saved = get_peft_model_state_dict(model, state_dict=marks, save_embedding_layers=True)
    places = {key: names[id(mark)] for key, mark in saved.items() if id(mark) in names}

    def reading(key: str) -> Read:
        def read(_: str) -> torch.Tensor:
            with safe_open(path, framework="pt") as tensors:
                tensor: torch.Tensor = tensors.get_tensor(key)
            return tensor

        return read

    with safe_open(path, framework="pt") as tensors:
        keys = list(tensors.keys())
    for key in keys:
        if key not in places:
            raise UserError(
                f"the adapter holds {key}, which has no place in {adapter.base_name!r}",
                where=str(path),
                remedy=f"check its base; or {IN_MEMORY}",
            )
    return {places[key]: reading(key) for key in keys}


def _require_rows(model: Any, name: str, parameter: torch.Tensor, base: OffloadedModel, adapter: AdapterFolder) -> None:
    """Refuse a base whose embeddings have grown by rows that the adapter does not hold.

    Raises:
        UserError: it does not.
    """
    if not adapter.record.get("rows") or not name.endswith((".weight", ".bias")):
        return
    place = name.rpartition(".")[0]
    embeddings = model.get_base_model().get_submodule(place)
    if embeddings not in (model.get_input_embeddings(), model.get_output_embeddings()):
        return
    before = len(base.stored[name])
    if before >= len(parameter) or hasattr(embeddings, "modules_to_save"):
        return
    trained = getattr(getattr(embeddings, "token_adapter", None), "token_indices", {}).get("default", ())
    if not set(range(before, len(parameter))) <= set(trained):
        raise UserError(
            f"tokens were added in training, and the adapter holds no rows of {place} for them",
            where=str(adapter.folder),
            remedy=f"{IN_MEMORY}; or train with that module in method.modules_to_save",
        )


def _merge_layer(layer: Any) -> dict[str, torch.Tensor]:
    """The plain layer's state that becomes of one with an adapter, by PEFT's own arithmetic."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        plain = layer.unload_and_optionally_merge_module(True, False, None)
    else:
        layer.merge(safe_merge=False)
        plain = layer.get_base_layer()
    state = {name: tensor.detach() for name, tensor in plain.state_dict().items()}
    # Its weights leave memory; they come back unmerged.
    for part in layer.modules():
        if hasattr(part, "merged_adapters"):
            part.merged_adapters.clear()
    return state
