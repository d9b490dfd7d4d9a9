"""Quantised folders load in plain transformers and answer by their weights; each way to get them wrong is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

import luthier
from luthier.cli import main
from luthier.data.examples import TrainingExample
from luthier.data.render import prompt_text
from luthier.deployment.parity import log_probabilities
from luthier.deployment.precision import check_packed
from luthier.deployment.quantize import RECORD, quantize_model
from luthier.errors import UserError
from luthier.evaluation.evaluator import FineTuneEvaluator
from luthier.method_options import LoraMethod
from luthier.methods import get_method
from luthier.methods.answering import load_to_answer
from luthier.methods.saved import load_saved, write_record
from luthier.models.fingerprint import identity
from luthier.models.loading import load_model, load_tokenizer, set_stop_tokens
from luthier.models.packed import PACKINGS, compute_in, packed_layers, plain_weight

ROWS = [TrainingExample(input=f"What is {i} + {i}?", output=f"It is {2 * i}.") for i in range(6)]
KINDS = ("int8", "int4", "nf4", "float16", "bfloat16")


def adapter(base, folder, size):
    """A LoRA whose B is filled with noise, as if it had been trained."""
    tokenizer, model = load_tokenizer(base), load_model(base)
    torch.manual_seed(1)
    model = get_method("lora").wrap(model, LoraMethod(lora_dropout=0.0), [])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_record(folder, model, str(base))
    return folder


@pytest.fixture(scope="module")
def tuned_dir(terse_model_dir, tmp_path_factory):
    return adapter(terse_model_dir, tmp_path_factory.mktemp("tuned") / "adapter", 0.5)


@pytest.fixture(scope="module")
def made(tuned_dir, tmp_path_factory):
    """The same adapter in every kind: folders, and what was measured."""
    root = tmp_path_factory.mktemp("quantised")
    return {kind: quantize_model(tuned_dir, root / kind, kind, data=ROWS) for kind in KINDS}


def prompts(tokenizer):
    return [prompt_text(tokenizer, [{"role": "user", "content": row.input}]) for row in ROWS]


def fresh(script, *arguments):
    """Run Python that has never heard of Luthier."""
    code = f"import sys, json, torch\n{script}\nassert 'luthier' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_transformers_loads_every_kind_in_a_fresh_process(made, tmp_path):
    ids = list(range(3, 40))
    (tmp_path / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
    fresh(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "ids = torch.tensor([json.load(open(sys.argv[1]))])\n"
        "for folder in sys.argv[3:]:\n"
        "    AutoTokenizer.from_pretrained(folder)\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation='sdpa').eval()\n"
        "    with torch.no_grad():\n"
        "        torch.save(model(ids).logits, f'{sys.argv[2]}/{folder.rsplit(chr(47), 1)[1]}.pt')",
        tmp_path / "ids.json",
        tmp_path,
        *(result.folder for result in made.values()),
    )
    logits = {kind: torch.load(tmp_path / f"{kind}.pt").float() for kind in KINDS}
    for kind, theirs in logits.items():
        ours = log_probabilities(load_model(made[kind].folder), ids)
        assert torch.equal(ours, theirs[0].log_softmax(-1)), kind
    assert not any(torch.equal(logits["int8"], logits[kind]) for kind in KINDS if kind != "int8")


def test_what_is_written_is_small_and_says_so(made, tuned_dir):
    for result in made.values():
        told = json.loads((result.folder / RECORD).read_text(encoding="utf-8"))
        files = sum(f.stat().st_size for f in result.folder.iterdir() if f.suffix == ".safetensors")
        assert told["after"]["bytes"] == files < told["before"]["bytes"]
        assert result.parity.passed and result.rows == len(ROWS) and told["parity"]["prompts"] == len(ROWS)
        assert 0 < result.after.perplexity < float("inf") and result.after.tokens_per_second > 0
        assert (result.folder / "chat_template.jinja").is_file()
        assert not (result.folder / "adapter_config.json").exists()
    # What is not packed stays as the base is stored, here in float32. A packed weight takes half a byte, or one.
    packed = sum(m.in_features * m.out_features for m in packed_layers(load_model(made["nf4"].folder)).values())
    saved = {kind: (r.before.bytes - r.after.bytes) / packed for kind, r in made.items()}
    assert 2.6 < saved["int8"] < 3 < saved["nf4"] < 3.5  # scales and the files' headers take the rest
    parity = {kind: made[kind].parity.numbers for kind in PACKINGS}
    assert parity["int8"]["precision_mean"] < parity["int4"]["precision_mean"] < parity["int4"]["tuning_mean"]


@pytest.mark.parametrize("kind", PACKINGS)
def test_the_libraries_round_as_the_definition_says(made, tuned_dir, kind):
    """Written by no library: levels, blocks and scales as the papers have them."""
    merged = load_saved(tuned_dir).model.merge_and_unload()
    model, packing = load_model(made[kind].folder), PACKINGS[kind]
    layers = packed_layers(model)
    assert len(layers) == 14 and "lm_head" not in layers
    for name, layer in layers.items():
        weight = merged.get_submodule(name).weight.float()
        wanted, found = packing.rounded(weight), plain_weight(layer)
        step = weight.abs().max() * 0.01 if kind == "nf4" else 1e-6  # nf4's scales are rounded to 8 bits
        same = (wanted - found).abs() <= step
        assert float(same.float().mean()) > 0.995, name


@pytest.mark.parametrize("kind", PACKINGS)
def test_products_in_another_precision_keep_the_weights(made, tuned_dir, kind):
    stored, fine = load_model(made[kind].folder), load_model(made[kind].folder, dtype=torch.float32)
    for name, layer in packed_layers(fine).items():
        assert torch.equal(plain_weight(layer), plain_weight(packed_layers(stored)[name]))
    plain = load_saved(tuned_dir, dtype=torch.float32).model.merge_and_unload()
    with torch.no_grad():
        for name, layer in packed_layers(fine).items():
            plain.get_submodule(name).weight.copy_(plain_weight(layer))
    ids = list(range(3, 60))
    assert float((log_probabilities(plain, ids) - log_probabilities(fine, ids)).abs().max()) < 1e-3
    coarse = compute_in(fine, torch.bfloat16)
    assert coarse.dtype == torch.bfloat16 and log_probabilities(coarse, ids).isfinite().all()


# What can go wrong, and what the gate says to it.


def _unpack_one(model):
    layer = model.model.layers[1].mlp.up_proj
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = torch.nn.Parameter(plain_weight(layer).to(model.dtype), requires_grad=False)
    model.model.layers[1].mlp.up_proj = plain


def _tenth_short(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        state.offset, state.state2.absmax = state.offset * 0.9, state.state2.absmax * 0.9
    else:
        weight.scale = weight.scale * 0.9


def _untuned(model, base):
    model.model.layers[1].mlp.down_proj = base.model.layers[1].mlp.down_proj


def _norm_moved(model):
    model.model.norm.weight.data *= 1.02


def _computes_otherwise(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 0.9)


def _stops_lost(model):
    model.generation_config.eos_token_id = 0


WRONG = {
    "a layer left out": (_unpack_one, "up_proj is not quantised"),
    "a scale a tenth short": (_tenth_short, "v_proj lie"),
    "a layer untuned": (_untuned, "down_proj lie"),
    "a norm moved": (_norm_moved, "norm.weight, which is not quantised"),
    "it computes otherwise": (_computes_otherwise, "its own weights in float32"),
    "stop tokens lost": (_stops_lost, "generation does not stop"),
}


@pytest.fixture(scope="module")
def sides(made, tuned_dir, terse_model_dir, tmp_path_factory):
    """Of each kind: reference, candidate, the untuned model in that kind; and the PEFT model that gives the base."""
    root = tmp_path_factory.mktemp("untuned")
    saved = load_saved(tuned_dir, dtype=torch.float32)
    reference = copy.deepcopy(saved.model).merge_and_unload()
    set_stop_tokens(reference, saved.tokenizer)
    found = {}
    for kind in PACKINGS:
        quantize_model(terse_model_dir, root / kind, kind, data=ROWS)
        found[kind] = (reference, made[kind].folder, load_model(root / kind), saved)
    return found


@pytest.mark.parametrize("kind", PACKINGS)
def test_an_honest_candidate_passes_and_each_wrong_one_is_refused(sides, kind):
    reference, folder, untuned, saved = sides[kind]
    asked = prompts(saved.tokenizer)

    def reasons(change, **more):
        candidate = load_model(folder)
        if change is not None:
            change(candidate, untuned) if change is _untuned else change(candidate)
        report = check_packed(reference, candidate, saved.tokenizer, asked, PACKINGS[kind], base=saved.model, **more)
        assert report.passed is not bool(report.reasons)
        return report.reasons

    assert reasons(None) == []
    for name, (change, told) in WRONG.items():
        found = reasons(change)
        assert found and told in found[0], (name, found)
    lost = copy.deepcopy(saved.tokenizer)
    lost.chat_template = None
    assert reasons(None, candidate_tokenizer=lost) == ["the chat template was lost"]


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_what_was_learnt_must_outlive_its_precision_and_nothing_is_left_where_it_does_not(
    terse_model_dir, tmp_path, monkeypatch, capsys
):
    slight = adapter(terse_model_dir, tmp_path / "slight", 0.003)
    target = tmp_path / "quantised" / "int4"
    code, _, err = run(monkeypatch, capsys, "quantize", slight, target, "--to", "int4")
    assert code == 2 and "lost in its precision" in err and "Traceback" not in err
    assert not list(target.parent.iterdir())
    # In 8 bits it is not lost.
    code, out, err = run(monkeypatch, capsys, "quantize", slight, target, "--to", "int8")
    assert code == 0 and "tokens a second" in out and "perplexity was not measured" in out, err
    assert [f.name for f in target.parent.iterdir()] == ["int4"]
    assert json.loads((target / RECORD).read_text(encoding="utf-8"))["quantization"] == "int8"


def test_mistakes_are_told(made, terse_model_dir, tuned_dir, tiny_encoder_dir, tmp_path, monkeypatch):
    target = tmp_path / "out"
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine", encoding="utf-8")
    cases = [
        ((terse_model_dir, target, "int3"), {}, "int8, int4, nf4, float16, bfloat16"),
        ((terse_model_dir, target, "int8"), {"calibration": ROWS}, "no method here learns its rounding from rows"),
        ((terse_model_dir, used, "int8"), {}, "holds no earlier quantised model"),
        ((made["int8"].folder, target, "nf4"), {}, "quantised already"),
        ((made["nf4"].folder, target, "int8"), {}, "quantised already"),
        ((tmp_path / "nothing", target, "int8"), {}, "no folder"),
        ((terse_model_dir, target, "int8"), {"data": tmp_path / "none.jsonl"}, "none.jsonl"),
        ((terse_model_dir, target, "int8"), {"data": []}, "no row has an answer"),
    ]
    for arguments, more, told in cases:
        with pytest.raises(UserError) as refused:
            quantize_model(*arguments, **more)
        assert told in str(refused.value)
    assert (used / "notes.txt").is_file() and not target.exists() and len(list(tmp_path.iterdir())) == 1


def test_rows_that_no_block_divides_stay_whole(terse_model_dir, tmp_path):
    """A hidden size of 48 is no multiple of int4's 32; the MLP's 128 is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(terse_model_dir, hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    load_tokenizer(terse_model_dir).save_pretrained(tmp_path / "narrow")
    result = quantize_model(tmp_path / "narrow", tmp_path / "int4", "int4", data=ROWS)
    assert set(packed_layers(load_model(tmp_path / "int4"))) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert any("12 layers stayed whole" in note for note in result.notes)


@pytest.mark.parametrize("kind", PACKINGS)
def test_a_quantised_folder_answers_wherever_a_model_does(made, kind, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = made[kind].folder
    ready = load_to_answer(folder)
    assert len(packed_layers(ready.model)) == 14
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if model.dtype != ready.model.dtype:
        compute_in(model, ready.model.dtype)
    said = luthier.QuantizedModelInference(folder).generate(ROWS[0].input, max_new_tokens=8)
    assert said == FineTuneEvaluator(model, tokenizer).generate(ROWS[0].input, max_new_tokens=8)
    known = identity(ready.model)
    assert known == identity(load_to_answer(folder).model)
    _tenth_short(ready.model)
    if kind != "nf4":  # whose scales are no parameters
        assert identity(ready.model) != known
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input": r.input, "output": r.output}) + "\n" for r in ROWS), encoding="utf-8")
    words = (f"was={made['bfloat16'].folder}", f"is={folder}", "--data", rows, "--max-new-tokens", 4)
    code, out, err = run(monkeypatch, capsys, "compare", *words, "--output", tmp_path / "compared.json")
    assert code == 0 and "perplexity" in out, err


def test_a_run_is_quantised_into_its_own_folder_and_judged_there(terse_model_dir, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [{"question": f"What colour has thing {i}?", "answer": f"Thing {i} is blue."} for i in range(60)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    run_dir = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name: {terse_model_dir}}}\ndata: {{train: {rows}}}\n"
        f"training: {{max_steps: 12, learning_rate: 5.0e-2}}\n"
        f"evaluation: {{max_new_tokens: 4, max_examples: 2}}\noutput_dir: {run_dir}\n",
        encoding="utf-8",
    )
    code, _, err = run(monkeypatch, capsys, "train", recipe)
    assert code == 0, err
    code, out, err = run(monkeypatch, capsys, "quantize", run_dir, "--to", "int8", "--rows", 3)
    assert code == 0 and "perplexity of 3 rows" in out and "tuning mean" in out, err
    code, out, err = run(monkeypatch, capsys, "evaluate", run_dir)
    told = json.loads((run_dir / "evaluation" / "comparison.json").read_text(encoding="utf-8"))["models"]
    assert code == 0 and list(told) == ["base", "tuned", "int8"], err
    perplexity = {name: model["metrics"]["perplexity"] for name, model in told.items()}
    assert perplexity["int8"] != perplexity["tuned"] == pytest.approx(perplexity["int8"], rel=0.05)
    code, _, err = run(monkeypatch, capsys, "quantize", terse_model_dir)
    assert code == 2 and "needs a folder of its own" in err


@pytest.mark.slow
def test_the_real_model_in_eight_bits_and_one_scale_of_it_a_tenth_short(smollm2_dir, tmp_path):
    result = quantize_model(smollm2_dir, tmp_path / "int8", "int8", data=ROWS[:2])
    assert result.after.bytes < 0.65 * result.before.bytes
    assert result.after.perplexity == pytest.approx(result.before.perplexity, rel=0.05)
    reference, tokenizer = load_model(smollm2_dir, dtype=torch.float32), load_tokenizer(smollm2_dir)
    candidate = load_model(tmp_path / "int8", dtype=torch.float32)
    _tenth_short(candidate)
    report = check_packed(reference, candidate, tokenizer, prompts(tokenizer)[:1], PACKINGS["int8"])
    assert "v_proj lie" in report.reasons[0]
