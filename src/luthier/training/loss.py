"""The loss of a batch at trained positions alone, by the leanest way that the model proves to allow."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from luthier.data.batch import Batch, pack, pad
from luthier.data.encode import EncodedExample
from luthier.methods.base import trainable_parameters
from luthier.models.virtual import VirtualTokens, own_logits
from luthier.training import attention
from luthier.training.cross_entropy import chunk_rows, linear_cross_entropy
from luthier.training.fused import cuda, kernels, varlen
from luthier.training.fused.decoder import FusedDecoder, NotFused
from luthier.training.fused.layer import Recompute


def _ops_of_layers(parameters: list[torch.nn.Parameter]) -> Any:
    """The kernels of fused layers for a model's device and precision.

    Raises:
        NotFused: there are none.
    """
    kinds = {(p.device.type, p.dtype) for p in parameters}
    if kinds in ({("cuda", torch.bfloat16)}, {("cuda", torch.float16)}):
        choice = varlen.choose(parameters[0].device, parameters[0].dtype)
        if choice.plain:
            raise NotFused(choice.reason)
        return cuda.load(parameters[0].device, parameters[0].dtype)
    if kinds != {("cpu", torch.bfloat16)}:
        names = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
        raise NotFused(f"the kernels are for weights in bfloat16, or on a GPU in float16; here are {names}")
    compiled = kernels.load()
    if compiled is None:
        raise NotFused(kernels.why_not())
    return compiled


class LossFunction:
    """The summed loss of a batch under a model, by the leanest way that the model proves to allow.

    Three questions are put to the model itself, on short rows, rather than to a table of architectures: does it give
    the same logits for packed examples as for each alone? Are its logits a plain linear head of its last hidden states?
    And do the fused layers give the same logits as its own? Where not, batches are right-padded, the model's own head
    computes the logits, or its own layers run.

    Args:
        model: wrapped by its method.
        batching: ``auto``, ``packed`` or ``padded``.
        pad_token_id: fills padded rows; masked.
        share_prefix: whether examples of a batch that begin alike share the computation of their beginning.
        ops: kernels of the fused layers; None: the compiled ones where they fit the model.

    Attributes:
        of_tokens: whether its mean is one a token, whose exponential is a perplexity.
        packed: whether batches are padding-free.
        head: whether the loss is computed in chunks from hidden states.
        fused: the fused layers; None where the model's own modules run.
        reason: why batches are padded, in words for the user; empty where they are not.
        fused_reason: why layers are not fused; empty where they are.
    """

    of_tokens = True

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        batching: str = "auto",
        pad_token_id: int = 0,
        share_prefix: bool = True,
        ops: Any = None,
    ) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.share_prefix = share_prefix
        self.virtual = VirtualTokens(model)
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.body = base.get_decoder() if hasattr(base, "get_decoder") else None
        if self.body is base:
            self.body = None
        self.output = self._output(base)
        self.selects = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.reason = ""
        self.fused_reason = ""
        self.head = False
        self.packed = False
        self.fused: FusedDecoder | None = None
        with _evaluating(model), torch.no_grad():
            self._probe(base, batching)
            try:
                self.fused = self._fuse(ops)
            except NotFused as why:
                self.fused_reason = str(why)

    def batch(self, examples: list[EncodedExample], *, draw: int = 0) -> Batch:
        """The examples as one batch of the form this model takes.

        Args:
            examples: at least one.
            draw: for a loss that draws random numbers for each row, which draw it is: a step's number, from 1; 0
                where the same rows must always be the same batch, as in validation.
        """
        rows = self.virtual.before(examples)
        batch = self._pack(rows, share=self.share_prefix) if self._packable(rows) else self._pad(rows)
        batch.tokens = sum(map(len, examples))
        return batch

    def own_loss(self, row: EncodedExample) -> torch.Tensor:
        """Sum of the cross-entropies of one row's targets by the model's own forward and head, as others compute it."""
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None].to(next(self.model.parameters()).device)
        logits = own_logits(self.model, ids)[0].float()
        at = torch.from_numpy(np.flatnonzero(row.trained)).to(ids.device)
        return F.cross_entropy(logits[at - 1], ids[0, at], reduction="sum")

    def _output(self, base: Any) -> Any:
        """The layer whose outputs are the logits."""
        return base.get_output_embeddings()

    def _attention(self) -> str:
        """The name of the attention that packed rows take."""
        return attention.register()

    def _packable(self, rows: list[EncodedExample]) -> bool:
        return self.packed

    def _pack(self, rows: list[EncodedExample], *, share: bool = False) -> Batch:
        return pack(rows, share=share)

    def _pad(self, rows: list[EncodedExample]) -> Batch:
        return pad(rows, self.pad_token_id)

    def _probe_rows(self) -> list[EncodedExample]:
        return _probe_rows(self.model)

    def recompute_activations(self, what: Recompute = True) -> str:
        """Keep less for the backward pass and compute it again there.

        Args:
            what: True: all but the inputs of layers; "mlp": the inner values of each layer's MLP.

        Returns:
            in words for the user, what is done instead, where layers run that cannot do what was asked; else empty.
        """
        if self.fused is not None:
            self.fused.recompute = what
            return ""
        if not what:
            return ""
        self.model.activation_checkpointing_enable(  # type: ignore[operator]
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
        # Whole layers need less memory than was asked for, never more.
        return "" if what is True else f"whole layers are recomputed, not their MLPs alone: {self.fused_reason}"

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Sum of the cross-entropies of the batch's targets, float32 scalar. Divide by the step's trained tokens."""
        if self.head:
            return linear_cross_entropy(self._hidden(batch), self.output.weight, self._bias(), batch.targets)
        return F.cross_entropy(self.logits(batch).float(), batch.targets, reduction="sum")

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> torch.Tensor:
        """``[K] float32``: the cross-entropy of each of the batch's targets, in the order of the examples."""
        return torch.cat([F.cross_entropy(logits, at, reduction="none") for logits, at in self._target_logits(batch)])

    @torch.no_grad()
    def token_scores(self, batch: Batch) -> torch.Tensor:
        """``[K, 2] float32``: beside :meth:`token_losses`, 1 where another token is likelier, else 0."""
        found = [
            torch.stack([F.cross_entropy(logits, at, reduction="none"), (logits.argmax(-1) != at).float()], 1)
            for logits, at in self._target_logits(batch)
        ]
        return torch.cat(found)

    def _target_logits(self, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``[k, V] float32`` logits and ``[k]`` targets, so many at a time as are held at once."""
        if not self.head:
            yield self.logits(batch).float(), batch.targets
            return
        size, weight, bias = chunk_rows(self.output.weight), self.output.weight, self._bias()
        for hidden, at in zip(self._hidden(batch).split(size), batch.targets.split(size), strict=True):
            yield F.linear(hidden, weight, bias).float(), at

    def _bias(self) -> torch.Tensor | None:
        """``[V]`` what is added to the logits."""
        return getattr(self.output, "bias", None)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """``[K, D]`` last hidden states at the kept positions."""
        if self.fused is not None and batch.packed:
            return self.fused(batch, self.virtual.embedded(batch.input_ids) if self.virtual.vectors else None)
        assert self.body is not None
        hidden = self.body(**self._inputs(batch)).last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])[batch.kept]

    def logits(self, batch: Batch) -> torch.Tensor:
        """``[K, V]`` logits at the kept positions, by the model's own head."""
        inputs = self._inputs(batch)
        if self.selects and batch.packed:
            return self.virtual.reader(**inputs, logits_to_keep=batch.kept).logits[0]
        logits = self.virtual.reader(**inputs).logits
        return logits.reshape(-1, logits.shape[-1])[batch.kept]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {**self.virtual.inputs(batch.input_ids), "use_cache": False}
        if batch.attention_mask is not None:
            begun = self.virtual.begun(len(batch.input_ids))
            return inputs | begun | {"attention_mask": self.virtual.mask(batch.attention_mask)}
        inputs["position_ids"] = batch.position_ids
        inputs["segments"] = batch.segments
        if batch.shares:
            return inputs
        borders = batch.cu_seqlens.to(batch.input_ids.device, non_blocking=True)
        return inputs | {
            # The names that transformers' own layers read, where they look across tokens without attention.
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": batch.longest,
            "max_length_k": batch.longest,
        }

    def _probe(self, base: Any, batching: str) -> None:
        self._probe_packing(batching)
        if self.body is None or not isinstance(self.output, torch.nn.Linear):
            return
        batch = self.batch(self._probe_rows()).to(next(self.model.parameters()).device)
        direct = self.output(self._hidden(batch))
        own = self.logits(batch)
        self.head = proves_head(base, direct, own)

    def _probe_packing(self, batching: str) -> None:
        if batching == "padded":
            self.reason = "model.batching=padded was asked for"
        elif self.virtual.keys:
            self.reason = "trained keys and values stand before each row's own in every layer"
        else:
            native = self.model.config._attn_implementation  # type: ignore[union-attr]
            try:
                self.reason = self._why_not_packed()
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, AssertionError) as error:
                what = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.reason = f"this model does not take packed rows: {what}"
            self.packed = not self.reason
            if not self.packed:
                self.model.set_attn_implementation(native)  # type: ignore[operator]

    def _fuse(self, ops: Any) -> FusedDecoder:
        """The fused layers, where they give the logits of the model's own.

        Raises:
            NotFused: they do not, or there are none for this model.
        """
        if not (self.packed and self.head):
            raise NotFused(self.reason or "its logits are no plain linear head of its last hidden states")
        # Of the base: virtual tokens may be made in float32, and reach the layers in the base's precision.
        parameters = list(self.virtual.reader.parameters())
        ops = _ops_of_layers(parameters) if ops is None else ops
        batch = self._pack(self.virtual.before(self._probe_rows())).to(parameters[0].device)
        # Far along as well, where a scale that depends on the position would show.
        far = replace(batch, position_ids=batch.position_ids + _context(self.model) // 2)
        with attention.recording() as calls:
            own = [self.output(self._hidden(b)).float() for b in (batch, far)]
        fused = FusedDecoder(self.body, calls, ops)
        half = parameters[0].dtype in (torch.bfloat16, torch.float16)
        for theirs, at in zip(own, (batch, far), strict=True):
            embedded = self.virtual.embedded(at.input_ids) if self.virtual.vectors else None
            apart = float((self.output(fused(at, embedded)).float() - theirs).abs().mean())
            bound = (0.15 if half else 0.01) * float(theirs.std())
            if not apart <= bound:
                raise NotFused(f"fused layers change its logits by {apart:.2g} (bound {bound:.2g})")
        apart, name = self._gradients_apart(fused, batch)
        if not apart <= (0.3 if half else 1e-3):
            raise NotFused(f"fused layers change the gradient of {name}: by {apart:.2g} of its size or direction")
        return fused

    @torch.enable_grad()
    def _gradients_apart(self, fused: FusedDecoder, batch: Batch) -> tuple[float, str]:
        """How far fused gradients are from the model's own in size or direction, and where they are so most.

        Both are noisy in bfloat16, on these few tokens by up to half of their size; but noise is at right angles to
        what it disturbs, and leaves ⟨a, b⟩ / ⟨a, a⟩ and the cosine near 1, which a lost term or a wrong scale does
        not. Of the first and the last layer alone: gradients of a whole large model would not fit.
        """
        layers = self.body.layers  # type: ignore[union-attr]
        named = [
            (name, parameter)
            for layer in dict.fromkeys((layers[0], layers[-1]))
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        ]
        if not named:
            # Nothing in the layers is trained, but what stands before them may be.
            named = list(trainable_parameters(self.model).items()) if self.virtual.vectors else []
        if not named:
            return 0.0, ""
        found = []
        for self.fused in (None, fused):
            loss = self(batch)
            found.append(torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, materialize_grads=True))
        self.fused = None
        apart = [
            (_apart(a.double().flatten(), b.double().flatten()), name)
            for a, b, (name, _) in zip(*found, named, strict=True)
            if a.any() or b.any()
        ]
        return max(apart, default=(0.0, ""))

    def _why_not_packed(self) -> str:
        """Empty where packed rows give each example the logits it has alone; leaves packed attention set."""
        rows = self._probe_rows()
        together, bound, why = self._beside_alone(rows)
        return why or self._why_moved(rows, 0, together, bound)

    def _why_moved(self, rows: list[EncodedExample], number: int, before: torch.Tensor, bound: float) -> str:
        """Whatever the rounding, another example in place of one must leave the logits of the others as they were."""
        rows = list(rows)
        rows[number] = replace(rows[number], input_ids=rows[number].input_ids[::-1].copy())
        after = self.logits(self._pack(self.virtual.before(rows)).to(before.device)).float()
        counts = [int(row.trained.sum()) for row in rows]
        moved = [float(piece.abs().max()) for piece in (after - before).split(counts)]
        most = max(moved[:number] + moved[number + 1 :])
        return f"an example changes the logits of another by {most:.2g} in packed rows" if most > 1e-3 * bound else ""

    def _beside_alone(self, rows: list[EncodedExample]) -> tuple[torch.Tensor, float, str]:
        """Logits of packed rows ``[K, V]``; how far they may be from those of each row alone; and why they are not
        those, empty where they are."""
        rows = self.virtual.before(rows)
        device = next(self.model.parameters()).device
        self.model.set_attn_implementation("eager")  # type: ignore[operator]
        alone = torch.cat([self.logits(self._pad([row]).to(device)) for row in rows]).float()
        self.model.set_attn_implementation(self._attention())  # type: ignore[operator]
        together = self.logits(self._pack(rows).to(device)).float()
        # Rounding moves bfloat16 logits of random tokens by some hundredths of their spread, on the average; a
        # wrong position or a look across a border moves them by the spread itself.
        half = next(self.model.parameters()).dtype in (torch.bfloat16, torch.float16)
        bound = (0.15 if half else 0.01) * self._spread(alone)
        apart = float((together - alone).abs().mean())
        why = "" if apart <= bound else f"packed rows change this model's logits by {apart:.2g} (bound {bound:.2g})"
        return together, bound, why

    def _spread(self, logits: torch.Tensor) -> float:
        """How much ``[K, V]`` logits differ."""
        return float(logits.std())


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The larger of b's error in size and in direction, 0 where it is a; infinite where one of them is zero."""
    if not (a.any() and b.any()):
        return math.inf
    product = float(a @ b)
    return max(abs(product / float(a @ a) - 1), 1 - product / float(a.norm() * b.norm()))


def _context(model: torch.nn.Module) -> int:
    """Longest context that the model's config names, in tokens."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return int(getattr(config, "max_position_embeddings", 0) or 0)


def proves_head(base: Any, direct: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether logits computed from hidden states are a model's own ``[K, V]``."""
    half = own.dtype in (torch.bfloat16, torch.float16)
    apart = float((direct.float() - own.float()).abs().mean())
    return apart <= (1e-3 if half else 1e-6) * float(own.float().std()) and not _bends_logits(base)


def _bends_logits(model: Any) -> bool:
    """Whether the config says that logits are scaled or capped: small ones hide that in half precision."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", None) or 1.0
    return getattr(config, "final_logit_softcapping", None) is not None or scale != 1.0


class _evaluating:
    """Puts a model into eval mode and back."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.was = self.model.training
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.was)


def _probe_rows(model: torch.nn.Module) -> list[EncodedExample]:
    """Three short rows of different lengths, every token but the first a target."""
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    rng = np.random.default_rng(0)
    rows = []
    for length in (5, 12, 9):
        trained = np.arange(length) > 0
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        rows.append(EncodedExample(ids, trained, None, 0))
    return rows
