"""Texts told apart: what is learnt is the class alone, and it is the same wherever the model is loaded."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from luthier import Classifier, FullFineTuner, LoRATuner, TaskType, TrainingExample
from luthier.cli.evaluation import classify
from luthier.data.classes import ClassEncoder, ClassNames
from luthier.data.dataset import prepare
from luthier.data.encoded import cache_key
from luthier.data.preview import row_json
from luthier.deployment.chat import chat
from luthier.deployment.merge import merge_adapter
from luthier.errors import UserError
from luthier.evaluation.classification import class_metrics, compare_classifiers
from luthier.finished import evaluate_run
from luthier.judging import Subject, lint_of, rows_to_show, stats_of
from luthier.method_options import FullMethod, options_of
from luthier.methods import METHODS
from luthier.methods.base import trainable_parameters
from luthier.methods.saved import load_saved
from luthier.models.heads import Head
from luthier.models.loading import load_model, load_tokenizer, set_padding
from luthier.models.quantized import Quantization, is_quantized
from luthier.pipeline import run as run_recipe
from luthier.recipe import Recipe
from luthier.tasks import get_task
from luthier.training.class_loss import ClassLoss

GOOD, BAD = ("good", "nice", "great", "lovely"), ("bad", "awful", "poor", "grim")
THINGS = ("house", "tree", "river", "stone", "bread", "wine", "paper", "lamp", "chair", "road", "cloud", "bird")
TWO, FOUR = ClassNames(("neg", "pos")), ClassNames(("a", "b", "c", "d"), multi_label=True)


def texts(count: int, seed: int = 0) -> list[TrainingExample]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        word = draw.choice(GOOD if number % 2 else BAD)
        things = draw.sample(THINGS, draw.randint(2, 7))
        things.insert(draw.randrange(len(things)), word)
        rows.append(TrainingExample(f"the {' '.join(things)} {seed}{number}", label="pos" if number % 2 else "neg"))
    return rows


def classifier(folder, classes: ClassNames, seed: int = 0):
    torch.manual_seed(seed)
    model = load_model(folder, dtype=torch.float32, head=Head(TaskType.CLASSIFICATION, classes))
    tokenizer = load_tokenizer(folder, chats=False)
    set_padding(model, tokenizer)
    return model, tokenizer


def loss_of(model, classes: ClassNames, tokenizer, **options) -> ClassLoss:
    options = {"pad_token_id": tokenizer.pad_token_id, **options}
    return ClassLoss(model, classes=len(classes), multi_label=classes.multi_label, **options)


# --- classes and encoding ---


def test_classes_are_sorted_by_size_or_by_name():
    assert ClassNames.of([TrainingExample("x", label=n) for n in (10, 9, 2, 9)]).names == ("2", "9", "10")
    named = [TrainingExample("x", label=n) for n in ("b", "B", "a")]
    assert ClassNames.of(named) == ClassNames(("B", "a", "b"))
    assert ClassNames.of(named, labels=["b", "a", "B", "c"]).names == ("b", "a", "B", "c")
    several = [TrainingExample("x", label=["a", "b"]), TrainingExample("y", label="c")]
    assert ClassNames.of(several) == ClassNames(("a", "b", "c"), multi_label=True)


@pytest.mark.parametrize(
    ("labels", "message"), [(["a", "a"], "one class, 'a'"), ([None, " "], "no training row has a class")]
)
def test_fewer_than_two_classes_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        ClassNames.of([TrainingExample("x", label=label) for label in labels])


def test_rows_that_cannot_be_classified_are_refused_with_their_reason(tokenizer):
    rows = [
        TrainingExample("fine", label="pos"),
        TrainingExample("no class"),
        TrainingExample("other", label="meh"),
        TrainingExample("two", label=["pos", "neg"]),
        TrainingExample(" ", label="pos"),
        TrainingExample(messages=[{"role": "user", "content": "x"}], label="pos"),
        TrainingExample("half \ud800", label="neg"),
        TrainingExample("long " * 50, label="neg"),
        TrainingExample("turn<|im_end|>", label="neg"),
    ]
    found = ClassEncoder(tokenizer, TWO, max_length=20).encode(rows)
    assert [r.reason for r in found.rejects] == [
        "no_class", "unknown_class", "several_classes", "empty_text", "conversation", "half_character", "too_long",
        "special_token_in_text",
    ]  # fmt: skip
    (kept,) = found.examples
    assert kept.extra == (1,) and kept.input_ids.tolist() == tokenizer("fine").input_ids


def test_a_text_may_be_of_no_class_where_it_may_be_of_several(tokenizer):
    rows = [TrainingExample("x", label=[]), TrainingExample("y", label=["d", "b"]), TrainingExample("z", label="a")]
    assert [row.extra for row in ClassEncoder(tokenizer, FOUR).encode(rows).examples] == [(), (1, 3), (0,)]


def test_a_cut_text_keeps_what_the_tokenizer_puts_at_its_end(tiny_encoder_dir):
    tokenizer = load_tokenizer(tiny_encoder_dir, chats=False)
    (row,) = ClassEncoder(tokenizer, TWO, max_length=6, truncation="cut").encode(texts(1)).examples
    assert len(row) == 6 and row.cut > 0
    assert row.input_ids[0] == tokenizer.cls_token_id and row.input_ids[-1] == tokenizer.sep_token_id


def test_encoded_rows_are_found_again_only_with_the_same_classes(tokenizer):
    keys = {cache_key(ClassEncoder(tokenizer, names), texts(4)) for names in (TWO, ClassNames(("pos", "neg")))}
    assert len(keys) == 2 and cache_key(ClassEncoder(tokenizer, TWO), texts(4)) in keys


# --- the loss ---


@pytest.mark.parametrize("classes", [TWO, FOUR], ids=["single", "multi"])
def test_the_loss_is_that_of_transformers(tiny_model_dir, tiny_encoder_dir, classes):
    for folder in (tiny_model_dir, tiny_encoder_dir):
        model, tokenizer = classifier(folder, classes)
        rows = texts(6)
        if classes is FOUR:
            rows = [replace(r, label=["a", "c"] if i % 2 else ["d"]) for i, r in enumerate(rows)]
        encoded = ClassEncoder(tokenizer, classes).encode(rows).examples
        loss = loss_of(model, classes, tokenizer)
        assert loss.packed, loss.reason
        inputs = tokenizer([r.input for r in rows], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        labels = torch.tensor([r.extra[0] for r in encoded])
        if classes is FOUR:
            labels = torch.zeros(len(rows), 4)
            for i, row in enumerate(encoded):
                labels[i, list(row.extra)] = 1
        model.set_attn_implementation("eager")
        theirs = model(**inputs, labels=labels).loss
        loss = loss_of(model, classes, tokenizer)
        batch = loss.batch(encoded)
        assert batch.trained_tokens == len(rows)
        torch.testing.assert_close(loss(batch) / batch.trained_tokens, theirs, rtol=1e-4, atol=1e-5)


def test_packed_texts_give_the_gradients_of_each_alone(tiny_model_dir):
    gradients = {}
    for way in ("packed", "padded", "alone"):
        model, tokenizer = classifier(tiny_model_dir, TWO)
        rows = texts(7)
        rows[1] = TrainingExample("good", label="pos")
        encoded = ClassEncoder(tokenizer, TWO).encode(rows).examples
        loss = loss_of(model, TWO, tokenizer, batching="auto" if way == "packed" else "padded")
        assert loss.packed is (way == "packed")
        for part in [[row] for row in encoded] if way == "alone" else [encoded]:
            loss(loss.batch(part)).backward()
        gradients[way] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, alone in gradients["alone"].items():
        for way in ("packed", "padded"):
            torch.testing.assert_close(gradients[way][name], alone, rtol=2e-3, atol=2e-4, msg=f"{way}: {name}")


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    draw = np.random.default_rng(0)
    names = [f"c{i}" for i in range(5)]
    for trial in range(30):
        right, given = draw.integers(0, 4, 40), draw.integers(0, 5, 40)
        metrics, each = class_metrics(np.eye(5, dtype=bool)[right], np.eye(5, dtype=bool)[given], names)
        assert metrics["accuracy"] == pytest.approx(accuracy_score(right, given))
        for kind in ("macro", "micro"):
            expected = f1_score(right, given, average=kind, zero_division=0)
            assert metrics[f"{kind}_f1"] == pytest.approx(expected), trial
        table = precision_recall_fscore_support(right, given, labels=range(5), zero_division=0)
        found = [[each[n][k] for n in names] for k in ("precision", "recall", "f1", "support")]
        np.testing.assert_allclose(found, table)
        many, gave = draw.random((40, 5)) < 0.4, draw.random((40, 5)) < 0.3
        metrics, _ = class_metrics(many, gave, names)
        assert metrics["accuracy"] == pytest.approx(accuracy_score(many, gave))
        assert metrics["macro_f1"] == pytest.approx(f1_score(many, gave, average="macro", zero_division=0))
        assert metrics["micro_f1"] == pytest.approx(f1_score(many, gave, average="micro", zero_division=0))


# --- the whole way ---

RUNS = {
    "lora": {"method": {"name": "lora", "r": 8, "lora_dropout": 0.0}, "learning_rate": 1e-2},
    "full": {"method": "full", "learning_rate": 3e-3},
    "adapter": {"method": "adapter", "learning_rate": 1e-2},
    "ia3": {"method": "ia3", "learning_rate": 5e-2},
}


def run(folder, method, target, rows=None, **training):
    settings = dict(RUNS[method])
    recipe = Recipe.from_dict(
        {
            "task": "classification",
            "model": {"name": str(folder), "dtype": "float32"},
            "method": settings.pop("method"),
            "training": {
                **settings,
                "max_steps": 60,
                "per_device_train_batch_size": 8,
                "report_to": [],
                "eval_steps": 20,
                **training,
            },
            "output_dir": str(target),
        }
    )
    given = {"train": texts(80), "validation": texts(10, seed=1), "test": texts(20, seed=2)}
    return run_recipe(recipe, given=rows or given)


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tiny_encoder_dir, tmp_path_factory):
    """Runs of every method on a decoder and on an encoder, by their names."""
    root = tmp_path_factory.mktemp("classifiers")
    kinds = {"decoder": (tiny_model_dir, ("lora", "adapter")), "encoder": (tiny_encoder_dir, RUNS)}
    return {
        f"{method}-{kind}": run(folder, method, root / f"{method}-{kind}")
        for kind, (folder, methods) in kinds.items()
        for method in methods
    }


def test_every_method_learns_the_classes(finished):
    for name, result in finished.items():
        majority, tuned = result.comparison.models
        assert majority.metrics["accuracy"] == 0.5 and majority.calibration is None
        stored = json.loads((result.run_dir / "evaluation/comparison.json").read_text())["models"]
        assert sum(b["count"] for b in stored["tuned"]["calibration"]["reliability"]) == 20
        assert tuned.metrics["nll"] == pytest.approx(tuned.metrics["loss"], rel=1e-4)
        assert "calibration" not in stored["majority"] and 0 <= tuned.metrics["ece"] <= 1
        assert "calibration error" in (result.run_dir / "report.html").read_text()
        # These bodies are random: where most of one stays as it is, there is little to learn with.
        least = {"full-encoder": 0.8, "lora-decoder": 0.75}.get(name, 0.5)
        assert tuned.metrics["accuracy"] >= least, (name, tuned.metrics)
        assert result.outcome.state.best_loss < result.outcome.first_eval_loss - 0.01, name


def test_plain_transformers_and_peft_load_what_was_saved(finished, tiny_model_dir, tiny_encoder_dir, tmp_path):
    asked = [row.input for row in texts(5, seed=3)]
    jobs, expected = [], {}
    for name, result in finished.items():
        scores = Classifier(result.run_dir).probabilities(asked)
        expected[str(result.saved)] = scores.tolist()
        base = tiny_model_dir if name.endswith("decoder") else tiny_encoder_dir
        if not name.startswith("adapter"):
            jobs.append({"folder": str(result.saved), "base": str(base), "adapter": result.saved.name == "adapter"})
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs, "texts": asked}))
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path)], check=True)
    for folder, scores in json.loads((tmp_path / "scores.json").read_text()).items():
        np.testing.assert_allclose(scores, expected[folder], rtol=1e-4, atol=1e-5, err_msg=folder)


_FRESH = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from peft import AutoPeftModelForSequenceClassification
root = Path(sys.argv[1])
work = json.loads((root / "jobs.json").read_text())
scores = {}
for job in work["jobs"]:
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    if job["adapter"]:
        model = AutoPeftModelForSequenceClassification.from_pretrained(job["folder"], num_labels=2)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(job["folder"])
        assert model.config.id2label == {0: "neg", 1: "pos"}, model.config.id2label
    with torch.no_grad():
        inputs = tokenizer(work["texts"], return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        scores[job["folder"]] = model.eval()(**inputs).logits.softmax(-1).tolist()
(root / "scores.json").write_text(json.dumps(scores))
"""


def test_a_merged_classifier_is_the_tuned_one(finished):
    for name in ("lora-decoder", "lora-encoder", "ia3-encoder"):
        result = finished[name]
        target = result.run_dir / "merged"
        report = merge_adapter(result.saved, target)
        assert report.passed and report.numbers["tuning_mean"] > 0
        asked = [row.input for row in texts(5, seed=3)]
        merged = Classifier(target)
        assert merged.classes == TWO
        np.testing.assert_allclose(
            merged.probabilities(asked), Classifier(result.run_dir).probabilities(asked), rtol=1e-3, atol=1e-4
        )


def test_the_head_that_begins_at_random_is_trained_by_every_method(tiny_encoder_dir):
    for name in ("lora", "ia3", "adapter", "full"):
        model, _ = classifier(tiny_encoder_dir, TWO)
        assert model.fresh_modules == ["classifier"]
        wrapped = METHODS[name].wrap(model, options_of(name)(), [], TaskType.CLASSIFICATION)
        assert any("classifier" in n for n in trainable_parameters(wrapped)), name


def test_an_interrupted_run_goes_on_to_the_same_weights(finished, tiny_model_dir, tmp_path):
    whole = finished["lora-decoder"]
    recipe = Recipe.load(
        whole.run_dir / "recipe.yaml", [f"output_dir={tmp_path / 'again'}", "training.save_total_limit=4"]
    )
    given = {"train": texts(80), "validation": texts(10, seed=1), "test": texts(20, seed=2)}
    run_recipe(recipe, given=given)
    checkpoints = tmp_path / "again" / "checkpoints"
    shutil.rmtree(checkpoints / "step-60")
    assert (checkpoints / "step-40").is_dir()
    result = run_recipe(recipe, given=given, resume=True)
    ours, theirs = (trainable_parameters(r.model) for r in (whole, result))
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def test_texts_of_several_classes_are_learnt(tiny_encoder_dir, tmp_path):
    def rows(count, seed):
        draw = random.Random(seed)
        made = []
        for number in range(count):
            words = [w for w in ("good", "bread", "river") if draw.random() < 0.5]
            filler = draw.sample(("lamp", "chair", "road", "cloud"), 2)
            together = words + filler
            draw.shuffle(together)
            made.append(TrainingExample(f"{' '.join(together)} {seed}{number}", label=words))
        return made

    tuner = FullFineTuner(str(tiny_encoder_dir), task="classification", dtype="float32")
    result = tuner.train(
        rows(120, 0), rows(10, 1), tmp_path / "run", test_examples=rows(30, 2), quiet=True, report_to=[],
        max_steps=100, learning_rate=3e-3, per_device_train_batch_size=16,
    )  # fmt: skip
    assert result.comparison.classes == ClassNames(("bread", "good", "river"), multi_label=True)
    majority, tuned = result.comparison.models
    assert tuned.metrics["macro_f1"] > max(0.75, majority.metrics["macro_f1"] + 0.2)
    assert set(tuned.calibration.by_label) == {"bread", "good", "river"}
    assert tuned.metrics["nll"] == pytest.approx(tuned.metrics["loss"], rel=1e-4)
    asked = [row.input for row in rows(20, 4)]
    found, scores = (getattr(Classifier(tmp_path / "run"), ask)(asked) for ask in ("classify", "probabilities"))
    assert [len(names) for names in found] == (scores > 0.5).sum(1).tolist() and len({len(n) for n in found}) > 1


def test_a_finished_classifier_is_judged_and_used_from_the_command_line(finished, tmp_path, capsys):
    folder = finished["full-encoder"].run_dir
    table = "review,label\n" + "\n".join(f"{r.input},{r.label}" for r in texts(12, seed=5))
    (tmp_path / "more.csv").write_text(table)
    comparison = evaluate_run(folder, data=str(tmp_path / "more.csv"), console=Console(file=io.StringIO()))
    assert [m.name for m in comparison.models] == ["majority", "tuned"]
    assert comparison.models[1].metrics["accuracy"] > 0.7
    capsys.readouterr()
    classify(folder, ["the good house bird", "the awful house bird"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = Classifier(folder).probabilities([row["text"] for row in found])
    for row, scores in zip(found, expected, strict=True):
        ((name, score),) = [tuple(given.values()) for given in row["classes"]]
        assert TWO.names[int(scores.argmax())] == name and score == pytest.approx(scores.max(), abs=1e-5)


def test_texts_that_are_longer_than_the_model_takes_are_cut_everywhere(tiny_encoder_dir, tmp_path):
    """Rows keep their whole text: what asks a model later must cut it as training does."""
    long = [replace(r, input=f"{r.input} {'stone river ' * 60}") for r in texts(24)]
    settings = {"truncation": "cut", "max_steps": 1, "report_to": [], "eval_steps": 1}
    tuner = LoRATuner(str(tiny_encoder_dir), task="classification", dtype="float32")
    result = tuner.train(long[:16], long[16:20], tmp_path / "run", test_examples=long[20:], quiet=True, **settings)
    assert json.loads((tmp_path / "run" / "preflight.json").read_text())["facts"]["rows"]["train"]["kept"] == 16
    assert len(Classifier(result.run_dir).classify([long[0].input])) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in lines) and not any("eval_perplexity" in line for line in lines)


def test_the_pre_flight_tells_of_what_a_classifier_cannot_read(tiny_encoder_dir):
    recipe = Recipe.from_dict(
        {
            "task": {"name": "classification", "labels": ["neg", "pos", "never"]},
            "data": {"truncation": "cut", "max_length": 8},
        }
    )
    tokenizer = load_tokenizer(tiny_encoder_dir, chats=False)
    rows = [*texts(30), TrainingExample("早 晚 冷 热 高 低", label="pos")]
    task = get_task("classification")
    found = {f.code: f for f in task.findings(recipe, prepare(recipe, tokenizer, given={"train": rows}))}
    assert found["text_cut"].severity == "warning" and found["text_cut"].count == sum(
        len(tokenizer(r.input).input_ids) > 8 for r in rows
    )
    assert found["unknown_tokens"].count == 1
    assert found["class_without_rows"].severity == "error" and "'never'" in found["class_without_rows"].message
    sound = Recipe.from_dict({"task": "classification"})
    given = {"train": texts(30), "validation": texts(10, seed=1)}
    assert task.findings(sound, prepare(sound, tokenizer, given=given)) == []


def test_a_model_that_has_learnt_nothing_is_said_to(tiny_encoder_dir):
    model, tokenizer = classifier(tiny_encoder_dir, TWO)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    rows = ClassEncoder(tokenizer, TWO).encode(texts(10)).examples
    found = compare_classifiers(
        [("tuned", lambda: contextlib.nullcontext(model))],
        rows,
        TWO,
        texts=[r.input for r in texts(10)],
        training=[(0,), (0,), (1,)],
    )
    assert found.notes == ["tuned gives every text the same class: it has learnt nothing from the texts"]
    majority, tuned = found.models
    assert not majority.given[:, 1].any() and tuned.given[:, 1].all()
    assert tuned.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(
        torch.tensor([[0.0, 1.0]] * 10), torch.tensor([r.extra[0] for r in rows])
    )))  # fmt: skip
    assert found.to_json()["confusion"]["tuned"] == [[0, 5], [0, 5]]


def test_data_verbs_show_rows_as_the_classifier_reads_them(tiny_encoder_dir, tmp_path):
    table = "review,label\n" + "\n".join(f"{r.input},{r.label}" for r in texts(12))
    (tmp_path / "rows.csv").write_text(table)
    recipe = Recipe.from_dict(
        {
            "task": "classification",
            "model": {"name": str(tiny_encoder_dir)},
            "data": {"train": str(tmp_path / "rows.csv")},
        }
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    opened = Subject(tmp_path / "recipe.yaml")
    shown, refused, encoder = rows_to_show(opened, count=2)
    assert not refused and encoder.classes == TWO
    assert [row.input_ids.tolist() for row in shown] == [opened.tokenizer(r.input).input_ids for r in texts(2)]
    assert row_json(shown[0], encoder)["classes"] == ["neg"]
    console = Console(file=io.StringIO(), width=120)
    console.print(opened.task.show(shown, encoder))
    assert "[CLS] the" in console.file.getvalue() and "neg" in console.file.getvalue()
    assert stats_of(opened)["train"].rows == 12 and not lint_of(opened, near=False).errors


# --- what is refused ---


def test_what_does_not_fit_a_classifier_is_refused(finished, tiny_model_dir, tmp_path):
    with pytest.raises(UserError, match="method prompt cannot tune a model for classification"):
        METHODS["prompt"].check(Recipe.from_dict({"task": "classification", "method": "prompt"}))
    for data in ({"system": "Be kind."}, {"train_on": "all"}, {"truncation": "split"}):
        with pytest.raises(UserError, match="has no use for data"):
            get_task("classification").check(Recipe.from_dict({"task": "classification", "data": data}))
    with pytest.raises(UserError, match="holds a classifier, which does not answer"):
        chat(str(finished["lora-decoder"].run_dir), input_fn=lambda _: "/exit")
    with pytest.raises(UserError, match="holds no classifier"):
        Classifier(tiny_model_dir)
    model, _ = classifier(tiny_model_dir, TWO)
    with pytest.raises(UserError, match="'score' is new to the model"):
        METHODS["full"].wrap(model, FullMethod(frozen_modules=["score"]), [], TaskType.CLASSIFICATION)
    with pytest.raises(UserError, match="a class is named twice"):
        Recipe.from_dict({"task": {"name": "classification", "labels": ["a", "a"]}})
    with pytest.raises(UserError, match="unknown task 'classify'"):
        Recipe.from_dict({"task": "classify"})
    with pytest.raises(UserError, match=r"unknown key 'task.label'; did you mean 'task.labels'"):
        Recipe.from_dict({"task": {"name": "classification", "label": ["a"]}})


def test_an_adapter_refuses_another_body(finished, tiny_encoder_dir, tmp_path):
    saved = finished["lora-encoder"].saved
    copy = tmp_path / "adapter"
    shutil.copytree(saved, copy)
    record = json.loads((copy / "luthier_base.json").read_text())
    assert record["labels"] == ["neg", "pos"] and record["task"] == "classification"
    (copy / "luthier_base.json").write_text(json.dumps(record | {"fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="another base"):
        load_saved(copy)


def test_python_rows_of_that_type_make_a_classifier(tiny_model_dir, tmp_path):
    rows = [replace(r, task_type=TaskType.CLASSIFICATION) for r in texts(24)]
    tuner = LoRATuner(str(tiny_model_dir), dtype="float32")
    result = tuner.train(
        rows[:20], output_dir=tmp_path / "run", max_steps=1, report_to=[], quiet=True, labels=["pos", "neg"]
    )
    assert Head.of(result.model).classes == ClassNames(("pos", "neg"))


def test_a_quantised_base_keeps_its_new_head_whole(tiny_model_dir):
    pytest.importorskip("bitsandbytes")
    head = Head(TaskType.CLASSIFICATION, TWO)
    model = load_model(tiny_model_dir, dtype=torch.float32, quantization=Quantization(), head=head)
    assert type(model.score) is torch.nn.Linear and model.fresh_modules == ["score"]
    assert any(is_quantized(p) for p in model.parameters())


def test_a_model_without_weights_for_its_body_is_refused(tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for head in (None, Head(TaskType.CLASSIFICATION, TWO)):
        with pytest.raises(UserError, match=r"holds no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
            load_model(folder, head=head)
