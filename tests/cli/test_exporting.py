"""The verb that exports: every format from one adapter, and what it says to mistakes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from saved_adapters import tuned

from luthier.methods.saved import load_saved


@pytest.fixture(scope="module")
def run(tmp_path_factory, terse_model_dir):
    return tuned(tmp_path_factory.mktemp("exported") / "a run", terse_model_dir, size=0.1, r=4)


def command(out: str, name: str) -> list[str]:
    """The command that was printed after a program's name, as a shell reads it."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name}:"))
    return shlex.split(line.partition(":")[2])


def test_gguf_lies_in_the_run_with_the_commands_that_start_it(luthier, run):
    code, out, err = luthier("export", run, "--kind", "f32")
    assert code == 0, err
    made = run / "gguf"
    assert {file.name for file in made.iterdir()} == {"model-f32.gguf", "Modelfile", "luthier_gguf.json"}
    assert json.loads((made / "luthier_gguf.json").read_text())["passed"] is True
    assert command(out, "llama.cpp") == ["llama-server", "-m", str(made / "model-f32.gguf"), "--jinja"]
    assert command(out, "Ollama")[:3] == ["cd", str(made), "&&"]


def test_a_gguf_adapter_stays_beside_its_base(luthier, run, tmp_path):
    code, out, err = luthier("export", run, tmp_path / "two", "--kind", "f32", "--adapter")
    assert code == 0, err
    said = command(out, "llama.cpp")
    assert said[said.index("--lora") + 1] == str(tmp_path / "two" / "adapter.gguf")
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "two" / "Modelfile").read_text()


def test_onnx_files_are_named(luthier, run, tmp_path):
    code, out, err = luthier("export", run, tmp_path / "onnx", "--format", "onnx")
    assert code == 0, err
    assert command(out, "onnxruntime") == [str(tmp_path / "onnx" / "model.onnx")]
    assert (tmp_path / "onnx" / "model.onnx").is_file()


def test_safetensors_are_the_merged_model(luthier, run, tmp_path):
    from transformers import AutoModelForCausalLM

    code, out, err = luthier("export", run, tmp_path / "plain", "--format", "safetensors")
    assert code == 0, err
    folder = command(out, "vLLM")[2]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(merged, load_saved(run).model(ids).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_served_beside_its_base(luthier, run, terse_model_dir, tmp_path):
    code, out, err = luthier("export", run, "--format", "safetensors", "--adapter")
    assert code == 0, err
    said = command(out, "vLLM")
    assert said[:4] == ["vllm", "serve", str(terse_model_dir), "--enable-lora"]
    assert f"tuned={run}" in said and said[-2:] == ["--max-lora-rank", "8"]
    assert not (run / "safetensors").exists()
    embedded = tuned(tmp_path / "embedded", "smollm2", seed=0, size=0.1, r=4)
    code, out, err = luthier("export", embedded, "--format", "safetensors", "--adapter")
    assert code == 0, err
    assert (Path(command(out, "vLLM")[2]) / "config.json").is_file(), "a name that vLLM can load"
    # vLLM reads one rank and one scale for all layers.
    uneven = tmp_path / "uneven"
    shutil.copytree(run, uneven)
    (config,) = uneven.rglob("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {"layers.0.q_proj": 2}}))
    code, _, err = luthier("export", uneven, "--format", "safetensors", "--adapter")
    assert code != 0 and "alpha_pattern" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kind", "q4_k"), "q4_k_m"),
        (("--calibration", "rows.jsonl"), "rounded without rows"),
        (("--format", "onnx", "--calibration", "rows.jsonl"), "rounded without rows"),
        (("--format", "genai", "--kind", "q8_0"), "f32 or int4"),
        (("--format", "safetensors", "--kind", "q8_0"), "keeps the precision"),
        (("--kind", "q3"), "q3"),
        (("--format", "pdf"), "there is no format 'pdf'"),
        (("--format", "onnx", "--adapter"), "ONNX files hold whole models"),
    ],
)
def test_mistakes_leave_nothing(luthier, run, tmp_path, words, message):
    code, _, err = luthier("export", run, tmp_path / "none", *words)
    assert code == 2 and message in err and "Traceback" not in err
    assert not (tmp_path / "none").exists()


def test_a_run_that_is_not_there_is_named(luthier, tmp_path):
    code, _, err = luthier("export", tmp_path / "nowhere", "--kind", "f32")
    assert code == 2 and "nowhere" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
