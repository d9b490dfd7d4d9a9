"""From examples to trained tokens: what is trained decodes to exactly the answers and their end-of-turn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import example as instance
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.chats import ChatEncoder, trained_tokens
from luthier.data.examples import TrainingExample
from luthier.data.render import PLAIN_TEMPLATE, Renderer, end_of_turn, end_of_turn_ids, prompt_messages, prompt_text
from luthier.models.loading import load_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}[turn]{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}[turn]model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Reasoning of earlier turns is dropped, that of the last one kept, as Qwen3's template does.
QWEN = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "{% if m['tool_calls'] %}{% for c in m['tool_calls'] %}[call]{{ c['function'] | tojson }}[/call]{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": None,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "plain": PLAIN_TEMPLATE,
}


@pytest.fixture(params=TEMPLATES, scope="module")
def templated(request, tokenizer):
    made = copy.deepcopy(tokenizer)
    if TEMPLATES[request.param]:
        made.chat_template = TEMPLATES[request.param]
    return made


@pytest.fixture(scope="module")
def encoder(tokenizer):
    # Word by word is another way, tested elsewhere, which would begin after some hundred rows.
    return ChatEncoder(Renderer(tokenizer), by_words=False)


def trained_text(tokenizer, row):
    return tokenizer.decode(row.input_ids[row.trained], clean_up_tokenization_spaces=False)


CHAT = [
    {"role": "user", "content": "Hi, what is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And in Chinese?"},
    {"role": "assistant", "content": "是四。\n\nNothing else 🙂"},
]


def test_every_answer_is_trained_with_its_end_and_nothing_else(templated):
    encoded = ChatEncoder(Renderer(templated)).encode([TrainingExample(messages=CHAT)])
    assert not encoded.rejects
    end = end_of_turn(templated)
    assert trained_text(templated, encoded.examples[0]).replace(" It", "It").replace(" 是", "是") == (
        f"It is 4.{end}是四。\n\nNothing else 🙂{end}"
    )


def test_training_reads_what_serving_reads(templated):
    """The ids before the answer are those of the prompt that serving tokenises."""
    for example in (TrainingExample("What is 2+2?", "It is 4."), TrainingExample(messages=CHAT)):
        row = ChatEncoder(Renderer(templated)).encode([example]).examples[0]
        prompt = templated(prompt_text(templated, prompt_messages(example)), add_special_tokens=False).input_ids
        last = np.flatnonzero(np.diff(row.trained.astype(int)) == 1)[-1] + 1
        assert row.input_ids[:last].tolist() == prompt


def test_the_whole_is_the_templates_text(templated):
    """One tokenisation: the row's ids are those of the template's own output."""
    row = ChatEncoder(Renderer(templated)).encode([TrainingExample(messages=CHAT)]).examples[0]
    text = templated.apply_chat_template(CHAT, tokenize=False)
    assert row.input_ids.tolist() == templated(text, add_special_tokens=False).input_ids


@settings(max_examples=80, deadline=None)
@given(prompt=st.text(min_size=1, max_size=60), answer=st.text(min_size=1, max_size=60))
@instance(prompt="0", answer=" \r0")
@instance(prompt="0", answer="\n\nHello")
@instance(prompt="0", answer="\t\t0")
@instance(prompt="0", answer=" Hello")
def test_any_answer_is_trained_as_it_stands(encoder, prompt, answer):
    """What is trained is the answer and its end, and before it stand the ids that serving would read.

    But where a token holds white space of the template and white space of the answer; then that token is trained
    whole, and the text before the answer in it is all that is trained besides.
    """
    tokenizer, row = encoder.tokenizer, TrainingExample(prompt, answer)
    encoded = encoder.encode([row])
    assert len(encoded.examples) + len(encoded.rejects) == 1
    if encoded.rejects:
        assert encoded.rejects[0].reason in ("empty_answer", "half_character", "characters_lost")
        return
    rendered = encoder.renderer.render(row)
    ((border, _),) = rendered.spans
    offsets = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    begin = next((a for a, b in offsets if a < border < b), border)
    joined = rendered.text[begin:border]
    assert trained_text(tokenizer, encoded.examples[0]) == f"{joined}{answer}<|im_end|>"
    first = int(np.flatnonzero(encoded.examples[0].trained)[0])
    asked = tokenizer(prompt_text(tokenizer, prompt_messages(row)), add_special_tokens=False).input_ids
    assert (encoded.examples[0].input_ids[:first].tolist() == asked) == (not joined)
    assert not joined or (joined.isspace() and answer[0].isspace())


def test_a_system_message_is_read_and_not_trained(tokenizer):
    row = ChatEncoder(Renderer(tokenizer, system="Be terse.")).encode([TrainingExample("2+2?", "4")]).examples[0]
    assert "Be terse." in tokenizer.decode(row.input_ids) and trained_text(tokenizer, row) == "4<|im_end|>"
    own = [{"role": "system", "content": "Mine."}, *CHAT[:2]]
    row = ChatEncoder(Renderer(tokenizer, system="Be terse.")).encode([TrainingExample(messages=own)]).examples[0]
    assert "Mine." in tokenizer.decode(row.input_ids) and "terse" not in tokenizer.decode(row.input_ids)


def test_what_is_trained_can_be_chosen(tokenizer):
    example = TrainingExample(messages=CHAT)
    last = ChatEncoder(Renderer(tokenizer, train_on="last_answer")).encode([example]).examples[0]
    assert trained_text(tokenizer, last) == CHAT[-1]["content"] + "<|im_end|>"
    every = ChatEncoder(Renderer(tokenizer, train_on="all")).encode([example]).examples[0]
    assert every.trained[1:].all() and not every.trained[0]


def test_plain_text_is_trained_whole_and_ends(tokenizer):
    row = ChatEncoder(Renderer(tokenizer)).encode([TrainingExample("Once upon a time.")]).examples[0]
    assert tokenizer.decode(row.input_ids) == "Once upon a time." + tokenizer.eos_token
    assert row.trained.tolist() == [False] + [True] * (len(row) - 1)


def test_tools_and_calls_reach_the_model(tokenizer):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "clear"},
        {"role": "assistant", "content": "It is clear."},
    ]
    example = TrainingExample(messages=turns, tools=tools)
    speaking = copy.deepcopy(tokenizer)
    speaking.chat_template = QWEN
    row = ChatEncoder(Renderer(speaking)).encode([example]).examples[0]
    text = trained_text(speaking, row)
    assert text.startswith("[call]") and '"Oslo"' in text and text.endswith("[/call]<|im_end|>It is clear.<|im_end|>")
    assert "clear<|im_end|>\n<|im_start|>assistant" in speaking.decode(row.input_ids)
    # SmolLM2's own template would drop tools in silence: the row is refused instead.
    reject = ChatEncoder(Renderer(tokenizer)).encode([example]).rejects[0]
    assert reject.reason == "tools_ignored" and reject.remedy


def test_reasoning_that_the_template_drops_is_not_trained(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = QWEN
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nsum\n</think>\n\n4"},
        {"role": "user", "content": "3+3?"},
        {"role": "assistant", "content": "<think>\nsum\n</think>\n\n6"},
    ]
    row = ChatEncoder(Renderer(thinking)).encode([TrainingExample(messages=turns)]).examples[0]
    assert trained_text(thinking, row) == "4<|im_end|><think>\nsum\n</think>\n\n6<|im_end|>"


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (TrainingExample("a <|im_start|> b", "c"), "special_token_in_text"),
        (TrainingExample("a", "c <|im_end|>"), "special_token_in_text"),
        (TrainingExample("a", " \n"), "empty_answer"),
        # SmolLM2's vocabulary lacks some bytes; its tokenizer drops them without a word.
        (TrainingExample("a", "lost: \x16"), "characters_lost"),
        (TrainingExample("a \U00040000", "b"), "characters_lost"),
        (TrainingExample(" "), "empty_text"),
        (TrainingExample("a", "half \ud83d"), "half_character"),
        (TrainingExample(messages=[{"role": "user", "content": "a"}]), "no_assistant_turn"),
    ],
)
def test_rows_that_would_teach_the_wrong_thing_are_refused(tokenizer, example, reason):
    encoded = ChatEncoder(Renderer(tokenizer)).encode([TrainingExample("q", "a"), example])
    assert len(encoded.examples) == 1 and [r.reason for r in encoded.rejects] == [reason]


def test_a_template_that_refuses_is_a_reject(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = GEMMA
    example = TrainingExample(messages=[{"role": "system", "content": "s"}, *CHAT])
    reject = ChatEncoder(Renderer(strict)).encode([example]).rejects[0]
    assert reject.reason == "template_refuses" and "System role not supported" in reject.message


def test_long_rows(tokenizer):
    long = TrainingExample("question", "word " * 50)
    whole = ChatEncoder(Renderer(tokenizer)).encode([long]).examples[0]
    refused = ChatEncoder(Renderer(tokenizer), max_length=40).encode([long])
    assert not refused.examples and refused.rejects[0].reason == "too_long"
    assert str(len(whole)) in refused.rejects[0].message
    cut = ChatEncoder(Renderer(tokenizer), max_length=40, truncation="cut").encode([long]).examples[0]
    assert len(cut) == 40 and cut.cut == whole.trained.sum() - cut.trained.sum()
    gone = ChatEncoder(Renderer(tokenizer), max_length=10, truncation="cut").encode([long])
    assert gone.rejects[0].reason == "nothing_trained"


def test_a_split_text_predicts_every_token_once(tokenizer):
    text = TrainingExample(" ".join(str(i) for i in range(300)))
    whole = ChatEncoder(Renderer(tokenizer)).encode([text]).examples[0]
    pieces = ChatEncoder(Renderer(tokenizer), max_length=64, truncation="split").encode([text]).examples
    assert len(pieces) > 3 and max(map(len, pieces)) == 64 and {p.index for p in pieces} == {0}
    targets = np.concatenate([p.input_ids[p.trained] for p in pieces])
    assert targets.tolist() == whole.input_ids[whole.trained].tolist()


def test_tokens_that_cross_a_border_are_trained():
    # "ab|cd" with a token over the border: whatever holds a character of the answer is to be predicted.
    offsets = np.array([[0, 1], [1, 3], [3, 4], [4, 4]])
    assert trained_tokens(offsets, [(2, 4)]).tolist() == [False, True, True, False]


def test_a_model_without_a_template_carries_the_plain_one(tiny_model_dir, tmp_path):
    bare = load_tokenizer(tiny_model_dir)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == PLAIN_TEMPLATE
    loaded.save_pretrained(tmp_path / "saved")
    row = ChatEncoder(Renderer(loaded)).encode([TrainingExample("2+2?", "4")]).examples[0]
    assert loaded.decode(row.input_ids) == "### User:\n2+2?\n\n### Assistant:\n4<|im_end|>\n\n"
    assert trained_text(loaded, row) == "4<|im_end|>"
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == PLAIN_TEMPLATE


def test_stop_tokens_follow_the_template(tokenizer):
    assert end_of_turn_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    other = copy.deepcopy(tokenizer)
    other.chat_template = LLAMA3.replace("<|im_end|>", "<|endoftext|>")
    assert end_of_turn(other) == "<|endoftext|>"
    assert end_of_turn_ids(other) == [
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]
