"""The field's teaching text as users type it: only the import line, the paths and the model's name are ours."""

from __future__ import annotations

import json

import pytest
import torch

from luthier import DataAugmentor, DatasetLoader, FineTuneEvaluator, FullFineTuner, InstructionTuner, LoRATuner
from luthier.data.examples import TaskType, TrainingExample
from luthier.errors import UserError
from luthier.recipe import Recipe


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"input": f"Name the colour of item {i}.", "output": f"Item {i} is green."} for i in range(140)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_the_whole_example(rows_file, terse_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader = DatasetLoader(task_type=TaskType.CAUSAL_LM)
    examples = loader.load_from_jsonl(str(rows_file))
    assert len(examples) == 140
    train_examples, val_examples, test_examples = loader.split(train_ratio=0.8, val_ratio=0.1)
    assert (len(train_examples), len(val_examples), len(test_examples)) == (112, 14, 14)
    augmentor = DataAugmentor()
    augmentor.add_augmenter(DataAugmentor.noise_injection)
    train_examples = augmentor.augment_examples(train_examples, augment_ratio=0.1)
    assert len(train_examples) == 112 + 11

    tuner = LoRATuner(model_name=str(terse_model_dir))
    tuner.train(
        train_examples=train_examples,
        val_examples=val_examples,
        output_dir=str(tmp_path / "run"),
        lora_r=8,
        lora_alpha=32,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
    )
    merged = tmp_path / "merged"
    tuner.merge_and_save(str(merged))

    model = AutoModelForCausalLM.from_pretrained(str(merged))
    tokenizer = AutoTokenizer.from_pretrained(str(merged))
    results = FineTuneEvaluator(model, tokenizer).evaluate_generation(test_examples[:4], max_length=12)
    assert {"bleu", "rouge1", "rouge2", "rougeL"} <= results.keys()
    assert all(0 <= results[key] <= 1 for key in ("bleu", "rouge1", "rouge2", "rougeL"))

    # The merged folder is the model that was trained, not the base with a new name.
    ids = tokenizer("Name the colour", return_tensors="pt").input_ids
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(terse_model_dir)(ids).logits
        ours, theirs = tuner.model(ids).logits.float(), model(ids).logits.float()
    assert (ours - theirs).abs().mean() < 0.25 * (ours - base).abs().mean()


def test_arguments_reach_their_section():
    recipe = LoRATuner("smollm2", dtype="float32")._recipe(
        "out", {"lora_r": 4, "weight_decay": 0.1, "max_seq_length": 99, "seed": 3, "use_rslora": True}
    )
    assert (recipe.method.r, recipe.training.weight_decay, recipe.data.max_length) == (4, 0.1, 99)
    assert (recipe.seed, recipe.method.use_rslora, recipe.model.dtype) == (3, True, "float32")


def test_mistakes_in_arguments(tmp_path):
    example = [TrainingExample(input="a", output="b")]
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        LoRATuner().train(example, output_dir=tmp_path / "run", learning_rte=1e-4)
    with pytest.raises(UserError, match="unknown training argument 'lora_r' for FullFineTuner"):
        FullFineTuner().train(example, output_dir=tmp_path / "run", lora_r=8)
    with pytest.raises(UserError, match="num_train_epochs"):
        LoRATuner().train(example, output_dir=tmp_path / "run", num_train_epochs=-1)
    with pytest.raises(UserError, match="list of TrainingExample"):
        LoRATuner().train("train.jsonl", output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="not trained yet"):
        LoRATuner().merge_and_save(tmp_path / "merged")
    with pytest.raises(UserError, match="no answer"):
        InstructionTuner().train([TrainingExample(input="plain text")], output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="unknown method 'lorra'"):
        InstructionTuner(method="lorra")
    assert not (tmp_path / "run").exists()


def test_instructions_are_learnt_with_an_adapter(terse_model_dir, tmp_path):
    rows = [TrainingExample(input=f"say {i}", output=f"said {i}") for i in range(8)]
    tuner = InstructionTuner(str(terse_model_dir), method="lora")
    result = tuner.train(rows, output_dir=tmp_path / "run", max_steps=1, lora_r=4, quiet=True)
    assert result.saved.name == "adapter"
    recipe = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert (recipe.task.name, recipe.method.name, recipe.method.r) == ("instruction", "lora", 4)
    tuner.merge_and_save(tmp_path / "merged")
    full = FullFineTuner(str(terse_model_dir))
    full.train(rows, output_dir=tmp_path / "full", max_steps=1, quiet=True)
    with pytest.raises(UserError, match="nothing to merge"):
        full.merge_and_save(tmp_path / "full-merged")


def test_full_tuning_from_python(terse_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    rows = [TrainingExample(input=f"say {i}", output=f"said {i}") for i in range(16)]
    result = FullFineTuner(str(terse_model_dir)).train(rows, output_dir=tmp_path / "run", max_steps=2, quiet=True)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    for name, value in result.model.state_dict().items():
        assert torch.equal(saved[name], value), name
