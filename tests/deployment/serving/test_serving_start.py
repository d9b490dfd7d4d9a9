"""What keeps a server from starting, told at once."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console

from luthier.deployment.serving.requests import Limits
from luthier.deployment.serving.run import serve
from luthier.errors import UserError
from luthier.models.loading import load_model, load_tokenizer


def test_what_cannot_be_served_is_told(tiny_model_dir, terse_model_dir, adapters, monkeypatch):
    monkeypatch.setenv("EMPTY_KEY", " ")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wrong = [
            ({"path": "/nowhere"}, "no folder"),
            ({"host": "0.0.0.0"}, "other machines"),
            ({"host": "::"}, "other machines"),
            ({"api_key_env": "EMPTY_KEY"}, "EMPTY_KEY"),
            ({"port": port}, "cannot listen"),
            ({"engine": "magic"}, "no engine"),
            ({"kind": "q4_k"}, "q4_k_m"),
            ({"max_model_len": 10**6}, "reads 2,048 tokens"),
            ({"name": "a/b"}, "cannot be a model's name"),
            ({"adapters": {"orders": str(adapters["polite"])}}, "two adapters"),
            ({"path": str(terse_model_dir), "adapters": {"orders": str(adapters["orders"])}}, "it was trained on"),
        ]
        for change, told in wrong:
            with pytest.raises(UserError, match=told):
                serve(**{"path": str(adapters["orders"]), "port": 0} | change)


def test_weights_are_served_as_they_are_stored_where_that_is_fast(terse_model_dir, tmp_path):
    from luthier.deployment.llamacpp import multiplies_bfloat16
    from luthier.deployment.serving.prepare import Sources, _Files

    load_model(terse_model_dir, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    load_tokenizer(terse_model_dir).save_pretrained(tmp_path / "bf16")
    for folder, fast in ((terse_model_dir, "f16"), (tmp_path / "bf16", "bf16" if multiplies_bfloat16() else "f16")):
        found = Sources.of(str(folder), {}, None)
        assert _Files(found, None, Console(quiet=True))._kind == fast
        assert _Files(found, "q8_0", Console(quiet=True))._kind == "q8_0"


def test_a_build_that_leaves_the_processor_unused_is_told(terse_model_dir):
    import xllamacpp

    from luthier.deployment.serving.prepare import Sources, serve_llamacpp

    told = io.StringIO()
    served = serve_llamacpp(
        Sources.of(str(terse_model_dir), {}, "alone"), Limits(64), None, kind="f32", slots=1, threads=1,
        console=Console(file=told, width=500),
    )  # fmt: skip
    served.engine.close()
    wide = "avx512f" in Path("/proc/cpuinfo").read_text().split()
    used = "AVX512 = 1" in xllamacpp.get_system_info()
    assert ("not built for this processor's AVX-512" in told.getvalue()) == (wide and not used)
