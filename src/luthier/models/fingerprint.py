"""What tells one base from another, whatever precision it is held in."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

import torch

from luthier.models.virtual import VirtualTokens

# Parts of the names of parameters that adapters add.
_ADDED = ("lora_", "ia3_", "bottleneck_", "trainable_tokens", "modules_to_save", "original_module")


def fingerprint(model: Any) -> str:
    """A cheap SHA-256 of a model: its parameters' names and shapes, and a few values of each, as bfloat16.

    The same weights in float32 and bfloat16 have the same fingerprint. Adapter parameters do not count, nor do
    embeddings, which grow with added tokens, nor modules that no weights were found for (see ``models.heads``). A
    quantised base has that of the weights that it was quantised from.
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
        flat = parameter.detach().reshape(-1)
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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest = hashlib.sha256(_settings(base.config.to_dict()))
    virtual = VirtualTokens(model).count
    on, off = bool(virtual), list[str]()
    for name, module in base.named_modules():
        # PEFT's layers, and bottleneck layers; transformers' models have methods of such names.
        if getattr(module, "disable_adapters", False) is True or getattr(module, "enabled", True) is False:
            off.append(f"{name}.")
        elif isinstance(active := getattr(module, "active_adapters", None), list):
            on = True
            digest.update(json.dumps([name, active, getattr(module, "scaling", None)], default=str).encode())
    if not off and hasattr(model, "bottleneck_config"):
        digest.update(repr(model.bottleneck_config).encode())
    for name in model.active_adapters if on and hasattr(model, "peft_config") else ():
        digest.update(_settings(model.peft_config[name].to_dict()))
    for holder in (base, model.prompt_encoder) if virtual else (base,):
        for name, tensor in itertools.chain(holder.named_parameters(), holder.named_buffers()):
            around = next((prefix for prefix in off if name.startswith(prefix)), None)
            own = name if around is None else name.removeprefix(around)
            if around is not None and not own.startswith(("base_layer.", "original_module.")):
                continue
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            digest.update(f"{plain}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(config: dict[str, Any]) -> bytes:
    known = {k: v for k, v in config.items() if not k.startswith("_") and k not in _BESIDE}
    return json.dumps(known, sort_keys=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
