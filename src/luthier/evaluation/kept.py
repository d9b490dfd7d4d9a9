"""Answers kept on disk as they come, so that an evaluation that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.decoding import BATCH_SIZE, Decoding
from luthier.errors import UserError
from luthier.evaluation.generation import Answer, Progress, generate_answers, stop_tokens
from luthier.models.fingerprint import identity
from luthier.models.heads import Head
from luthier.runfolder import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """What :func:`kept_answers` found and made."""

    answers: list[Answer]
    """In the order of the prompts."""
    found: int
    """How many of them were there already."""


def kept_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = BATCH_SIZE,
    max_source_length: int | None = None,
    decoding: Decoding | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    model_identity: str | None = None,
) -> KeptAnswers:
    """:func:`generate_answers`, each batch written to a journal in Luthier's cache, and none asked for that is there.

    A journal is one JSONL file of what bears on an answer beside its prompt: every bit of the weights, the tokenizer,
    the decoding, the longest answer, the stop tokens, and the versions of the libraries. So a model that has changed is
    asked anew. The batch size is left out, for it changes no answer. Prompts are told apart by their token ids. The
    journals lie in ``answers/`` of the cache and can be deleted at any time.

    Args:
        model: see :func:`generate_answers`, as for what is not listed here.
        tokenizer: see there.
        prompts: see there.
        resume: False: everything is asked anew, and kept.
        progress: told how many prompts are answered, those that were there among them.
        model_identity: the model's :func:`identity`, where it is known; None: its weights are read.

    Raises:
        UserError: as there; or the journal cannot be written.
    """
    decoding = Decoding() if decoding is None else decoding
    pairs = Head.of(model).pairs
    cut = {"truncation": max_source_length is not None, "max_length": max_source_length} if pairs else {}
    encoded = tokenizer(list(prompts), add_special_tokens=pairs, verbose=False, **cut)["input_ids"] if prompts else []
    keys = [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:32] for ids in encoded]
    about = _about(model, tokenizer, model_identity) | {
        "decoding": decoding.describe(),
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": stop_tokens(model, tokenizer),
    }
    journal = _Journal.of(about)
    kept = journal.read() if resume else {}
    wanted = [i for i, key in enumerate(keys) if key not in kept]
    found = len(keys) - len(wanted)
    if found and progress is not None:
        progress(found, len(keys))
    new = generate_answers(
        model,
        tokenizer,
        [prompts[i] for i in wanted],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_source_length=max_source_length,
        decoding=decoding,
        progress=None if progress is None else lambda done, _: progress(found + done, len(keys)),
        answered=lambda batch: journal.write((keys[wanted[i]], answer) for i, answer in batch.items()),
    )
    asked = dict(zip(wanted, new, strict=True))
    return KeptAnswers([asked[i] if i in asked else kept[key] for i, key in enumerate(keys)], found)


def _about(model: Any, tokenizer: PreTrainedTokenizerBase, known: str | None) -> dict[str, Any]:
    """What answers come from: the model, the tokenizer, and the code."""
    import transformers

    from luthier import __version__

    words = json.dumps([tokenizer.get_vocab(), sorted(tokenizer.all_special_tokens)], sort_keys=True)
    return {
        "model": identity(model) if known is None else known,
        "device": next(model.parameters()).device.type,
        "tokenizer": hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest(),
        "versions": {"luthier": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }


@dataclass(frozen=True, slots=True)
class _Journal:
    """One file of answers: a line that says what they come from, then one a prompt, the last of a prompt counts."""

    path: Path
    about: dict[str, Any]

    @classmethod
    def of(cls, about: dict[str, Any]) -> _Journal:
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        return cls(cache_root() / "answers" / f"{name}.jsonl", about)

    def read(self) -> dict[str, Answer]:
        """Answers by their prompts' keys; a line that was cut when its process was killed is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._refused(error) from error
        found: dict[str, Answer] = {}
        for line in lines:
            try:
                row = json.loads(line)
                key = row.pop("prompt")
                found[key] = Answer(**row)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return found

    def write(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Add answers, whole lines at once."""
        rows = [{"prompt": key} | asdict(answer) for key, answer in answers]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                begun = file.tell() > 0
                if begun:
                    file.seek(-1, 2)
                # Behind half a line, a new one begins.
                text = "\n" if begun and file.read(1) != b"\n" else ""
                text += "".join(json.dumps(row) + "\n" for row in ([] if begun else [{"about": self.about}]) + rows)
                file.write(text.encode())
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"answers cannot be kept: {error.strerror}",
            where=str(self.path),
            remedy="set LUTHIER_CACHE to a folder that you may write to",
        )
