"""Tuned weights as they lie on disk: a run, adapter or model folder, loaded as any user would load it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.errors import UserError
from luthier.methods.base import METHODS, TuningMethod
from luthier.methods.mixed import MIXED_WITH_PREFIX, PARTS
from luthier.models.catalogue import CATALOGUE
from luthier.models.fingerprint import fingerprint
from luthier.models.heads import Head
from luthier.models.loading import load_model, load_tokenizer, set_padding
from luthier.models.quantized import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.recipe import Recipe

BASE_RECORD = "luthier_base.json"


@dataclass(slots=True)
class SavedModel:
    """A tuned model and where it comes from."""

    model: Any
    """A plain transformers model, or a PEFT model around its base."""
    tokenizer: PreTrainedTokenizerBase
    kind: str
    """``adapter`` or ``model``"""
    base_name: str | None
    """The base, by the name that loads it; None where the folder does not say."""
    method: TuningMethod | None = None
    """How an adapter was made; None for a whole model."""
    folder: Path | None = None
    """The adapter's folder; None for a whole model."""

    @property
    def head(self) -> Head:
        """What stands on the model's body."""
        return Head.of(self.model)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[Any]:
        """The untouched base, for as long as the context lasts.

        Raises:
            UserError: the folder does not say which model it was tuned from.
        """
        if self.kind == "adapter":
            with self.model.disable_adapter():
                yield self.model
            return
        if self.base_name is None:
            raise UserError("this folder does not say which model it was tuned from", remedy="name the run's folder")
        yield load_model(self.base_name, dtype=self.model.dtype, head=self.head).to(self.model.device)


def load_saved(path: str | Path, *, dtype: torch.dtype | None = None) -> SavedModel:
    """Load what a run has saved.

    Args:
        path: a run folder, an adapter folder, a model folder, an embedded model's name or a hub id.
        dtype: precision of the weights; None: as the base is stored.

    Raises:
        UserError: nothing is there, the folder is half of one, or the adapter was trained on another base.
    """
    text = str(path)
    folder = Path(text).expanduser()
    if text in CATALOGUE or not folder.is_dir():
        fetched = None if text in CATALOGUE or folder.exists() else _fetched_adapter(text)
        return _whole(text, dtype, text) if fetched is None else _on_base(AdapterFolder.read(fetched), dtype)
    base = _base_of_run(folder)
    folder = _tuned_weights(folder)
    if not (parts_of(folder)[0] / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise UserError(f"{text!r} holds no model and no adapter", where=text, remedy="name a run or model folder")
        return _whole(folder, dtype, base)
    return _on_base(AdapterFolder.read(folder), dtype)


def _fetched_adapter(name: str) -> Path | None:
    """The folder that a hub's adapter is fetched into, without pickles; None: no adapter is known of that name."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        for config in ("adapter_config.json", f"{PARTS[-1]}/adapter_config.json"):
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(name, config)
                return Path(snapshot_download(name, allow_patterns=patterns))
    except (HTTPError, OSError, HFValidationError):
        pass  # loading it as a model tells what is wrong
    return None


def _tuned_weights(folder: Path) -> Path:
    """The folder itself, or that of the tuned weights where it is a run's."""
    if not (folder / "manifest.json").is_file():
        return folder
    inner = next((folder / n for n in ("adapter", "model") if (folder / n).is_dir()), None)
    if inner is None:
        raise UserError(
            f"the run in {str(folder)!r} has saved no model yet",
            where=str(folder),
            remedy="finish it with `luthier train RECIPE --resume`",
        )
    return inner


def parts_of(folder: Path) -> list[Path]:
    """The folders of an adapter's weights, in the order in which they go on the base: its own, or those in it that a
    mixture with a prefix has."""
    *_, last = inner = [folder / part for part in PARTS]
    plain = (folder / "adapter_config.json").is_file()
    return inner if (last / "adapter_config.json").is_file() and not plain else [folder]


def _whole(name: str | Path, dtype: torch.dtype | None, base: str | None) -> SavedModel:
    model = load_model(name, dtype=dtype)
    return SavedModel(model, load_tokenizer(name, chats=Head.of(model).writes), "model", base)


def _base_of_run(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["model"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A saved adapter and what its folder says of it; no weights are read."""

    folder: Path
    config: dict[str, Any]
    """``adapter_config.json``; of a mixture with a prefix, that of its matrices."""
    record: dict[str, Any]
    """``luthier_base.json``; empty where another tool has saved the adapter."""

    @classmethod
    def read(cls, path: str | Path) -> AdapterFolder:
        """What a run or adapter folder says.

        Raises:
            UserError: there is no adapter, or half of one.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UserError(f"there is no folder {str(path)!r}", remedy="name a run or adapter folder")
        folder = _tuned_weights(folder)
        try:
            config = json.loads((parts_of(folder)[0] / "adapter_config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{str(path)!r} holds no adapter", remedy="name the folder of a run that trained one"
            ) from None
        except ValueError as error:
            raise UserError(
                f"adapter_config.json is no JSON: {error}", where=str(folder), remedy="save it again"
            ) from None
        weights = ("adapter_model.safetensors", "adapter_model.bin")
        if not all(any((part / name).is_file() for name in weights) for part in parts_of(folder)):
            raise UserError(
                "the adapter has no weights", where=str(folder), remedy="it was saved in part; save it again"
            )
        return cls(folder, config, _record(folder))

    @property
    def parts(self) -> list[Path]:
        """The folders that PEFT has written, in the order in which they go on the base."""
        return parts_of(self.folder)

    @property
    def base_name(self) -> str:
        """The name that loads the base.

        Raises:
            UserError: the folder does not say.
        """
        # The embedded name finds its folder on any machine; the config holds a path of the one that trained.
        recorded = self.record.get("base")
        name = str(recorded if recorded in CATALOGUE else self.config.get("base_model_name_or_path") or recorded or "")
        if not name:
            raise UserError(
                "the adapter does not name its base", where=str(self.folder), remedy="set base_model_name_or_path"
            )
        return name

    @property
    def method(self) -> TuningMethod:
        """How it was made."""
        if len(self.parts) > 1:
            return MIXED_WITH_PREFIX
        fallback = "adapter" if self.config.get("peft_type") == "BOTTLENECK" else "lora"
        return METHODS.get(str(self.record.get("method")), METHODS[fallback])

    @property
    def quantization(self) -> Quantization | None:
        """How its base was held; None: as it is stored."""
        held = self.record.get("quantization")
        return Quantization(**held) if held else None

    @property
    def head(self) -> Head:
        """What stands on its base's body."""
        return Head.from_dict(self.record)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one saved beside it, else its base's."""
        own = (self.folder / "tokenizer_config.json").is_file()
        return load_tokenizer(self.folder if own else self.base_name, chats=self.head.writes)

    def load_base(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Its base, with rows for tokens that were added in training.

        Args:
            dtype: precision of the weights; None: as the base is stored.

        Raises:
            UserError: the model of that name is another than the adapter was trained on.
        """
        name = self.base_name
        base = load_model(name, dtype=dtype, quantization=self.quantization, head=self.head)
        rows = int(base.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        if self.record.get("rows", rows) > rows:
            # Tokens were added in training; their rows come with the adapter.
            base.resize_token_embeddings(self.record["rows"], mean_resizing=False)
        self.require_base(fingerprint(base))
        return base

    def require_base(self, got: str) -> None:
        """Refuse a base of another fingerprint than the one that the adapter was trained on.

        Raises:
            UserError: it is another.
        """
        expected = self.record.get("fingerprint")
        if expected is not None and expected != got:
            raise UserError(
                f"the adapter was trained on another base than {self.base_name!r} "
                f"(fingerprint {expected[:12]}, this one {got[:12]})",
                where=str(self.folder / BASE_RECORD),
                remedy="load the base it was trained on",
            )

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """Turns the ways in which the weights do not fit the base into one clear message."""
        try:
            yield
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            if isinstance(error, UserError):
                raise
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"the adapter does not fit its base {self.base_name!r}: {first}",
                where=str(self.folder),
                remedy="check both folders",
            ) from None


def _on_base(adapter: AdapterFolder, dtype: torch.dtype | None) -> SavedModel:
    tokenizer, base = adapter.tokenizer(), adapter.load_base(dtype)
    set_padding(base, tokenizer)
    with adapter.fitting():
        model: Any = adapter.method.load(base, adapter.folder)
    return SavedModel(model.eval(), tokenizer, "adapter", adapter.base_name, adapter.method, adapter.folder)


def adapter_dtype(folder: Path) -> torch.dtype | None:
    """Precision that an adapter was trained in; None where it isn't saved as safetensors."""
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as tensors:
        dtype: torch.dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return dtype


def _record(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / BASE_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_record(
    adapter_dir: Path,
    base: Any,
    name: str,
    *,
    base_fingerprint: str | None = None,
    method: TuningMethod | None = None,
    recipe: Recipe | None = None,
) -> None:
    """Write what an adapter belongs to and how it was made, as ``luthier_base.json`` beside it.

    Args:
        adapter_dir: the adapter's folder.
        base: the base, or the PEFT model around it.
        name: the name that loads the base.
        base_fingerprint: of the base as it was before anything was added to it; None: it is computed.
        method: the method; None: LoRA.
        recipe: the run's recipe; None: a causal language model, as it is stored.
    """
    record: dict[str, Any] = {
        "base": name,
        "fingerprint": fingerprint(base) if base_fingerprint is None else base_fingerprint,
        "rows": int(base.get_input_embeddings().weight.shape[0]),
        "method": (method or METHODS["lora"]).name,
    }
    if recipe is not None and method is not None:
        record |= Head.of(base).to_dict() | {"task": recipe.task.name}
        if (quantization := method.quantization(recipe.method)) is not None:
            record["quantization"] = asdict(quantization)
    put_record(adapter_dir, record)


def put_record(adapter_dir: Path, record: dict[str, Any]) -> None:
    """Write ``luthier_base.json``."""
    (adapter_dir / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
