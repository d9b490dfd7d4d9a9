"""A tuned model as a folder of onnxruntime-genai, by its own builder, behind the parity gate.

onnxruntime-genai keeps the cache, reads the template and chooses tokens by itself, where ``deployment.onnx`` leaves
that to the program around it; and its graphs can hold weights in 4 bits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.deployment.gguf import arithmetic_noise
from luthier.deployment.merge import PROMPTS, claim, hand_over, plain_model, untuned
from luthier.deployment.onnx import OnnxExport
from luthier.deployment.onnx_weights import stored_model
from luthier.deployment.parity import ParityReport, require
from luthier.deployment.runtimes import check_runtime
from luthier.deployment.tokens import token_ids
from luthier.errors import UserError
from luthier.evaluation.generation import stop_tokens
from luthier.models.loading import load_model, load_tokenizer, resolve_model
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "luthier_genai.json"
KINDS = {"f32": "fp32", "int4": "int4"}
"""Kinds of weights, as the builder calls them."""
_CONFIG = "genai_config.json"


def require_genai() -> None:
    """Refuse where onnxruntime-genai is not installed.

    Raises:
        UserError: it is not.
    """
    missing = [name for name in ("onnxruntime_genai", "onnx", "onnx_ir") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"not installed, and needed to make the folder and to hold it against its model: {', '.join(missing)}",
            where="--format genai",
            remedy="pip install 'luthier[genai]'",
        )


class GenaiRuntime:
    """A :class:`~luthier.deployment.runtimes.Runtime`.

    Args:
        folder: what :func:`export_genai` has written.

    Raises:
        UserError: onnxruntime-genai is not installed, or does not load the folder.
    """

    name = "onnxruntime-genai"

    def __init__(self, folder: str | Path) -> None:
        require_genai()
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        try:
            self._model: Any = onnxruntime_genai.Model(str(folder))
            self._tokenizer: Any = onnxruntime_genai.Tokenizer(self._model)
        except Exception as error:  # the library raises nothing finer
            raise UserError(
                f"onnxruntime-genai does not load the folder: {error}",
                where=str(folder),
                remedy="export it again, or choose --format onnx",
            ) from None
        self._tokenizer.update_options(add_special_tokens="false")
        self._stops = {int(token) for token in self._tokenizer.eos_token_ids}

    def tokens(self, text: str) -> list[int]:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation by its own template engine, up to where an answer begins."""
        text: str = self._tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
        return text

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        # What the graph gives: `get_logits` leaves out a last token that is also the one for padding, as often the one
        # that ends a turn is. A copy, for the array lies in the generator's own memory.
        generator = self._started(ids, 1)
        return torch.tensor(generator.get_output("logits"))[0, -1].float().log_softmax(-1)

    def greedy(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """See :class:`~luthier.deployment.runtimes.Runtime`."""
        writing = self._started(ids, max_new_tokens)
        while not writing.is_done():
            writing.generate_next_token()
        answer = [int(token) for token in writing.get_sequence(0)[len(ids) :]]
        return answer[:-1] if answer and answer[-1] in self._stops else answer

    def _started(self, ids: Sequence[int], count: int) -> Any:
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(ids) + count)
        generator = self._library.Generator(self._model, params)
        generator.append_tokens(list(ids))
        return generator


def export_genai(
    path: str | Path, output_dir: str | Path, *, kind: str = "f32", prompts: Sequence[str] | None = None
) -> OnnxExport:
    """Write a model for onnxruntime-genai, and let it go when that answers as transformers does.

    Args:
        path: a run, adapter or model folder, or an embedded model's name; an adapter is merged first.
        output_dir: an empty or new folder, or one that holds an earlier export of this kind.
        kind: ``f32``, or ``int4``: blocks of 32 weights in 4 bits, the head too and embeddings that are the same.
        prompts: rendered texts for the gate; None: a few plain ones.

    Raises:
        UserError: a library is missing, the kind or the family of models is unknown, the folder is in use, the disk is
            full, or the gate refuses; nothing is left behind.
    """
    require_genai()
    if kind not in KINDS:
        raise UserError(
            f"onnxruntime-genai's folders cannot be of kind {kind!r} here",
            where="--kind",
            remedy=f"choose {' or '.join(KINDS)}",
        )
    if not Path(path).expanduser().is_dir():
        resolve_model(path)  # before a folder is made beside what is not there
    target = Path(output_dir).expanduser()
    claim(target, RECORD, "export for onnxruntime-genai")
    asked = list(prompts or PROMPTS)
    aside, work = (target.parent / f".{part}-{target.name}" for part in ("writing", "working"))
    for folder in (aside, work):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(target):
            aside.mkdir(parents=True)
            work.mkdir()
        source, base_name = plain_model(path, work, asked)
        if not source.is_dir():
            raise UserError(
                f"{str(path)!r} is no folder of this machine", where=str(path), remedy="download it and name its folder"
            )
        _build(source, aside, work / "cache", KINDS[kind])
        reference, tokenizer = load_model(source, dtype=torch.float32), load_tokenizer(source)
        with writing(target):
            _complete(aside, stop_tokens(reference, tokenizer), tokenizer)
        report = check_genai(aside, kind, reference, tokenizer, asked, base=untuned(base_name, reference))
        require(report)
        versions = {name: version(name) for name in ("transformers", "torch", "onnx", "onnxruntime-genai")}
        told = report.to_dict() | {"kind": kind, "exported": str(path), "base": base_name, "versions": versions}
        hand_over(aside, target, RECORD, told)
    finally:
        for folder in (aside, work):
            shutil.rmtree(folder, ignore_errors=True)
    files = sorted(p for p in target.iterdir() if p.is_file())
    return OnnxExport(files, report, {p.name: p.stat().st_size for p in files})


def check_genai(
    folder: Path,
    kind: str,
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    base: Any | None = None,
) -> ParityReport:
    """The gate of such a folder: its weights, its template, its stop tokens, and what it makes of prompts.

    Args:
        folder: the export.
        kind: of the weights.
        reference: the model that it was made from, float32.
        tokenizer: its own.
        prompts: rendered texts.
        base: what it was tuned from, where that is known.
    """
    runtime, stored = GenaiRuntime(folder), None
    noise: dict[str, float] = {}
    differ: list[str] = []
    if kind == "int4":
        stored, differ, worst = stored_model(folder, reference)
        # Its products in 4 bits round their inputs to 8 bits, block by block, as llama.cpp's do.
        noise = arithmetic_noise(stored, "q8_0", token_ids(tokenizer, prompts, None))
    report = check_runtime(
        reference,
        runtime,
        tokenizer,
        prompts,
        noise=noise,
        stored=stored,
        base=base,
        stops=stop_tokens(reference, tokenizer),
        name=f"onnxruntime-genai {kind}",
    )
    if stored is not None:
        report.numbers["weights_apart"] = worst
    report.reasons += differ + _rendered_otherwise(runtime, tokenizer)
    report.passed = not report.reasons
    return report


def _rendered_otherwise(runtime: GenaiRuntime, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    chat = [("user", "Hi there"), ("assistant", "Yes?"), ("user", "ok 你好")]
    messages = [{"role": role, "content": text} for role, text in chat]
    right = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    try:
        same = runtime.render(messages) == right
    except Exception as error:  # the library raises nothing finer
        said = str(error).splitlines() or [type(error).__name__]
        return [f"onnxruntime-genai cannot render the chat template: {said[0]}"]
    return [] if same else ["onnxruntime-genai renders a conversation otherwise than the chat template says"]


def _build(source: Path, target: Path, cache: Path, precision: str) -> None:
    """Run the builder, in a process of its own: it is a script.

    Raises:
        UserError: it knows no such model, or fails.
    """
    words = ["-i", str(source), "-o", str(target), "-p", precision, "-e", "cpu", "-c", str(cache)]
    done = subprocess.run(
        # -P: the builder imports modules by names that files of the working folder can have.
        [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", *words],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode < 0:
        raise UserError(
            f"onnxruntime-genai's builder was ended by signal {-done.returncode}",
            where=str(source),
            remedy="it holds the whole model in float32: see whether memory is short",
        )
    if done.returncode or not (target / _CONFIG).is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"onnxruntime-genai's builder cannot write this model: {said[-1] if said else 'it does not say why'}",
            where=str(source),
            remedy="choose --format onnx or gguf, or see to what it says",
        )


def _complete(folder: Path, stops: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """What the builder leaves out: stop tokens beyond the config's, and a template that the model's folder lacks."""
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = list(stops)
    (folder / _CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    template = folder / "chat_template.jinja"
    if not template.is_file():
        template.write_text(str(tokenizer.chat_template), encoding="utf-8")
