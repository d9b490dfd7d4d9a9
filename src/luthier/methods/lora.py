"""LoRA: low-rank matrices A (r × in) and B (out × r) beside frozen weights, W' = W + (alpha / r) · B·A.

Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. The model is wrapped by
PEFT, so what is saved is a plain PEFT adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from luthier.data.advice import rows_for
from luthier.errors import UserError
from luthier.methods.base import Advice, TuningMethod, peft_warnings_apart, register
from luthier.recipe import LoraMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _wrap(model: PreTrainedModel, options: LoraMethod, new_token_ids: list[int]) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    extra: dict[str, Any] = {}
    if new_token_ids and not {"embed_tokens", "wte"} & set(options.modules_to_save):
        # Only the new rows of the embeddings are trained and saved, not the whole matrix.
        extra["trainable_token_indices"] = new_token_ids
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        target_modules=options.target_modules,
        modules_to_save=options.modules_to_save or None,
        use_rslora=options.use_rslora,
        **extra,
    )
    try:
        # The matrices take the weights' dtype: a bfloat16 product beside a bfloat16 product costs no casts. The
        # optimiser keeps them in float32 (training.optimiser), where small updates survive.
        with peft_warnings_apart():
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(
            f"LoRA does not fit this model: {str(error).splitlines()[0]}",
            where="method.target_modules",
            remedy="use all-linear, or the names of linear layers of this model",
        ) from None


LORA = register(
    TuningMethod(
        name="lora",
        wrap=_wrap,
        adapter=True,
        merges=True,
        learning_rate=2e-4,
        weight_decay=0.0,
        advice=Advice(
            learning_rate=(1e-4, 2e-4), epochs=(1, 3), examples=rows_for("lora", "a light adaptation"), rank=(4, 16)
        ),
    )
)
