"""From a run's folder to an engine that runs it, each export behind the parity gate and kept for the next start."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from luthier.data.render import prompt_text
from luthier.deployment.adapters import AdapterSet
from luthier.deployment.gguf import check_adapter, check_file
from luthier.deployment.gguf_writing import Weights, require_kind, require_unquantised, write_adapter_gguf, write_gguf
from luthier.deployment.llamacpp import multiplies_bfloat16, require_llamacpp, unused_instructions
from luthier.deployment.parity import ParityReport, render_parity, require
from luthier.deployment.serving.api_error import ApiError
from luthier.deployment.serving.engine import Engine
from luthier.deployment.serving.llamacpp import LlamaCppEngine
from luthier.deployment.serving.reference import TransformersEngine
from luthier.deployment.serving.requests import Limits
from luthier.deployment.serving.served import Served, ServedModel, require_name
from luthier.errors import UserError
from luthier.methods.answering import load_to_answer
from luthier.methods.saved import AdapterFolder, load_saved
from luthier.models.heads import Head
from luthier.models.loading import context_of, load_config, load_model, load_tokenizer, resolve_model
from luthier.runfolder import cache_root
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = ("What is the capital of France?", "Write a haiku about rain.", "用一句话介绍你自己。")
"""What the gate asks, through each model's own chat template."""
_EXPORTER = 1
"""Raised when files that were made before are no good any more."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What is to be served."""

    base: str
    """The name that loads the base, or the one model."""
    base_name: str
    """As requests call it."""
    adapters: dict[str, AdapterFolder]
    """By the names that requests call them."""

    @classmethod
    def of(cls, path: str, adapters: Mapping[str, str], name: str | None) -> Sources:
        """Find out.

        Args:
            path: a run or adapter folder (its base is served as well), a model folder or an embedded name.
            adapters: further ones on the same base, by name.
            name: of what ``path`` holds; None: its folder's.

        Raises:
            UserError: a name is no good or there twice, a folder holds nothing, or two stand on different bases.
        """
        folder = Path(path).expanduser()
        if folder.is_dir() and not (folder / "config.json").is_file() and not (folder / "model").is_dir():
            first = AdapterFolder.read(folder)
            base, own = first.base_name, {name or _name_of(folder): first}
            base_name = Path(base).name
        else:
            base, own = str(folder / "model") if (folder / "model").is_dir() else path, {}
            base_name = name or _name_of(folder)
        sources = cls(base, base_name, own)
        for other, place in adapters.items():
            if other in sources.adapters:
                raise UserError(f"two adapters are called {other!r}", where="--adapter", remedy="name them apart")
            sources.adapters[other] = AdapterFolder.read(place)
        sources._check()
        return sources

    def base_folder(self) -> Path:
        """Where the base's files lie.

        Raises:
            UserError: not on this machine.
        """
        folder = Path(resolve_model(self.base))
        if not folder.is_dir():
            raise UserError(
                f"{self.base!r} is no folder of this machine",
                remedy="download it and name its folder, or use --engine transformers",
            )
        return folder

    def _check(self) -> None:
        for adapter in self.adapters.values():
            require_same_base(adapter, self.base)
        for name in (self.base_name, *self.adapters):
            try:
                require_name(name)
            except ApiError as error:
                raise UserError(error.message, where="--name", remedy="name it by --name") from None
        if self.base_name in self.adapters:
            raise UserError(
                f"base and adapter are both called {self.base_name!r}", where="--name", remedy="name them apart"
            )


def require_same_base(adapter: AdapterFolder, base: str) -> None:
    """Refuse an adapter of another base.

    Raises:
        UserError: it is.
    """
    ours, theirs = (Path(resolve_model(name)).expanduser() for name in (base, adapter.base_name))
    if ours != theirs and ours.resolve() != theirs.resolve():
        raise UserError(
            f"it was trained on {adapter.base_name!r}, not on {base!r}",
            where=str(adapter.folder),
            remedy="serve it by a server of its own",
        )


def _name_of(folder: Path) -> str:
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name in ("adapter", "model", "merged") else resolved.name


def serve_transformers(sources: Sources, limits: Limits, adapter_root: Path | None) -> Served:
    """The models in transformers.

    Raises:
        UserError: they cannot be loaded, or not beside each other.
    """
    names = list(sources.adapters)
    if not names:
        saved = load_to_answer(sources.base)
        require_writing(saved.head, sources.base)
        engine = TransformersEngine(saved, None, context=limits.context)
        return Served(engine, limits, [ServedModel(sources.base_name, None, saved.tokenizer)])
    folders = {name: adapter.folder for name, adapter in sources.adapters.items()}
    models: Any
    if len(names) == 1 and adapter_root is None:
        models = load_to_answer(folders[names[0]])  # of any method, also those that no other can stand beside
        require_writing(models.head, str(folders[names[0]]))
    else:
        models = AdapterSet.load(folders)
        require_writing(Head.of(models.model), str(folders[names[0]]))
    return served_by(TransformersEngine(models, names[0], context=limits.context), sources, limits, adapter_root)


def serve_llamacpp(
    sources: Sources,
    limits: Limits,
    adapter_root: Path | None,
    *,
    kind: str | None,
    slots: int,
    threads: int | None,
    console: Console,
) -> Served:
    """The models in llama.cpp, from files that are made where they are not there from an earlier start.

    Args:
        sources: what is served.
        limits: of requests.
        adapter_root: folder of adapters that may be added.
        kind: of the base's weights; None: bf16 where they are stored so and llama.cpp multiplies them by the
            processor's own instructions, else f16.
        slots: answers that are written at once.
        threads: that compute; None: one a core.
        console: where to say what happens.

    Raises:
        UserError: a model cannot be written as GGUF, or the parity gate refuses what llama.cpp makes of it.
    """
    require_llamacpp()
    if kind is not None:
        require_kind(kind)
    if unused_instructions():
        console.print(
            "llama.cpp is not built for this processor's AVX-512: built from source it answers many requests at once "
            "up to twice as fast (docs/serve.md)",
            style="dim",
        )
    files = _Files(sources, kind, console)
    engine = LlamaCppEngine(
        files.base(),
        {name: files.adapter(adapter) for name, adapter in sources.adapters.items()},
        context=limits.context,
        slots=slots,
        threads=threads,
        convert=lambda folder: files.adapter(AdapterFolder.read(folder)),
    )
    return served_by(engine, sources, limits, adapter_root)


def served_by(engine: Engine, sources: Sources, limits: Limits, adapter_root: Path | None) -> Served:
    """Base and adapters under their names."""
    models = [ServedModel(sources.base_name, None, load_tokenizer(sources.base))]
    for name, adapter in sources.adapters.items():
        models.append(ServedModel(name, name, adapter.tokenizer(), sources.base_name))
    return Served(engine, limits, models, adapter_root=adapter_root)


def context_for(sources: Sources, wanted: int | None) -> int:
    """Longest prompt with its answer: what is wanted, at most the model's own; 4,096 where nothing is.

    Raises:
        UserError: the model's is shorter.
    """
    most = context_of(load_config(sources.base), load_tokenizer(sources.base))
    if wanted is not None and most is not None and wanted > most:
        raise UserError(
            f"this model reads {most:,} tokens", where=f"--max-model-len {wanted}", remedy=f"{most} at most"
        )
    return wanted or min(4096, most or 4096)


class _Files:
    """GGUF files of the base and of adapters, in the cache; the models they are held against load when needed."""

    def __init__(self, sources: Sources, kind: str | None, console: Console) -> None:
        self._sources, self._console = sources, console
        self._folder = sources.base_folder()
        self._kind = kind or self._kind_of_weights()
        self._cache = cache_root() / "serving"

    def _kind_of_weights(self) -> str:
        """The faster kind in 16 bits of those that lose next to nothing."""
        return "bf16" if multiplies_bfloat16() and Weights.of(self._folder).dtypes() == {"BF16"} else "f16"

    def base(self) -> Path:
        """The base's file."""
        kind = self._kind
        file = self._cache / f"{key_of(self._folder, kind)}.gguf"

        def held_against(made: Path) -> ParityReport:
            reference = load_model(self._folder, dtype=torch.float32)
            require_writing(Head.of(reference), str(self._folder))
            tokenizer = load_tokenizer(self._folder)
            return check_file(made, self._folder, kind, reference, tokenizer, gate_prompts(tokenizer))

        self._make(file, lambda made: write_gguf(self._folder, made, kind), held_against)
        return file

    def adapter(self, adapter: AdapterFolder) -> Path:
        """An adapter's file.

        Raises:
            UserError: it stands on another base, its method has no GGUF form, or the parity gate refuses.
        """
        require_same_base(adapter, self._sources.base)
        require_unquantised(adapter, "llama.cpp")
        file = self._cache / f"{key_of(adapter.folder, f'lora on {key_of(self._folder, self._kind)}')}.gguf"

        def held_against(made: Path) -> ParityReport:
            saved = load_saved(adapter.folder, dtype=torch.float32)
            with tempfile.TemporaryDirectory(dir=self._cache) as beside:
                return check_adapter(made, self._folder, saved, gate_prompts(saved.tokenizer), Path(beside))

        self._make(file, lambda made: write_adapter_gguf(adapter.folder, made), held_against)
        return file

    def _make(self, file: Path, write: Callable[[Path], object], gate: Callable[[Path], ParityReport]) -> None:
        """Write a file aside, hold it against its model, and name it when it passes; its record lies beside it."""
        record = file.with_suffix(".json")
        if record.is_file() and file.is_file():
            return
        self._console.print(f"writing {file.name}", highlight=False)
        aside = file.with_suffix(".writing")
        try:
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
            write(aside)
            report = gate(aside)
            self._console.print(render_parity(report))
            require(report)
            with writing(file):
                aside.replace(file)
                record.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        finally:
            aside.unlink(missing_ok=True)


def gate_prompts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str] = QUESTIONS) -> list[str]:
    """What the gate asks a model that is served."""
    return [prompt_text(tokenizer, [{"role": "user", "content": question}]) for question in questions]


def require_writing(head: Head, where: str) -> None:
    """Refuse a model that writes nothing.

    Raises:
        UserError: it does not.
    """
    if not head.writes:
        raise UserError("it holds no model that writes answers", where=where, remedy="use `luthier classify`")


def key_of(folder: Path, kind: str) -> str:
    """Of a folder's weights, settings and tokenizer, without reading the weights: names, sizes and times of change."""
    digest = hashlib.sha256(f"{_EXPORTER} {kind}".encode())
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            stat = file.stat()
            digest.update(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]
