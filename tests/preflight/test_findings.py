"""Each fault the pre-flight exists for, made on purpose, is found; a sound run is passed without an error."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.data.chats import ChatEncoder
from luthier.data.dataset import prepare
from luthier.data.examples import TrainingExample
from luthier.data.render import Renderer
from luthier.errors import UserError
from luthier.methods import get_method
from luthier.models.loading import load_model, load_tokenizer, set_stop_tokens
from luthier.recipe import Recipe
from luthier.tasks import get_task
from luthier.training.loss import LossFunction
from luthier.training.preflight import preflight, render_preflight
from luthier.training.preflight.data_checks import check_conversations
from luthier.training.preflight.model_checks import check_first_loss, check_room, first_loss, predict


def rows(count: int, begin: int = 0) -> list[TrainingExample]:
    return [
        TrainingExample(input=f"What is {i} plus {i * 7}?", output=f"The sum is {i * 8}.")
        for i in range(begin, begin + count)
    ]


def recipe(**data) -> Recipe:
    return Recipe.from_dict({"data": data, "training": {"report_to": []}})


def codes(findings) -> dict[str, str]:
    return {f.code: f.severity for f in findings}


def altered(dataset):
    """The data set with training rows that a test may change."""
    dataset.train.encoded = list(dataset.train.encoded)
    return dataset


def checked(settings, method, dataset, model, loss, added, folder):
    """The pre-flight of a causal language model."""
    task = get_task("causal_lm")
    found, chance = task.findings(settings, dataset), task.chance(model)
    return preflight(
        settings, method, dataset, model, loss, found=found, chance=chance, stop_tokens_added=added, run_dir=folder
    )


@pytest.fixture
def fresh_tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir)


def test_sound_rows_have_no_finding(fresh_tokenizer):
    given = {"train": rows(30), "validation": rows(10, 1000), "test": rows(10, 2000)}
    assert check_conversations(recipe(), prepare(recipe(), fresh_tokenizer, given=given)) == []


def test_lost_rows_are_counted_by_reason_and_placed(fresh_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"q{i}", "response": f"a{i}"}) for i in range(96)]
    lines[10] = json.dumps({"prompt": "q", "response": ""})
    lines[20] = '{"prompt": "q", "respo'
    lines[30] = json.dumps({"prompt": "q <|im_end|> q", "response": "a"})
    path.write_text("\n".join(lines), encoding="utf-8")
    settings = recipe(train=str(path), split={"validation": 0, "test": 0})
    dataset = prepare(settings, fresh_tokenizer)
    found = {f.code: f for f in check_conversations(settings, dataset)}["rows_lost"]
    assert found.severity == "error" and found.count == 3
    assert set(found.rows) == {f"{path}:11", f"{path}:21", f"{path}:31"}
    assert len(dataset.train.examples) == 93
    allowed = recipe(train=str(path), split={"validation": 0, "test": 0}, max_rejected_share=0.05)
    assert codes(check_conversations(allowed, prepare(allowed, fresh_tokenizer)))["rows_lost"] == "warning"


def test_plain_text_among_instructions_is_found(fresh_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Say {i}.", "response": f"{i}"} for i in range(10)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "text.jsonl").write_text('{"text": "It rains."}\n{"text": "It has rained."}\n', encoding="utf-8")
    settings = recipe(train=[str(path), str(tmp_path / "text.jsonl")], split={"validation": 0, "test": 0})
    dataset = prepare(settings, fresh_tokenizer)
    assert "no_answer" not in codes(check_conversations(settings, dataset))
    settings.task = "instruction"
    found = {f.code: f for f in check_conversations(settings, dataset)}["no_answer"]
    assert (found.severity, found.count) == ("error", 2)
    assert found.rows == tuple(f"{tmp_path / 'text.jsonl'}:{line}" for line in (1, 2))


def test_masked_answers_are_found(fresh_tokenizer):
    dataset = altered(prepare(recipe(), fresh_tokenizer, given={"train": rows(20)}))
    for row in dataset.train.encoded[:3]:
        first = int(np.flatnonzero(row.trained)[0])
        row.trained[first : first + 2] = False
    found = {f.code: f for f in check_conversations(recipe(), dataset)}
    assert found["trained_text_differs"].severity == "error" and found["trained_text_differs"].count == 3


def test_nothing_trained_is_found(fresh_tokenizer):
    dataset = altered(prepare(recipe(), fresh_tokenizer, given={"train": rows(20)}))
    for row in dataset.train.encoded:
        row.trained[:] = False
    assert codes(check_conversations(recipe(), dataset))["no_trained_token"] == "error"


def test_a_lost_end_of_turn_is_found(fresh_tokenizer):
    dataset = altered(prepare(recipe(), fresh_tokenizer, given={"train": rows(20)}))
    row = dataset.train.encoded[4]
    row.trained[np.flatnonzero(row.trained)[-1]] = False
    found = {f.code: f for f in check_conversations(recipe(), dataset)}["end_of_turn_untrained"]
    assert (found.severity, found.count) == ("error", 1)


def test_a_template_without_end_of_turn_is_told(fresh_tokenizer):
    fresh_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    dataset = prepare(recipe(), fresh_tokenizer, given={"train": rows(20)})
    assert codes(check_conversations(recipe(), dataset))["no_end_of_turn"] == "warning"


def test_a_doubled_and_a_missing_bos_are_found(fresh_tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos = fresh_tokenizer.bos_token
    fresh_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, fresh_tokenizer.bos_token_id)]
    )
    plain = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    dataset = prepare(recipe(), fresh_tokenizer, given={"train": rows(20)})
    assert "bos_missing" not in codes(check_conversations(recipe(), dataset)) and "bos_doubled" not in codes(
        check_conversations(recipe(), dataset)
    )
    fresh_tokenizer.chat_template = plain
    dataset = prepare(recipe(), fresh_tokenizer, given={"train": rows(20)})
    assert codes(check_conversations(recipe(), dataset))["bos_missing"] == "error"
    fresh_tokenizer.chat_template = "{{ bos_token + bos_token }}" + plain
    dataset = prepare(recipe(), fresh_tokenizer, given={"train": rows(20)})
    assert codes(check_conversations(recipe(), dataset))["bos_doubled"] == "error"


def test_marked_turns_and_reasoning_are_sound_and_the_template_is_described(fresh_tokenizer):
    def turns(i, **more):
        first, second = ({"role": "assistant", "content": f"It is {i + n}."} for n in range(2))
        return [
            {"role": "user", "content": f"What is {i}?"},
            first | {"train": False},
            {"role": "user", "content": "And one more?"},
            second | more,
        ]

    given = {"train": [TrainingExample(messages=turns(i, reasoning_content="I add.")) for i in range(20)]}
    given["validation"] = [TrainingExample(messages=turns(1000))]
    for train_on in ("answers", "last_answer", "all"):
        settings = recipe(train_on=train_on)
        found = codes(check_conversations(settings, prepare(settings, fresh_tokenizer, given=given)))
        assert found == ({} if train_on == "all" else {"reasoning_in_content": "info"})


def test_training_on_other_tokens_than_serving_is_found(fresh_tokenizer):
    dataset = prepare(recipe(), fresh_tokenizer, given={"train": rows(20)})
    # What is exported later has another template than the rows were rendered with.
    fresh_tokenizer.chat_template = fresh_tokenizer.chat_template.replace("assistant\n", "assistant \n")
    dataset.encoder = ChatEncoder(Renderer(fresh_tokenizer))
    assert "prompt_ids_differ" in codes(check_conversations(recipe(), dataset))


def test_a_token_over_the_border_of_the_answer_is_found(fresh_tokenizer):
    # "\n\n" is one token at the end of the serving prompt, and two before a letter.
    template = fresh_tokenizer.chat_template.replace("message['role'] + '\n' +", "message['role'] + '\n\n' +")
    fresh_tokenizer.chat_template = template.replace("assistant\n'", "assistant\n\n'")
    dataset = prepare(recipe(), fresh_tokenizer, given={"train": rows(20)})
    assert codes(check_conversations(recipe(), dataset)).get("prompt_ids_differ") == "warning"


def test_answers_that_begin_blank_are_found_where_it_changes_tokens(fresh_tokenizer):
    def found(*answers, **data):
        settings = recipe(**data)
        given = {"train": [*rows(20), *(TrainingExample("Say it.", answer) for answer in answers)]}
        findings = check_conversations(settings, prepare(settings, fresh_tokenizer, given=given))
        assert "prompt_ids_differ" not in codes(findings)
        return {f.code: f for f in findings}.get("answer_begins_blank")

    # The template's "\n" before an answer and a blank after it are one token of SmolLM2's, unless a word follows.
    joined = ("\n\nHello", "  Bye", "\t\t0", " \r1")
    finding = found(*joined, " Hello there", "\nGood bye")
    assert (finding.severity, finding.count) == ("warning", len(joined))
    assert "normalize_whitespace: {on: answer}" in finding.remedy
    assert found(*joined, clean=[{"normalize_whitespace": {"on": "answer"}}]) is None
    # Every answer of a conversation counts, where it is trained.
    turns = [m for pair in ("\n\nYes.", "No.") for m in TrainingExample("Well?", pair).to_chat_format()]
    dataset = prepare(recipe(), fresh_tokenizer, given={"train": [TrainingExample(messages=turns), *rows(20)]})
    assert codes(check_conversations(recipe(), dataset))["answer_begins_blank"] == "warning"
    settings = recipe(train_on="last_answer")
    dataset = prepare(settings, fresh_tokenizer, given={"train": dataset.train.examples})
    assert "answer_begins_blank" not in codes(check_conversations(settings, dataset))


def test_cut_answers_are_counted_in_tokens(fresh_tokenizer):
    settings = recipe(max_length=70, truncation="cut")
    given = {"train": [*rows(20), TrainingExample(input="long", output="word " * 60)]}
    dataset = prepare(settings, fresh_tokenizer, given=given)
    whole = prepare(recipe(), fresh_tokenizer, given=given)
    found = {f.code: f for f in check_conversations(settings, dataset)}["answer_cut"]
    lost = whole.train.trained_tokens - dataset.train.trained_tokens
    assert found.count == 1 and f"{lost:,} trained tokens" in found.message


def test_repetition_and_contradiction_are_told_apart(fresh_tokenizer):
    given = {"train": [*rows(20), *rows(2), TrainingExample(input="What is 5 plus 35?", output="Nothing.")]}
    found = {f.code: f for f in check_conversations(recipe(), prepare(recipe(), fresh_tokenizer, given=given))}
    assert found["duplicates"].count == 2 and found["contradictions"].count == 1


def test_overlap_between_parts_is_found(fresh_tokenizer):
    story = "A long story about a fox that went to the river to drink and met a heron who told it where the fish are"
    near = TrainingExample(input=story + " today.", output="fox")
    given = {
        "train": [*rows(20), TrainingExample(input=story, output="fox")],
        "validation": [*rows(5, 500), near],
        "test": [*rows(5, 900), rows(1)[0]],
    }
    found = {f.code: f for f in check_conversations(recipe(), prepare(recipe(), fresh_tokenizer, given=given))}
    assert found["overlap"].severity == "error" and "test" in found["overlap"].message
    assert found["overlap_near"].count == 1 and "validation" in found["overlap_near"].message


def test_label_imbalance_is_found(fresh_tokenizer):
    given = {"train": [TrainingExample(input=f"text {i}", output="good" if i else "bad") for i in range(40)]}
    assert "label_imbalance" in codes(check_conversations(recipe(), prepare(recipe(), fresh_tokenizer, given=given)))
    one = {"train": [replace(e, output="good") for e in given["train"]]}
    assert "one_label" in codes(check_conversations(recipe(), prepare(recipe(), fresh_tokenizer, given=one)))


def test_a_question_that_was_trained_on_with_another_answer_is_told(fresh_tokenizer):
    asked = TrainingExample(input=rows(1)[0].input, output="It is nothing at all.")
    given = {"train": rows(20), "test": [*rows(5, 900), asked]}
    found = {f.code: f for f in check_conversations(recipe(), prepare(recipe(), fresh_tokenizer, given=given))}
    assert found["overlap_prompt"].severity == "warning" and found["overlap_prompt"].count == 1
    assert not {"overlap", "overlap_near"} & found.keys()


def test_near_copies_do_not_cry_wolf(fresh_tokenizer):
    def told(text: str, numbers) -> list[TrainingExample]:
        return [TrainingExample(input=text.format(n), output=f"Number {n} is done.") for n in numbers]

    order = "Please send {0} boxes of pencils to the school in Lagos before Friday the {0}th"
    museum = "The museum in Oslo ordered {0} paintings and wants them hung by the {0}th of May"
    given = {"train": told(museum, range(99)), "validation": told(order, range(3, 20)), "test": told(museum, [200])}
    assert (
        not {"overlap", "overlap_near", "overlap_prompt"}
        & codes(check_conversations(recipe(), prepare(recipe(), fresh_tokenizer, given=given))).keys()
    )


# --- with a model ---


def ready(folder: Path, settings: Recipe, given, wrap: bool = True):
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=torch.float32)
    added = set_stop_tokens(model, tokenizer)
    dataset = prepare(settings, tokenizer, given=given)
    method = get_method(settings.method.name)
    wrapped = method.wrap(model, settings.method, [])
    return method, dataset, wrapped, LossFunction(wrapped, pad_token_id=tokenizer.pad_token_id), added


def test_a_whole_preflight_passes_and_prints(tiny_model_dir, tmp_path):
    from rich.console import Console

    settings = recipe()
    given = {"train": rows(120), "validation": rows(10, 1000)}
    method, dataset, model, loss, added = ready(tiny_model_dir, settings, given)
    report = checked(settings, method, dataset, model, loss, added, tmp_path / "run")
    assert report.passed, report.findings
    report.require()
    ours, plain = report.facts["first_loss"].values()
    assert ours == pytest.approx(plain, rel=1e-4)
    console = Console(record=True, width=120, force_terminal=True)
    console.print(get_task("causal_lm").show(dataset.train.encoded[:2], dataset.encoder), render_preflight(report))
    shown = console.export_text(styles=True)
    # The answer and its end-of-turn are on green; the question is not.
    assert "\x1b[30;42mThe sum is 0.\x1b[0m\x1b[1;30;102m<|im_end|>\x1b[0m" in shown
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_a_wrong_training_path_is_found_by_the_first_loss(tiny_model_dir):
    settings = recipe()
    _, dataset, model, loss, _ = ready(tiny_model_dir, settings, {"train": rows(40)})
    honest = first_loss(model, loss, dataset)
    assert "first_loss" not in codes(check_first_loss(honest, math.log(49152), coarse=False))
    original = loss.batch

    def shifted(examples):
        batch = original(examples)
        batch.targets = batch.targets.roll(1)
        return batch

    loss.batch = shifted
    assert codes(check_first_loss(first_loss(model, loss, dataset), 49152, coarse=False))["first_loss"] == "error"


def test_settings_outside_the_advice_are_warned_of(tiny_model_dir, tmp_path):
    settings = Recipe.from_dict(
        {
            "method": {"name": "lora", "r": 128},
            "training": {"learning_rate": 0.01, "num_train_epochs": 12, "report_to": []},
        }
    )
    method, dataset, model, loss, added = ready(tiny_model_dir, settings, {"train": rows(40)})
    report = checked(settings, method, dataset, model, loss, added, tmp_path)
    found = codes(report.findings)
    assert {"learning_rate", "rank", "epochs", "few_rows", "no_validation"} <= found.keys()
    assert report.passed


def test_what_does_not_fit_is_refused(tiny_model_dir, tmp_path):
    settings = recipe()
    _, dataset, model, loss, _ = ready(tiny_model_dir, settings, {"train": rows(40)})
    needs = predict(settings, model, dataset.train.encoded, loss)
    assert not list(check_room(needs, tmp_path, torch.device("cpu")))
    huge = replace(needs, activations=10**15, disk=10**18)
    assert codes(check_room(huge, tmp_path / "not" / "there", torch.device("cpu"))) == {
        "memory": "error",
        "disk": "error",
    }


def test_an_error_stops_the_run_with_its_place(fresh_tokenizer, tiny_model_dir, tmp_path):
    settings = recipe()
    method, dataset, model, loss, added = ready(tiny_model_dir, settings, {"train": rows(40)})
    row = altered(dataset).train.encoded[0]
    row.trained[np.flatnonzero(row.trained)[-1]] = False
    report = checked(settings, method, dataset, model, loss, added, tmp_path)
    with pytest.raises(UserError, match="end_of_turn_untrained"):
        report.require()
