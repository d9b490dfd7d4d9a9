"""Work divided among processes is the work of one, and an error in one is the error."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from luthier.data.examples import Source, TrainingExample
from luthier.data.lint import lint
from luthier.data.parallel import over_pieces
from luthier.data.store import Chosen, ExampleStore
from luthier.errors import UserError


def examples(count):
    answers = ("As an AI language model, I cannot.", "cafÃ© au lait", "I think so.")
    made = (TrainingExample(f"Question {n}?", answers[n % 3], source=Source("f", n + 1)) for n in range(count))
    return ExampleStore(made)


def lengths(rows, first):
    return [(first + n, len(row.input), os.getpid()) for n, row in enumerate(rows)]


def fail(rows, first):
    if first:
        raise UserError("a row is bad", where=str(rows[0].source))
    return 0


def vanish(rows, first, *, main):
    if os.getpid() != main:
        os._exit(9)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Other processes find the functions of this file."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_pieces_come_in_order_from_several_processes(processes):
    store = examples(50)
    rows = Chosen(store, range(49, -1, -1))
    found = [item for piece in over_pieces(lengths, rows, processes=processes) for item in piece]
    assert [item[:2] for item in found] == [(n, len(row.input)) for n, row in enumerate(rows)]
    assert len({item[2] for item in found}) == processes
    assert over_pieces(lengths, rows[:0], processes=processes)[0] == []


def test_errors_of_others_are_told():
    with pytest.raises(UserError, match="a row is bad\n  where: f:"):
        over_pieces(fail, examples(20), processes=2)
    with pytest.raises(RuntimeError, match="without a result"):
        over_pieces(partial(vanish, main=os.getpid()), examples(20), processes=2)


def test_lint_by_two_is_lint_by_one(monkeypatch):
    store = examples(300)
    alone = lint(store)
    monkeypatch.setattr("luthier.data.parallel._ROWS_A_PROCESS", 100)
    monkeypatch.setattr("luthier.data.parallel.cores", lambda: 2)
    assert lint(store).findings == alone.findings
    assert {"boilerplate", "mojibake"} <= {f.code for f in alone.findings}
