"""ONNX: onnxruntime says and answers what transformers does, and the gate lets nothing else pass."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luthier.deployment.onnx import check_export, export_onnx
from luthier.deployment.onnx_graph import require_exportable
from luthier.deployment.onnx_runtime import OnnxRuntime
from luthier.errors import UserError
from luthier.method_options import LoraMethod
from luthier.methods import get_method
from luthier.methods.saved import write_record
from luthier.models.loading import load_model, load_tokenizer

ROWS = ([5, 9, 200, 31, 7, 7, 41], [88, 3], [100, 101, 102, 103, 60])
PROMPTS = ("What is the capital of France?", "def fib(n):", "3 + 4 = ?")
VOCABULARY = 300
PAGE = Path(__file__).resolve().parents[2] / "docs" / "onnx.md"


@pytest.fixture(scope="module")
def words(tokenizer):
    """A tokenizer for the tiny families' vocabulary."""
    return tokenizer.train_new_from_iterator([PAGE.read_text(encoding="utf-8")], VOCABULARY)


def tiny(family):
    """A random two-layer model, in float32."""
    import transformers

    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.2}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    torch.manual_seed(3)
    if family == "gpt2":
        config = transformers.GPT2Config(**ids, n_embd=64, n_layer=2, n_head=4, n_positions=256)
        return transformers.GPT2LMHeadModel(config).eval()
    if family == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**ids, **shape)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**ids, **shape, tie_word_embeddings=True)).eval()


def write_model(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def export_of(tmp_path_factory, words):
    """A family's tiny model, its tokenizer, its export's folder and what the export told; each is made once."""
    made = {}

    def export(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            path = write_model(folder / "model", tiny(family), words)
            told = export_onnx(path, folder / "onnx", prompts=PROMPTS)
            made[family] = load_model(path), load_tokenizer(path), folder / "onnx", told
        return made[family]

    return export


@pytest.fixture(params=["llama", pytest.param("qwen3", marks=pytest.mark.slow), "gpt2"])
def family(request, export_of):
    return export_of(request.param)


@pytest.fixture
def llama(export_of):
    return export_of("llama")[:3]


@torch.no_grad()
def test_a_padded_batch_has_the_logits_of_transformers(family):
    model, _, folder, _ = family
    for row, logits in zip(ROWS, OnnxRuntime(folder).batch_logits(ROWS), strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([row])).logits[0], atol=1e-4, rtol=0)


def test_greedy_answers_are_those_of_transformers(family):
    model, _, folder, exported = family
    runtime = OnnxRuntime(folder)
    for row in ROWS:
        ids = torch.tensor([row])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=runtime.stops
        )
        answer = [i for i in made[0, len(row) :].tolist() if i not in runtime.stops]
        assert runtime.greedy(row, 16) == answer
    assert exported.report.passed and exported.report.numbers["answers_same"] == 1


class Recording:
    """A session that notes the lengths it is asked for."""

    def __init__(self, session):
        self.session, self.lengths = session, []

    def run(self, outputs, feed):
        self.lengths.append((feed["input_ids"].shape[1], feed["past_key_values.0.key"].shape[2]))
        return self.session.run(outputs, feed)


def test_each_further_token_is_run_alone(llama):
    runtime = OnnxRuntime(llama[2])
    runtime.stops = []
    runtime.session = Recording(runtime.session)
    runtime.greedy(ROWS[0], 4)
    assert runtime.session.lengths == [(7, 0), (1, 7), (1, 8), (1, 9)]


def test_stop_tokens_template_and_names_are_in_the_folder(llama):
    _, tokenizer, folder = llama
    assert tokenizer.eos_token_id in OnnxRuntime(folder).stops
    assert load_tokenizer(folder).chat_template == tokenizer.chat_template
    record = json.loads((folder / "luthier_onnx.json").read_text(encoding="utf-8"))
    assert record["passed"] and record["versions"]["onnxruntime"]
    names = {spec.name: spec.shape for spec in OnnxRuntime(folder).session.get_inputs()}
    assert names["past_key_values.1.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert names["attention_mask"] == ["batch_size", "total_sequence_length"]


def layer_left_out(model):
    broken = copy.deepcopy(model)
    del broken.model.layers[1]
    broken.config.num_hidden_layers = 1
    return broken


def scale_short(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].self_attn.v_proj.weight.mul_(0.99)
    return broken


@pytest.mark.parametrize("wrong", [layer_left_out, scale_short])
def test_the_gate_refuses_other_weights(llama, wrong):
    model, tokenizer, folder = llama
    assert check_export(model, tokenizer, folder, PROMPTS).passed
    report = check_export(wrong(model), tokenizer, folder, PROMPTS)
    assert not report.passed and any("log-probability| is" in r for r in report.reasons), report


def test_the_gate_refuses_a_folder_that_does_not_stop_or_has_lost_its_template(llama, tmp_path):
    model, tokenizer, folder = llama
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "generation_config.json").read_text(encoding="utf-8"))
    (broken / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": 77}), encoding="utf-8")
    (broken / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    reasons = check_export(model, tokenizer, broken, PROMPTS).reasons
    assert any("does not stop at" in r for r in reasons) and "the chat template was lost" in reasons


def adapter(folder, path, *, size):
    model, tokenizer = load_model(path), load_tokenizer(path)
    torch.manual_seed(1)
    tuned = get_method("lora").wrap(model, LoraMethod(lora_dropout=0.0), [])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    write_model(folder, tuned, tokenizer)
    write_record(folder, tuned, str(path))
    return tuned.eval()


@torch.no_grad()
def test_an_adapter_is_merged_and_differs_from_its_base(llama, tmp_path):
    tuned = adapter(tmp_path / "adapter", llama[2].parent / "model", size=0.1)
    exported = export_onnx(tmp_path / "adapter", tmp_path / "onnx", prompts=PROMPTS)
    assert exported.report.numbers["tuning_mean"] > 100 * exported.report.numbers["candidate_mean"]
    logits = OnnxRuntime(tmp_path / "onnx").logits(ROWS[0])
    torch.testing.assert_close(logits, tuned(torch.tensor([ROWS[0]])).logits[0], atol=1e-4, rtol=0)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "onnx"}
    assert exported.sizes["model.onnx.data"] > 0 and "adapter" not in {p.name for p in exported.files}


def test_an_adapter_that_learnt_nothing_is_refused_and_nothing_is_left(llama, tmp_path):
    adapter(tmp_path / "adapter", llama[2].parent / "model", size=0.0)
    with pytest.raises(UserError, match="does not differ from its base"):
        export_onnx(tmp_path / "adapter", tmp_path / "onnx", prompts=PROMPTS)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.fixture(scope="module", params=["encoder", "decoder", pytest.param("words", marks=pytest.mark.slow)])
def scorer(request, tmp_path_factory, tiny_encoder_dir, words):
    """Two classifiers and a model that fills in words."""
    import transformers

    folder, names = tmp_path_factory.mktemp(request.param), {0: "bad", 1: "good", 2: "so so"}
    labels = {"num_labels": 3, "id2label": names, "label2id": {n: i for i, n in names.items()}}
    torch.manual_seed(0)
    if request.param == "decoder":
        config = transformers.LlamaConfig(**tiny("llama").config.to_dict() | {"architectures": None} | labels)
        model, tokenizer = transformers.LlamaForSequenceClassification(config), words
    else:
        tokenizer = load_tokenizer(tiny_encoder_dir, chats=False)
        config = transformers.BertConfig.from_pretrained(tiny_encoder_dir)
        if request.param == "encoder":
            config.update(labels | {"problem_type": "single_label_classification"})
            model = transformers.BertForSequenceClassification(config)
        else:
            model = transformers.BertForMaskedLM(config)
    path = write_model(folder / "model", model.eval(), tokenizer)
    export_onnx(path, folder / "onnx", prompts=("a great house", "bad bread", "the good river was grim"))
    return load_model(path), load_tokenizer(path, chats=False), folder / "onnx"


@torch.no_grad()
def test_scores_are_those_of_transformers_alone_and_in_a_batch(scorer):
    model, tokenizer, folder = scorer
    rows = [tokenizer(t).input_ids for t in ("a great house", "bad", "the wine and the bread of it")]
    runtime = OnnxRuntime(folder)
    for row, together in zip(rows, runtime.batch_logits(rows), strict=True):
        want = model(input_ids=torch.tensor([row])).logits[0]
        torch.testing.assert_close(runtime.logits(row), want, atol=1e-4, rtol=0)
        torch.testing.assert_close(together, want, atol=1e-4, rtol=0)


def test_the_gate_refuses_another_scorer(scorer):
    model, tokenizer, folder = scorer
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if n.endswith(("query.weight", "q_proj.weight"))).mul_(0.9)
    assert check_export(model, tokenizer, folder, PROMPTS).passed
    assert not check_export(broken, tokenizer, folder, PROMPTS).passed


def test_classes_that_were_renamed_are_noticed(scorer, tmp_path):
    model, tokenizer, folder = scorer
    if not hasattr(model, "score") and not hasattr(model, "classifier"):
        pytest.skip("it has no classes")
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = {"0": "good", "1": "bad", "2": "so so"}
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "the classes' names or numbers were lost" in check_export(model, tokenizer, broken, PROMPTS).reasons


def test_a_missing_library_is_told(monkeypatch, llama, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(UserError, match=r"(?s)onnxscript, which is not installed.*pip install 'luthier\[onnx\]'"):
        export_onnx(llama[2].parent / "model", tmp_path / "onnx")


def test_a_folder_in_use_is_refused_and_left_alone(llama, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="holds no earlier ONNX export"):
        export_onnx(llama[2].parent / "model", tmp_path)
    with pytest.raises(UserError, match="is a file"):
        export_onnx(llama[2].parent / "model", tmp_path / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_models_with_another_state_are_refused():
    import transformers

    t5 = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="an encoder beside a decoder"):
        require_exportable(transformers.T5ForConditionalGeneration(t5))
    lfm = transformers.Lfm2Config(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    with pytest.raises(UserError, match="another state than keys and values"):
        require_exportable(transformers.Lfm2ForCausalLM(lfm))


def page_code(name):
    return re.search(rf"<!-- run: {name} -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]


def test_the_page_s_code_answers_as_the_model(llama):
    _, tokenizer, folder = llama
    done = subprocess.run(
        [sys.executable, "-c", page_code("writes")], cwd=folder.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    answer = OnnxRuntime(folder).greedy(tokenizer(prompt, add_special_tokens=False).input_ids, 64)
    assert done.stdout.rstrip("\n") == tokenizer.decode(answer, skip_special_tokens=True).rstrip("\n")


@torch.no_grad()
def test_the_page_s_code_classifies_as_the_model(scorer):
    model, tokenizer, folder = scorer
    if not hasattr(model, "classifier"):
        pytest.skip("the page's classifier is an encoder")
    done = subprocess.run(
        [sys.executable, "-c", page_code("classifies")], cwd=folder.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([tokenizer("a great house").input_ids])
    assert done.stdout.strip() == model.config.id2label[int(model(ids).logits.argmax())]
