"""`make quickstart` as it is: the base clearly worse, the tuned model clearly useful, and its files sound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_quickstart_proves_what_changed(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "luthier.cli", "train", "examples/records/recipe.yaml", f"output_dir={run}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    models = json.loads((run / "evaluation" / "comparison.json").read_text())["models"]
    base, tuned = models["base"]["metrics"], models["tuned"]["metrics"]
    assert base["json_exact"] <= 0.05 and tuned["json_exact"] >= 0.8
    assert tuned["json_valid"] >= 0.95 and tuned["perplexity"] < base["perplexity"] / 1.5
    for wanted in ("valid JSON", "perplexity", "luthier chat", "luthier merge", "tokens/s"):
        assert wanted in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"


@pytest.mark.slow
def test_a_signal_ends_the_command_with_a_checkpoint_and_its_own_code(tmp_path):
    import signal
    import time

    run = tmp_path / "run"
    command = [sys.executable, "-m", "luthier.cli", "train", "examples/records/recipe.yaml", f"output_dir={run}"]
    more = ["evaluation.enabled=false", "training.max_steps=6", "training.per_device_train_batch_size=2"]
    process = subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists() or '"loss"' not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in out
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
    again = subprocess.run([*command, *more, "--resume"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "going on from step" in again.stdout, again.stderr
    assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
