"""Rows that a hand-over is measured on, or learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.data.chats import ChatEncoder
from luthier.data.dataset import prepare
from luthier.data.encode import EncodedExample
from luthier.data.examples import TrainingExample
from luthier.data.loader import load_source
from luthier.data.render import Renderer, prompt_messages, prompt_text
from luthier.errors import UserError
from luthier.recipe import Recipe
from luthier.runfolder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PARITY_PROMPTS = 8


@dataclass(slots=True)
class Rows:
    """What a gate asks, perplexity is measured on, or a rounding heeds."""

    prompts: list[str] = field(default_factory=list)
    encoded: list[EncodedExample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        model_path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        data: str | Path | Sequence[TrainingExample] | None,
        most: int,
    ) -> Rows:
        """Those given, or the held-out ones of the run.

        Raises:
            UserError: a file cannot be read, or holds no row with an answer.
        """
        recipe = _recipe(model_path)
        system = recipe.data.system if recipe else None
        if data is None:
            if recipe is None or not recipe.data.train:
                return cls(notes=["perplexity was not measured: no rows were given (--data FILE)"])
            found = prepare(recipe, tokenizer)
            part = next((p for p in reversed(found.parts) if p.examples), found.train)
            examples, encoded = list(part.examples[:most]), list(part.encoded[:most])
        else:
            examples = read_rows(data, model_path)
            renderer = Renderer(tokenizer, system=system, train_on="last_answer", allow_special_tokens=True)
            encoded = ChatEncoder(renderer).encode(examples[:most]).examples
        if not encoded:
            raise UserError(
                "no row has an answer",
                where=str(data) if isinstance(data, str | Path) else str(model_path),
                remedy="name rows with answers",
            )
        asked = [e for e in examples if not e.is_plain_text][:_PARITY_PROMPTS]
        return cls([prompt_text(tokenizer, prompt_messages(e, system), e.tools) for e in asked], encoded)


def read_rows(data: str | Path | Sequence[TrainingExample], model_path: str | Path) -> list[TrainingExample]:
    """Rows that are given, of a file by the columns that the model's run names.

    Raises:
        UserError: a file cannot be read.
    """
    if not isinstance(data, str | Path):
        return list(data)
    recipe = _recipe(model_path)
    return load_source(str(data), recipe.data.columns if recipe else None).examples


def _recipe(model_path: str | Path) -> Recipe | None:
    """Of a finished run; None: the folder is another."""
    path = Path(model_path).expanduser() / "recipe.yaml"
    return Recipe.load(path) if path.is_file() and RunFolder(path.parent).finished else None
