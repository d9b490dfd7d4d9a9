"""What loads when: a verb's help at once, and no library before the part of a run that needs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Each takes from 50 ms to seconds to import.
HEAVY = {
    *("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "gguf", "huggingface_hub"),
    *("numpy", "pandas", "pyarrow", "scipy", "sympy", "pydantic", "yaml", "rapidfuzz", "charset_normalizer"),
    *("sacrebleu", "rouge_score", "nltk", "tensorboard", "datasets", "jinja2", "psutil"),
    *("ftfy", "py3langid", "lm_eval"),
}

HELP = """
import contextlib, io
from luthier.cli import main
sys.argv = ["luthier", {verb}"--help"]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    main()
assert "Usage" in out.getvalue()
"""


def loaded(statements: str) -> set[str]:
    """Libraries that are loaded after the statements, in a process of their own."""
    script = f"import sys\n{statements}\nprint(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"}
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("verb", ["", "train", "benchmark"])
def test_help_loads_no_heavy_library(verb):
    # Typer itself checks a verb's arguments by pydantic.
    allowed = {"pydantic"} if verb else set()
    assert loaded(HELP.format(verb=f"{verb!r}, " if verb else "")) & HEAVY == allowed


def test_the_package_loads_nothing_but_the_standard_library():
    extra = loaded("before = set(sys.modules)\nimport luthier\nfor name in before: del sys.modules[name]")
    assert not {name for name in extra if not name.startswith("_")} - set(sys.stdlib_module_names) - {"luthier"}


def test_the_pipeline_loads_what_it_uses_when_it_uses_it():
    """Scorers, trackers and readers of other formats wait for their turn, which may never come."""
    late = {
        "transformers",
        "peft",
        "accelerate",
        "sacrebleu",
        "rouge_score",
        "nltk",
        "tensorboard",
        "pandas",
        "pyarrow",
    }
    assert not loaded("import luthier.pipeline") & (late | {"gguf", "datasets", "scipy", "charset_normalizer"})
