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
from luthier.models.catalogue import CATALOGUE
from luthier.models.fingerprint import fingerprint
from luthier.models.heads import Head
from luthier.models.loading import load_model, load_tokenizer, set_padding
from luthier.models.quantized import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        yield load_model(self.base_name, dtype=self.model.dtype)


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
        return _whole(text, dtype, text)
    base = _base_of_run(folder)
    if (folder / "manifest.json").is_file():
        inner = next((folder / n for n in ("adapter", "model") if (folder / n).is_dir()), None)
        if inner is None:
            raise UserError(
                f"the run in {text!r} has saved no model yet",
                where=text,
                remedy="finish it with `luthier train RECIPE --resume`",
            )
        folder = inner
    if not (folder / "adapter_config.json").is_file():
        if not (folder / "config.json").is_file():
            raise UserError(f"{text!r} holds no model and no adapter", where=text, remedy="name a run or model folder")
        return _whole(folder, dtype, base)
    return _adapter(folder, dtype)


def _whole(name: str | Path, dtype: torch.dtype | None, base: str | None) -> SavedModel:
    model = load_model(name, dtype=dtype)
    return SavedModel(model, load_tokenizer(name, chats=Head.of(model).writes), "model", base)


def _base_of_run(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["model"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _adapter(folder: Path, dtype: torch.dtype | None) -> SavedModel:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"adapter_config.json is no JSON: {error}", where=str(folder), remedy="save it again") from None
    record = _record(folder)
    if not any((folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")):
        raise UserError("the adapter has no weights", where=str(folder), remedy="it was saved in part; save it again")
    # The embedded name finds its folder on any machine; the config holds a path of the one that trained.
    recorded = record.get("base")
    name = str(recorded if recorded in CATALOGUE else config.get("base_model_name_or_path") or recorded or "")
    if not name:
        raise UserError("the adapter does not name its base", where=str(folder), remedy="set base_model_name_or_path")
    fallback = "adapter" if config.get("peft_type") == "BOTTLENECK" else "lora"
    method = METHODS.get(str(record.get("method")), METHODS[fallback])
    quantized = record.get("quantization")
    head = Head.from_dict(record)
    base = load_model(name, dtype=dtype, quantization=Quantization(**quantized) if quantized else None, head=head)
    own = folder if (folder / "tokenizer_config.json").is_file() else name
    tokenizer = load_tokenizer(own, chats=head.writes)
    set_padding(base, tokenizer)
    rows = int(base.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if record.get("rows", rows) > rows:
        # Tokens were added in training; their rows come with the adapter.
        base.resize_token_embeddings(record["rows"], mean_resizing=False)
    expected, got = record.get("fingerprint"), fingerprint(base)
    if expected is not None and expected != got:
        raise UserError(
            f"the adapter was trained on another base than {name!r} (fingerprint {expected[:12]}, this one {got[:12]})",
            where=str(folder / BASE_RECORD),
            remedy="load the base it was trained on",
        )
    try:
        model: Any = method.load(base, folder)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the adapter does not fit its base {name!r}: {first}", where=str(folder), remedy="check both folders"
        ) from None
    return SavedModel(model.eval(), tokenizer, "adapter", name, method, folder)


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
    (adapter_dir / BASE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
