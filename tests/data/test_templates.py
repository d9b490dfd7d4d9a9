"""Chat templates of well-known families: what is trained is what the model must say after the prompt of serving."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
from template_families import FAMILIES, family

from luthier.data.chats import ChatEncoder
from luthier.data.examples import TrainingExample
from luthier.data.loader import load_file
from luthier.data.render import Renderer, end_of_turn_ids, prompt_messages, prompt_text, template_text


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


_ENCODERS = {}


def encoder(tokenizer, **options):
    """One for all tests: making it reads the whole vocabulary."""
    key = (id(tokenizer), *options.items())
    if key not in _ENCODERS:
        _ENCODERS[key] = ChatEncoder(Renderer(tokenizer, **options))
    return _ENCODERS[key]


def encode(tokenizer, examples, **options):
    encoded = encoder(tokenizer, **options).encode(examples)
    assert not encoded.rejects, encoded.rejects[0]
    return encoded.examples


def turns(*said):
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def check_rows(name, tokenizer, examples):
    """Each row's trained tokens are its answer and end, and the ids before them are those of the serving prompt."""
    encoded = encoder(tokenizer).encode(examples)
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


@pytest.mark.parametrize("name", ["hermes", "qwen3", "llama3", "glm4", "glm45"])
def test_tools_and_results_are_what_apply_chat_template_writes(families, shared_data, name):
    tokenizer = families[name]
    for example in load_file(shared_data / "glaive_toolcall_en_demo.json").examples[:20]:
        wanted = tokenizer.apply_chat_template(example.messages, tools=example.tools, tokenize=False)
        assert template_text(tokenizer, example.messages, example.tools, add_generation_prompt=False) == wanted


def called(name, message, number):
    """What a family's model must produce to call tools."""

    def dump(value):
        return json.dumps(value, ensure_ascii=False)

    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]
    match name:
        case "hermes" | "qwen3":
            # Qwen3's empty reasoning stands before a last answer alone.
            each = [f'<tool_call>\n{{"name": "{f}", "arguments": {dump(a)}}}\n</tool_call>' for f, a in calls]
            return "\n".join(each) + "<|im_end|>"
        case "llama3":
            return "".join(f'{{"name": "{f}", "parameters": {dump(a)}}}' for f, a in calls) + "<|eot_id|>"
        case "mistral":
            ids = [f"call{n:05}" for n in range(number, number + len(calls))]
            each = [dump({"name": f, "arguments": a, "id": i}) for (f, a), i in zip(calls, ids, strict=True)]
            return f"[TOOL_CALLS] [{', '.join(each)}]</s>"
        case "deepseek_v31":
            each = [f"<｜tool▁call▁begin｜>{f}<｜tool▁sep｜>{dump(a)}<｜tool▁call▁end｜>" for f, a in calls]
            return f"<｜tool▁calls▁begin｜>{''.join(each)}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        case "glm4":
            return "".join(f"{f}\n{dump(a)}" for f, a in calls) + "<|observation|>"
        case "glm45":
            text = "\n<think></think>"
            for f, arguments in calls:
                text += f"\n<tool_call>{f}"
                for key, value in arguments.items():
                    shown = value if isinstance(value, str) else dump(value)
                    text += f"\n<arg_key>{key}</arg_key>\n<arg_value>{shown}</arg_value>"
                text += "\n</tool_call>"
            return text + "<|observation|>"


CALLING = ("hermes", "qwen3", "llama3", "mistral", "deepseek_v31", "glm4", "glm45")


@pytest.mark.parametrize("name", CALLING)
def test_every_call_of_real_rows_is_trained_whole(families, shared_data, name):
    tokenizer = families[name]
    examples = load_file(shared_data / "glaive_toolcall_en_demo.json").examples
    assert len(examples) == 300
    calls = 0
    for row in encode(tokenizer, examples):
        messages = examples[row.index].messages
        wanted, number = [], 1
        for i, message in enumerate(messages):
            if message.get("tool_calls"):
                wanted.append(called(name, message, number))
                number += len(message["tool_calls"])
            elif message["role"] == "assistant":
                wanted.append(said(name, message["content"], last=i == len(messages) - 1))
        calls += number - 1
        spans = [row.input_ids[a:b] for a, b in runs(row)]
        assert [tokenizer.decode(ids) for ids in spans] == wanted, examples[row.index].source
    assert calls == 211


THOUGHT = "Two and two\nmake 4."
KEEPS_INLINE = ("chatml", "hermes", "llama2", "llama3", "mistral", "gemma", "gemma3", "phi3", "phi4", "glm4")


def thinking(form, answer="4"):
    """A turn with its reasoning, in a form that files have."""
    if form == "inline":
        return {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{answer}"}
    return {"role": "assistant", "content": answer, form: THOUGHT}


@pytest.mark.parametrize("form", ["inline", "reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "deepseek_v31"])
def test_the_last_answers_reasoning_is_trained_in_every_form(families, name, form):
    tokenizer = families[name]
    example = TrainingExample(messages=[{"role": "user", "content": "2+2?"}, thinking(form)])
    (row,) = encode(tokenizer, [example])
    inline = f"<think>\n{THOUGHT}\n</think>\n\n4"
    wanted = said(name, inline) if name in KEEPS_INLINE else said(name, "4", thought=THOUGHT)
    assert decoded(tokenizer, row) == [wanted]
    prompt = tokenizer(prompt_text(tokenizer, example.messages[:1]), add_special_tokens=False).input_ids
    assert row.input_ids[: runs(row)[0][0]].tolist() == prompt
    notes = encoder(tokenizer).renderer.render(example).notes
    assert ("reasoning_in_content" in notes) == (name in KEEPS_INLINE and form != "inline")


@pytest.mark.parametrize("form", ["inline", "reasoning_content"])
@pytest.mark.parametrize("name", ["qwen3", "glm45", "deepseek_r1"])
def test_reasoning_of_earlier_answers_goes_as_when_serving(families, name, form):
    tokenizer = families[name]
    asked = {"role": "user", "content": "2+2?"}
    example = TrainingExample(messages=[asked, thinking(form, "first"), asked, thinking(form, "second")])
    (row,) = encode(tokenizer, [example])
    assert decoded(tokenizer, row) == [said(name, "first", last=False), said(name, "second", thought=THOUGHT)]
    assert "earlier_reasoning_dropped" in encoder(tokenizer).renderer.render(example).notes
    prompt = tokenizer(prompt_text(tokenizer, example.messages[:3]), add_special_tokens=False).input_ids
    assert row.input_ids[: runs(row)[-1][0]].tolist() == prompt


def test_a_template_that_would_lose_the_last_reasoning_refuses_the_row(families):
    example = TrainingExample(messages=[{"role": "user", "content": "2+2?"}, thinking("inline")])
    encoded = encoder(families["deepseek_v31"]).encode([example])
    assert [r.reason for r in encoded.rejects] == ["reasoning_dropped"] and "model.chat_template" in (
        encoded.rejects[0].remedy or ""
    )
    # Where that answer is not trained, nothing of the training is lost.
    unmarked = copy.deepcopy(example.messages)
    unmarked[1]["train"] = False
    more = [*unmarked, {"role": "user", "content": "so?"}, {"role": "assistant", "content": "4"}]
    (row,) = encode(families["deepseek_v31"], [TrainingExample(messages=more)])
    assert decoded(families["deepseek_v31"], row) == [said("deepseek_v31", "4")]


@pytest.mark.parametrize("name", ["qwen3", "glm45"])
def test_reasoning_before_a_call_is_trained_with_it(families, name):
    tokenizer = families[name]
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"of": [2, 2]}}}
    calling = {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [call]}
    messages = [{"role": "user", "content": "2+2?"}, calling, {"role": "tool", "content": "4"}, thinking("reasoning")]
    (row,) = encode(tokenizer, [TrainingExample(messages=messages, tools=tools)])
    first, second = decoded(tokenizer, row)
    assert first.lstrip("\n").startswith("<think>") and "I add." in first and "[2, 2]" in first
    assert second == said(name, "4", thought=THOUGHT)


def test_parallel_calls_are_one_answer(families):
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"of": n}}, "id": f"call_{n}"} for n in "ab"]
    results = [{"role": "tool", "content": n, "tool_call_id": f"call_{n}"} for n in "ab"]
    answers = {"role": "assistant", "content": "", "tool_calls": calls}
    messages = [{"role": "user", "content": "add"}, answers, *results, {"role": "assistant", "content": "done"}]
    example = TrainingExample(messages=messages, tools=tools)
    for name in ("hermes", "qwen3", "mistral", "deepseek_v31", "glm45"):
        (row,) = encode(families[name], [example])
        assert decoded(families[name], row) == [called(name, answers, 1), said(name, "done")]
    # Results go with the calls that they answer, under the ids that the template takes.
    assert '{"content": b, "call_id": "call00002"}' in encoder(families["mistral"]).renderer.render(example).text
    refused = encoder(families["llama3"]).encode([example]).rejects[0]
    assert refused.reason == "template_refuses" and "single tool-calls" in refused.message


def test_a_text_beside_a_call_is_not_lost_in_silence(families):
    tools = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"of": "x"}}}]
    turn = {"role": "assistant", "content": "I shall add.", "tool_calls": calls}
    example = TrainingExample(messages=[{"role": "user", "content": "add"}, turn], tools=tools)
    (row,) = encode(families["hermes"], [example])
    assert decoded(families["hermes"], row)[0].startswith("\nI shall add.\n<tool_call>") or decoded(
        families["hermes"], row
    )[0].startswith("I shall add.\n<tool_call>")
    assert encoder(families["llama3"]).encode([example]).rejects[0].reason == "answer_altered"


SYSTEM = [{"role": "system", "content": "Be terse."}]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "gemma"])
def test_system_text_is_read_where_serving_has_it(families, name):
    tokenizer = families[name]
    for messages in HARD[:2]:
        example = TrainingExample(messages=SYSTEM + messages)
        (row,) = encode(tokenizer, [example])
        last = runs(row)[-1]
        assert tokenizer.decode(row.input_ids).count("Be terse.") == 1
        assert (
            decoded(tokenizer, row)[-1] == said(name, messages[-1]["content"]) and len(runs(row)) == len(messages) // 2
        )
        if name != "deepseek_r1":
            prompt = prompt_text(tokenizer, prompt_messages(example))
            assert row.input_ids[: last[0]].tolist() == tokenizer(prompt, add_special_tokens=False).input_ids
    again = TrainingExample(messages=[{"role": "developer", "content": "Be terse."}, *HARD[0]])
    (row,) = encode(tokenizer, [again])
    assert "Be terse." in tokenizer.decode(row.input_ids)


def test_a_template_without_a_system_turn_says_what_to_do(families):
    refused = encoder(families["gemma"]).encode([TrainingExample(messages=SYSTEM + HARD[0])]).rejects[0]
    assert refused.reason == "template_refuses" and "System role not supported" in refused.message
    assert "data.system" in refused.remedy
    twice = [{"role": "user", "content": "a"}, *turns("b", "c")]
    refused = encoder(families["llama2"]).encode([TrainingExample(messages=twice)]).rejects[0]
    assert "alternate" in refused.message and "join neighbouring turns" in refused.remedy


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("llama2", "mistral", "gemma", "gemma3")])
def test_a_conversation_may_begin_with_the_assistant(families, name):
    messages = [{"role": "assistant", "content": "Welcome."}, *turns("Hi", "Hello.")]
    (row,) = encode(families[name], [TrainingExample(messages=messages)])
    assert decoded(families[name], row)[0].strip().endswith(f"Welcome.{ENDS[name]}")
    assert decoded(families[name], row)[1] == said(name, "Hello.")
    assert "assistant" not in decoded(families[name], row)[0].lower()


@pytest.mark.parametrize("name", FAMILIES)
def test_two_answers_in_a_row_are_two_answers(families, name):
    messages = [*turns("Hi", "One."), {"role": "assistant", "content": "Two."}]
    encoded = encoder(families[name]).encode([TrainingExample(messages=messages)])
    if encoded.rejects:
        assert name in ("llama2", "mistral", "gemma", "gemma3") and "alternate" in encoded.rejects[0].message
        return
    text = "".join(decoded(families[name], encoded.examples[0]))
    assert text.endswith(f"Two.{ENDS[name]}")
    # GLM-4 ends a turn with the next one's opening.
    assert "assistant" not in text.lower().replace("<|assistant|>", "" if name in ("glm4", "glm45") else "assistant")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "answer", ["  lead", "trail \n", "a\n\nb", "What is it?", "</turn> [/X] {{ x }}", "user", "\ttab"]
)
def test_answers_that_are_hard_to_find(families, name, answer):
    tokenizer = families[name]
    for question in ("What is it?", answer, f"Is it {answer}?"):
        (row,) = encode(tokenizer, [TrainingExample(question, answer)])
        assert decoded(tokenizer, row) == [said(name, answer)]


@pytest.mark.parametrize("name", FAMILIES)
def test_another_familys_end_of_turn_is_plain_text(families, name):
    tokenizer = families[name]
    for end in set(ENDS.values()):
        known = end in tokenizer.all_special_tokens or end in {
            str(t) for t in tokenizer.added_tokens_decoder.values() if t.special
        }
        example = TrainingExample("Which?", f"It is {end} there.")
        encoded = encoder(tokenizer).encode([example])
        if known:
            assert encoded.rejects[0].reason == "special_token_in_text"
            (row,) = encode(tokenizer, [example], allow_special_tokens=True)
        else:
            (row,) = encoded.examples
        assert decoded(tokenizer, row) == [said(name, example.output)]


@pytest.mark.parametrize("name", FAMILIES)
def test_marked_turns_stay_and_are_not_trained(families, name):
    tokenizer = families[name]
    messages = copy.deepcopy(HARD[0])
    plain = encoder(tokenizer).renderer.render(TrainingExample(messages=messages))
    messages[1]["train"] = False
    example = TrainingExample(messages=messages)
    assert encoder(tokenizer).renderer.render(example).text == plain.text
    (row,) = encode(tokenizer, [example])
    assert decoded(tokenizer, row) == [said(name, messages[3]["content"])]
    (row,) = encode(tokenizer, [example], train_on="all")
    text = "".join(decoded(tokenizer, row))
    assert "It is 4." not in text and "And in Chinese?" in text and "是四" in text


def test_marks_and_train_on(families):
    tokenizer = families["chatml"]

    def trained(marks, train_on):
        messages = turns("a", "one", "b", "two", "c", "three")
        for i, mark in marks.items():
            messages[2 * i + 1].update(mark)
        encoded = encoder(tokenizer, train_on=train_on).encode([TrainingExample(messages=messages)])
        if encoded.rejects:
            return encoded.rejects[0].reason
        return "".join(decoded(tokenizer, encoded.examples[0])).replace("<|im_end|>", " ").split()

    assert trained({0: {"weight": 0}}, "answers") == ["two", "three"]
    assert trained({1: {"loss": False}}, "answers") == ["one", "three"]
    assert trained({0: {"train": True}}, "last_answer") == ["one", "three"]
    assert trained({2: {"train": False}}, "last_answer") == "nothing_trained"
    assert trained({i: {"train": False} for i in range(3)}, "answers") == "nothing_trained"
    assert trained({0: {"train": "no"}}, "answers") == "bad_mark"


def test_stop_tokens_are_every_end_of_an_assistants_turn(families):
    def stops(name):
        return {families[name].convert_ids_to_tokens(i) for i in end_of_turn_ids(families[name])}

    assert stops("glm4") == {"<|user|>", "<|observation|>", "<|endoftext|>"}
    assert stops("phi3") == {"<|end|>", "<|endoftext|>"}
    assert stops("qwen3") == {"<|im_end|>"}
