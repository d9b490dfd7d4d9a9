"""vLLM in a process of its own: how it is found, how it ends, and what the gate asks of it.

What it answers is tested in test_serving_api.py. All that needs vLLM itself is skipped where it is not found; name it
by LUTHIER_VLLM, and what it needs besides by LUTHIER_VLLM_ARGS.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live import VLLM, VLLM_ARGUMENTS, running
from rich.console import Console
from safetensors.torch import load_file, save_file
from saved_adapters import tuned
from tiny_models import tiny_llama

from luthier.deployment.serving.prepare import Sources
from luthier.deployment.serving.prepare_vllm import _Gate, serve_vllm
from luthier.deployment.serving.requests import Limits
from luthier.deployment.serving.run import _chosen, serve
from luthier.deployment.vllm import VllmServer, find_vllm, require_vllm, room_for_rank
from luthier.errors import UserError

needs_vllm = pytest.mark.skipif(find_vllm(VLLM) is None, reason="vLLM is not installed")


def program(folder, text):
    """A program that does what a shell script says."""
    made = folder / "vllm"
    made.write_text(f"#!/bin/sh\n{text}\n")
    made.chmod(0o755)
    return str(made)


def test_the_program_is_the_one_that_is_named_or_the_first_of_path(tmp_path, monkeypatch):
    named = program(tmp_path, "exit 0")
    assert require_vllm(named) == named
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert find_vllm() == named  # beside this environment's python
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_vllm() == named
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_vllm() is None
    with pytest.raises(UserError, match="there is no program vllm"):
        require_vllm()
    with pytest.raises(UserError, match="'/nowhere/vllm' is no program"):
        require_vllm("/nowhere/vllm")


def test_a_file_that_is_no_program_is_told(tmp_path, tiny_model_dir):
    text = tmp_path / "vllm"
    text.write_bytes(b"\x00\x01")
    text.chmod(0o755)
    with pytest.raises(UserError, match="it does not run"):
        VllmServer(str(text), tiny_model_dir, dtype="float32", context=64)


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (
            'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: the model is too large\n'
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
            "the model is too large",
        ),
        ("vllm: error: unrecognized arguments: --no-such", "unrecognized arguments: --no-such"),
        ("nothing of use", "exit code 3"),
    ],
)
def test_a_program_that_ends_tells_why(tmp_path, tiny_model_dir, log, told):
    failing = program(tmp_path, f"cat <<'E'\n{log}\nE\nexit 3")
    with pytest.raises(UserError) as caught:
        VllmServer(failing, tiny_model_dir, dtype="float32", context=64)
    assert caught.value.what == f"vLLM ended before it could start: {told}"
    assert log in Path(caught.value.remedy.removeprefix("its log says more: ")).read_text()


def test_it_ends_with_the_process_that_began_it(tmp_path, tiny_model_dir):
    """Also when that one is killed, and can let nothing end."""
    marks = tmp_path / "pid"
    waiting = program(tmp_path, f"echo $$ > {marks}.new; mv {marks}.new {marks}; exec sleep 600")
    script = (
        "from luthier.deployment.vllm import VllmServer; from pathlib import Path; "
        f"VllmServer({waiting!r}, Path({str(tiny_model_dir)!r}), dtype='float32', context=64)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)})
    while not marks.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    child = int(marks.read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"  # one that nobody has waited for is dead


def test_what_vllm_cannot_hold_is_told(tiny_model_dir, adapters, tmp_path):
    patterned = tmp_path / "patterned"
    shutil.copytree(adapters["orders"], patterned)
    (config,) = patterned.rglob("adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": {"layers.0.q_proj": 2}}))
    there = program(tmp_path, "exit 0")
    wrong = [
        ({"engine": "vllm", "vllm": str(tmp_path / "nowhere")}, "no program"),
        ({"kind": "q8_0"}, "serves no weights of kind q8_0"),
        ({"path": str(patterned)}, "rank_pattern"),
        ({"vllm_args": "--a 'b"}, "as a shell reads them"),
        ({"vllm_args": "--uds=/tmp/x"}, "Luthier's to give"),
        ({"vllm_args": "--served_model_name x"}, "Luthier's to give"),
        ({"threads": 2}, "--threads is for the engine llamacpp"),
        ({"engine": "llamacpp"}, "--vllm is for the engine vllm"),
    ]
    for change, told in wrong:
        with pytest.raises(UserError, match=told):
            serve(**{"path": str(adapters["orders"]), "port": 0, "vllm": there} | change)


def test_vllm_is_the_engine_where_there_are_a_gpu_and_its_program(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", str(tmp_path))
    for gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        for there in (False, True):
            if there:
                program(tmp_path, "exit 0")
            assert _chosen(None, None, None, None) == ("vllm" if gpu and there else "llamacpp")
            assert _chosen(None, None, "bf16", None) == ("vllm" if gpu and there else "llamacpp")
            # What llama.cpp alone heeds is asked for.
            assert _chosen(None, None, "q8_0", None) == _chosen(None, None, None, 4) == "llamacpp"
        (tmp_path / "vllm").unlink()
    assert _chosen(None, "/some/vllm", None, None) == _chosen("vllm", None, None, None) == "vllm"


def test_ranks_have_room():
    assert [room_for_rank(rank) for rank in (1, 8, 9, 64, 65, 512)] == [8, 8, 16, 64, 128, 512]


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("wide"), tokenizer, hidden=128)


@pytest.fixture(scope="module")
def held(base):
    """vLLM with nothing but a base."""
    server = VllmServer(
        require_vllm(VLLM), base, dtype="float32", context=512, rank=4, adapters=2, arguments=VLLM_ARGUMENTS
    )
    yield server
    server.close()


@needs_vllm
def test_the_gate_refuses_an_adapter_that_vllm_does_not_run_as_it_was_tested(held, base, tmp_path, monkeypatch):
    good, wrong = (tuned(tmp_path / str(seed), base, seed=seed, size=0.1, r=4) for seed in range(2))
    gate = _Gate(held, Sources.of(str(good), {}, None), base, "float32", Console(quiet=True))
    gate.base()
    assert gate.adapter("good", good)
    held.unload("good")
    # In the file that vLLM reads, one B of all is a tenth longer.
    served = tmp_path / "served"
    shutil.copytree(wrong, served)
    (weights,) = served.rglob("adapter_model.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {name: tensors[name] * 1.1}, weights, metadata={"format": "pt"})
    monkeypatch.setattr(held, "load", lambda model, folder: VllmServer.load(held, model, weights.parent))
    with pytest.raises(UserError, match="the parity gate refuses"):
        gate.adapter("bad", wrong)
    names = [model["id"] for model in held.ask("/v1/models")["data"]]
    assert names == [VllmServer.BASE], "what was refused is not there"


@needs_vllm
def test_what_does_not_fit_is_told(held, base, tmp_path):
    wide = tuned(tmp_path / "wide", base, seed=0, size=0.1, r=16)
    gate = _Gate(held, Sources.of(str(wide), {}, None), base, "float32", Console(quiet=True))
    with pytest.raises(UserError, match="rank 16"):
        gate.adapter("wide", wide)


@needs_vllm
def test_a_vllm_that_has_gone_is_told(base):
    found = Sources.of(str(base), {}, "alone")
    served = serve_vllm(
        found, Limits(512), None, program=VLLM, arguments=VLLM_ARGUMENTS, kind="f32", slots=2,
        console=Console(quiet=True),
    )  # fmt: skip
    vllm = served.engine._server
    with running(served) as live:
        assert live.get("/health").json() == {"status": "ok"}
        asked = {"model": "alone", "messages": [{"role": "user", "content": "Hi"}]}
        unknown = {"model": "alone", "prompt": [1, 2], "logit_bias": {"999999": 1}}
        refused = live.post("/v1/completions", unknown)
        assert refused.status_code == 400 and "vLLM refuses" in refused.text and "999999" in refused.text
        stops = [f"stop {number}" for number in range(16)]
        assert live.post("/v1/chat/completions", asked | {"stop": stops, "max_tokens": 2}).status_code == 200
        os.killpg(vllm._process.pid, signal.SIGKILL)
        vllm._process.wait()
        failed = live.post("/v1/chat/completions", asked)
        assert failed.status_code == 500 and "vLLM ended before it had answered" in failed.text
        assert live.get("/health").status_code == 503 and live.get("/health").json() == {"status": "failed"}
