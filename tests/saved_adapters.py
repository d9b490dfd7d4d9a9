"""Adapters that look trained, in no time."""

from __future__ import annotations

import torch

from luthier.method_options import options_of
from luthier.methods import get_method
from luthier.methods.saved import write_record
from luthier.models.fingerprint import fingerprint
from luthier.models.loading import add_tokens, load_model, load_tokenizer


def tuned(folder, base, *, method="lora", tokens=(), seed=0, size=0.02, template=None, **options):
    """An adapter folder as a run leaves it, noise of a size added to its matrices."""
    tokenizer, model = load_tokenizer(base), load_model(base, dtype=torch.float32)
    if template:
        tokenizer.chat_template = template
    own, ids = fingerprint(model), add_tokens(model, tokenizer, list(tokens))
    how = get_method(method)
    torch.manual_seed(seed)
    model = how.wrap(model, options_of(method)(**options), ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    how.save(model.eval(), folder)
    tokenizer.save_pretrained(folder)
    write_record(folder, model, str(base), base_fingerprint=own, method=how)
    return folder
