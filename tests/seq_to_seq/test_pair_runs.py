"""Whole runs of encoder-decoders: trained, saved, loaded by others, merged, judged, resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from card_code import code_of, said_by
from huggingface_hub import ModelCard
from pair_cases import words_tokenizer
from rich.console import Console

from luthier import FineTuneEvaluator, FullFineTuner, LoRATuner
from luthier.data.examples import TrainingExample
from luthier.decoding import Decoding
from luthier.deployment.chat import chat
from luthier.errors import UserError
from luthier.evaluation.generation import generate_answers
from luthier.evaluation.perplexity import calculate_perplexity
from luthier.finished import evaluate_run, merge_saved
from luthier.methods.saved import load_saved
from luthier.models.loading import load_model, load_tokenizer
from luthier.pipeline import run
from luthier.recipe import Recipe
from luthier.training.loop import Trainer

QUIET = Console(quiet=True)


def recipe(model_dir, output_dir, method="lora", **training):
    settings = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "report_to": []}
    return Recipe.from_dict(
        {
            "task": {"name": "seq_to_seq", "max_target_length": 16, "source_prefix": "read: "},
            "model": {"name": str(model_dir), "dtype": "float32"},
            "method": method,
            "training": settings | {"eval_steps": 3} | training,
            "evaluation": {"max_new_tokens": 12},
            "output_dir": str(output_dir),
        }
    )


def parts(pairs):
    return {"train": pairs[:24], "validation": pairs[24:30], "test": pairs[30:]}


@pytest.fixture(scope="module")
def finished(pair_dirs, pairs, tmp_path_factory):
    """One run a family, by another method each."""
    runs = {}
    for family, method in (("t5", "lora"), ("bart", "full"), ("m2m", "ia3"), ("t5-unscaled", "adapter")):
        folder = tmp_path_factory.mktemp("run") / family
        runs[family] = run(recipe(pair_dirs[family], folder, method), given=parts(pairs))
    return runs


def logits_of(model, tokenizer, examples):
    found = []
    for example in examples:
        ids = tokenizer("read: " + example.input, return_tensors="pt").input_ids
        labels = tokenizer(text_target=example.output, return_tensors="pt").input_ids
        with torch.no_grad():
            found.append(model(input_ids=ids, labels=labels).logits)
    return found


@pytest.mark.parametrize("family", ["t5", "bart", "m2m", "t5-unscaled"])
def test_the_code_of_its_card_answers_as_the_run_did(finished, pair_dirs, family):
    result = finished[family]
    folder = result.run_dir / ("model" if family == "bart" else "adapter")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == {"bart": "transformers", "t5-unscaled": "luthier"}.get(family, "peft")
    question, answer = result.comparison.questions[0], result.comparison.models[1].answers[0]
    code = code_of(card)
    assert "'read: TEXT'" in code
    report = (result.run_dir / "report.md").read_text()
    assert "models write targets for sources" in report and "chat template" not in report
    code = code.replace("read: TEXT", question.prompt)
    assert said_by(code, base=pair_dirs[family], adapter=folder, model=folder) == answer.text + "\n"


def test_a_run_judges_base_and_tuned_and_its_loss_falls(finished):
    for family, result in finished.items():
        first, best = result.outcome.first_eval_loss, result.outcome.state.best_loss
        assert best < first, family
        base, tuned = result.comparison.models
        assert (base.name, tuned.name) == ("base", "tuned")
        assert tuned.metrics["perplexity"] < base.metrics["perplexity"]
        question = result.comparison.questions[0]
        assert question.prompt.startswith("read: ")
        assert question.references == [" ".join(reversed(question.prompt.split()[1:]))]
        manifest = json.loads((result.run_dir / "manifest.json").read_text())
        assert [p["passed"] for p in manifest["parity"]] == [True]


def test_what_is_saved_is_what_was_trained_in_a_process_without_luthier(finished, pair_dirs, pairs, tmp_path):
    jobs, expected = [], {}
    for family in ("t5", "bart"):
        result = finished[family]
        jobs.append({"folder": str(result.saved), "base": str(pair_dirs[family])})
        answers = generate_answers(
            result.model, result.tokenizer, ["read: " + e.input for e in pairs[:3]], max_new_tokens=12
        )
        expected[str(result.saved)] = (
            logits_of(result.model, result.tokenizer, pairs[:3]),
            [a.token_ids for a in answers],
        )
    texts = [[f"read: {e.input}", e.output] for e in pairs[:3]]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs, "texts": texts}))
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path)], check=True)
    for folder, (logits, answers) in torch.load(tmp_path / "found.pt").items():
        ours, said = expected[folder]
        assert all(torch.equal(a, b) for a, b in zip(ours, logits, strict=True)), folder
        assert said == answers


_FRESH = """
import json, sys
from pathlib import Path
import torch
from peft import AutoPeftModelForSeq2SeqLM
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

given = json.loads((Path(sys.argv[1]) / "jobs.json").read_text())
found = {}
for job in given["jobs"]:
    adapter = (Path(job["folder"]) / "adapter_config.json").is_file()
    model = (AutoPeftModelForSeq2SeqLM if adapter else AutoModelForSeq2SeqLM).from_pretrained(job["folder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    logits, answers = [], []
    for source, target in given["texts"]:
        ids = tokenizer(source, return_tensors="pt")
        labels = tokenizer(text_target=target, return_tensors="pt").input_ids
        with torch.no_grad():
            logits.append(model(input_ids=ids.input_ids, labels=labels).logits)
            opened = 2 if model.generation_config.forced_bos_token_id is not None else 1
            # BART's own settings force an end where the limit cuts.
            made = model.generate(
                input_ids=ids.input_ids, attention_mask=ids.attention_mask, do_sample=False,
                max_new_tokens=11 + opened, forced_eos_token_id=None,
            )
        answers.append(made[0, opened:].tolist())
    found[job["folder"]] = (logits, answers)
torch.save(found, Path(sys.argv[1]) / "found.pt")
"""


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_answer_does_not_depend_on_its_batch(family, finished, pairs):
    result = finished[family]
    sources = ["read: " + e.input for e in pairs[:12]]
    whole, alone = (
        generate_answers(result.model, result.tokenizer, sources, max_new_tokens=9, batch_size=size) for size in (12, 1)
    )
    assert whole == alone
    assert all(len(a.token_ids) <= 9 and (a.token_ids[-1] == 1) == a.stopped for a in whole)
    evaluator = FineTuneEvaluator(result.model, result.tokenizer, source_prefix="read: ")
    assert evaluator.generate(pairs[0].input, 9) == alone[0].text
    assert evaluator.generate(pairs[1], 9) == alone[1].text
    assert evaluator.generate([{"role": "user", "content": pairs[2].input}], 9) == alone[2].text
    assert evaluator.evaluate_generation(pairs[:3], max_length=9)["exact_match"] <= 1


@pytest.mark.parametrize("family", ["t5", "m2m"])
def test_a_merged_model_is_plain_and_the_same(family, finished, pairs, tmp_path):
    result = finished[family]
    merged, report = merge_saved(result.run_dir)
    assert report.passed
    assert report.numbers["tuning_mean"] > 10 * report.numbers["candidate_mean"]
    model, tokenizer = load_model(merged), load_tokenizer(merged, chats=False)
    for ours, theirs in zip(
        logits_of(result.model, result.tokenizer, pairs[:3]), logits_of(model, tokenizer, pairs[:3]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": e.input, "response": e.output}) + "\n" for e in pairs[:6]))
    comparison = evaluate_run(result.run_dir, data=str(rows), console=QUIET)
    assert [m.name for m in comparison.models] == ["base", "tuned", "merged"]
    _, tuned, plain = comparison.models
    assert [a.text for a in tuned.answers] == [a.text for a in plain.answers]
    assert tuned.metrics["perplexity"] == pytest.approx(plain.metrics["perplexity"], rel=1e-4)


def test_a_lost_layer_does_not_pass_the_gate(finished, tmp_path):
    """The parity gate sees encoder and decoder alike."""
    from luthier.deployment.parity import check_parity

    result = finished["bart"]
    for side in ("encoder", "decoder"):
        broken = load_model(result.saved)
        with torch.no_grad():
            getattr(broken.model, side).layers[1].fc2.weight.mul_(0.9)
        assert not check_parity(result.model, broken, result.tokenizer, ["read: amber birch"], exact=True).passed
    endless = load_model(result.saved)
    endless.generation_config.eos_token_id = None
    report = check_parity(result.model, endless, result.tokenizer, ["read: amber"], exact=True)
    assert report.reasons == ["generation does not stop at '</s>', which ends an answer"]


def test_resumed_is_uninterrupted(pair_dirs, pairs, tmp_path, monkeypatch):
    """Dropout and order included, bit for bit."""
    whole = run(recipe(pair_dirs["t5"], tmp_path / "whole"), given=parts(pairs))
    step = Trainer._step

    def failing(self):
        if self.state.step == 4:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(pair_dirs["t5"], tmp_path / "parts"), given=parts(pairs))
    resumed = run(recipe(pair_dirs["t5"], tmp_path / "parts"), given=parts(pairs), resume=True)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_tuners_know_pairs_by_the_rows_and_the_model(pair_dirs, pairs, tiny_model_dir, tmp_path):
    tuner = LoRATuner(str(pair_dirs["t5"]), dtype="float32")
    tuner.train(pairs[:8], output_dir=tmp_path / "run", max_steps=1, report_to=[], source_prefix="read: ", quiet=True)
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").task.name == "seq_to_seq"
    assert tuner.merge_and_save(tmp_path / "merged").passed
    # A decoder learns input -> output as well.
    assert LoRATuner(str(tiny_model_dir))._task_of(pairs) == "causal_lm"
    saved = load_saved(tmp_path / "run")
    assert saved.head.pairs
    assert saved.head.task == "seq_to_seq"


def test_the_wrong_model_or_verb_is_told_what_fits(finished, pair_dirs, pairs, tiny_model_dir, tmp_path):
    plain = [TrainingExample(e.input, e.output) for e in pairs]
    with pytest.raises(UserError, match="use task=seq_to_seq"):
        FullFineTuner(str(pair_dirs["bart"])).train(plain, output_dir=tmp_path / "a", quiet=True)
    with pytest.raises(UserError, match="use task=causal_lm"):
        FullFineTuner(str(tiny_model_dir), task="seq_to_seq").train(plain, output_dir=tmp_path / "b", quiet=True)
    with pytest.raises(UserError, match="cannot tune a model for seq_to_seq"):
        run(recipe(pair_dirs["t5"], tmp_path / "c", "prefix"), given=parts(pairs))
    with pytest.raises(UserError, match="FineTuneEvaluator"):
        chat(str(finished["t5"].run_dir), console=QUIET, input_fn=lambda _: "/exit")
    with pytest.raises(UserError, match="no perplexity without its source"):
        calculate_perplexity(finished["t5"].model, finished["t5"].tokenizer, "amber birch")
    evaluator = FineTuneEvaluator(finished["t5"].model, finished["t5"].tokenizer)
    turns = [{"role": "user", "content": "amber"}, {"role": "assistant", "content": "birch"}]
    with pytest.raises(UserError, match="no source with its target"):
        evaluator.generate([*turns, turns[0]])
    with pytest.raises(UserError, match="no system message"):
        FineTuneEvaluator(finished["t5"].model, finished["t5"].tokenizer, system="Be brief")
    broken = tmp_path / "endless"
    shutil.copytree(pair_dirs["t5"], broken)
    config = json.loads((broken / "config.json").read_text())
    del config["decoder_start_token_id"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        run(recipe(broken, tmp_path / "d"), given=parts(pairs))
    endless = words_tokenizer()
    endless._tokenizer.post_processor = None
    shutil.rmtree(broken)
    shutil.copytree(pair_dirs["t5"], broken)
    endless.save_pretrained(broken)
    with pytest.raises(UserError, match="would not stop"):
        run(recipe(broken, tmp_path / "e"), given=parts(pairs))


def test_targets_by_chance_and_by_beams(finished, pairs):
    sources = ["read: " + e.input for e in pairs[:6]]
    for family in ("t5", "bart"):
        model, tokenizer = finished[family].model, finished[family].tokenizer

        def answers(decoding, batch_size, asked=sources, model=model, tokenizer=tokenizer):
            return generate_answers(model, tokenizer, asked, max_new_tokens=8, batch_size=batch_size, decoding=decoding)

        greedy = answers(Decoding(), 6)
        for decoding in (Decoding(do_sample=True, temperature=2.0), Decoding(num_beams=3, no_repeat_ngram_size=2)):
            alone = answers(decoding, 1)
            assert answers(decoding, 12) == alone != greedy, family
            assert answers(decoding, 4, sources[::-1])[::-1] == alone, family
