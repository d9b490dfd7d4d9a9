"""K-quants: what llama.cpp's quantiser makes, with and without rows, is what llama.cpp computes."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from luthier.data.examples import TrainingExample
from luthier.deployment.gguf import export_gguf, stored_model
from luthier.deployment.gguf_writing import write_gguf
from luthier.deployment.k_quants import K_QUANTS, importance_of
from luthier.errors import UserError
from luthier.models.loading import load_model, load_tokenizer

WEIGHT = "model.layers.0.mlp.down_proj.weight"
ROWS = [TrainingExample(input=f"What is {i} + {i}?", output=f"It is {2 * i}.") for i in range(8)]


@pytest.fixture(scope="module")
def wide(terse_model_dir, tmp_path_factory):
    """A random model whose rows blocks of 256 divide."""
    import transformers

    folder, terse_tokenizer = tmp_path_factory.mktemp("wide"), load_tokenizer(terse_model_dir)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(terse_tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=terse_tokenizer.bos_token_id,
        eos_token_id=terse_tokenizer.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    terse_tokenizer.save_pretrained(folder)
    return folder


def test_importance_is_the_mean_square_of_each_input_over_all_tokens(terse_model_dir):
    model = load_model(terse_model_dir, dtype=torch.float32)
    texts = [torch.arange(3, 10), torch.arange(40, 43)]
    found = importance_of(model, texts)
    layer = model.model.layers[0]
    with torch.no_grad():
        read = torch.cat([layer.input_layernorm(model.model.embed_tokens(text)) for text in texts])  # [10, D]
    for name in ("q_proj", "k_proj", "v_proj"):
        values = torch.from_numpy(found[f"model.layers.0.self_attn.{name}.weight"])
        torch.testing.assert_close(values, read.square().mean(0))
    assert "lm_head.weight" not in found and len(found) == 2 * 7
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="it is there")
def test_what_makes_them_is_named_where_it_is_missing(terse_model_dir, tmp_path):
    with pytest.raises(UserError, match="llama-cpp-python is not installed") as refused:
        export_gguf(terse_model_dir, tmp_path / "out", kind="q4_k_m")
    assert "q4_0" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_file_of_rows_is_read_before_anything_is_made(terse_model_dir, tmp_path):
    pytest.importorskip("llama_cpp")
    with pytest.raises(UserError, match="nowhere"):
        export_gguf(terse_model_dir, tmp_path / "out", kind="q6_k", calibration=tmp_path / "nowhere.jsonl")
    assert not list(tmp_path.iterdir())


def test_rows_are_refused_where_nothing_learns_from_them(terse_model_dir, tmp_path):
    for options in ({"kind": "q8_0"}, {"kind": "f32", "adapter": True}):
        with pytest.raises(UserError, match="rounded without rows"):
            export_gguf(terse_model_dir, tmp_path / "out", calibration=ROWS, **options)
    assert not list(tmp_path.iterdir())


def test_each_kind_is_smaller_and_coarser_than_the_one_before(wide, tmp_path):
    pytest.importorskip("llama_cpp")
    right = load_model(wide, dtype=torch.float32).state_dict()[WEIGHT]
    sizes, apart = [], []
    for kind in ("q8_0", *K_QUANTS):
        file = write_gguf(wide, tmp_path / f"{kind}.gguf", kind)
        read = stored_model(file, wide).state_dict()[WEIGHT]
        sizes.append(file.stat().st_size)
        apart.append(float((read - right).norm() / right.norm()))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    # Of the matrices that q4_k_m and q5_k_m have finer, this is one.
    assert apart == sorted(apart) and apart[-1] < 0.35
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".gguf"] * len(sizes)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_llama_cpp_computes_them_as_transformers_does(wide, tmp_path, kind):
    pytest.importorskip("llama_cpp")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": r.input, "output": r.output}) + "\n" for r in ROWS), encoding="utf-8")
    plain = write_gguf(wide, tmp_path / "plain.gguf", kind).read_bytes()
    made = export_gguf(wide, tmp_path / "out", kind=kind, calibration=rows)
    assert made.report.passed and made.files[0].read_bytes() != plain
    assert export_gguf(wide, tmp_path / "out", kind=kind, calibration=ROWS).report.numbers == made.report.numbers
    assert made.report.numbers["candidate_mean"] > 0
    assert json.loads((made.folder / "luthier_gguf.json").read_text())["kind"] == kind
    assert sorted(p.name for p in made.folder.iterdir()) == ["Modelfile", "luthier_gguf.json", f"model-{kind}.gguf"]


def test_rounding_heeds_what_counts(wide, tmp_path):
    pytest.importorskip("llama_cpp")
    right = load_model(wide, dtype=torch.float32).state_dict()[WEIGHT]
    counts = torch.ones(512)
    counts[::8] = 100.0
    errors = []
    for name, importance in (("plain", None), ("heeding", {WEIGHT: counts.numpy()})):
        file = write_gguf(wide, tmp_path / f"{name}.gguf", "q2_k", importance=importance)
        error = (stored_model(file, wide).state_dict()[WEIGHT] - right).square()
        errors.append(float((error * counts).sum()))
    assert errors[1] < 0.8 * errors[0]


def test_what_llama_cpp_refuses_is_told(wide, tmp_path):
    pytest.importorskip("llama_cpp")
    with pytest.raises(UserError, match="cannot write q2_k"):
        write_gguf(wide, tmp_path / "a.gguf", "q2_k", importance={WEIGHT: torch.ones(7).numpy()})
    assert not list(tmp_path.iterdir())
