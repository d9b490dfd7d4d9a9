"""Runs the body of a decoder through the fused layers, reading the weights of the model's own modules.

The model stays as transformers and PEFT made it: nothing is patched or replaced, and saving, generating and switching
adapters work as ever. Which models fit is not looked up in a table: the modules must have the structure that `layer`
computes, the model's own calls to its attention say scale and window, and `LossFunction` accepts the result only where
it gives the model's own logits.
"""

from __future__ import annotations

from typing import Any

import torch

from luthier.data.batch import Batch
from luthier.training.attention import AttentionCall
from luthier.training.fused.layer import (
    NAMES,
    Call,
    Layer,
    LayerPlan,
    Norm,
    Norms,
    Projection,
    Recompute,
    Tensors,
    kept_bytes,
)


class NotFused(Exception):
    """This model's layers are not those that the kernels compute; the message says in what."""


class FusedDecoder:
    """A decoder's body over fused kernels.

    Args:
        body: the decoder without its head (transformers' ``LlamaModel`` and its kin), LoRA layers in place or not.
        calls: what each of its attention modules asked for, from ``attention.recording``.
        ops: `kernels.Kernels`, `cuda.Cuda`, or the module `reference`.

    Raises:
        NotFused: the structure is another.
    """

    def __init__(self, body: Any, calls: dict[torch.nn.Module, AttentionCall], ops: Any) -> None:
        _require(_children(body) == {"embed_tokens", "layers", "norm", "rotary_emb"}, "the decoder has other parts")
        self.body = body
        self.ops = ops
        self.recompute: Recompute = False
        for layer in body.layers:
            _check_layer(layer, calls)
        self.calls = calls
        _norm_eps(_running(body.norm))
        # Read once: everything that can change while a model trains is read at each call instead.
        self.windows = [calls[layer.self_attn].sliding_window for layer in body.layers]

    def __call__(self, batch: Batch, embedded: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states, normed, at the batch's kept positions: ``[K, D]``.

        Args:
            batch: packed.
            embedded: ``[1, N, D]`` what the first layer reads; None: the vectors of the batch's ids.
        """
        body = self.body
        x = body.embed_tokens(batch.input_ids) if embedded is None else embedded
        cosine, sine = (t[0].float().contiguous() for t in body.rotary_emb(x, position_ids=batch.position_ids))
        x = x[0].contiguous()
        # Only where examples share tokens may a position be kept twice; looking for it makes a GPU wait.
        rows, back = torch.unique(batch.kept, return_inverse=True) if batch.shares else (batch.kept, None)
        training = body.training
        seeds = torch.randint(2**32, (len(body.layers), 4)).tolist() if training else None
        for number, layer in enumerate(body.layers):
            plan, tensors = self._layer(layer, self.windows[number])
            call = Call(self.ops, batch.segments, cosine, sine, training=training, recompute=self.recompute)
            if seeds is not None:
                call.seeds = tuple(seeds[number])
            if number == len(body.layers) - 1:
                call.rows = rows
            x = Layer.apply(x, plan, call, *tensors.flat())
        norm = _running(body.norm)
        hidden: torch.Tensor = Norm.apply(x, norm.weight, _norm_eps(norm), self.ops)
        return hidden if back is None else hidden[back]

    def kept_bytes(self, recompute: Recompute) -> int:
        """Bytes a token that the largest layer keeps for its backward pass."""
        layers = (self._layer(layer, window) for layer, window in zip(self.body.layers, self.windows, strict=True))
        return max(kept_bytes(*layer, recompute) for layer in layers)

    def _layer(self, layer: Any, window: int | None) -> tuple[LayerPlan, Tensors]:
        attention = layer.self_attn
        projections, scales, rates = zip(*(_projection(_module(layer, name)) for name in NAMES), strict=True)
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        norms = [_running(n) for n in (layer.input_layernorm, layer.post_attention_layernorm, *head_norms)]
        d = attention.head_dim
        plan = LayerPlan(
            heads=len(projections[0].weight) // d,
            kv_heads=len(projections[1].weight) // d,
            d=d,
            scale=self.calls[attention].scaling,
            window=window,
            rotary=bool(getattr(attention, "use_rope", True)),
            eps=tuple(0.0 if n is None else _norm_eps(n) for n in norms),  # type: ignore[arg-type]
            lora_scale=scales,
            lora_dropout=rates,
        )
        return plan, Tensors(Norms(*(None if n is None else n.weight for n in norms)), projections)  # type: ignore[arg-type]


def _module(layer: Any, name: str) -> Any:
    return _running(getattr(layer.self_attn if name in ("q_proj", "k_proj", "v_proj", "o_proj") else layer.mlp, name))


def _running(module: Any) -> Any:
    """The module that runs: of one that is trained whole beside an adapter, PEFT keeps the original and a copy."""
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(module, ModulesToSaveWrapper):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _children(module: torch.nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotFused(otherwise)


def _check_layer(layer: Any, calls: dict[torch.nn.Module, AttentionCall]) -> None:
    parts = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    _require(_children(layer) == parts, "its layers have other parts")
    attention, mlp = layer.self_attn, layer.mlp
    _require(
        _children(attention) - {"q_norm", "k_norm"} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and hasattr(attention, "q_norm") == hasattr(attention, "k_norm"),
        "its attention has other parts",
    )
    _require(_children(mlp) == {"gate_proj", "up_proj", "down_proj", "act_fn"}, "its MLP has other parts")
    _require("SiLU" in type(mlp.act_fn).__name__, f"its activation is {type(mlp.act_fn).__name__}")
    call = calls.get(attention)
    _require(call is not None, "an attention module did not ask for packed attention")
    assert call is not None
    _require(call.softcap is None, "its attention scores are capped")
    _require(not getattr(attention, "attention_dropout", 0), "it has dropout in its attention")
    _require(attention.head_dim % 32 == 0, f"its heads have {attention.head_dim} values, no multiple of 32")
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        _norm_eps(_running(norm))
    for name in NAMES:
        projection = _projection(_module(layer, name))[0]
        _require(all(n % 16 == 0 for n in projection.weight.shape), f"{name} has sizes that are no multiples of 16")
    hooked = [n for n, m in layer.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    _require(not hooked, f"its module {hooked[:1]} has hooks")


def _norm_eps(norm: Any) -> float:
    eps = getattr(norm, "variance_epsilon", None)
    _require(eps is not None and set(norm._parameters) == {"weight"}, f"its norm is {type(norm).__name__}")
    return float(eps)  # type: ignore[arg-type]


def _projection(module: Any) -> tuple[Projection, float, float]:
    """A linear layer's tensors, and the scale and dropout of its LoRA.

    Raises:
        NotFused: it is no plain linear layer, or its adapter is no plain LoRA.
    """
    if type(module) is torch.nn.Linear:
        return Projection(_plain(module.weight), _plain(module.bias), None, None), 0.0, 0.0
    from peft.tuners.lora.layer import Linear as LoraLinear

    _require(type(module) is LoraLinear, f"it has a layer of the type {type(module).__name__}")
    base = module.base_layer
    _require(type(base) is torch.nn.Linear, f"a LoRA stands on a layer of the type {type(base).__name__}")
    plain = Projection(_plain(base.weight), _plain(base.bias), None, None)
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not active:
        return plain, 0.0, 0.0
    name = active[0]
    _require(len(active) == 1, "several adapters are active")
    _require(name not in module.lora_variant and not module.lora_bias[name], "its LoRA is of another kind")
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    rate = float(getattr(module.lora_dropout[name], "p", 0.0))
    return plain._replace(a=_plain(a), b=_plain(b)), float(module.scaling[name]), rate


def _plain(tensor: Any) -> Any:
    _require(
        tensor is None or (tensor.is_contiguous() and type(tensor) in (torch.Tensor, torch.nn.Parameter)),
        "a weight is no plain tensor",
    )
    return tensor
