"""Rows that begin alike are grouped so that the most tokens are saved; a batch that shares them holds the same rows."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.batch import pack
from luthier.data.encode import EncodedExample
from luthier.data.prefixes import group_by_prefix

token_rows = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=5)


def partitions(items: list[int]):
    if not items:
        yield []
        return
    for size in range(len(items)):
        for rest in itertools.combinations(items[1:], size):
            for others in partitions([i for i in items[1:] if i not in rest]):
                yield [[items[0], *rest], *others]


def shared_by(rows: list[np.ndarray]) -> int:
    shortest = min(len(r) for r in rows) - 1
    return next((i for i in range(shortest) if len({int(r[i]) for r in rows}) > 1), shortest)


@settings(max_examples=500, deadline=None)
@given(token_rows, st.integers(1, 3))
def test_no_partition_saves_more(listed, shortest):
    rows = [np.array(r) for r in listed]
    groups = group_by_prefix(rows, shortest)
    assert sorted(i for members, _ in groups for i in members) == list(range(len(rows)))
    for members, shared in groups:
        assert len(members) == 1 or shared >= shortest
        assert shared <= shared_by([rows[i] for i in members])
    saved = sum((len(members) - 1) * shared for members, shared in groups)

    def worth(partition) -> int:
        common = [(len(g) - 1) * shared_by([rows[i] for i in g]) for g in partition]
        return sum(c for c, g in zip(common, partition, strict=True) if len(g) == 1 or c >= (len(g) - 1) * shortest)

    assert saved == max(worth(p) for p in partitions(list(range(len(rows)))))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(2, 30)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_a_shared_row_holds_every_examples_tokens(made, random):
    """Each example is read back from its segments: its tokens, its positions, its targets."""
    beginnings = [np.arange(100 * k, 100 * k + 20) for k in range(3)]
    examples = []
    for which, length in made:
        ids = np.concatenate([beginnings[which], [random.randint(0, 9) for _ in range(length)]]).astype(np.int32)
        trained = np.array([random.random() < 0.5 for _ in ids])
        trained[0], trained[-1] = False, True
        examples.append(EncodedExample(ids, trained, None, 0))
    plain, shared = pack(examples), pack(examples, share=True)
    assert shared.targets.tolist() == plain.targets.tolist()
    assert shared.tokens == plain.tokens
    assert shared.computed <= plain.computed
    pieces = []
    parents = {int(s[2]) for s in shared.segments if s[3]}
    for begin, end, prefix, length in shared.segments.tolist():
        if begin in parents and not length:
            continue
        at = [*range(prefix, prefix + length), *range(begin, end)]
        assert shared.position_ids[0][at].tolist() == list(range(len(at)))
        pieces.append(shared.input_ids[0][at].tolist())
    assert sorted(pieces) == sorted(e.input_ids[:-1].tolist() for e in examples)
    assert shared.input_ids[0][shared.kept].tolist() == plain.input_ids[0][plain.kept].tolist()
    assert shared.position_ids[0][shared.kept].tolist() == plain.position_ids[0][plain.kept].tolist()
