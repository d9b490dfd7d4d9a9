"""Bottleneck adapters in a model: h + up(act(down(h))) on the output h of linear layers that end a residual branch.

Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751 (after attention and after the
MLP); Pfeiffer et al., 2020, "AdapterFusion", arXiv:2005.00247 (after the MLP alone). PEFT has no such tuner and takes
none from outside, so the wrapper here offers what this package asks of PEFT's, under the same names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rapidfuzz import process
from safetensors.torch import load_file, save_file

from luthier.errors import UserError
from luthier.models.heads import shared_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEFT_TYPE = "BOTTLENECK"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ACTIVATIONS = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU, "silu": torch.nn.SiLU}
# The last linear layers of a block's two branches, by the end of their names in transformers' models.
_ATTENTION = (
    "self_attn.o_proj",
    "attn.c_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "attention.dense",
    "attention.output.dense",
    "attention.out_lin",
    "attn.Wo",
    "encoder_attn.out_proj",
    "SelfAttention.o",
    "EncDecAttention.o",
)
_MLP = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.fc2",
    "mlp.dense_4h_to_h",
    "output.dense",
    "ffn.lin2",
    "mlp.Wo",
    "fc2",
    "DenseReluDense.wo",
)


@dataclass(frozen=True, slots=True)
class BottleneckConfig:
    """What the adapters of a model are."""

    target_modules: tuple[str, ...]
    """Full names, in the base, of the linear layers that an adapter follows."""
    reduction_factor: int
    """An adapter has (features / reduction_factor) inner values, rounded down, and at least one."""
    non_linearity: str
    """relu, gelu or silu"""
    adapter_dropout: float
    """Dropout on the inner values."""
    modules_to_save: tuple[str, ...] = ()
    """Modules of the base that are trained and saved whole: a new head."""


class BottleneckLayer(torch.nn.Module):
    """A linear layer and the adapter on its output.

    Args:
        base_layer: a ``torch.nn.Linear``, or the ``Conv1D`` of GPT-2.
        config: what the adapter is; takes the layer's dtype and device. Its ``up`` starts at zero, so the start is
            the base.
    """

    def __init__(self, base_layer: Any, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        features = base_layer.out_features if isinstance(base_layer, torch.nn.Linear) else base_layer.nf
        inner = max(1, features // config.reduction_factor)
        like = {"dtype": base_layer.weight.dtype, "device": base_layer.weight.device}
        self.bottleneck_down = torch.nn.Linear(features, inner, **like)
        self.bottleneck_up = torch.nn.Linear(inner, features, **like)
        torch.nn.init.zeros_(self.bottleneck_up.weight)
        torch.nn.init.zeros_(self.bottleneck_up.bias)
        self.activation = _ACTIVATIONS[config.non_linearity]()
        self.dropout = torch.nn.Dropout(config.adapter_dropout)
        self.enabled = True

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's, which some models' code reads."""
        weight: torch.Tensor = self.base_layer.weight
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's."""
        bias: torch.Tensor | None = self.base_layer.bias
        return bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., features]``."""
        h: torch.Tensor = self.base_layer(x)
        if not self.enabled:
            return h
        added: torch.Tensor = self.bottleneck_up(self.dropout(self.activation(self.bottleneck_down(h))))
        return h + added


class BottleneckModel(torch.nn.Module):
    """A base with bottleneck adapters, in the manner of a ``PeftModel``; what it has not itself, the base answers.

    Only the parameters of adapters, and of modules that are trained whole, require gradients.

    Args:
        base: a transformers model; changed in place.
        config: what the adapters are.

    Raises:
        KeyError: the base has no layer of a name in ``config.target_modules``.
    """

    def __init__(self, base: PreTrainedModel, config: BottleneckConfig) -> None:
        super().__init__()
        base.requires_grad_(False)
        known = dict(base.named_modules())
        for name in config.target_modules:
            if not _is_linear(known.get(name)):
                raise KeyError(f"the base has no linear layer {name}")
            parent, _, own = name.rpartition(".")
            setattr(known[parent], own, BottleneckLayer(known[name], config))
        for name in config.modules_to_save:
            # What the head shares with the rest of the model is the base's, and stays as it is.
            shared = shared_parameters(base, known[name])
            for own, parameter in known[name].named_parameters():
                parameter.requires_grad_(own not in shared)
        self.base_model = base
        self.bottleneck_config = config

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # Written as well as read, and `generate` reads the base's.
    @property
    def generation_config(self) -> Any:
        """The base's."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base_model.generation_config = value

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the base's."""
        return self.base_model(*args, **options)

    def get_base_model(self) -> PreTrainedModel:
        """The base, the adapters in it."""
        base: PreTrainedModel = self.base_model
        return base

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The untouched base, for as long as the context lasts."""
        layers = [m for m in self.modules() if isinstance(m, BottleneckLayer)]
        were = [layer.enabled for layer in layers]
        try:
            for layer in layers:
                layer.enabled = False
            yield
        finally:
            for layer, was in zip(layers, were, strict=True):
                layer.enabled = was

    def merge_and_unload(self) -> Any:
        """Refused.

        Raises:
            UserError: always.
        """
        raise UserError(
            "bottleneck adapters cannot be merged: no weight of the base can take up their nonlinearity",
            remedy="load the adapter beside its base, or tune with method.name=lora",
        )

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The tensors of adapters and of modules that are trained whole, by their names in the base."""
        whole = tuple(f"{name}." for name in self.bottleneck_config.modules_to_save)
        named = self.get_base_model().named_parameters()
        return {n: p for n, p in named if ".bottleneck_" in n or n.startswith(whole)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            # PEFT knows no such type, and refuses the folder instead of loading a part of it.
            "peft_type": PEFT_TYPE,
            "auto_mapping": None,
            "library": "luthier",
            "base_model_name_or_path": self.get_base_model().name_or_path,
            **asdict(self.bottleneck_config),
        }
        (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        tensors = {n: p.detach().cpu().contiguous() for n, p in self.adapter_state().items()}
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, base: PreTrainedModel, folder: str | Path) -> BottleneckModel:
        """Saved adapters on their base, in the base's precision.

        Raises:
            KeyError, ValueError, OSError: they do not fit it, or the folder holds none.
        """
        content = json.loads((Path(folder) / _CONFIG).read_text(encoding="utf-8"))
        if content.get("peft_type") != PEFT_TYPE:
            raise ValueError(f"the folder holds an adapter of the type {content.get('peft_type')}, not {PEFT_TYPE}")
        config = BottleneckConfig(
            target_modules=tuple(content["target_modules"]),
            reduction_factor=content["reduction_factor"],
            non_linearity=content["non_linearity"],
            adapter_dropout=content["adapter_dropout"],
            modules_to_save=tuple(content.get("modules_to_save", ())),
        )
        saved = load_file(Path(folder) / _WEIGHTS)
        model = cls(base, config)
        state = model.adapter_state()
        for name in sorted(state.keys() ^ saved.keys()):
            raise ValueError(f"{name} is {'not in the file' if name in state else 'not of these adapters'}")
        with torch.no_grad():
            for name, parameter in state.items():
                if parameter.shape != saved[name].shape:
                    raise ValueError(f"{name} is {tuple(saved[name].shape)}, not {tuple(parameter.shape)}")
                parameter.copy_(saved[name])
        return model


def places(model: PreTrainedModel, placement: str, named: Sequence[str]) -> tuple[str, ...]:
    """Full names of the linear layers that an adapter is to follow.

    Args:
        model: the base.
        placement: ``houlsby`` or ``pfeiffer``; not asked where layers are named.
        named: ends of names of linear layers; empty: found by the names that transformers' models use.

    Raises:
        UserError: a name is none of a linear layer, or not every block's branches were found.
    """
    linear = [n for n, m in model.named_modules() if _is_linear(m)]
    if named:
        return _named(linear, named)
    expected = _branches(model)
    found: list[str] = []
    attention = {n for n in linear if n.endswith(tuple("." + end for end in _ATTENTION))}
    for what, ends in (("attention", _ATTENTION), ("MLP", _MLP)):
        if what == "attention" and placement == "pfeiffer":
            continue
        here = [
            n
            for n in linear
            if (n in attention) == (what == "attention") and n.endswith(tuple("." + end for end in ends))
        ]
        if len(here) != expected[what]:
            raise UserError(
                f"{len(here)} layers that end an {what} were found by name in this model, which has {expected[what]}",
                where="method.target_modules",
                remedy="name the linear layers that end the branches, such as o_proj and down_proj, or use lora",
            )
        found += here
    return tuple(n for n in linear if n in set(found))


def _branches(model: PreTrainedModel) -> dict[str, int]:
    """How many residual branches of each kind a model has; a decoder's blocks beside an encoder attend twice."""
    config: Any = model.config.get_text_config()
    blocks = int(config.num_hidden_layers)
    if not getattr(config, "is_encoder_decoder", False):
        return {"attention": blocks, "MLP": blocks}
    names = ("num_decoder_layers", "decoder_layers")
    second = int(next((n for n in (getattr(config, name, None) for name in names) if n is not None), blocks))
    return {"attention": blocks + 2 * second, "MLP": blocks + second}


def _named(linear: list[str], named: Sequence[str]) -> tuple[str, ...]:
    for end in named:
        if not any(f".{n}".endswith(f".{end}") for n in linear):
            near = process.extractOne(end, sorted({n.rpartition(".")[2] for n in linear}))
            raise UserError(
                f"this model has no linear layer whose name ends in {end!r}",
                where="method.target_modules",
                remedy=f"did you mean {near[0]!r}?" if near else "name linear layers of this model",
            )
    return tuple(n for n in linear if f".{n}".endswith(tuple(f".{end}" for end in named)))


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))
