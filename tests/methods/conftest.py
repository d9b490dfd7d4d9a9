"""What the tests of methods share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, VOCABULARY, tiny

from luthier.data.encode import EncodedExample


@pytest.fixture(scope="session")
def family_dirs(tmp_path_factory) -> dict[str, Path]:
    """A folder of each family's model, as a user has one."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        tiny(family).save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="session")
def rows() -> list[EncodedExample]:
    """Rows whose second half, which is trained, repeats the first."""
    rng = np.random.default_rng(0)
    made = []
    for index, half in enumerate((5, 9, 7, 12)):
        ids = np.tile(rng.integers(3, VOCABULARY, half), 2).astype(np.int32)
        made.append(EncodedExample(ids, np.arange(2 * half) >= half, None, index))
    return made
