"""What the built package holds beside its code."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    """Data files too: the general set, templates, word lists, kernels."""
    builder = pytest.importorskip("hatchling.builders.wheel")
    (made,) = builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(made) as wheel:
        packed = {name: wheel.getinfo(name).file_size for name in wheel.namelist() if name.startswith("luthier/")}
    source = ROOT / "src"
    here = {
        path.relative_to(source).as_posix(): path.stat().st_size
        for path in (source / "luthier").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == here
    assert packed["luthier/evaluation/general/en.jsonl"] and packed["luthier/evaluation/general/zh.jsonl"]
