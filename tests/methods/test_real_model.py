"""Every method on the real small model, by whole runs: it comes back in another process, merges, and resumes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from luthier.data.render import prompt_text
from luthier.method_options import options_of
from luthier.methods import METHODS, method_of
from luthier.methods.base import trainable_parameters
from luthier.methods.saved import load_saved
from luthier.models.virtual import own_logits
from luthier.pipeline import run
from luthier.recipe import Recipe

pytestmark = pytest.mark.slow

CASES = {
    "full": {},
    "lora": {},
    "lora-rslora": {"use_rslora": True},
    "lora-dora": {"use_dora": True},
    "lora-plus": {"loraplus_lr_ratio": 8},
    "lora-pissa": {"init_lora_weights": "pissa"},
    "mixed": {},
    "mixed-prefix": {"num_virtual_tokens": 20, "modules_to_save": ["all-norms", "embed_tokens"]},
    "qlora": {},
    "qlora-8": {"bits": 8},
    "prompt": {},
    "p_tuning": {},
    "prefix": {},
    "adapter": {},
    "adapter-pfeiffer": {"placement": "pfeiffer"},
    "ia3": {},
}
RATES = {"full": 1e-4, "prompt": 1e-2, "p_tuning": 1e-3, "prefix": 1e-3, "adapter": 1e-3, "ia3": 1e-2}
ROWS = [
    {"input": f"Where is the {colour} {tree}?", "output": f"Behind house {number}, under {number + 3} stones."}
    for number, (colour, tree) in enumerate(
        (
            ("amber", "oak"),
            ("silver", "birch"),
            ("red", "cedar"),
            ("black", "alder"),
            ("white", "willow"),
            ("grey", "elm"),
        )
    )
]
NEW = 12

_FRESH = """
import json, sys
import torch
from luthier.methods.saved import load_saved
from luthier.models.virtual import VirtualTokens

folder, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
virtual = VirtualTokens(load_saved(folder, dtype=torch.float32).model)
out = virtual.reader.generate(
    **virtual.generation_inputs(torch.tensor([prompt])), do_sample=False, min_new_tokens=new, max_new_tokens=new,
    use_cache=True, return_dict_in_generate=True, output_logits=True,
)
torch.save((out.sequences[0, -new:], torch.cat(out.logits)), sys.argv[4])
"""


def generated(folder, prompt, target):
    """``[NEW]`` tokens and ``[NEW, V]`` logits that a fresh process generates, with its cache."""
    subprocess.run([sys.executable, "-c", _FRESH, str(folder), json.dumps(prompt), str(NEW), str(target)], check=True)
    return torch.load(target)


def test_every_method_is_among_the_cases():
    assert {case.partition("-")[0] for case in CASES} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_the_whole_job(case, tmp_path):
    method = case.partition("-")[0]
    dropout = {"lora_dropout": 0.0} if method in ("lora", "qlora", "mixed") else {}
    section = options_of(method)(**dropout, **CASES[case])
    merges = method_of(section).merges

    def made(name):
        return Recipe.from_dict(
            {
                "model": {"name": "smollm2", "dtype": "float32"},
                "method": section.model_dump(),
                "training": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "report_to": [],
                             "learning_rate": RATES.get(method, 1e-3)},
                "deployment": {"merge": merges and name == "whole"},
                "evaluation": {"enabled": False},
                "output_dir": str(tmp_path / name),
            }
        )  # fmt: skip

    given = {"train": ROWS[:4], "validation": ROWS[4:]}
    whole = run(made("whole"), given=given)
    manifest = json.loads((whole.run_dir / "manifest.json").read_text())
    assert all(report["passed"] for report in manifest["parity"]) and len(manifest["parity"]) == 1 + merges
    assert whole.outcome.state.best_loss < whole.outcome.first_eval_loss

    prompt = whole.tokenizer(
        prompt_text(whole.tokenizer, [{"role": "user", "content": ROWS[4]["input"]}]), add_special_tokens=False
    ).input_ids
    new, logits = generated(whole.run_dir, prompt, tmp_path / "fresh.pt")
    ids = torch.tensor([[*prompt, *new.tolist()]])
    with torch.no_grad():
        ours = own_logits(whole.model.eval(), ids)[0, len(prompt) - 1 : -1]
        saved = load_saved(whole.run_dir, dtype=torch.float32)
        with saved.as_base() as base:
            theirs = own_logits(base, ids)[0, len(prompt) - 1 : -1]
        first = own_logits(whole.model, ids[:, : len(prompt)])[0, -1]
    torch.testing.assert_close(first.float(), logits[0].float(), rtol=1e-3, atol=2e-3)
    if case != "qlora-8":  # whose products round one token as they would not beside others
        torch.testing.assert_close(ours.float(), logits.float(), rtol=1e-3, atol=2e-3)
    assert float((theirs - ours).abs().max()) > 0.1
    if merges:
        _, merged = generated(whole.run_dir / "merged", prompt, tmp_path / "merged.pt")
        if method != "qlora":  # whose stored base is another than the one it was trained on
            torch.testing.assert_close(merged[0].float(), logits[0].float(), rtol=1e-2, atol=5e-2)

    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for folder in ("adapter", "model", "merged", "checkpoints/step-4"):
        shutil.rmtree(tmp_path / "broken" / folder, ignore_errors=True)
    resumed = run(made("broken"), given=given, resume=True)
    parameters, again = (trainable_parameters(r.model) for r in (whole, resumed))
    assert resumed.outcome.state.step == 4 and parameters.keys() == again.keys()
    assert all(torch.equal(parameter, again[name]) for name, parameter in parameters.items())
