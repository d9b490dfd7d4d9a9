"""Several adapters on one base: added, switched, combined into new ones, saved and merged."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from luthier.deployment.merge import PROMPTS, merge_adapter
from luthier.deployment.parity import ParityReport, check_parity, distance, log_probabilities, require
from luthier.deployment.tokens import limit_of, token_ids
from luthier.errors import UserError
from luthier.methods.base import TuningMethod, load_peft, peft_warnings_apart, tie_copies
from luthier.methods.combination import Combination, CombinationType, add_combined, require_combinable
from luthier.methods.saved import AdapterFolder, load_saved, put_record
from luthier.models.fingerprint import fingerprint
from luthier.models.heads import Head
from luthier.models.loading import load_model, set_padding, without_bars
from luthier.models.quantized import Quantization
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class CombinedAdapter:
    """A combination of adapters, and what became of each part of it."""

    name: str
    """The new adapter's, in its set."""
    combination: Combination
    parts: dict[str, tuple[float, float]]
    """Of each adapter: ‖ΔW − ΔWᵢ‖ / ‖ΔWᵢ‖ and the cosine of the angle between them, over all layers."""
    lost: float
    """‖ΔW asked for − ΔW of the new adapter‖ / ‖ΔW asked for‖: what its rank and its precision lose of it."""
    ranks: tuple[int, int]
    """The least and the greatest over the layers."""

    def to_dict(self) -> dict[str, Any]:
        """What lies beside a saved combination."""
        told = {n: {"distance": d, "cosine": c} for n, (d, c) in self.parts.items()}
        return asdict(self.combination) | {"parts": told, "lost": self.lost, "ranks": list(self.ranks)}


@dataclass(frozen=True, slots=True)
class _Member:
    record: dict[str, Any]
    """``luthier_base.json``"""
    method: TuningMethod
    tokenizer: PreTrainedTokenizerBase
    base_name: str


class AdapterSet:
    """Named adapters on one base, of which one is on; made by :meth:`load`.

    ``model`` answers as the base with that adapter, and is to be read with ``tokenizer``, which is that adapter's own.
    """

    def __init__(self, first: str, adapter: AdapterFolder, dtype: torch.dtype | None = None) -> None:
        base = adapter.load_base(dtype)
        self._rows = int(base.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        self._fingerprint = fingerprint(base)
        self._quantization = adapter.quantization
        self._kind = adapter.config.get("peft_type")
        self._off = False
        _require_name(first, base)
        with adapter.fitting():
            self.model: Any = load_peft(base, adapter.folder, first)
        self.model.eval()
        self.model.set_adapter(first, inference_mode=True)
        self._members = {first: self._member(adapter)}
        set_padding(base, self.tokenizer)

    @classmethod
    def load(cls, adapters: Mapping[str, str | Path], *, dtype: torch.dtype | None = None) -> AdapterSet:
        """Saved adapters on the base that all of them were trained on; the first is on.

        Args:
            adapters: run or adapter folders by the names they are to have.
            dtype: precision of base and adapters; None: as the base is stored.

        Raises:
            UserError: none is named, or see :meth:`add`.
        """
        if not adapters:
            raise UserError("no adapter is named", remedy="name at least one run or adapter folder")
        # All folders are looked at before the base is loaded.
        folders = {name: AdapterFolder.read(path) for name, path in adapters.items()}
        for folder in folders.values():
            _require_lone(folder)
        (first, adapter), *others = folders.items()
        made = cls(first, adapter, dtype)
        for name, folder in others:
            made._put(name, folder)
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters, in the order in which they came."""
        return tuple(self._members)

    @property
    def active(self) -> str | None:
        """The adapter that is on; None within :meth:`base`."""
        return None if self._off else str(self.model.active_adapter)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with its chat template, that was saved with the adapter that is on."""
        return self._members[str(self.model.active_adapter)].tokenizer

    def add(self, name: str, path: str | Path) -> None:
        """Put one more saved adapter on the base; which one is on does not change.

        Args:
            name: a new one.
            path: a run or adapter folder.

        Raises:
            UserError: the name is in use or no good; there is no adapter; it was trained on another base, or beside
                one that was held otherwise, or by a method that cannot live beside the others'.
        """
        adapter = AdapterFolder.read(path)
        _require_lone(adapter)
        self._put(name, adapter)

    def remove(self, name: str) -> None:
        """Take an adapter away.

        Raises:
            UserError: there is none of that name, or it is on.
        """
        self._require(name)
        if name == str(self.model.active_adapter):
            raise UserError(f"the adapter {name!r} is on", remedy="switch to another before it is removed")
        self.model.delete_adapter(name)
        del self._members[name]

    def switch(self, name: str) -> None:
        """Turn an adapter on, and the one that was on off.

        Raises:
            UserError: there is none of that name, or all are off for the time being.
        """
        self._require(name)
        if self._off:
            raise UserError("all adapters are off here", remedy="leave the base() context before one is switched on")
        self.model.set_adapter(name, inference_mode=True)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """The model with an adapter on, for as long as the context lasts.

        Raises:
            UserError: see :meth:`switch`.
        """
        before = str(self.model.active_adapter)
        self.switch(name)
        try:
            yield self.model
        finally:
            self.switch(before)

    @contextlib.contextmanager
    def base(self) -> Iterator[Any]:
        """The untouched base, for as long as the context lasts."""
        before = self._off
        with self.model.disable_adapter():
            self._off = True
            try:
                yield self.model
            finally:
                self._off = before

    def weigh(
        self,
        weights: Mapping[str, float],
        combination: CombinationType = "linear",
        *,
        name: str | None = None,
        density: float | None = None,
        rank: int | Literal["full"] | None = None,
        seed: int | None = None,
    ) -> CombinedAdapter:
        """Make a new adapter of others; which one is on does not change.

        Args:
            weights: of each, by name. ``linear``, ``dare_linear``: of the sum; ``ties``, ``dare_ties``: of the mean.
            combination: see :mod:`luthier.methods.combination`.
            name: of the new one; None: their names, joined by +.
            density: share of entries of each update that stays; None: 0.5. Not with ``linear``.
            rank: of the new one; None: the sum of theirs, which is exact for ``linear``; ``full``: exact for all, and
                as large as the layers themselves.
            seed: of what DARE drops; None: 0. The same seed gives the same adapter.

        Raises:
            UserError: an adapter is no plain LoRA, or the adapters read text differently; an argument cannot be used.
        """
        asked = Combination(dict(weights), combination, density, rank, seed)
        for part in weights:
            self._require(part)
        new = "+".join(weights) if name is None else name
        self._require_new(new)
        if self._off:
            raise UserError("all adapters are off here", remedy="leave the base() context before some are combined")
        require_combinable({part: self.model.peft_config[part] for part in weights})
        members = {part: self._members[part] for part in weights}
        _require_alike(members)
        active = str(self.model.active_adapter)
        account = add_combined(self.model, asked, new)
        self.model.eval()
        self.model.set_adapter(active, inference_mode=True)
        self._members[new] = next(iter(members.values()))
        config = self.model.peft_config[new]
        ranks = [config.r, *config.rank_pattern.values()]
        told = {part: account.of_part(part) for part in weights}
        return CombinedAdapter(new, asked, told, account.share_lost(), (min(ranks), max(ranks)))

    def distance(self, one: str, other: str | None = None, prompts: Sequence[str] = PROMPTS) -> float:
        """Mean |Δ log-probability| of likely tokens between an adapter and another, or the base, over some texts."""
        self._require(one)
        tokenizer = self._members[one].tokenizer
        ids = token_ids(tokenizer, prompts, limit_of(self.model, tokenizer))
        answers = []
        for name in (one, other):
            with self.base() if name is None else self.use(name) as model:
                answers.append([log_probabilities(model, i) for i in ids])
        return distance(*answers)["mean"]

    def save(self, name: str, folder: str | Path, *, prompts: Sequence[str] | None = None) -> ParityReport:
        """Write an adapter as a folder that plain PEFT and all of Luthier's commands load, with its tokenizer.

        It is written aside, loaded again, and renamed where it gives the same logits bit for bit.

        Args:
            name: the adapter.
            folder: a new or empty one.
            prompts: rendered texts for the parity gate; None: a few plain ones.

        Raises:
            UserError: there is no such adapter, the folder is in use, the disk is full, or the gate refuses.
        """
        self._require(name)
        target, member = Path(folder).expanduser(), self._members[name]
        require_unused(target)
        aside = target.parent / f".writing-{target.name}"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with writing(target), without_bars():
                self.model.save_pretrained(aside, selected_adapters=[name])
                written = aside if name == "default" else aside / name
                member.tokenizer.save_pretrained(written)
                put_record(written, member.record)
            again = load_saved(written, dtype=self.model.dtype)
            with self.use(name):
                report = check_parity(
                    self.model,
                    again.model,
                    member.tokenizer,
                    prompts or PROMPTS,
                    candidate_tokenizer=again.tokenizer,
                    name="saved and reloaded",
                    exact=True,
                )
            require(report)
            with writing(target):
                written.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return report

    def merge(self, name: str, folder: str | Path, *, prompts: Sequence[str] | None = None) -> ParityReport:
        """Merge an adapter into its base, behind the parity gate; see :func:`luthier.deployment.merge.merge_adapter`.

        Args:
            name: the adapter.
            folder: a new or empty one, or one that holds an earlier merge.
            prompts: rendered texts for the parity gate; None: a few plain ones.

        Raises:
            UserError: the method does not merge, or see :meth:`save`.
        """
        self._require(name)
        self._members[name].method.require_merging()
        target = Path(folder).expanduser()
        aside = target.parent / f".writing-{target.name}-adapter"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.save(name, aside, prompts=prompts)
            return merge_adapter(aside, target, prompts=prompts)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _put(self, name: str, adapter: AdapterFolder) -> None:
        self._require_new(name)
        self._require_same_base(name, adapter)
        active = str(self.model.active_adapter)
        with adapter.fitting(), peft_warnings_apart():
            self.model.load_adapter(str(adapter.folder), adapter_name=name, autocast_adapter_dtype=False)
        tie_copies(self.model)
        self.model.set_adapter(active, inference_mode=True)
        self._members[name] = self._member(adapter)

    def _member(self, adapter: AdapterFolder) -> _Member:
        own = {"base": adapter.base_name, "fingerprint": self._fingerprint, "rows": self._rows}
        record = own | {"method": adapter.method.name} | adapter.record
        return _Member(record, adapter.method, adapter.tokenizer(), adapter.base_name)

    def _require(self, name: str) -> None:
        if name not in self._members:
            raise UserError(f"there is no adapter {name!r}", remedy=f"known: {', '.join(self._members)}")

    def _require_new(self, name: str) -> None:
        if name in self._members:
            raise UserError(f"there is an adapter {name!r} already", remedy="choose another name, or remove that one")
        _require_name(name, self.model)

    def _require_same_base(self, name: str, adapter: AdapterFolder) -> None:
        first, member = next(iter(self._members.items()))
        if (kind := adapter.config.get("peft_type")) != self._kind:
            raise UserError(
                f"{name!r} was tuned by method {adapter.method.name} ({kind}) and {first!r} by "
                f"{member.method.name} ({self._kind}): they cannot live on one base",
                where=str(adapter.folder),
                remedy="load it in a set of its own, or tune all by one method",
            )
        head, others = adapter.head, Head.of(self.model)
        if (head.writes, head.classes) != (others.writes, others.classes):
            raise UserError(
                f"{name!r} stands on a base with another head than {first!r}: their tasks or classes differ",
                where=str(adapter.folder),
                remedy="load it in a set of its own",
            )
        own = adapter.record.get("fingerprint") or fingerprint(load_model(adapter.base_name))
        if own != self._fingerprint:
            raise UserError(
                f"{name!r} was trained on another base, {adapter.base_name!r} (fingerprint {own[:12]}), than "
                f"{first!r}, {member.base_name!r} ({self._fingerprint[:12]})",
                where=str(adapter.folder),
                remedy="load it in a set of its own",
            )
        if adapter.quantization != self._quantization:
            raise UserError(
                f"{name!r} was trained beside a base {_held(adapter.quantization)}, and {first!r} beside one "
                f"{_held(self._quantization)}",
                where=str(adapter.folder),
                remedy="load it in a set of its own, or merge it, which gives the base as stored",
            )
        if (rows := adapter.record.get("rows", self._rows)) != self._rows:
            raise UserError(
                f"{name!r} has {rows:,} rows of embeddings and {first!r} {self._rows:,}: tokens were added in training",
                where=str(adapter.folder),
                remedy="load it in a set of its own, or tune all with the same model.added_tokens",
            )


def require_unused(target: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: it does.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{str(target)!r} is not empty", remedy="name a new folder; nothing was touched")


def _require_lone(adapter: AdapterFolder) -> None:
    """Refuse adapters that no other can stand beside.

    Raises:
        UserError: PEFT does not hold it, or it goes with changed weights of the base.
    """
    if adapter.config.get("peft_type") == "BOTTLENECK":
        raise UserError(
            "bottleneck adapters (method adapter) stand alone on their base",
            where=str(adapter.folder),
            remedy="load it by itself, or tune with method.name=lora, whose adapters are switched and combined",
        )
    if len(adapter.parts) > 1:
        raise UserError(
            "a mixture with a prefix stands alone on its base: it is two of PEFT's adapters, one around the other",
            where=str(adapter.folder),
            remedy="load it by itself, or tune with method.num_virtual_tokens=0",
        )
    start = str(adapter.config.get("init_lora_weights", True)).lower()
    if start.startswith(("pissa", "olora", "corda", "lora_ga")):
        raise UserError(
            f"an adapter that began as {start} changes the weights of its base, which others share",
            where=str(adapter.folder),
            remedy="save it as a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )


def _require_name(name: str, model: Any) -> None:
    """PEFT finds an adapter's parameters by its name among the parts of theirs."""
    taken = {part for key, _ in model.named_parameters() for part in key.split(".")} | {"", "base_model"}
    own = name.startswith(("lora_", "ia3_", "trainable_tokens", "modules_to_save", "base_layer"))
    if name in taken or own or name != name.strip() or any(c in name for c in "./\\"):
        raise UserError(
            f"{name!r} cannot be an adapter's name",
            remedy="choose one without dots and slashes that is no name of a layer, such as 'orders'",
        )


def _require_alike(members: Mapping[str, _Member]) -> None:
    """Refuse to combine adapters that read the same text as other tokens.

    Raises:
        UserError: what differs, and between whom.
    """
    (first, one), *others = members.items()
    for name, other in others:
        differs = None
        if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            differs = "the vocabulary"
        elif one.tokenizer.chat_template != other.tokenizer.chat_template:
            differs = "the chat template"
        elif one.tokenizer.special_tokens_map != other.tokenizer.special_tokens_map:
            differs = "the special tokens"
        if differs is not None:
            raise UserError(
                f"{first!r} and {name!r} cannot be combined: {differs} of the one is not the other's",
                remedy="switch between them, or tune both alike: one adapter can have one only",
            )


def _held(quantization: Quantization | None) -> str:
    return "as it is stored" if quantization is None else f"in {quantization.bits} bits ({quantization.quant_type})"
