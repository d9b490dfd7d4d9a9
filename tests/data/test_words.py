"""Word by word or by the tokenizer: the ids are the same, whatever the text and the family's expressions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from luthier.data.chats import ChatEncoder, trained_tokens
from luthier.data.encode import WordsDiffer, runs_of
from luthier.data.examples import TrainingExample
from luthier.data.render import Renderer
from luthier.data.words import WordTokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FAMILIES = {
    "gpt2": [{**BYTES, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}],
    "llama3": [_split(LLAMA3), BYTES],
    "qwen": [_split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), BYTES],
    "o200k": [_split(O200K), BYTES],
    "deepseek": [_split(r"\p{N}{1,3}"), _split("[一-龥\u3040-ゟ゠-ヿ]+"), _split(DEEPSEEK), BYTES],
}


@pytest.fixture(scope="module")
def made(tokenizer):
    """The small model's tokenizer with a family's way to cut words."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # A small part of its words: large tokenizers take seconds to make.
    model = content["model"]
    model["vocab"] = {word: index for word, index in model["vocab"].items() if index < 3000}
    known = model["vocab"].keys()
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= known]

    def make(steps, **changed):
        listed = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        backend = Tokenizer.from_str(json.dumps({**content, **changed, "pre_tokenizer": listed}))
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")

    return {
        **{name: make(steps) for name, steps in FAMILIES.items()},
        "nfc": make(FAMILIES["qwen"], normalizer={"type": "NFC"}),
        "prefix": make([{**BYTES, "use_regex": True, "add_prefix_space": True}]),
        "lowercase": make(FAMILIES["gpt2"], normalizer={"type": "Lowercase"}),
        "unknown": make([{"type": "Whitespace"}, BYTES]),
    }


@pytest.fixture(scope="module")
def by_words(made):
    return {name: WordTokenizer.of(tokenizer) for name, tokenizer in made.items()}


def test_the_kinds_that_are_known(by_words):
    assert {name for name, words in by_words.items() if words is None} == {"prefix", "lowercase", "unknown"}


texts = st.lists(
    st.one_of(
        st.text(st.sampled_from("aZsrtvemld019 .,'’ \n\r\t\u00a0\u2009é–ſ№½²\x1c\x85_-<|>"), max_size=12),
        st.sampled_from(["it's", "WE'LL", "'ſ", "<|im_end|>", "<|im_start|>", "<|im_", "  \n", "12345678", "don’t"]),
        st.text(max_size=6),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("family", [*FAMILIES, "nfc"])
@settings(max_examples=300, deadline=None)
@given(text=texts, data=st.data())
def test_ids_and_ranges_are_the_tokenizers(made, by_words, family, text, data):
    words, tokenizer = by_words[family], made[family]
    if not words.covers(text):
        return
    begin = data.draw(st.integers(0, len(text)))
    span = (begin, data.draw(st.integers(begin, len(text))))
    reference = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert words.encode(text)[0].tolist() == reference.input_ids
    found = words.encode(text, [span])
    if found is not None and span[0] < span[1]:
        trained = trained_tokens(np.array(reference.offset_mapping).reshape(-1, 2), [span])
        assert runs_of(trained) == [(max(a, 1), b) for a, b in found[1] if b > 1]


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "alpaca_en_demo.json"])
def test_real_rows_are_covered_and_the_same(tokenizer, shared_data, name):
    from luthier.data.loader import load_file

    examples = load_file(shared_data / name).examples[:2000]
    words = WordTokenizer.of(tokenizer)
    covered = [words.covers(e.to_causal_lm_format()) for e in examples]
    assert sum(covered) > 0.97 * len(covered)
    renderer = Renderer(tokenizer)
    fast, plain = (ChatEncoder(renderer, by_words=fast).encode(examples).examples for fast in (True, False))
    for ours, theirs in zip(fast, plain, strict=True):
        assert np.array_equal(ours.input_ids, theirs.input_ids) and np.array_equal(ours.trained, theirs.trained)


def test_words_that_differ_are_noticed_and_no_row_keeps_them(tokenizer):
    encoder = ChatEncoder(Renderer(tokenizer))
    assert encoder._words is not None
    list(encoder.stream([TrainingExample("2 + 2?", "4")] * 600))
    encoder._words._known[" four"] = encoder._words._known[" five"]
    examples = [TrainingExample("Two and two?", f"It is four, {n} times.") for n in range(250)]
    with pytest.raises(WordsDiffer):
        list(encoder.stream(examples))
    plain = ChatEncoder(Renderer(tokenizer), by_words=False).encode(examples).examples
    again = encoder.encode(examples).examples
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(again, plain, strict=True))
