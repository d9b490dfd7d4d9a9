"""Hidden words: chosen by the rule, the same however a step is divided, filled in alike wherever a model is loaded."""

from __future__ import annotations

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

from luthier import FullFineTuner, TaskType, TrainingExample
from luthier.data.batch import Order
from luthier.data.borders import word_numbers, words_of_tokens
from luthier.data.dataset import prepare
from luthier.data.encode import EncodedExample
from luthier.data.masked import MaskEncoder, Masking, words_of
from luthier.errors import UserError
from luthier.evaluation.masked import fill
from luthier.finished import evaluate_run, merge_saved
from luthier.method_options import options_of
from luthier.methods import METHODS
from luthier.methods.base import trainable_parameters
from luthier.methods.saved import load_saved
from luthier.models.heads import Head
from luthier.models.loading import load_model, load_tokenizer
from luthier.pipeline import run as run_recipe
from luthier.recipe import Recipe
from luthier.tasks import get_task
from luthier.training.input import StepInput
from luthier.training.masked_loss import MaskedLoss

VOCABULARY = 200
SPECIAL = (0, 1, 2, 3, 4)
MASK = 4
RULE = Masking(MASK, np.arange(5, VOCABULARY), seed=3)


def texts(count: int, seed: int = 0) -> list[TrainingExample]:
    """Sentences whose words follow from each other, but for a few in front that make each another."""
    draw = random.Random(seed)
    kinds = [("good", "bread", "house"), ("bad", "wine", "river"), ("ugly", "lamp", "road")]
    rows = []
    for number in range(count):
        front = " ".join(draw.sample(("tree", "stone", "paper", "chair", "cloud", "bird", "not", "very"), 4))
        quality, thing, place = draw.choice(kinds)
        rows.append(TrainingExample(f"{front} {seed}{number} the {quality} {thing} is in the {place}"))
    return rows


def row_of(words: list[int], rng: np.random.Generator) -> EncodedExample:
    """A row of random tokens between two special ones, its words of so many tokens each."""
    body = rng.integers(5, VOCABULARY, sum(words))
    ids = np.concatenate([[2], body, [3]]).astype(np.int32)
    trained = np.ones(len(ids), dtype=bool)
    trained[[0, -1]] = False
    return EncodedExample(ids, trained, None, 0, extra=tuple((1 + np.cumsum([0, *words[:-1]])).tolist()))


# --- words ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop_me, 3rd!", ["Don", "'", "t", " ", "stop", "_", "me", ",", " ", "3rd", "!"]),
        ("हिन्दी भाषा", ["हिन्दी", " ", "भाषा"]),
        # jieba's words; BERT's tokenizer reads one character a token.
        ("我在北京大学学习AI。", ["我", "在", "北京大学", "学习", "AI", "。"]),
        ("ภาษา", ["ภ", "า", "ษ", "า"]),
        ("e\u0301t\u00e9 𠀀", ["e\u0301t\u00e9", " ", "𠀀"]),
    ],
)
def test_the_words_of_a_text(text, words):
    numbers = word_numbers(text)
    assert len(numbers) == len(text)
    found = ["".join(c for c, m in zip(text, numbers, strict=True) if m == n) for n in range(numbers[-1] + 1)]
    assert found == words


def wordpiece(folder):
    return load_tokenizer(folder, chats=False)


def byte_level(folder):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(["the good bread is good"] * 3, vocab_size=300, special_tokens=["<s>", "</s>", "<mask>"])
    return RobertaTokenizerFast(tokenizer_object=made._tokenizer)


def unigram(folder):
    from tokenizers import SentencePieceUnigramTokenizer
    from transformers import PreTrainedTokenizerFast

    made = SentencePieceUnigramTokenizer()
    corpus = ["the good bread, isn't goodly 很好吃 superb7"] * 3
    made.train_from_iterator(corpus, vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, unk_token="<unk>", mask_token="<mask>")


@pytest.mark.parametrize("made", [wordpiece, byte_level, unigram])
def test_tokens_of_any_kind_belong_to_the_same_words(made, tiny_encoder_dir):
    tokenizer = made(tiny_encoder_dir)
    text = "the goodly bread, isn't 很好吃 superb7"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    numbers = words_of_tokens(text, np.array(encoded.offset_mapping))
    assert (np.diff(numbers) >= 0).all()
    groups = [np.array(encoded.offset_mapping)[numbers == n] for n in np.unique(numbers)]
    found = [text[g[:, 0].min() : g[:, 1].max()].strip() for g in groups]
    assert [w for w in found if w] == ["the", "goodly", "bread", ",", "isn", "'", "t", "很", "好吃", "superb7"]
    assert any(len(group) > 1 for group in groups)


def test_a_chinese_word_is_hidden_whole(tiny_encoder_dir):
    tokenizer = load_tokenizer(tiny_encoder_dir, chats=False)
    (row,) = MaskEncoder(tokenizer).encode([TrainingExample("味道很好吃")]).examples
    assert tokenizer.convert_ids_to_tokens(row.input_ids[1:-1].tolist()) == list("味道很好吃")
    assert words_of(row).tolist() == [0, 0, 1, 2, 2]
    masking = replace(RULE, mlm_probability=0.3)
    seen = {tuple(masking.draw(row, n)[1]) for n in range(300)}
    assert seen == {(1, 2), (3,), (4, 5), (1, 2, 3), (1, 2, 4, 5), (3, 4, 5), (1, 2, 3, 4, 5)}
    (single,) = MaskEncoder(tokenizer, whole_word_mask=False).encode([TrainingExample("味道很好吃")]).examples
    assert len(words_of(single)) == 5 and (1,) in {tuple(masking.draw(single, n)[1]) for n in range(300)}


# --- the rule ---


def test_masks_follow_the_rule():
    rng = np.random.default_rng(0)
    chosen = words_chosen = words = 0
    fates = {"mask": 0, "kept": 0, "other": 0}
    for _ in range(400):
        sizes = rng.integers(1, 4, 60).tolist()
        row = row_of(sizes, rng)
        ids, at = RULE.draw(row, 1)
        same = ids == row.input_ids
        assert same[np.setdiff1d(np.arange(len(row)), at)].all()
        assert row.trained[at].all()
        number = words_of(row)[at - 1]
        # Whole words: every token of a word that has one chosen.
        assert len(at) == sum(sizes[n] for n in set(number.tolist()))
        words, words_chosen, chosen = words + 60, words_chosen + len(set(number.tolist())), chosen + len(at)
        read = ids[at]
        assert not np.isin(read[read != MASK], SPECIAL).any()
        fates["mask"] += int((read == MASK).sum())
        fates["kept"] += int(same[at].sum())
        fates["other"] += int(((read != MASK) & ~same[at]).sum())
    assert words_chosen / words == pytest.approx(0.15, abs=0.01)
    assert fates["mask"] / chosen == pytest.approx(0.8, abs=0.02)
    assert fates["other"] / chosen == pytest.approx(0.1, abs=0.015)
    assert fates["kept"] / chosen == pytest.approx(0.1, abs=0.015)


def test_a_row_always_hides_a_word_and_draws_are_reproducible():
    rng = np.random.default_rng(1)
    short, row = row_of([2], rng), row_of([1] * 50, rng)
    for number in range(50):
        assert RULE.draw(short, number)[1].tolist() == [1, 2]
    draws = [RULE.draw(row, n) for n in range(20)]
    for number, (ids, at) in enumerate(draws):
        again = RULE.draw(replace(row, index=9), number)
        assert np.array_equal(ids, again[0]) and np.array_equal(at, again[1])
    assert len({tuple(at) for _, at in draws}) > 15
    assert len({tuple(replace(RULE, seed=s).draw(row, 0)[1]) for s in range(20)}) > 15


# --- encoding ---


def test_long_texts_are_split_into_pieces_that_lose_nothing(tiny_encoder_dir):
    tokenizer = load_tokenizer(tiny_encoder_dir, chats=False)
    text = "the goodly bread is superb " * 9
    whole = tokenizer(text, add_special_tokens=False).input_ids
    encoder = MaskEncoder(tokenizer, max_length=16, truncation="split")
    pieces = encoder.encode([TrainingExample(text)]).examples
    assert np.concatenate([p.input_ids[1:-1] for p in pieces]).tolist() == whole
    for piece in pieces:
        assert len(piece) <= 16 and piece.input_ids[0] == 2 and piece.input_ids[-1] == 3
        # A piece begins with a word's first token, and ends with a whole word.
        assert not tokenizer.convert_ids_to_tokens(int(piece.input_ids[1])).startswith("##")
    (cut,) = MaskEncoder(tokenizer, max_length=16, truncation="cut").encode([TrainingExample(text)]).examples
    assert len(cut) == 16 and cut.cut == len(whole) - 14 and cut.input_ids[-1] == tokenizer.sep_token_id


def test_a_row_with_an_answer_is_one_text_and_unfit_rows_are_refused(tiny_encoder_dir):
    tokenizer = load_tokenizer(tiny_encoder_dir, chats=False)
    rows = [
        TrainingExample("good", "bread"),
        TrainingExample(" "),
        TrainingExample(messages=[{"role": "user", "content": "x"}]),
        TrainingExample("half \ud800"),
        TrainingExample("the [MASK] house"),
        TrainingExample("☃"),
        TrainingExample("the " * 30),
    ]
    found = MaskEncoder(tokenizer, max_length=20).encode(rows)
    assert [r.reason for r in found.rejects] == [
        "empty_text", "conversation", "half_character", "special_token_in_text", "nothing_to_hide", "too_long",
    ]  # fmt: skip
    (kept,) = found.examples
    assert kept.input_ids.tolist() == tokenizer("good\nbread").input_ids
    (allowed,) = MaskEncoder(tokenizer, allow_special_tokens=True).encode([rows[4]]).examples
    assert not allowed.trained[allowed.input_ids == tokenizer.mask_token_id].any()


# --- the loss ---


def masked_model(kind: str):
    import transformers

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64, initializer_range=0.2
        )
        return transformers.DistilBertForMaskedLM(config).eval()
    if kind == "modernbert":
        tokens = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
        return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**common, **tokens)).eval()
    if kind == "electra":
        return transformers.ElectraForMaskedLM(transformers.ElectraConfig(**common, embedding_size=16)).eval()
    name = {"bert": "Bert", "roberta": "Roberta"}[kind]
    return getattr(transformers, f"{name}ForMaskedLM")(getattr(transformers, f"{name}Config")(**common)).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert", "electra"])
def test_the_loss_is_that_of_transformers(kind):
    model = masked_model(kind)
    rng = np.random.default_rng(2)
    rows = [row_of([1] * n, rng) for n in (5, 23, 40)]
    padded = MaskedLoss(model, masking=RULE, batching="padded").batch(rows, draw=7)
    labels = torch.full_like(padded.input_ids, -100)
    labels.view(-1)[padded.kept] = padded.targets
    theirs = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, labels=labels).loss
    theirs = theirs * padded.trained_tokens
    expected = torch.autograd.grad(theirs, list(model.parameters()), allow_unused=True)
    loss = MaskedLoss(model, masking=RULE)
    assert loss.packed, loss.reason
    assert loss.head, "the head is not computed at hidden tokens alone"
    batch = loss.batch(rows, draw=7)
    assert torch.equal(batch.targets, padded.targets) and batch.computed == batch.tokens
    ours = loss(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(ours, list(model.parameters()), allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    alone = sum(float(loss.own_loss(row).detach()) for row in rows)
    assert float(loss(loss.batch(rows)).detach()) == pytest.approx(alone, rel=1e-4)


def test_a_head_that_looks_at_other_places_computes_all_of_them():
    model = masked_model("bert")

    class Mixing(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.decoder = inner, inner.decoder

        def forward(self, hidden):
            return self.inner(hidden + hidden.mean(1, keepdim=True))

    model.cls.predictions = Mixing(model.cls.predictions)
    loss = MaskedLoss(model, masking=RULE)
    assert not loss.head
    row = row_of([1] * 9, np.random.default_rng(3))
    torch.testing.assert_close(loss(loss.batch([row])), loss.own_loss(row))


def test_a_step_has_one_gradient_however_it_is_divided():
    model = masked_model("bert")
    rng = np.random.default_rng(4)
    rows = [row_of(rng.integers(1, 3, rng.integers(3, 30)).tolist(), rng) for _ in range(16)]
    loss = MaskedLoss(model, masking=RULE)

    def gradients(step: int, size: int, accumulation: int, processes: int, ahead: bool = False):
        order = Order(len(rows), batch_size=size, accumulation=accumulation, processes=processes, shuffle=False)
        batches = []
        for process in range(processes):
            source = StepInput(loss.batch, rows, order, process, steps=4, ahead=ahead, pin=False)
            for before in range(step):
                source.take(before)
            batches += source.take(step)
            source.close()
        count = sum(batch.trained_tokens for batch in batches)
        total = sum(loss(batch) for batch in batches) / count
        return count, torch.autograd.grad(total, list(model.parameters()))

    found = {step: gradients(step, 8, 1, 1) for step in (0, 1, 2)}
    # Steps 0 and 2 take the same rows, which are drawn anew.
    assert len({float(grads[0].abs().sum()) for _, grads in found.values()}) == 3
    for step, divided in ((1, (1, 8, 1)), (1, (2, 2, 2)), (2, (8, 1, 1, True))):
        count, grads = gradients(step, *divided)
        assert count == found[step][0]
        for a, b in zip(grads, found[step][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- whole runs ---


@pytest.fixture(scope="module")
def with_head_dir(tiny_encoder_dir, tmp_path_factory):
    """The tiny encoder with a masked-LM head of its own."""
    folder = tmp_path_factory.mktemp("tiny-mlm")
    torch.manual_seed(1)
    load_model(tiny_encoder_dir, head=Head(TaskType.MASKED_LM)).save_pretrained(folder)
    load_tokenizer(tiny_encoder_dir, chats=False).save_pretrained(folder)
    return folder


def recipe_of(folder, method, target, merge=False, **training) -> Recipe:
    settings = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": []}
    return Recipe.from_dict(
        {
            "task": {"name": "masked_lm", "mlm_probability": 0.2},
            "model": {"name": str(folder), "dtype": "float32"},
            "method": method,
            "training": settings | {"eval_steps": 10} | training,
            "deployment": {"merge": merge},
            "output_dir": str(target),
        }
    )


GIVEN = {"train": texts(60), "validation": texts(10, 1), "test": texts(20, 2)}


@pytest.fixture(scope="module")
def finished(tiny_encoder_dir, with_head_dir, tmp_path_factory):
    """Runs by their names: on a body alone, and (``own``) on a model that has a head."""
    root = tmp_path_factory.mktemp("masked")
    jobs = {
        "full": (tiny_encoder_dir, "full", {"learning_rate": 5e-3}),
        "lora": (tiny_encoder_dir, "lora", {"merge": True}),
        "ia3": (tiny_encoder_dir, "ia3", {"merge": True}),
        "adapter": (tiny_encoder_dir, "adapter", {}),
        "own-lora": (with_head_dir, "lora", {"merge": True}),
    }
    return {
        name: run_recipe(recipe_of(folder, method, root / name, **options), given=GIVEN)
        for name, (folder, method, options) in jobs.items()
    }


def test_every_method_learns_to_fill_in_words(finished):
    for name, result in finished.items():
        tuned = result.comparison.models[-1]
        assert result.outcome.state.best_loss < 0.85 * result.outcome.first_eval_loss, name
        # A guess would be right once in 140 times; in 5 guesses once in 28.
        assert tuned.metrics["top5_accuracy"] > 0.2 and tuned.metrics["accuracy"] > 0.1, (name, tuned.metrics)
        names = ["base", "tuned"] if name == "own-lora" else ["tuned"]
        assert [m.name for m in result.comparison.models] == names
    first, tuned = finished["own-lora"].comparison.models
    assert tuned.metrics["loss"] < first.metrics["loss"]


def test_scores_are_those_of_the_hidden_words(finished):
    saved = load_saved(finished["full"].run_dir)
    masking = replace(Masking.of(saved.tokenizer, recipe_of("x", "full", "y").task, 42),
                      mask_replace_prob=1.0, random_replace_prob=0.0)  # fmt: skip
    assert not set(masking.replacements.tolist()) & set(saved.tokenizer.all_special_ids)
    rows = MaskEncoder(saved.tokenizer).encode(GIVEN["test"]).examples
    metrics, fills, _ = fill(saved.model, rows, masking)
    total, right, five, count = 0.0, 0, 0, 0
    for row, mine in zip(rows, fills, strict=True):
        ids, at = masking.draw(row, 0)
        assert (ids[at] == saved.tokenizer.mask_token_id).all()
        with torch.no_grad():
            logits = saved.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, at]
        goal = torch.from_numpy(row.input_ids[at].astype(np.int64))
        total += float(torch.nn.functional.cross_entropy(logits, goal, reduction="sum"))
        right += int((logits.argmax(-1) == goal).sum())
        five += int((logits.topk(5).indices == goal[:, None]).sum())
        count += len(at)
        assert mine.tolist() == logits.argmax(-1).tolist()
    expected = {"accuracy": right / count, "top5_accuracy": five / count, "loss": total / count}
    assert metrics == pytest.approx(expected | {"perplexity": np.exp(total / count)}, rel=1e-4)


_FRESH = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
from peft import PeftModel
root = Path(sys.argv[1])
logits, filled = {}, {}
for folder, base in json.loads((root / "jobs.json").read_text()).items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(base or folder)
    if base:
        model = PeftModel.from_pretrained(model, folder)
    else:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        filled[folder] = pipeline("fill-mask", model=folder)("the good [MASK] is in the house")[0]["token"]
    with torch.no_grad():
        inputs = tokenizer("the good [MASK] is in the house", return_tensors="pt")
        logits[folder] = model.eval()(**inputs).logits
torch.save((logits, filled), root / "logits.pt")
"""


def test_plain_transformers_and_peft_load_what_was_saved(finished, tiny_encoder_dir, with_head_dir, tmp_path):
    bases = {"full": None, "lora": tiny_encoder_dir, "ia3": tiny_encoder_dir, "own-lora": with_head_dir}
    jobs = {str(finished[name].saved): base and str(base) for name, base in bases.items()}
    jobs |= {str(finished[name].run_dir / "merged"): None for name in ("lora", "ia3", "own-lora")}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path)], check=True, capture_output=True)
    found, filled = torch.load(tmp_path / "logits.pt")
    for name in bases:
        result = finished[name]
        inputs = result.tokenizer("the good [MASK] is in the house", return_tensors="pt")
        with torch.no_grad():
            ours = result.model(**inputs).logits
        torch.testing.assert_close(found[str(result.saved)], ours, rtol=1e-5, atol=1e-5, msg=name)
        plain = str(result.saved if name == "full" else result.run_dir / "merged")
        assert filled[plain] == int(ours[0, 3].argmax()), name
        if name != "full":
            torch.testing.assert_close(found[plain], ours, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "qlora"])
def test_a_new_head_is_trained_whole_and_stays_tied(method, tiny_encoder_dir):
    base = load_model(tiny_encoder_dir, dtype=torch.float32, head=Head(TaskType.MASKED_LM))
    assert base.fresh_modules == ["cls.predictions"]
    embeddings = base.get_input_embeddings().weight
    wrapped = METHODS[method].wrap(base, options_of(method)(), [], TaskType.MASKED_LM)
    trained = trainable_parameters(wrapped)
    ends = ("predictions.bias", "transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight")
    for end in ends:
        assert any(name.replace("modules_to_save.default.", "").endswith(end) for name in trained), (method, end)
    assert not any(p.shape == embeddings.shape for p in trained.values()), sorted(trained)
    assert wrapped.get_base_model().get_output_embeddings().weight is wrapped.get_input_embeddings().weight


def test_saved_heads_are_tied_after_reloading(finished):
    for name, result in finished.items():
        base = load_saved(result.run_dir).model
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        assert base.get_output_embeddings().weight is base.get_input_embeddings().weight, name


def test_an_interrupted_run_goes_on_to_the_same_weights(finished, tiny_encoder_dir, tmp_path):
    whole = finished["lora"]
    recipe = recipe_of(tiny_encoder_dir, "lora", tmp_path / "again", save_total_limit=9)
    run_recipe(recipe, given=GIVEN)
    for step in (20, 30, 40):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step-{step}")
    result = run_recipe(recipe, given=GIVEN, resume=True)
    for (name, a), b in zip(
        trainable_parameters(whole.model).items(), trainable_parameters(result.model).values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_finished_run_is_judged_and_merged_again(finished, tmp_path):
    result = finished["own-lora"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": row.input}) for row in texts(12, 5)))
    printed = io.StringIO()
    found = evaluate_run(result.run_dir, data=str(file), console=Console(file=printed, width=160))
    assert [m.name for m in found.models] == ["base", "tuned", "merged"]
    assert found.models[2].metrics == pytest.approx(found.models[1].metrics, rel=1e-3)
    assert "12 held-out rows" in printed.getvalue()
    stored = json.loads((result.run_dir / "evaluation" / "rows.json").read_text())
    assert len(stored["rows"]) == 12 and set(stored["rows"][0]["given"]) == {"base", "tuned", "merged"}
    target, report = merge_saved(result.run_dir, tmp_path / "merged")
    assert report.passed and (target / "model.safetensors").is_file()


# --- what is refused, and what is told ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.system=x"], "data.system"),
        (["data.train_on=all"], "data.train_on"),
        (["training.sharding=full"], "training.sharding"),
        (["task.mlm_probability=1.5"], "mlm_probability"),
        (["task.mask_replace_prob=0.95"], "add up to more than 1"),
        (["task.whole_word=true"], "did you mean 'task.whole_word_mask'"),
        (["method={name: prompt}"], "method prompt cannot tune a model for masked_lm"),
    ],
)
def test_settings_without_meaning_are_refused(changes, message, tiny_encoder_dir, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe_of(tiny_encoder_dir, "lora", tmp_path / "run").to_yaml())
    with pytest.raises(UserError, match=message):
        recipe = Recipe.load(tmp_path / "recipe.yaml", changes)
        get_task("masked_lm").check(recipe)
        METHODS[recipe.method.name].check(recipe)


def test_a_model_that_writes_is_refused(tiny_model_dir, tiny_encoder_dir, tmp_path):
    with pytest.raises(UserError, match="no mask token"):
        run_recipe(recipe_of(tiny_model_dir, "lora", tmp_path / "run"), given=GIVEN)
    with pytest.raises(UserError, match="no encoder that fills in words"):
        load_model(tiny_model_dir, head=Head(TaskType.MASKED_LM))


def test_findings_and_the_shown_rows(tiny_encoder_dir):
    tokenizer = load_tokenizer(tiny_encoder_dir, chats=False)
    recipe = recipe_of(tiny_encoder_dir, "lora", "x")
    recipe.data.truncation, recipe.data.max_length = "cut", 8
    rows = [TrainingExample(f"the good {'bread ' * (n % 4)}{n} ☃☃") for n in range(20)]
    dataset = prepare(recipe, tokenizer, given={"train": rows})
    codes = {f.code for f in get_task("masked_lm").findings(recipe, dataset)}
    assert {"unknown_tokens", "text_cut", "short_texts", "no_validation"} <= codes
    console = Console(file=io.StringIO(), width=120)
    console.print(get_task("masked_lm").show(dataset.train.encoded[:3], dataset.encoder))
    assert "[MASK]" in console.file.getvalue()


def test_python_rows_of_that_type_hide_words(with_head_dir, tmp_path):
    rows = [replace(row, task_type=TaskType.MASKED_LM) for row in texts(16)]
    tuner = FullFineTuner(str(with_head_dir), dtype="float32")
    result = tuner.train(rows, output_dir=tmp_path / "run", max_steps=2, mlm_probability=0.3, quiet=True, report_to=[])
    assert type(result.model).__name__ == "BertForMaskedLM"
    saved = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert (saved.task.name, saved.task.mlm_probability) == ("masked_lm", 0.3)
