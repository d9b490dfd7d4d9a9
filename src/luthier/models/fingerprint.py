"""What tells one base from another, whatever precision it is held in."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch

from luthier.models.virtual import VirtualTokens

# Parts of the names of parameters that adapters add.
_ADDED = ("lora_", "ia3_", "bottleneck_", "trainable_tokens", "modules_to_save", "original_module")


def fingerprint(model: Any, read: Callable[[str], torch.Tensor] | None = None) -> str:
    """A cheap SHA-256 of a model: its parameters' names and shapes, and a few values of each, as bfloat16.

    The same weights in float32 and bfloat16 have the same fingerprint. Adapter parameters do not count, nor do
    embeddings, which grow with added tokens, nor modules that no weights were found for (see ``models.heads``). A
    quantised base has that of the weights that it was quantised from.

    Args:
        model: a base, or one with adapters.
        read: gives a base's parameter by its name, where the weights stay on disk (see ``models.offloaded``).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    origin = getattr(base, "quantized_from", None)
    if origin is not None:
        return str(origin.fingerprint)
    digest = hashlib.sha256()
    vocabulary = base.get_input_embeddings().weight.shape[0]
    fresh = tuple(f"{name}." for name in getattr(base, "fresh_modules", ()))
    for name, parameter in base.named_parameters():
        if any(part in name for part in _ADDED) or name.startswith(fresh):
            continue
        if parameter.shape[0] == vocabulary:
            continue
        flat = (parameter.detach() if read is None else read(name)).reshape(-1)
        picked = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16)
        plain = name.replace(".base_layer", "")
        digest.update(f"{plain}{tuple(parameter.shape)}".encode())
        digest.update(picked.float().numpy().tobytes())
    return digest.hexdigest()


# Of configs: what does not bear on answers, or stands in the weights themselves.
_BESIDE = ("transformers_version", "dtype", "torch_dtype", "base_model_name_or_path", "inference_mode", "revision")


def identity(model: Any) -> str:
    """SHA-256 of every bit of a model's weights, with its config and the adapters that are on.

    Two models of one identity answer alike; a base under adapters that are off has that of the base alone. It reads all
    weights, which takes a second or two for each GB.
    """
    settings, tensors = _parts(model)
    return _digest(settings, tensors)


class KnownIdentity:
    """The :func:`identity` of one model that is open, its weights read again only where they have changed.

    A change is seen by the count that PyTorch keeps of a tensor's changes, by its place in memory, by the config and by
    the adapters that are on. What is written past that count, through ``tensor.data`` or by a kernel of one's own, is
    not seen: make a new one after every training.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # With the tensors, so that no other takes the place in memory of one that is gone.
        self._known: dict[tuple[Any, ...], tuple[str, list[torch.Tensor]]] = {}

    def __call__(self) -> str:
        """The identity as it is now."""
        settings, tensors = _parts(self._model)
        if any(tensor.is_inference() for _, tensor in tensors):  # their changes are not counted
            return _digest(settings, tensors)
        state = (settings, *((name, t.data_ptr(), t._version, t.dtype, t.shape) for name, t in tensors))
        if state not in self._known:
            self._known[state] = _digest(settings, tensors), [tensor.detach() for _, tensor in tensors]
        return self._known[state][0]


def _digest(settings: bytes, tensors: list[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256(settings)
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(model: Any) -> tuple[bytes, list[tuple[str, torch.Tensor]]]:
    """What tells a model: config and adapters that are on, and the tensors in use by their plain names."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = [_settings(base.config.to_dict())]
    virtual = VirtualTokens(model).count
    on, off = bool(virtual), list[str]()
    for name, module in base.named_modules():
        # PEFT's layers, and bottleneck layers; transformers' models have methods of such names.
        if getattr(module, "disable_adapters", False) is True or getattr(module, "enabled", True) is False:
            off.append(f"{name}.")
        elif isinstance(active := getattr(module, "active_adapters", None), list):
            on = True
            settings.append(json.dumps([name, active, getattr(module, "scaling", None)], default=str).encode())
    if not off and hasattr(model, "bottleneck_config"):
        settings.append(repr(model.bottleneck_config).encode())
    for name in model.active_adapters if on and hasattr(model, "peft_config") else ():
        settings.append(_settings(model.peft_config[name].to_dict()))
    tensors = []
    for holder in (base, model.prompt_encoder) if virtual else (base,):
        for name, tensor in itertools.chain(holder.named_parameters(), holder.named_buffers()):
            around = next((prefix for prefix in off if name.startswith(prefix)), None)
            own = name if around is None else name.removeprefix(around)
            if around is not None and not own.startswith(("base_layer.", "original_module.")):
                continue
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            # A matrix that torchao holds consists of several.
            for part in getattr(tensor, "tensor_data_names", ()):
                tensors.append((f"{plain}.{part}", getattr(tensor, part)))
            if not hasattr(tensor, "tensor_data_names"):
                tensors.append((plain, tensor))
    return b"".join(settings), tensors


def _settings(config: dict[str, Any]) -> bytes:
    known = {k: v for k, v in config.items() if not k.startswith("_") and k not in _BESIDE}
    return json.dumps(known, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
