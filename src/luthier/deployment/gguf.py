"""A tuned model leaves for llama.cpp and Ollama, behind the parity gate."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.data.examples import TrainingExample
from luthier.deployment.gguf_vocabulary import adds
from luthier.deployment.gguf_writing import Weights, require_kind, write_adapter_gguf, write_gguf
from luthier.deployment.k_quants import K_QUANTS, importance_of
from luthier.deployment.llamacpp import LlamaCppRuntime, require_llamacpp
from luthier.deployment.merge import PROMPTS, claim, hand_over, plain_model, untuned
from luthier.deployment.ollama import modelfile
from luthier.deployment.parity import ParityReport, distance, log_probabilities, require
from luthier.deployment.rows import Rows, read_rows
from luthier.deployment.runtimes import check_runtime, stops_lost
from luthier.deployment.tokens import token_ids
from luthier.errors import UserError
from luthier.evaluation.generation import stop_tokens
from luthier.methods.saved import AdapterFolder, SavedModel, load_saved
from luthier.models.loading import load_config, load_model, load_tokenizer, resolve_model, without_bars
from luthier.training.checkpoint import writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "luthier_gguf.json"
_CALIBRATION_ROWS, _CALIBRATION_TOKENS = 128, 1024
# ‖written - stored‖ / ‖stored‖ of a matrix, at most. Of every ninth of SmolLM2's, stored in bfloat16: bf16 and
# f16 0, q8_0 0.0014 to 0.0061, q4_0 0.084 to 0.096; of normal random numbers: bf16 0.0017, f16 2.1e-4. K-quants, the
# worst matrix of either: q6_k 0.018, q5_k_m 0.053, q4_k_m 0.072, q3_k_m 0.15, q2_k 0.30.
_WEIGHTS_APART = {"f32": 1e-6, "bf16": 3e-3, "f16": 5e-4, "q8_0": 0.015, "q4_0": 0.2}
_WEIGHTS_APART |= {"q6_k": 0.04, "q5_k_m": 0.1, "q4_k_m": 0.15, "q3_k_m": 0.3, "q2_k": 0.45}
# How much of a matrix's projection on what was stored may be lost: of the same in q4_0, 0.004 to 0.005; in K-quants, up
# to 0.0195 (q5_1, which q5_k_m has in place of q5_k), in a calibrated q2_k of random numbers 0.052.
_SHARE, _K_SHARE = 0.02, 0.08


@dataclass(frozen=True, slots=True)
class GgufExport:
    """What :func:`export_gguf` has made."""

    folder: Path
    files: list[Path]
    """GGUF files, the Modelfile last."""
    report: ParityReport
    sizes: dict[str, int]
    """Bytes of each file, by its name."""


def export_gguf(
    path: str | Path,
    output_dir: str | Path,
    *,
    kind: str = "q8_0",
    adapter: bool = False,
    prompts: Sequence[str] | None = None,
    calibration: str | Path | Sequence[TrainingExample] | None = None,
) -> GgufExport:
    """Write a tuned model as GGUF with a Modelfile, and let it go when llama.cpp answers as transformers does.

    Args:
        path: a run, adapter or model folder; an adapter is merged first.
        output_dir: an empty or new folder, or one that holds an earlier export.
        kind: of the weights, one of :data:`~luthier.deployment.gguf_writing.KINDS`.
        adapter: write the base and the LoRA beside it as two files, in place of one merged model.
        prompts: rendered texts for the gate; None: a few plain ones.
        calibration: rows, or a file of rows, such as those of training: a K-quant's rounding errors count by what the
            model's layers carry on the first of them.

    Raises:
        UserError: the model cannot be written so, the folder is in use, llama.cpp is not installed, the disk is full,
            or the gate refuses; nothing is left behind.
    """
    require_kind(kind)
    if calibration is not None and (kind not in K_QUANTS or adapter):
        what = "a base beside an adapter is" if adapter else f"kind {kind} is"
        raise UserError(
            f"{what} rounded without rows",
            where="--calibration",
            remedy=f"leave it out, or export one merged model as {', '.join(K_QUANTS)}",
        )
    require_llamacpp()
    if not Path(path).expanduser().is_dir():
        resolve_model(path)  # before a folder is made beside what is not there
    rows = None if calibration is None else read_rows(calibration, path)
    target = Path(output_dir).expanduser()
    claim(target, RECORD, "export")
    asked = list(prompts or PROMPTS)
    aside = target.parent / f".writing-{target.name}"
    work = target.parent / f".working-{target.name}"
    for folder in (aside, work):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(target):
            aside.mkdir(parents=True)
            work.mkdir()
        if adapter:
            report = _with_adapter(path, aside, work, kind, asked)
        else:
            report = _whole(path, aside, work, kind, asked, rows)
        require(report)
        names = [file.name for file in aside.iterdir()]
        names.sort(key=lambda name: (name == "Modelfile", not name.startswith(("model", "base"))))
        sizes = {name: (aside / name).stat().st_size for name in names}
        told = report.to_dict() | {"kind": kind, "sizes": sizes, "exported": str(path)}
        hand_over(aside, target, RECORD, told)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    return GgufExport(target, [target / name for name in names], report, sizes)


def _whole(
    path: str | Path,
    aside: Path,
    work: Path,
    kind: str,
    prompts: Sequence[str],
    calibration: Sequence[TrainingExample] | None,
) -> ParityReport:
    """One merged model: writes it, and what the gate says of it."""
    folder, base_name = plain_model(path, work, prompts)
    reference, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    importance = None
    if calibration is not None:
        rows = Rows.of(path, tokenizer, calibration, _CALIBRATION_ROWS).encoded
        importance = importance_of(reference, [torch.as_tensor(r.input_ids[:_CALIBRATION_TOKENS]) for r in rows])
    file = write_gguf(folder, aside / f"model-{kind}.gguf", kind, importance=importance)
    stops = stop_tokens(reference, tokenizer)
    _write_modelfile(aside, file, tokenizer, stops)
    base = untuned(base_name, reference)
    return check_file(file, folder, kind, reference, tokenizer, prompts, base=base)


def check_file(
    file: Path,
    folder: Path,
    kind: str,
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    base: Any | None = None,
) -> ParityReport:
    """The gate of a model's file: every weight, the stop tokens, and what llama.cpp makes of prompts.

    Args:
        file: the GGUF file.
        folder: the plain model that it was made from.
        kind: of the file.
        reference: that model, float32.
        tokenizer: its own.
        prompts: rendered texts.
        base: what it was tuned from, where that is known.
    """
    stops = stop_tokens(reference, tokenizer)
    stored = stored_model(file, folder)
    noise = arithmetic_noise(stored, kind, token_ids(tokenizer, prompts, None))
    with LlamaCppRuntime(file) as runtime:
        report = check_runtime(
            reference,
            runtime,
            tokenizer,
            prompts,
            noise=noise,
            stored=stored,
            base=base,
            stops=stops,
            name=f"GGUF {kind}",
        )
        report.reasons += _weights_differ(report, folder, stored, kind) + stops_lost(runtime, tokenizer, stops)
    report.passed = not report.reasons
    return report


def check_adapter(lora: Path, folder: Path, saved: SavedModel, prompts: Sequence[str], work: Path) -> ParityReport:
    """The gate of a LoRA's file.

    What a LoRA changes can be less than what llama.cpp's arithmetic costs in 8 or 4 bits, where nobody could say
    whether it is right. It is held against the base in float32, which is written for that alone.

    Args:
        lora: the GGUF file.
        folder: the plain base.
        saved: the adapter on that base, float32.
        prompts: rendered texts.
        work: a folder for the base's file, which is removed.
    """
    stops = stop_tokens(saved.model, saved.tokenizer)
    fine = write_gguf(folder, work / "base-f32.gguf", "f32")
    try:
        with LlamaCppRuntime(fine, adapter=lora) as runtime:
            report = check_runtime(
                saved.model,
                runtime,
                saved.tokenizer,
                prompts,
                noise={},
                base=saved.model,
                stops=stops,
                name="GGUF LoRA",
            )
            report.reasons += stops_lost(runtime, saved.tokenizer, stops)
    finally:
        fine.unlink()
    report.passed = not report.reasons
    return report


def _with_adapter(path: str | Path, aside: Path, work: Path, kind: str, prompts: Sequence[str]) -> ParityReport:
    """A base and its LoRA: writes both, and what the gate says of them."""
    adapter = AdapterFolder.read(path)
    if adapter.quantization is not None:
        raise UserError(
            "it was trained beside a quantised base, which GGUF does not hold",
            where=str(adapter.folder),
            remedy="leave out --adapter: it is merged then",
        )
    lora = write_adapter_gguf(path, aside / "adapter.gguf")
    folder = Path(resolve_model(adapter.base_name))
    file = write_gguf(folder, aside / f"base-{kind}.gguf", kind)
    saved = load_saved(path, dtype=torch.float32)
    _write_modelfile(aside, file, saved.tokenizer, stop_tokens(saved.model, saved.tokenizer), adapter=lora)
    report = check_adapter(lora, folder, saved, prompts, work)
    report.name = f"GGUF {kind} with adapter"
    report.reasons += _weights_differ(report, folder, stored_model(file, folder), kind)
    report.passed = not report.reasons
    return report


def _write_modelfile(
    aside: Path,
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int],
    *,
    adapter: Path | None = None,
) -> None:
    text = modelfile(
        file.name,
        tokenizer,
        [str(tokenizer.convert_ids_to_tokens(stop)) for stop in stops],
        adds_bos=adds(tokenizer, tokenizer.bos_token_id, 0),
        adapter=None if adapter is None else adapter.name,
    )
    (aside / "Modelfile").write_text(text, encoding="utf-8")


def stored_model(file: Path, folder: Path) -> Any:
    """The weights of a GGUF file in a transformers model, float32, by transformers' own reader.

    Args:
        file: the GGUF file.
        folder: the model that it was made from, for the config: that reader knows no scaled positions.
    """
    from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig

    config = load_config(folder).get_text_config()
    if config.model_type == "mistral":
        # The same model by another name, which transformers' reader of llama.cpp's family llama does not know.
        config = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})
    # That reader's bar heeds no setting.
    with without_bars(), contextlib.redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()


def arithmetic_noise(model: Any, kind: str, ids: Sequence[Sequence[int]]) -> dict[str, float]:
    """What llama.cpp's arithmetic costs: it rounds what each matrix is multiplied with to the precision that fits the
    matrix (float16, bfloat16, or 8 bits in blocks of 32, of K-quants 256), which is done here to transformers' own
    products.

    Of SmolLM2 and six conversations, llama.cpp lay away from the weights' float32 by 0.93 (f16), 0.89 (bf16), 0.93
    (q8_0) and 1.02 (q4_0) times the mean |Δ log-probability| that this gives.

    Args:
        model: the stored weights, float32.
        kind: of the file.
        ids: tokens of the prompts.

    Returns:
        see ``distance``: ``mean``, ``max``, ``kl``.
    """
    if kind == "f32":
        return {}
    plain = [log_probabilities(model, i) for i in ids]
    with _rounding(model, kind):
        return distance(plain, [log_probabilities(model, i) for i in ids])


@contextlib.contextmanager
def _rounding(model: Any, kind: str) -> Iterator[None]:
    def rounded(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_round(args[0], kind), *args[1:])

    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [layer.register_forward_pre_hook(rounded) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round(values: torch.Tensor, kind: str) -> torch.Tensor:
    if kind in ("f16", "bf16"):
        return values.to(torch.float16 if kind == "f16" else torch.bfloat16).to(values.dtype)
    size = 256 if kind in K_QUANTS and values.shape[-1] % 256 == 0 else 32
    if values.shape[-1] % size:
        return values
    blocks = values.unflatten(-1, (-1, size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    stored = scale.half().to(values.dtype) if size == 32 else scale
    return ((blocks / scale.clamp(min=1e-30)).round() * stored).flatten(-2)


@torch.no_grad()
def _weights_differ(report: ParityReport, folder: Path, stored: Any, kind: str) -> list[str]:
    """Whether a weight of the file is not that of the folder, rounded."""
    weights, written = Weights.of(folder), stored.state_dict()
    worst = 0.0
    reasons = []
    for name in weights.files:
        if name not in written:
            reasons.append(f"{name} is not in the file")
            continue
        ours, theirs = weights.read(name).float(), written[name]
        length = float(ours.norm()) or 1.0
        apart, share = float((ours - theirs).norm()) / length, float((ours * theirs).sum()) / length**2
        worst = max(worst, apart)
        if not (apart <= _WEIGHTS_APART[kind] and abs(share - 1) <= (_K_SHARE if kind in K_QUANTS else _SHARE)):
            reasons.append(
                f"{name} lies {apart:.3g} of its length away from what was exported; {share:.3g} of it is left"
            )
    report.numbers["weights_apart"] = worst
    return reasons[:3]
