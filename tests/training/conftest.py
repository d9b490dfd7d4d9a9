"""What the training tests share."""

from __future__ import annotations

import pytest
from bench import Bench


@pytest.fixture(scope="session")
def bench(terse_model_dir) -> Bench:
    return Bench(terse_model_dir)
