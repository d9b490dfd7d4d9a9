"""Models and tokenizers by embedded name, local folder, GGUF file or hub id, with errors that say what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.data.examples import TaskType
from luthier.data.render import PLAIN_TEMPLATE, end_of_turn_ids
from luthier.errors import UserError
from luthier.models.catalogue import CATALOGUE, embedded_model_folder
from luthier.models.fingerprint import fingerprint
from luthier.models.heads import Head, fresh_modules, modules_of
from luthier.models.packed import compute_in, library_of, load_torchao_quietly, require_library
from luthier.models.pairs import set_opening
from luthier.models.quantized import Quantization, QuantizedFrom, require_bitsandbytes, settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def resolve_model(name: str | Path) -> str:
    """The folder, GGUF file or hub id that stands behind a model's name.

    Raises:
        UserError: a path that does not exist or holds no model.
    """
    text = str(name)
    if text in CATALOGUE:
        return str(embedded_model_folder(text))
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            raise UserError(
                f"{text!r} holds " + ("an adapter, not a model" if adapter else "no config.json"),
                where="model.name",
                remedy="merge the adapter first (`luthier merge`)" if adapter else "name a folder that holds a model",
            )
        return str(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{text!r} is a file", where="model.name", remedy="name its folder, or a .gguf file")
        return str(path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise UserError(f"there is no folder {text!r}", where="model.name", remedy="check the path")
    return text


def training_dtype(choice: str = "auto", device: torch.device | None = None) -> torch.dtype:
    """The precision to train in: ``auto`` takes bfloat16 where the hardware has instructions for it.

    On CPUs those are AVX512-BF16 or AMX: without them a bfloat16 product is several times slower than float32.
    """
    if choice != "auto":
        dtype: torch.dtype = getattr(torch, choice)
        return dtype
    if device is not None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device is not None and device.type != "cpu":
        return torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, chat_template: str | None = None, chats: bool = True
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with a chat template: its own, the file named, or a documented plain format.

    Args:
        name: embedded name, folder, GGUF file or hub id.
        revision: branch, tag or commit of a hub model.
        chat_template: a Jinja file.
        chats: whether it needs a template at all.

    Raises:
        UserError: nothing is found under that name, or the template file cannot be read.
    """
    from transformers import AutoTokenizer

    own = Path(name).expanduser()
    # An adapter's folder holds a tokenizer and no model.
    resolved = str(own) if (own / "tokenizer_config.json").is_file() else resolve_model(name)
    place, options = _place(resolved, revision)
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"the chat template {chat_template!r} cannot be read: {error.strerror}",
                where="model.chat_template",
                remedy="name a Jinja file",
            ) from None
    if not tokenizer.chat_template and chats:
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.pad_token is None:
        # Padding is masked everywhere; which token stands there does not matter.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str | Path, *, revision: str | None = None) -> Any:
    """A model's config.

    Raises:
        UserError: nothing is found under that name.
    """
    from transformers import AutoConfig

    place, options = _place(resolve_model(name), revision)
    with _explained(name):
        return AutoConfig.from_pretrained(place, **options)


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    quantization: Quantization | None = None,
    head: Head | None = None,
    offload_folder: Path | None = None,
) -> PreTrainedModel:
    """A model, in eval mode. Modules that no weights are found for are named in its attribute ``fresh_modules``.

    Args:
        name: embedded name, folder, GGUF file or hub id.
        dtype: precision of the weights, or of the products where they are stored in 8 or 4 bits; None: as stored.
        revision: branch, tag or commit of a hub model.
        quantization: how its linear layers' weights are held; None: as they are.
        head: what stands on its body; None: what it was saved with, the head of a causal language model as a rule.
        offload_folder: where given, the weights stay on disk (see ``models.offloaded``), and those that must be
            rewritten for it are written there.

    Raises:
        UserError: nothing is found under that name, its files are incomplete, or it can have no such head.
    """
    load_torchao_quietly()
    from transformers import GgufConfig

    place, options = _place(resolve_model(name), revision)
    if quantization is not None and "gguf_file" in options:
        raise UserError(
            f"{str(name)!r} is a GGUF file, which cannot be quantised again",
            where="model.name",
            remedy="name a folder or a hub id that holds the weights as safetensors, or use method.name=lora",
        )
    if head is None:
        head = Head.of_config(load_config(name, revision=revision))
    elif head.task is TaskType.MASKED_LM:
        _require_masked(name, load_config(name, revision=revision))
    if quantization is not None:
        return _quantized(name, place, options, dtype, revision, quantization, head)
    packed_by = None
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif (packed_by := library_of(load_config(name, revision=revision))) is not None:
        require_library(packed_by, str(name))
    if offload_folder is not None:
        options |= {"device_map": {"": "disk"}, "offload_folder": str(offload_folder)}
    with _explained(name), without_bars(), _quiet(head):
        model, told = head.loader().from_pretrained(
            place,
            dtype="auto" if packed_by else dtype or "auto",
            output_loading_info=True,
            # A classifier of other classes gives its body.
            ignore_mismatched_sizes=head.classes is not None,
            **options,
            **head.options(),
        )
    without = [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]
    model.fresh_modules = _fresh(name, model, head, without)
    if "gguf_file" in options:
        model.name_or_path = resolve_model(name)
    elif Path(place).is_dir():
        # An adapter's config names its base by this: an absolute path is found from any working folder.
        model.name_or_path = str(Path(place).resolve())
    if packed_by is not None and dtype is not None:
        compute_in(model, dtype)
    return model.eval()


def _require_masked(name: str | Path, config: Any) -> None:
    """Refuse a model that reads from one side alone, or whose head does not predict each token at its own place.

    Raises:
        UserError: it does.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as NAMES

    kind = str(config.model_type)
    if not str(NAMES.get(kind, "")).endswith("ForMaskedLM"):
        raise UserError(
            f"model {str(name)!r} is no encoder that fills in words ({kind})",
            where="model.name",
            remedy="name a BERT, RoBERTa or another encoder, or use task=causal_lm",
        )


def _fresh(name: str | Path, model: PreTrainedModel, head: Head, parameters: list[str]) -> list[str]:
    """The modules that no weights were found for.

    Raises:
        UserError: they are not a new head's, so they should have been there.
    """
    body = f"{model.base_model_prefix}."
    whole = head.writes or head.pairs
    lost = [p for p in parameters if whole or (p.startswith(body) and not p.startswith(f"{body}pooler."))]
    if lost:
        raise UserError(
            f"model {str(name)!r} holds no weights for {lost[0]}"
            + (f" and {len(lost) - 1:,} more parameters" if len(lost) > 1 else ""),
            where="model.name",
            remedy="its files are incomplete or of another kind of model; get them anew",
        )
    return modules_of(model, parameters)


def _quantized(
    name: str | Path,
    place: str,
    options: dict[str, Any],
    dtype: torch.dtype | None,
    revision: str | None,
    quantization: Quantization,
    head: Head,
) -> PreTrainedModel:
    """See :func:`load_model`; ``dtype`` is the precision of what is not quantised, and of products."""
    require_bitsandbytes()
    # The weights are read as they are stored, which maps the file into memory and keeps none of them.
    plain = load_model(name, revision=revision, head=head)
    if getattr(plain.config, "quantization_config", None) is not None:
        raise UserError(
            f"{str(name)!r} is stored quantised already",
            where="model.name",
            remedy="name the model that it was quantised from",
        )
    origin = QuantizedFrom(str(name), revision, quantization, plain.dtype, fingerprint(plain))
    place_of_plain, fresh = plain.name_or_path, fresh_modules(plain)
    del plain
    with _explained(name), without_bars(), _quiet(head):
        model = head.loader().from_pretrained(
            place,
            dtype=dtype or origin.dtype,
            quantization_config=quantization.config(dtype or origin.dtype, whole=fresh),
            # Quantised on the CPU like all bases are loaded, where a GPU may not hold what is not yet quantised.
            device_map={"": "cpu"},
            **options,
            **head.options(),
        )
    model.name_or_path, model.fresh_modules = place_of_plain, fresh
    return settle(model, origin).eval()


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of loading and saving, which would break the run's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet(head: Head) -> Iterator[None]:
    """Without the report on weights of another head than the one asked for, which is meant."""
    from transformers.utils import logging

    shown = logging.get_verbosity()
    if not head.writes:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(shown)


def set_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make generation stop where an answer ends; the ids that were missing are returned.

    A model whose generation config lacks the template's end-of-turn talks on after its answer once served.
    """
    head = Head.of(model)
    if head.pairs:
        set_opening(model, tokenizer)
        return []
    if not head.writes:
        return []
    config = model.generation_config
    assert config is not None
    eos = config.eos_token_id
    known = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    missing = [i for i in end_of_turn_ids(tokenizer) if i not in known]
    if missing:
        config.eos_token_id = known + missing
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return missing


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a classifier which token is padding: a decoder's finds the end of a text by it, anywhere it is loaded."""
    if Head.of(model).classes is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def context_of(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Longest text that a model takes, in tokens; None where nothing says."""
    # Some count positions from a padding's number on and say so in the tokenizer alone; others' says nothing (1e30).
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (own, tokenizer.model_max_length) if n is not None and n < 10**9]
    return min(limits, default=None)


def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> list[int]:
    """Add tokens to the vocabulary and rows for them to the embeddings; returns the ids of those that are new.

    New rows start as the mean of the pieces their text had before, so that they begin with a meaning.
    """
    return grow(model, tokenizer, extend(tokenizer, tokens))


def extend(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> dict[str, list[int]]:
    """Add tokens to a vocabulary; returns those that are new, each with the ids its text had before."""
    known = tokenizer.get_vocab()
    pieces = {t: tokenizer(t, add_special_tokens=False).input_ids for t in tokens if t not in known}
    tokenizer.add_tokens(list(pieces))
    return pieces


def grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pieces: dict[str, list[int]]) -> list[int]:
    """Rows of the embeddings for what :func:`extend` has added; returns their ids."""
    if not pieces:
        return []
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in pieces]
    if max(ids) >= len(_embedding_weights(model)[0]):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for weight in _embedding_weights(model):
            for token_id, old in zip(ids, pieces.values(), strict=True):
                weight[token_id] = weight[old].float().mean(0).to(weight.dtype)
    return ids


def _embedding_weights(model: PreTrainedModel) -> list[torch.Tensor]:
    """``[V, D]`` of the input embeddings and of the output head, once where they are tied."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(layer.weight): layer.weight for layer in layers if layer is not None}.values())


def _place(resolved: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    path = Path(resolved)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return resolved, {} if revision is None or path.is_dir() else {"revision": revision}


class _explained:
    """Turns the many ways in which a model fails to load into one clear message."""

    def __init__(self, name: str | Path) -> None:
        self.name = str(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, UserError):
            return
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(self.name).expanduser().exists() or self.name in CATALOGUE:
            remedy = "check that the folder holds a whole model: config.json, weights and tokenizer.json"
        else:
            offline = os.environ.get("HF_HUB_OFFLINE") == "1"
            remedy = (
                f"known embedded models: {', '.join(CATALOGUE)}; a local folder must exist; a hub id needs a network"
                + (" (HF_HUB_OFFLINE=1 is set)" if offline else "")
            )
        raise UserError(f"model {self.name!r} cannot be loaded: {first}", where="model.name", remedy=remedy) from error
