"""Every number of the statistics, held to a plain computation of its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.chats import ChatEncoder
from luthier.data.examples import Source, TrainingExample
from luthier.data.loader import load_file
from luthier.data.render import Renderer
from luthier.data.stats import LIMITS, histogram, measure, shared_beginnings
from luthier.data.stats_view import render_stats


@pytest.fixture(scope="module")
def encoder(tokenizer) -> ChatEncoder:
    return ChatEncoder(Renderer(tokenizer, allow_special_tokens=True))


def rows(count: int) -> list[TrainingExample]:
    return [
        TrainingExample(f"How much is {i} plus {i}?", f"It is {2 * i}. " * (1 + i % 90), source=Source("f", i + 1))
        for i in range(count)
    ]


def by_hand(tokenizer, examples) -> tuple[list[list[int]], list[int]]:
    """Token ids of each row and where its answer begins, by the chat template alone."""
    ids, starts = [], []
    for example in examples:
        messages = example.to_chat_format()
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids.append(tokenizer(whole, add_special_tokens=False).input_ids)
        starts.append(len(tokenizer(prompt, add_special_tokens=False).input_ids))
    return ids, starts


def test_tokens_are_those_of_the_template(tokenizer, encoder):
    examples = rows(200)
    stats = measure(examples, encoder)
    ids, starts = by_hand(tokenizer, examples)
    lengths = np.array([len(row) for row in ids])
    # The template closes an answer with <|im_end|> and a line's end, which is not trained.
    answers = lengths - np.array(starts) - 1
    assert not stats.estimated and stats.measured == 200
    assert stats.tokens.total == lengths.sum() and stats.answer_tokens.total == answers.sum()
    assert stats.prompt_tokens.total == (lengths - answers).sum()
    assert stats.tokens.percentiles[0] == lengths.min() and stats.tokens.percentiles[100] == lengths.max()
    assert stats.tokens.percentiles[50] == sorted(lengths)[99] and stats.tokens.percentiles[95] == sorted(lengths)[189]
    assert stats.answer_share == pytest.approx(answers.sum() / lengths.sum())
    for at in stats.cut:
        over = lengths > at.max_length
        beyond = sum(len(range(max(at.max_length, start), n - 1)) for n, start in zip(lengths, starts, strict=True))
        assert at.rows == pytest.approx(over.mean())
        assert at.answers_refused == pytest.approx(answers[over].sum() / answers.sum())
        assert at.answers_cut == pytest.approx(beyond / answers.sum())
    assert [at.max_length for at in stats.cut] == list(LIMITS) and stats.cut[0].rows > 0
    assert stats.vocabulary_used == len({i for row in ids for i in row}) and stats.vocabulary == len(tokenizer)
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    plain = sum(i not in tokenizer.all_special_ids for row in ids for i in row)
    assert stats.characters_per_token == pytest.approx(sum(map(len, decoded)) / plain)
    longest = max(range(200), key=lambda i: lengths[i])
    assert stats.longest[0] == (lengths[longest], f"f:{longest + 1}")
    assert [n for n, _ in stats.shortest] == sorted(lengths)[:5]
    assert json.loads(json.dumps(stats.to_dict()))["tokens"]["total"] == lengths.sum()


def test_every_row_is_counted_and_a_sample_measured(encoder):
    examples = rows(3_000)
    whole, part = measure(examples, encoder, sample=None), measure(iter(examples), encoder, sample=500, seed=3)
    assert whole.measured == 3_000 and not whole.estimated
    assert part.rows == 3_000 and part.measured == 500 and part.estimated
    assert part.characters == whole.characters == sum(len(e.input) + len(e.output) for e in examples)
    # A fair sample: its mean is within four standard errors of the whole's.
    spread = np.std([len(e.output) / 3 for e in examples]) / 500**0.5
    assert abs(part.tokens.mean - whole.tokens.mean) < 4 * spread
    assert part == measure(iter(examples), encoder, sample=500, seed=3)
    assert part.tokens != measure(examples, encoder, sample=500, seed=4).tokens
    lines = [int(place.rpartition(":")[2]) for _, place in part.longest + part.shortest]
    assert max(lines) > 500, "a sample is not the first rows"


def test_a_sample_takes_each_row_with_the_same_chance(encoder):
    from luthier.data.stats import _each_seen, _Texts

    taken = Counter()
    for seed in range(400):
        chosen = list(_each_seen(rows(20), _Texts(), 5, seed))
        assert [e.source.line for e in chosen] == sorted(e.source.line for e in chosen) and len(chosen) == 5
        taken.update(e.source.line for e in chosen)
    # 100 times each on average, with a standard deviation of 8.7.
    assert len(taken) == 20 and all(65 < count < 135 for count in taken.values())


def test_turns_roles_tools_and_classes(encoder):
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": "a"},
    ]
    examples = [TrainingExample(messages=chat), TrainingExample("q", "yes"), TrainingExample("plain text")]
    stats = measure(examples, encoder)
    assert stats.turns == {2: 1, 4: 1} and stats.plain_text == 1 and stats.system_rows == stats.systems == 1
    assert stats.roles == {"assistant": 3, "user": 2, "system": 1, "tool": 1} and stats.tool_calls == {"look": 2}
    assert stats.labels is None
    labelled = [TrainingExample("x", "pos" if i % 3 else "neg") for i in range(60)]
    assert measure(labelled, encoder).labels == {"pos": 40, "neg": 20}
    labelled[0].label = "neg"
    assert measure(labelled, encoder).labels == {"neg": 1}


def test_rows_that_the_model_cannot_take_are_counted_apart(encoder):
    tools = [{"type": "function", "function": {"name": "look"}}]
    examples = [*rows(3), dataclasses.replace(rows(1)[0], tools=tools)]
    stats = measure(examples, encoder)
    assert stats.rows == 4 and stats.measured == 3 and sum(stats.refused.values()) == 1 and not stats.estimated
    none = measure([examples[-1]], encoder)
    assert none.tokens is None and none.rows == 1
    assert measure([], encoder).rows == 0
    for shown in (stats, none, measure([], encoder)):
        render_stats(shown, "x")


def test_languages_are_told(encoder):
    english = TrainingExample(
        "What is the capital city of this country?", "The capital city is on the river, they say."
    )
    chinese = TrainingExample("这个国家的首都是哪里？请用一句话回答。", "据说首都在一条大河的旁边。")
    assert measure([english, chinese, chinese], encoder).languages == {"zh": 2, "en": 1}


@given(st.lists(st.integers(1, 5_000), min_size=1, max_size=200))
def test_a_histogram_holds_every_row_once(lengths):
    found = histogram(np.array(lengths))
    assert sum(count for _, _, count in found) == len(lengths)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found)) and len(found) <= 25
    for begin, below, count in found:
        assert count == sum(begin <= n < below for n in lengths)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=2, max_size=12))
def test_shared_beginnings_are_those_of_a_tree(rows):
    common, share = shared_beginnings([np.array(row, dtype=np.int32) for row in rows])
    # By hand: rows one after another, each with the longest beginning of any that came before it, in sorted order.
    ordered = sorted(rows)

    def shared(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    best = [max((shared(row, other) for other in ordered[:i]), default=0) for i, row in enumerate(ordered)]
    assert share == pytest.approx(sum(n for n in best if n >= 16) / sum(map(len, rows)))
    assert common == min(shared(rows[0], row) for row in rows)


def test_real_rows(shared_data, encoder):
    stats = measure(load_file(shared_data / "waimai_10k.csv").examples, encoder, sample=300)
    assert stats.rows == 11_987 and stats.labels == {"0": 7_987, "1": 4_000}
    assert stats.languages["zh"] > 200 and stats.answer_tokens.percentiles[50] == 2
