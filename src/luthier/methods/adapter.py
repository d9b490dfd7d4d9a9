"""Bottleneck adapters: two small linear layers with a nonlinearity between them, in the residual branches.

Houlsby et al., 2019, arXiv:1902.00751; Pfeiffer et al., 2020, arXiv:2005.00247. The layers are in
:mod:`luthier.methods.bottleneck`; plain PEFT refuses what is saved, ``luthier.methods.saved.load_saved`` loads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from luthier.data.advice import rows_for
from luthier.data.examples import TaskType
from luthier.errors import UserError
from luthier.method_options import AdapterMethod
from luthier.methods.base import Advice, TuningMethod, register
from luthier.methods.bottleneck import BottleneckConfig, BottleneckModel, places
from luthier.models.heads import fresh_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.recipe import Recipe


@register
class Adapter(TuningMethod):
    """Bottleneck adapters in the residual branches of a frozen model."""

    name = "adapter"
    trains = "bottleneck layers, whose nonlinearity no weight of the base can take up"
    learning_rate = 5e-4
    advice = Advice(learning_rate=(1e-4, 1e-3), epochs=(1, 5), examples=rows_for("lora", "a light adaptation"))

    def check(self, recipe: Recipe) -> None:
        """See :meth:`TuningMethod.check`."""
        super().check(recipe)
        options = recipe.method
        if isinstance(options, AdapterMethod) and options.target_modules and options.placement != "houlsby":
            raise UserError(
                "method.target_modules and method.placement both say where adapters stand",
                where="method.target_modules",
                remedy="leave one of them out",
            )

    def wrap(
        self,
        model: PreTrainedModel,
        options: AdapterMethod,
        new_token_ids: list[int],
        task: TaskType = TaskType.CAUSAL_LM,
    ) -> torch.nn.Module:
        """See :meth:`TuningMethod.wrap`."""
        config = BottleneckConfig(
            target_modules=places(model, options.placement, options.target_modules),
            reduction_factor=options.reduction_factor,
            non_linearity=options.non_linearity,
            adapter_dropout=options.adapter_dropout,
            modules_to_save=tuple(fresh_modules(model)),
        )
        return BottleneckModel(model, config)

    def kept_values(self, options: AdapterMethod, hidden: int, inner: int) -> int:
        """See :meth:`TuningMethod.kept_values`."""
        # The layer's output, and the inner values before and after the activation and after dropout.
        sites = 2 if options.placement == "houlsby" else 1
        return sites * (hidden + 3 * max(1, hidden // options.reduction_factor))

    def load(self, base: PreTrainedModel, folder: Path) -> torch.nn.Module:
        """See :meth:`TuningMethod.load`."""
        return BottleneckModel.from_pretrained(base, folder)
