"""PEFT's prefix tuning around PEFT's LoRA, both trained, and both off where the base is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModelForCausalLM

from luthier.errors import UserError
from luthier.methods.base import load_peft, peft_warnings_apart
from luthier.methods.mixed import PARTS
from luthier.methods.pissa import whole_state


class PrefixedLora(PeftModelForCausalLM):
    """A LoRA model with keys and values before every text.

    PEFT puts prefix tuning around any model, but then trains it alone and switches it off alone.

    Args:
        model: wrapped by PEFT for LoRA.
        config: of the keys and values.
        adapter_name: of both.
        **options: of PEFT's model.
    """

    def __init__(self, model: Any, config: Any, adapter_name: str = "default", **options: Any) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model, config, adapter_name, **options)
        for parameter in trained:
            parameter.requires_grad_(True)

    @classmethod
    def loaded(cls, base: Any, folder: Path) -> PrefixedLora:
        """What :meth:`save_pretrained` has written on its base, in the base's precision.

        Raises:
            RuntimeError, ValueError, KeyError, OSError: they do not fit.
        """
        matrices, before = (folder / part for part in PARTS)
        config = PeftConfig.from_pretrained(str(before))
        config.inference_mode = True
        with peft_warnings_apart():
            model = cls(load_peft(base, matrices), config, autocast_adapter_dtype=False)
            model.load_adapter(str(before), "default", autocast_adapter_dtype=False)
        return model

    def save_pretrained(self, folder: str | Path) -> None:  # type: ignore[override]
        """Write both as PEFT writes each, into folders of their own."""
        matrices, before = (Path(folder) / part for part in PARTS)
        self.lora.save_pretrained(matrices, state_dict=whole_state(self.lora))
        # Embeddings of added tokens lie with the matrices.
        super().save_pretrained(str(before), save_embedding_layers=False)
        for part in (matrices, before):  # PEFT's card of half an adapter; that of both stands above
            (part / "README.md").unlink(missing_ok=True)

    @property
    def lora(self) -> Any:
        """The LoRA model."""
        return self.base_model

    def get_base_model(self) -> Any:
        """The base, the matrices in it."""
        return self.lora.get_base_model()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The untouched base, for as long as the context lasts."""
        with super().disable_adapter(), self.lora.disable_adapter():
            yield

    def merge_and_unload(self, *_: Any, **__: Any) -> Any:
        """Refused: the matrices alone would be merged.

        Raises:
            UserError: always.
        """
        raise UserError(
            "keys and values before every text cannot become part of weights",
            where="method.num_virtual_tokens",
            remedy="load the adapter beside its base, or train with method.num_virtual_tokens=0",
        )
