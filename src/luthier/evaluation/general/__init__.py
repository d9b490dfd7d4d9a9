"""Short questions that a small chat model can often answer, to see what tuning has made it forget.

Written for this project and under its licence: 120 rows, half English, half Chinese, six of each topic in each
language. No right answer stands in its own question, so that a model that repeats the question is not right.
"""

from __future__ import annotations

from pathlib import Path

from luthier.data.examples import TrainingExample
from luthier.data.loader import load_file

LANGUAGES = ("en", "zh")


def general_set() -> list[TrainingExample]:
    """The rows; ``metadata`` holds each one's ``topic`` and ``language``."""
    folder = Path(__file__).parent
    return [row for language in LANGUAGES for row in load_file(folder / f"{language}.jsonl").examples]
