"""Chat templates of well-known families: what is trained is what the model must say after the prompt of serving."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from luthier.data.encode import Encoder
from luthier.data.examples import TrainingExample
from luthier.data.loader import load_file
from luthier.data.render import Renderer, prompt_messages, prompt_text, template_text

TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = json.loads((TEMPLATES / "tokens.json").read_text(encoding="utf-8"))
# Digits and line breaks are split as Llama 3, Qwen, DeepSeek and GLM split them. The small model's own splitting joins
# two line breaks at a text's end and not before a word, so that no prompt that ends in two has the row's ids.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def family(tokenizer, name):
    """The small model's tokenizer with a family's control tokens and template."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokens = FAMILIES[name]
    made = copy.deepcopy(tokenizer)
    words = [Split(Regex(WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    made.backend_tokenizer.pre_tokenizer = Sequence(words)
    made.add_tokens(tokens["added"])
    named = {k: tokens[k] for k in ("bos_token", "eos_token") if tokens[k]}
    made.add_special_tokens({**named, "additional_special_tokens": tokens["special"]})
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return made


@pytest.fixture(scope="module")
def families(tokenizer):
    return {name: family(tokenizer, name) for name in FAMILIES}


# What closes an answer, and what stands before it that the model says itself.
ENDS = {
    "chatml": "<|im_end|>",
    "hermes": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "qwen3": "<|im_end|>",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
    "deepseek_r1": "<｜end▁of▁sentence｜>",
    "deepseek_v31": "<｜end▁of▁sentence｜>",
    "glm4": "<|user|>",
    "glm45": "<|user|>",
}


def said(name, answer, *, last=True, thought=""):
    """What a family's model must produce for an answer."""
    match name:
        case "chatml" | "hermes" | "phi3" | "phi4" | "deepseek_v31":
            text = answer
        case "llama3" | "gemma" | "gemma3":
            text = answer.strip()
        case "llama2":
            text = f" {answer.strip()} "
        case "mistral":
            text = f" {answer.strip()}"
        case "qwen3":
            text = f"<think>\n{thought}\n</think>\n\n{answer.lstrip(chr(10))}" if last else answer
        case "deepseek_r1":
            text = f"{thought}\n</think>\n\n{answer.lstrip()}" if thought and last else answer
        case "glm4":
            text = f"\n{answer}"
        case "glm45":
            text = f"\n<think>{thought if last else ''}</think>\n{answer.strip()}"
    return text + ENDS[name]


def runs(row):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.trained.astype(np.int8), [0]])))
    return edges.reshape(-1, 2).tolist()


def decoded(tokenizer, row):
    return [tokenizer.decode(row.input_ids[a:b], clean_up_tokenization_spaces=False) for a, b in runs(row)]


def encode(tokenizer, examples, **options):
    encoded = Encoder(Renderer(tokenizer, **options)).encode(examples)
    assert not encoded.rejects, encoded.rejects[0]
    return encoded.examples


def turns(*said):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def load(shared_data, name):
    rows = load_file(shared_data / name).examples
    return rows


def check_rows(name, tokenizer, examples):
    """Each row's trained tokens are its answer and end, and the ids before them are those of the serving prompt."""
    encoded = Encoder(Renderer(tokenizer)).encode(examples)
    assert {r.reason for r in encoded.rejects} <= {"characters_lost"}
    assert len(encoded.examples) > 0.95 * len(examples)
    asked = [prompt_text(tokenizer, prompt_messages(examples[row.index])) for row in encoded.examples]
    prompts = tokenizer(asked, add_special_tokens=False).input_ids
    for row, prompt in zip(encoded.examples, prompts, strict=True):
        assert decoded(tokenizer, row) == [said(name, examples[row.index].output)]
        # R1's prompt opens a reasoning that these rows do not have.
        assert name == "deepseek_r1" or row.input_ids[: runs(row)[0][0]].tolist() == prompt


FILES = ["gsm8k_train.jsonl", "alpaca_en_demo.json", "alpaca_zh_demo.json", "waimai_10k.csv"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("file", FILES)
def test_real_rows_decode_to_their_answers(families, shared_data, name, file):
    check_rows(name, families[name], load_file(shared_data / file).examples[:60])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("file", FILES)
def test_two_thousand_real_rows_decode_to_their_answers(families, shared_data, name, file):
    check_rows(name, families[name], load_file(shared_data / file).examples[:2_000])


HARD = [
    turns("Hi, what is 2+2?", "It is 4.", "And in Chinese?", "是四。\n\nNothing else 🙂"),
    turns("Say hello", "hello", "Say hello", "hello", "again: hello", "hello"),
    turns("4", "4", "four", "4"),
    turns("Say: yes", "yes yes", "more", "yes"),
]
OTHERS_ENDS = turns("Which token ends a turn?", "[END] or {end} or </turn>, says a text.")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("number", range(len(HARD)))
def test_every_answer_of_a_conversation(families, name, number):
    messages = HARD[number]
    (row,) = encode(families[name], [TrainingExample(messages=messages)])
    answers = [m["content"] for m in messages[1::2]]
    wanted = [said(name, a, last=a is answers[-1] and n == len(answers) - 1) for n, a in enumerate(answers)]
    assert decoded(families[name], row) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_what_apply_chat_template_writes(families, name):
    tokenizer = families[name]
    for messages in HARD:
        for add in (False, True):
            given = messages[:-1] if add else messages
            assert template_text(tokenizer, given, add_generation_prompt=add) == tokenizer.apply_chat_template(
                given, tokenize=False, add_generation_prompt=add
            )
