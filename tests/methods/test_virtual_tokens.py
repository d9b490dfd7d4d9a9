"""Prompt tuning, P-tuning, prefix tuning and a mixture with a prefix: our path against PEFT's own forward on each row
alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from card_code import code_of, said_by
from huggingface_hub import ModelCard
from peft import PeftModel

from luthier.data.encode import EncodedExample
from luthier.data.examples import TaskType, TrainingExample
from luthier.decoding import Decoding
from luthier.deployment.parity import log_probabilities
from luthier.errors import UserError
from luthier.evaluation.generation import _chosen, _generated
from luthier.evaluation.perplexity import perplexity_of_examples
from luthier.methods import get_method, method_of
from luthier.methods.base import trainable_parameters
from luthier.methods.mixed import MIXED_WITH_PREFIX
from luthier.methods.saved import load_saved
from luthier.models.fingerprint import identity
from luthier.models.loading import load_tokenizer
from luthier.models.virtual import VirtualTokens, own_logits
from luthier.pipeline import run
from luthier.recipe import Recipe
from luthier.training.fused import reference
from luthier.training.loss import LossFunction
from luthier.training.progress import Silent

GREEDY = Decoding()
METHODS = ["prompt", "p_tuning", "prefix", "mixed"]
OPTIONS = {"mixed": {"lora_dropout": 0.0, "modules_to_save": ["all-norms", "embed_tokens|wte"]}}
SHAPES = ["llama", "qwen3", "gemma3", "gpt2"]
VOCABULARY = 300


def tiny(shape: str):
    import transformers as t

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    if shape == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**common))
    elif shape == "qwen3":
        model = t.Qwen3ForCausalLM(t.Qwen3Config(**common, head_dim=32))
    elif shape == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        config = t.Gemma3TextConfig(
            **common, head_dim=32, query_pre_attn_scalar=32, sliding_window=48, layer_types=kinds
        )
        model = t.Gemma3ForCausalLM(config)
    else:
        config = t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, n_positions=256, initializer_range=0.2,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = t.GPT2LMHeadModel(config)
    return model.eval()


def wrapped(name: str, shape: str = "llama", **options):
    given = OPTIONS.get(name, {}) | options
    section = Recipe.from_dict({"method": {"name": name, "num_virtual_tokens": 20, **given}}).method
    torch.manual_seed(1)
    base = tiny(shape)
    model = method_of(section).wrap(base, section, [], TaskType.CAUSAL_LM)
    for key, parameter in trainable_parameters(model).items():
        if ".lora_B." in key:  # whose zeros would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def recipe_of(name: str, section: dict) -> Recipe:
    return Recipe.from_dict({"method": {"name": name, "num_virtual_tokens": 20}} | section)


def by_peft(shape: str, folder):
    """A saved adapter as PEFT alone loads it; that of a mixture in two steps."""
    model = tiny(shape)
    for part in sorted(p.parent for p in folder.rglob("adapter_config.json")):  # lora before prefix
        model = PeftModel.from_pretrained(model, part)
    return model.eval()


def rows_of(*lengths: int) -> list[EncodedExample]:
    rng = np.random.default_rng(3)
    rows = []
    for length in lengths:
        trained = rng.random(length) < 0.6
        trained[0], trained[-1] = False, True
        rows.append(EncodedExample(rng.integers(0, VOCABULARY, length).astype(np.int32), trained, None, 0))
    return rows


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def peft_alone(model, rows) -> torch.Tensor:
    """Summed loss of PEFT's own forward with labels, one row at a time."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(row.trained)[None], ids, -100)
        if VirtualTokens(model).keys:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        else:
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            total = total + loss * int(row.trained.sum())
    return total


def trained_a_little(model, steps: int = 4):
    loss_function = LossFunction(model)
    batch = loss_function.batch(rows_of(9, 14, 30))
    optimiser = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = loss_function(batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batching", ["auto", "padded"])
def test_loss_and_gradients_are_those_of_peft_on_each_row_alone(name, shape, batching):
    rows = rows_of(7, 33, 19, 2)
    model = wrapped(name, shape)
    expected = peft_alone(model, rows)
    expected.backward()
    theirs = gradients(model)
    loss_function = LossFunction(model, batching=batching)
    assert loss_function.packed == (batching == "auto" and name not in ("prefix", "mixed")), loss_function.reason
    assert loss_function.reason or loss_function.packed
    batch = loss_function.batch(rows)
    assert batch.tokens == sum(map(len, rows))
    if loss_function.packed:
        assert batch.shares and batch.computed < sum(map(len, rows)) + 2 * 20  # the virtual tokens stand there once
    loss = loss_function(batch)
    loss.backward()
    ours = gradients(model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)
    assert ours.keys() == theirs.keys() == set(trainable_parameters(model))
    kinds = ("prompt_encoder", "lora_A", "lora_B", "modules_to_save") if name == "mixed" else ("prompt_encoder",)
    assert all(any(kind in n for kind in kinds) for n in ours)
    assert all(any(kind in n and g.any() for n, g in ours.items()) for kind in kinds)
    scale = max(float(g.abs().max()) for g in theirs.values())
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=2e-3, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("name", ["prompt", "p_tuning"])
def test_fused_layers_take_the_vectors(name):
    model, rows = wrapped(name), rows_of(7, 33, 19)
    plain = LossFunction(model, share_prefix=False)
    plain(plain.batch(rows)).backward()
    theirs = gradients(model)
    fused = LossFunction(model, ops=reference)
    assert fused.fused is not None, fused.fused_reason
    fused(fused.batch(rows)).backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, theirs[key], rtol=2e-3, atol=2e-4 * float(theirs[key].abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_learns_saves_loads_and_switches_off(name, shape, tmp_path):
    model = wrapped(name, shape)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    at_first = {n: p.clone() for n, p in trainable_parameters(model).items()}
    losses = trained_a_little(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert not any(torch.equal(p, at_first[n]) for n, p in trainable_parameters(model).items())
    model.eval()
    model.set_attn_implementation("sdpa")
    method = MIXED_WITH_PREFIX if name == "mixed" else get_method(name)
    ids = rows_of(23)[0].input_ids.tolist()
    method.save(model, tmp_path)
    ours = log_probabilities(model, ids)
    assert len(ours) == len(ids)
    assert torch.equal(ours, log_probabilities(method.load(tiny(shape), tmp_path), ids))
    assert torch.equal(ours, log_probabilities(by_peft(shape, tmp_path), ids))
    untouched = log_probabilities(tiny(shape), ids)
    assert float((ours - untouched).abs().mean()) > 1e-2
    with model.disable_adapter():
        assert torch.equal(log_probabilities(model, ids), untouched)
        assert identity(model) == identity(tiny(shape))
        # All of our paths too.
        assert _chosen(model, [ids], [5], [], GREEDY) == _chosen(tiny(shape), [ids], [5], [], GREEDY)
        assert _generated(model, [ids], 5, [], GREEDY) == _generated(tiny(shape), [ids], 5, [], GREEDY)
        base = perplexity_of_examples(model, rows_of(9, 30))
        assert base.nll_per_token == pytest.approx(perplexity_of_examples(tiny(shape), rows_of(9, 30)).nll_per_token)
    assert torch.equal(ours, log_probabilities(model, ids))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_answers_are_those_without_a_cache_alone_or_in_a_batch(name, shape):
    model = wrapped(name, shape)
    trained_a_little(model)
    model.eval()
    model.set_attn_implementation("sdpa")
    prompts = [r.input_ids.tolist() for r in rows_of(5, 31, 12)]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(6):
                ids = torch.cat([ids, own_logits(model, ids)[:, -1:].argmax(-1)], 1)
            expected.append(ids[0, len(prompt) :].tolist())
        together = _chosen(model, prompts, [6, 3, 6], [], GREEDY)
        assert [together[0], together[1], together[2]] == [expected[0], expected[1][:3], expected[2]]
        for prompt, answer in zip(prompts, expected, strict=True):
            assert _chosen(model, [prompt], [6], [], GREEDY) == [answer]
            assert _generated(model, [prompt], 6, [], GREEDY) == [answer]  # what the chat calls as well


@pytest.mark.parametrize("name", METHODS)
def test_perplexity_is_that_of_peft(name):
    model, rows = wrapped(name), rows_of(9, 30)
    with torch.no_grad():
        expected = float(peft_alone(model, rows)) / sum(int(r.trained.sum()) for r in rows)
    assert perplexity_of_examples(model, rows).nll_per_token == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"deployment": {"merge": True}}, "cannot be merged"),
        ({"model": {"added_tokens": ["<new>"]}}, "does not train the embeddings"),
        ({"training": {"sharding": "full"}}, "cannot be divided"),
        ({"task": "classification"}, "cannot tune"),
    ],
    ids=["merge", "new tokens", "sharding", "task"],
)
def test_what_cannot_be_done_is_refused_with_advice(name, section, message):
    recipe = recipe_of(name, section)
    if name == "mixed" and "model" in section:
        method_of(recipe.method).check(recipe)  # beside its prefix, LoRA trains them
        return
    with pytest.raises(UserError, match=message) as refused:
        method_of(recipe.method).check(recipe)
    assert ("method.num_virtual_tokens=0" if name == "mixed" else "method.name=lora") in refused.value.remedy


@pytest.mark.parametrize("name", ["prefix", "mixed"])
def test_prefixes_refuse_gradient_checkpointing(name):
    recipe = recipe_of(name, {"training": {"gradient_checkpointing": True}})
    with pytest.raises(UserError, match="dropped"):
        method_of(recipe.method).check(recipe)


def test_prompt_does_gradient_checkpointing_right():
    model, rows = wrapped("prompt"), rows_of(7, 20)
    loss_function = LossFunction(model)
    loss_function(loss_function.batch(rows)).backward()
    kept = gradients(model)
    loss_function.recompute_activations(True)
    model.train()
    loss_function(loss_function.batch(rows)).backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, kept[key])


def test_vectors_begin_as_those_of_a_text(tiny_model_dir, tokenizer):
    from luthier.models.loading import load_model

    options = Recipe.from_dict(
        {"method": {"name": "prompt", "num_virtual_tokens": 9, "prompt_tuning_init_text": "Answer the question."}}
    ).method
    model = get_method("prompt").wrap(load_model(tiny_model_dir), options, [])
    ids = tokenizer("Answer the question.").input_ids
    expected = model.word_embeddings.weight[torch.tensor((ids * 9)[:9])]
    assert torch.equal(model.prompt_encoder.default.embedding.weight, expected.float())


class PowerCut(Silent):
    """Fails after the third step."""

    def step(self, record) -> None:
        if record["step"] == 3:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_from_end_to_end_and_resumed(name, tmp_path, terse_model_dir):
    rows = [TrainingExample(f"Name the colour {w}.", f"It is like {w * 3}.") for w in "abcdefghijkl"]
    given = {"train": rows[:8], "validation": rows[8:10], "test": rows[10:]}

    def recipe(folder: str):
        return Recipe.from_dict(
            {
                "model": {"name": str(terse_model_dir), "dtype": "float32"},
                "method": {"name": name, "num_virtual_tokens": 18},
                "training": {"report_to": [], "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4},
                "evaluation": {"max_new_tokens": 4},
                "output_dir": str(tmp_path / folder),
            }
        )

    whole = run(recipe("whole"), given=given)
    base, tuned = whole.comparison.models
    assert (base.name, tuned.name) == ("base", "tuned")
    assert base.metrics["perplexity"] != tuned.metrics["perplexity"]
    facts = json.loads((tmp_path / "whole/preflight.json").read_text())["facts"]
    first, plain = facts["first_loss"].values()
    assert first == pytest.approx(plain, rel=1e-4)
    with pytest.raises(RuntimeError, match="power cut"):
        run(recipe("cut"), given=given, reporter=PowerCut())
    resumed = run(recipe("cut"), given=given, resume=True)
    weights = trainable_parameters(resumed.model)
    assert all(torch.equal(p, weights[n]) for n, p in trainable_parameters(whole.model).items())
    with torch.no_grad():
        ids = torch.arange(5, 15)[None]
        ours = own_logits(whole.model, ids)
        assert torch.equal(ours, own_logits(load_saved(tmp_path / "whole").model, ids))
    # The card's code answers so too, without Luthier, for which PEFT's own generate will not do.
    row = json.loads((tmp_path / "whole/evaluation/comparison.json").read_text())["rows"][0]
    folder = tmp_path / "whole" / "adapter"
    code = code_of(ModelCard.load(folder / "README.md")).replace('"QUESTION"', repr(row["asked"]))
    right = load_tokenizer(folder).decode(row["answers"]["tuned"]["token_ids"], skip_special_tokens=True)
    assert said_by(code, base=terse_model_dir, adapter=folder) == right + "\n"
