"""The models that a server holds: a base and adapters on it, each with the tokenizer and template it was tuned with."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.deployment.serving.api_error import ApiError
from luthier.deployment.serving.engine import Engine
from luthier.deployment.serving.requests import Limits
from luthier.errors import UserError, shorten
from luthier.methods.saved import AdapterFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One name that requests can choose."""

    name: str
    adapter: str | None
    """The engine's name of it; None: the base, or the one model that is served."""
    tokenizer: PreTrainedTokenizerBase
    parent: str | None = None
    """Of an adapter, the base's name."""
    created: int = field(default_factory=lambda: int(time.time()))

    def to_json(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "luthier",
            "parent": self.parent,
        }


class Served:
    """What is served now.

    Args:
        engine: runs it.
        limits: what requests may ask for.
        models: the first ones; the base first.
        adapter_root: the folder in which adapters lie that may be added while the server runs; None: none may.
    """

    def __init__(
        self, engine: Engine, limits: Limits, models: list[ServedModel], *, adapter_root: Path | None = None
    ) -> None:
        self.engine, self.limits = engine, limits
        self._models = {model.name: model for model in models}
        self._first = {model.name for model in models}
        self._root = None if adapter_root is None else adapter_root.expanduser().resolve()
        self._changing = threading.Lock()

    @property
    def models(self) -> list[ServedModel]:
        """All, in the order in which they came."""
        return list(self._models.values())

    def find(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            ApiError: there is none.
        """
        model = self._models.get(name)
        if model is None:
            known = ", ".join(self._models)
            raise ApiError(
                404, f"there is no model {shorten(name)}; there are: {known}", code="model_not_found", param="model"
            )
        return model

    def add(self, name: str, path: str) -> ServedModel:
        """Put one more adapter on the base.

        Args:
            name: a new one.
            path: its folder, under the server's ``adapter_root``.

        Raises:
            ApiError: no adapters may be added, the name is no good or in use, the folder lies elsewhere or holds
                nothing that fits.
        """
        if self._root is None:
            raise ApiError(403, "this server was started without --adapter-root: no adapters can be added")
        require_name(name)
        folder = self._within(path)
        with self._changing:
            if name in self._models:
                raise ApiError(409, f"there is a model {name!r} already; unload it first", param="lora_name")
            base = next(iter(self._models.values()))
            try:
                tokenizer = AdapterFolder.read(folder).tokenizer()
                self.engine.add(name, folder)
            except UserError as error:
                raise ApiError(400, f"{error.what}; {error.remedy}", param="lora_path") from None
            model = ServedModel(name, name, tokenizer, base.name)
            self._models[name] = model
        return model

    def remove(self, name: str) -> None:
        """Take an adapter away that was added while the server ran.

        Raises:
            ApiError: there is none of that name.
        """
        with self._changing:
            self.find(name)
            if name in self._first:
                raise ApiError(403, f"{name!r} was there from the start and stays", param="lora_name")
            # New requests no longer find it; the engine waits for those that did.
            del self._models[name]
            self.engine.remove(name)

    def _within(self, path: str) -> Path:
        assert self._root is not None, "only called where adapters may be added"
        try:
            folder = (self._root / path).resolve()
            inside = folder.is_relative_to(self._root)
            # A run's folder leads to its adapter's: neither may be a link out of the root.
            places = [folder, *(inner.resolve() for inner in folder.rglob("*"))] if inside and folder.is_dir() else []
        except (OSError, ValueError, RuntimeError):
            places = []
        if not places or not all(place.is_relative_to(self._root) for place in places):
            raise ApiError(400, f"there is no adapter {shorten(path)} under this server's root", param="lora_path")
        return folder


def require_name(name: str) -> None:
    """A name that requests choose: letters, digits, and - _ . inside.

    Raises:
        ApiError: it is another.
    """
    if not _NAME.fullmatch(name):
        raise ApiError(
            400,
            f"{shorten(name)} cannot be a model's name: take up to 64 letters, digits, '-', '_' and '.'",
            param="lora_name",
        )
