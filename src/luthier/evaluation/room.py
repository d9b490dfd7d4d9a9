"""How many rows may be answered at once."""

from __future__ import annotations

from typing import Any

from luthier.models.memory import free_memory

# The share of free memory that the answers of a batch may be predicted to take.
_SHARE = 0.5


def rows_that_fit(model: Any, prompt: int, new: int) -> int:
    """How many rows of ``prompt`` tokens memory holds until each has ``new`` tokens more; at least 1.

    Counted are the keys and values of all layers, and what one layer makes of the whole prompt: states, inner values,
    and the mask, which transformers writes out for each row.
    """
    weight = next(model.parameters())
    config = model.config.get_text_config()

    def size(name: str, otherwise: int) -> int:
        value = getattr(config, name, None) or otherwise
        return max(value) if isinstance(value, (list, tuple)) else int(value)  # Some have a size for each layer.

    hidden, heads = size("hidden_size", 1), size("num_attention_heads", 1)
    keys, width = size("num_key_value_heads", heads), size("head_dim", hidden // heads)
    held = 2 * size("num_hidden_layers", 1) * keys * width * (prompt + new)
    passing = prompt * (4 * hidden + 3 * size("intermediate_size", 4 * hidden) + prompt)
    return max(1, int(_SHARE * free_memory(weight.device) / ((held + passing) * weight.element_size())))
