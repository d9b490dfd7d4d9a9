"""Running the lines of Python that a model card has."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from huggingface_hub import ModelCard


def code_of(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]


def said_by(code: str, **paths: str | Path) -> str:
    """What a card's code prints, with its folders filled in."""
    for name, path in paths.items():
        code = code.replace(f'"path/to/{name}"', repr(str(path)))
    assert "path/to" not in code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()
