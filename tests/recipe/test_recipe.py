"""The recipe: every mistake in it is named with its place, and what is written is what is read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from luthier.errors import UserError
from luthier.recipe import Recipe, apply_overrides, known_keys

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_what_is_read(tmp_path):
    recipe = Recipe.from_dict(
        {"method": {"name": "lora", "r": 16}, "training": {"learning_rate": 1e-4}, "data": {"train": "/d/a.jsonl"}}
    )
    assert Recipe.load(write(tmp_path, recipe.to_yaml())) == recipe


def test_overrides_win_and_keep_their_types(tmp_path):
    path = write(tmp_path, "training: {learning_rate: 1.0e-5, num_train_epochs: 3}\nmethod: lora\n")
    recipe = Recipe.load(
        path,
        ["training.learning_rate=2e-4", "method.r=32", "data.max_length=null", "training.report_to=[]", "seed=7"],
    )
    assert recipe.training.learning_rate == 2e-4
    assert recipe.training.num_train_epochs == 3
    assert (recipe.method.r, recipe.data.max_length, recipe.training.report_to, recipe.seed) == (32, None, [], 7)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("training: {learning_rte: 1}", "did you mean 'training.learning_rate'"),
        ("trainin: {}", "did you mean 'training'"),
        ("learning_rate: 1", "did you mean 'training.learning_rate'"),
        ("training: {num_train_epochs: many}", "training.num_train_epochs"),
        ("training: {per_device_train_batch_size: 0}", "greater than or equal to 1"),
        ("method: qlorra", "unknown method 'qlorra'"),
        ("method: {name: full, r: 8}", "unknown key 'method.r'; full has frozen_layers, frozen_modules"),
        ("method: {name: ia3, r: 8}", "unknown key 'method.r'; ia3 has target_modules, feedforward_modules"),
        ("method: {name: prefix, num_tokens: 8}", "did you mean 'method.num_virtual_tokens'"),
        ("data: {columns: {prompt: [a]}}", "data.columns.prompt: "),
        ("data: {split: {validation: 0.6, test: 0.6}}", "leave no row"),
        ("data: [1, 2]", "data"),
        ("- a\n- b\n", "must be a mapping"),
        ("training: {learning_rate: [", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, wanted):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    assert wanted in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_recipe_that_is_no_file(tmp_path, name):
    with pytest.raises(UserError):
        Recipe.load(tmp_path / name)


def test_overrides_without_a_value_or_through_a_value():
    with pytest.raises(UserError, match="key=value"):
        apply_overrides({}, ["training.learning_rate"])
    with pytest.raises(UserError, match="is a value"):
        apply_overrides({"seed": 3}, ["seed.deep=1"])


def test_an_override_may_be_a_whole_section(tmp_path):
    path = write(tmp_path, "method: {name: lora, r: 4}\n")
    method = Recipe.load(path, ["method={name: full}"]).method
    assert method.model_dump(exclude_unset=True) == {"name": "full"}
    recipe = Recipe.load(path, ["data.train=[a.jsonl, e.jsonl]", "data.clean=FILE.py:some_function"])
    assert [Path(source.path).name for source in recipe.data.train] == ["a.jsonl", "e.jsonl"]
    assert recipe.data.clean[0].name.endswith("FILE.py:some_function")


def test_paths_start_at_the_recipe_and_overrides_at_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.jsonl").write_text("{}")
    path = write(tmp_path, "data: {train: rows.jsonl}")
    assert Recipe.load(path).data.train[0].path == str(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path / "here")
    assert Recipe.load(path, ["data.train=mine.jsonl"]).data.train[0].path == str(tmp_path / "here" / "mine.jsonl")


def test_every_key_has_a_description():
    def walk(section, prefix=""):
        for name, field in section.model_fields.items():
            assert field.description, f"{prefix}{name} has no description"

    from luthier import method_options, recipe

    for section in (*vars(recipe).values(), *vars(method_options).values()):
        if isinstance(section, type) and issubclass(section, recipe.Section):
            walk(section)
    assert {"training.learning_rate", "method.r", "data.columns.prompt"} <= set(known_keys())


def test_the_reference_pages_are_the_code():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == module.reference(), (
        "run python docs/make_reference.py"
    )
    assert (ROOT / "docs" / "steps.md").read_text(encoding="utf-8") == module.steps(), (
        "run python docs/make_reference.py"
    )


def test_options_of_decoding_that_exclude_each_other_are_told(tmp_path):
    path = write(tmp_path, "evaluation: {do_sample: true, temperature: 0.5, top_p: 0.9}\nseed: 7\n")
    decoding = Recipe.load(path).evaluation.decoding(Recipe.load(path).seed)
    assert (decoding.do_sample, decoding.temperature, decoding.top_p, decoding.seed) == (True, 0.5, 0.9, 7)
    for text, said in (
        ("evaluation: {temperature: 0.5}", "do_sample=True"),
        ("evaluation: {do_sample: true, num_beams: 2}", "exclude each other"),
        ("evaluation: {top_p: 0}", "top_p"),
    ):
        with pytest.raises(UserError, match=said):
            Recipe.load(write(tmp_path, text))


def test_one_value_stands_for_a_section(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    path = write(tmp_path, "model: smollm2\ndata: rows.jsonl\nmethod: full\ntask: instruction\n")
    recipe = Recipe.load(path, ["model.dtype=float32", "data.max_length=64"])
    assert (recipe.model.name, recipe.model.dtype) == ("smollm2", "float32")
    assert [source.path for source in recipe.data.train] == [str(tmp_path / "rows.jsonl")]
    assert (recipe.data.max_length, recipe.method.name, recipe.task.name) == (64, "full", "instruction")
    assert len(Recipe.load(write(tmp_path, "data: [a.jsonl, b.jsonl]\n")).data.train) == 2


def test_a_value_in_place_of_a_section_is_told_with_the_keys_that_it_has(tmp_path):
    with pytest.raises(UserError, match="evaluation is a section, not 3: it has enabled, max_examples"):
        Recipe.load(write(tmp_path, "evaluation: 3\n"))
    with pytest.raises(UserError, match="training is a section, not 'fast': it has num_train_epochs"):
        Recipe.load(write(tmp_path, "training: fast\n"))
