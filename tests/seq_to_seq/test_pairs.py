"""Pairs of texts: how they are encoded, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pair_cases import FAMILIES, words_tokenizer

from luthier.data.batch import IGNORED, pad_pairs, source_length
from luthier.data.dataset import prepare
from luthier.data.examples import TrainingExample
from luthier.data.pairs import PairEncoder
from luthier.errors import UserError
from luthier.models.heads import Head
from luthier.models.loading import load_model, load_tokenizer
from luthier.models.pairs import opening, shifted
from luthier.recipe import Recipe
from luthier.tasks import get_task


def encoded(examples, **options):
    return PairEncoder(words_tokenizer(), **options).encode(examples)


def test_a_row_is_the_source_then_the_target_each_with_its_end():
    tokenizer = words_tokenizer()
    made = encoded([TrainingExample("amber birch", "cedar")], source_prefix="read: ").examples[0]
    assert tokenizer.decode(made.input_ids) == "read: amber birch </s> cedar </s>"
    assert made.trained.tolist() == [False] * 4 + [True] * 2
    assert source_length(made) == 4


def test_one_exchange_is_a_pair_and_more_turns_are_none():
    ask, answer = {"role": "user", "content": "amber"}, {"role": "assistant", "content": "birch"}
    system = {"role": "system", "content": "dune"}
    result = encoded([TrainingExample(messages=turns) for turns in ([ask, answer], [ask, answer] * 2, [system, ask])])
    assert [len(e) for e in result.examples] == [4]
    assert [r.reason for r in result.rejects] == ["conversation"] * 2
    assert "system, user" in result.rejects[1].message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (TrainingExample("amber"), "no_answer"),
        (TrainingExample("amber", " "), "no_answer"),
        (TrainingExample(" ", "amber"), "empty_text"),
        (TrainingExample("amber", "unheard"), "characters_lost"),
        (TrainingExample("amber </s>", "amber"), "special_token_in_text"),
        (TrainingExample("amber \ud800", "amber"), "half_character"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused(row, reason):
    (reject,) = encoded([row]).rejects
    assert reject.reason == reason


def test_long_sides_are_refused_or_cut_before_their_end():
    rows = [TrainingExample("amber " * 9, "birch"), TrainingExample("amber", "birch " * 9)]
    refused = encoded(rows, max_length=8, max_target_length=4).rejects
    assert [r.reason for r in refused] == ["too_long"] * 2
    assert "data.max_length" in refused[0].message
    assert "task.max_target_length" in refused[1].message
    long_source, long_target = encoded(rows, max_length=8, max_target_length=4, truncation="cut").examples
    assert (source_length(long_source), long_source.extra, long_source.cut) == (8, (2,), 0)
    assert (len(long_target) - source_length(long_target), long_target.extra, long_target.cut) == (4, (0,), 6)
    assert long_source.input_ids[7] == long_target.input_ids[-1] == 1


def test_languages_stand_where_the_tokenizer_puts_them(tmp_path):
    from transformers import MBart50Tokenizer

    def tokenizer(**languages):
        return MBart50Tokenizer(
            vocab=[("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], **languages
        )

    own = tokenizer()
    encoder = PairEncoder(own, src_lang="de_DE", tgt_lang="fr_XX")
    (row,) = encoder.encode([TrainingExample("a a", "a")]).examples
    assert own.convert_ids_to_tokens(row.input_ids) == ["de_DE", "▁a", "▁a", "</s>", "fr_XX", "▁a", "</s>"]
    assert source_length(row) == 4
    own.save_pretrained(tmp_path)
    (again,) = PairEncoder(load_tokenizer(tmp_path, chats=False)).encode([TrainingExample("a a", "a")]).examples
    assert np.array_equal(again.input_ids, row.input_ids)
    with pytest.raises(UserError, match="none is named"):
        PairEncoder(tokenizer())
    with pytest.raises(UserError, match="no language 'de'") as error:
        PairEncoder(tokenizer(), src_lang="de", tgt_lang="fr_XX")
    assert "de_DE" in str(error.value)
    with pytest.raises(UserError, match="no languages"):
        PairEncoder(words_tokenizer(), tgt_lang="fr_XX")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_reads_what_the_models_own_loss_lets_it_read(family, pair_dirs):
    """The first tokens that generation begins with are those of training, before the text of any target."""
    model, tokenizer = load_model(pair_dirs[family]), load_tokenizer(pair_dirs[family], chats=False)
    labels = torch.tensor([tokenizer(text_target="amber birch").input_ids])
    begins = {"t5": [0], "t5-unscaled": [0], "bart": [1, 3], "m2m": [1]}[family]
    assert opening(model, tokenizer) == begins == shifted(model, labels)[0, : len(begins)].tolist()
    padded = torch.cat([labels, torch.full((1, 2), IGNORED)], 1)
    assert shifted(model, padded).tolist() == [[begins[0], *labels[0].tolist(), 0]]


def test_a_model_that_does_not_say_how_targets_begin_is_refused(pair_dirs):
    model = load_model(pair_dirs["t5"])
    model.config.decoder_start_token_id = None
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        shifted(model, torch.tensor([[4, 1]]))


def test_batches_pad_both_sides(pairs):
    rows = encoded(pairs[:4]).examples
    batch = pad_pairs(rows, 0, lambda labels: labels)
    assert batch.input_ids.shape == (4, 6)
    assert batch.attention_mask.sum(1).tolist() == [source_length(r) for r in rows]
    assert torch.equal(batch.decoder_input_ids.flatten()[batch.kept], batch.targets)
    assert (batch.decoder_input_ids == IGNORED).sum() == batch.decoder_input_ids.numel() - len(batch.targets)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.decoder_input_ids, batch.decoder_input_ids)
    assert moved.computed == batch.computed == batch.input_ids.numel() + batch.decoder_input_ids.numel()


def findings(tokenizer, rows, **task):
    recipe = Recipe.from_dict({"task": {"name": "seq_to_seq", **task}, "data": {"truncation": "cut", "cache": False}})
    dataset = prepare(recipe, tokenizer, given={"train": rows})
    return {f.code: f for f in get_task("seq_to_seq").findings(recipe, dataset)}


def test_what_the_pre_flight_finds(pairs):
    assert not {"end_of_sequence_untrained", "answer_cut", "unknown_tokens", "target_text_differs"} & set(
        findings(words_tokenizer(), pairs)
    )
    cut = findings(words_tokenizer(), pairs, max_target_length=3)
    assert (cut["answer_cut"].severity, cut["answer_cut"].count) == ("warning", 32)
    assert "unknown_tokens" in findings(words_tokenizer(), [TrainingExample("unheard of", "amber")])
    assert "line_breaks_lost" in findings(words_tokenizer(), [TrainingExample("amber", "birch\ncedar")])
    endless = words_tokenizer()
    endless._tokenizer.post_processor = None
    assert findings(endless, pairs)["end_of_sequence_untrained"].severity == "error"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"data": {"system": "Be brief"}}, "data.system"),
        ({"data": {"train_on": "all"}}, "data.train_on"),
        ({"data": {"truncation": "split"}}, "data.truncation"),
        ({"model": {"chat_template": "x.jinja"}}, "model.chat_template"),
        ({"model": {"added_tokens": ["<x>"]}}, "model.added_tokens"),
        ({"method": {"name": "lora", "layers_to_transform": [0]}}, "method.layers_to_transform"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, wanted):
    with pytest.raises(UserError, match=wanted):
        get_task("seq_to_seq").check(Recipe.from_dict({"task": "seq_to_seq", **settings}))


def test_a_head_is_known_by_its_config(pair_dirs, tiny_model_dir):
    assert Head.of(load_model(pair_dirs["bart"])).pairs
    assert not Head.of(load_model(tiny_model_dir)).pairs
