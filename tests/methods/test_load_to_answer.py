"""What was saved is asked in a precision that this machine is fast in, and stays what it is."""

from __future__ import annotations

import torch

from luthier.methods.answering import load_to_answer
from luthier.methods.saved import load_saved
from luthier.models.loading import training_dtype


def test_sixteen_bits_become_float32_where_their_products_are_slow(smollm2_dir):
    stored, ready = load_saved(smollm2_dir).model, load_to_answer(smollm2_dir).model
    assert stored.dtype == torch.bfloat16
    device = next(ready.parameters()).device
    slow = device.type == "cpu" and training_dtype("auto", device) is torch.float32
    assert ready.dtype == (torch.float32 if slow else torch.bfloat16)
    for name, weight in stored.state_dict().items():
        assert torch.equal(ready.state_dict()[name].cpu().float(), weight.float()), name


def test_a_precision_that_is_asked_for_is_kept(smollm2_dir):
    assert load_to_answer(smollm2_dir, dtype=torch.bfloat16).model.dtype == torch.bfloat16
