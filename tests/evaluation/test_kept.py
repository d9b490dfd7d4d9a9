"""Answers kept on disk: what was answered is not asked again, what has changed is."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from luthier.data.examples import TrainingExample
from luthier.decoding import Decoding
from luthier.errors import UserError
from luthier.evaluation import kept as room
from luthier.evaluation.generation import generate_answers
from luthier.evaluation.harm import measure_harm
from luthier.evaluation.kept import kept_answers
from luthier.methods.bottleneck import BottleneckConfig, BottleneckModel
from luthier.models import fingerprint
from luthier.models.fingerprint import KnownIdentity, identity
from luthier.models.loading import load_model, load_tokenizer

TEXTS = ["hello", "what is the capital of France", "a b c d", "one two three", "x y z w", "who are you", "q"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


@pytest.fixture
def asked(monkeypatch):
    """The prompts that the model is asked, call by call."""
    calls = []

    def recorded(model, tokenizer, prompts, **options):
        calls.append(list(prompts))
        return generate_answers(model, tokenizer, prompts, **options)

    monkeypatch.setattr(room, "generate_answers", recorded)
    return calls


@pytest.fixture
def tiny(terse_model_dir):
    return load_model(terse_model_dir, dtype=torch.float32), load_tokenizer(terse_model_dir)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tiny, asked, own_cache):
    for decoding in (Decoding(), Decoding(do_sample=True), Decoding(num_beams=2)):
        options = {"max_new_tokens": 8, "decoding": decoding, "batch_size": 2}
        whole = generate_answers(*tiny, TEXTS, **options)
        asked.clear()

        def stop(done, total):
            assert total == len(TEXTS)
            if done >= 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            kept_answers(*tiny, TEXTS, **options, progress=stop)
        heard: list[tuple[int, ...]] = []
        found = kept_answers(*tiny, TEXTS, **options, progress=lambda *n, heard=heard: heard.append(n))
        assert found.answers == whole and 3 <= found.found < len(TEXTS)
        assert heard[0] == (found.found, len(TEXTS)) and heard[-1] == (len(TEXTS), len(TEXTS))
        assert len(asked[1]) == len(TEXTS) - found.found
        again = kept_answers(*tiny, [*TEXTS[::-1], "new"], **options)
        assert again.answers[:-1] == whole[::-1] and asked[-1] == ["new"]
        fresh = kept_answers(*tiny, TEXTS, **options, resume=False)
        assert fresh.answers == whole and fresh.found == 0 and asked[-1] == TEXTS
    assert len(list(own_cache.iterdir())) == 3


def test_half_a_line_is_no_answer(tiny, asked, own_cache):
    whole = kept_answers(*tiny, TEXTS, max_new_tokens=4).answers
    (journal,) = own_cache.iterdir()
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + len(TEXTS) and json.loads(lines[0])["about"]["max_new_tokens"] == 4
    journal.write_text("".join(lines[:3]) + lines[3][:30])
    found = kept_answers(*tiny, TEXTS, max_new_tokens=4)
    assert found.answers == whole and found.found == 2
    assert kept_answers(*tiny, TEXTS, max_new_tokens=4).found == len(TEXTS)


def test_whatever_bears_on_an_answer_makes_it_be_asked_anew(tiny):
    model, tokenizer = tiny

    def found(**changes):
        return kept_answers(model, tokenizer, TEXTS[:2], **{"max_new_tokens": 4} | changes).found

    assert (found(), found(), found(batch_size=1)) == (0, 2, 2)
    assert found(max_new_tokens=5) == 0
    assert found(decoding=Decoding(do_sample=True)) == 0 and found(decoding=Decoding(do_sample=True, seed=1)) == 0
    model.generation_config.eos_token_id = 5
    assert found() == 0
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 7] += 1e-3
    assert found() == 0 and found() == 2
    model.to(torch.bfloat16)
    assert found() == 0


def test_a_folder_that_cannot_be_written_is_told(tiny, own_cache):
    own_cache.parent.mkdir()
    own_cache.write_text("a file")
    with pytest.raises(UserError, match=r"(?s)cannot be kept.*LUTHIER_CACHE"):
        kept_answers(*tiny, TEXTS, max_new_tokens=2)


def test_an_identity_tells_adapters_on_from_off(tiny):
    model, _ = tiny
    base = identity(model)
    assert identity(copy.deepcopy(model)) == base
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    on = identity(peft)
    with peft.disable_adapter():
        assert identity(peft) == base
    assert identity(peft) == on != base
    peft.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] *= 2
    louder = identity(peft)
    assert louder != on
    peft.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.data[0, 0] += 1e-3
    assert identity(peft) not in (on, louder)

    saving = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    untied = copy.deepcopy(model)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    alone = identity(untied)
    saved = get_peft_model(untied, saving)
    saved.base_model.model.lm_head.modules_to_save["default"].weight.data[0, 0] += 1
    with saved.disable_adapter():
        assert identity(saved) == alone
    assert identity(saved) != alone

    for config in (PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),):
        prefix = get_peft_model(copy.deepcopy(model), config)
        before = identity(prefix)
        with torch.no_grad():
            next(prefix.prompt_encoder.parameters())[0, 0] += 1
        assert identity(prefix) not in (before, base)
        with prefix.disable_adapter():
            assert identity(prefix) == base

    names = ("model.layers.0.mlp.down_proj",)
    bottled = BottleneckModel(copy.deepcopy(model), BottleneckConfig(names, 8, "relu", 0.0))
    with bottled.disable_adapter():
        assert identity(bottled) == base
    assert identity(bottled) != base


def test_a_known_identity_reads_weights_again_only_where_they_changed(tiny, monkeypatch):
    read = []

    def recorded(settings, tensors):
        read.append(len(tensors))
        return digest(settings, tensors)

    digest = fingerprint._digest
    model = get_peft_model(tiny[0], LoraConfig(target_modules="all-linear", init_lora_weights=False))
    truth = identity(model)
    monkeypatch.setattr(fingerprint, "_digest", recorded)
    known = KnownIdentity(model)
    assert [known(), known()] == [truth, truth] and len(read) == 1
    with model.disable_adapter():
        base = known()
        assert base == known() != truth and len(read) == 2
    assert known() == truth and len(read) == 2
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    for change in (
        lambda: layer.base_layer.weight.add_(1e-3),
        lambda: layer.lora_B["default"].weight.mul_(2),
        lambda: setattr(layer.base_layer, "weight", torch.nn.Parameter(layer.weight * 2)),
        lambda: layer.scaling.update(default=9.0),
        lambda: model.to(torch.bfloat16),
        lambda: model.to(torch.float32),
    ):
        before, times = known(), len(read)
        with torch.no_grad():
            change()
        assert known() == identity(model) and known() != before and len(read) == times + 2
    # An optimiser's step is a change like any other.
    before = known()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    optimiser.step()
    assert known() == identity(model) != before


def test_a_model_that_is_asked_several_things_is_read_once(tiny, monkeypatch):
    read = []
    digest = fingerprint._digest
    monkeypatch.setattr(fingerprint, "_digest", lambda *parts: read.append(1) or digest(*parts))
    rows = [TrainingExample("hello", output="a b c d e f g h i"), TrainingExample("who are you", output="nobody")]
    models = [(name, lambda: contextlib.nullcontext(tiny[0])) for name in ("base", "tuned")]
    harm = measure_harm(models, tiny[1], training=rows, held_out=rows, general=rows, max_new_tokens=2)
    assert len(harm.checks) > 4 and len(read) == 2


def test_harm_can_be_asked_anew(tiny, asked):
    rows = [TrainingExample("hello", output="nobody"), TrainingExample("who are you", output="nobody")]
    models = [(name, lambda: contextlib.nullcontext(tiny[0])) for name in ("base", "tuned")]
    for resume, wanted in ((True, 2), (True, 0), (False, 4)):
        asked.clear()
        measure_harm(models, tiny[1], general=rows, max_new_tokens=2, resume=resume)
        assert sum(map(len, asked)) == wanted
