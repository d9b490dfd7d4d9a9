"""What tells one base from another, whatever precision it is held in."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

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
