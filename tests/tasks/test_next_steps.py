"""What is proposed after a run can be done with what the run has saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.tasks.base import TASKS


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.type.value)
def test_only_what_merges_is_proposed_to_be_merged_or_loaded_as_merged(task):
    def proposed(kind, merges):
        return "\n".join(task.next_steps(Path("runs/mine"), kind, merges=merges))

    assert "luthier merge runs/mine" in proposed("adapter", True) and "merged" in proposed("adapter", True)
    for lines in (proposed("adapter", False), proposed("model", False)):
        assert "merge" not in lines
        assert "luthier evaluate runs/mine" in lines
