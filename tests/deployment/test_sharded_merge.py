"""The merge shard by shard: the same tensors, bit for bit, as the merge in memory, and never the model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from luthier.deployment import offloaded_adapter, sharded_merge
from luthier.deployment.merge import merge_adapter
from luthier.deployment.sharded_merge import merge_sharded
from luthier.errors import UserError
from luthier.method_options import Ia3Method, LoraMethod
from luthier.methods import get_method
from luthier.methods.saved import write_record
from luthier.models.fingerprint import fingerprint
from luthier.models.loading import add_tokens, load_model, load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from families import FAMILIES, tiny


def letters():
    """A tokenizer of single characters that fits the tiny families' vocabulary."""
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *map(chr, range(32, 127))])}
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="</s>"))
    whole.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def adapted(folder, base, *, dtype=None, tokens=(), learnt=0.1, **options):
    """A folder with a LoRA of a base whose every trained parameter is noise."""
    tokenizer, model = load_tokenizer(base), load_model(base, dtype=dtype)
    before, ids = fingerprint(model), add_tokens(model, tokenizer, list(tokens))
    torch.manual_seed(1)
    model = get_method("lora").wrap(model, LoraMethod(**{"r": 4, "lora_dropout": 0.0} | options), ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * learnt)
    get_method("lora").save(model, folder)
    tokenizer.save_pretrained(folder)
    write_record(folder, model, str(base), base_fingerprint=before)
    return folder


def tensors(folder):
    """All tensors of a saved model by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def require_same(one, other):
    """Every file of two merges but the weights' division into shards and what was measured."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    for path in one.glob("*.json"):
        if not path.name.startswith(("luthier", "model.safetensors")):
            assert json.loads(path.read_text()) == json.loads((other / path.name).read_text()), path.name


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The tiny families in bfloat16, as folders."""
    made = {}
    for family in FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        model = tiny(family).to(torch.bfloat16)
        model.save_pretrained(made[family])
        letters().save_pretrained(made[family])
    return made


# More than the tiny models' spare rows of embeddings hold.
MANY = [f"<{n}>" for n in range(210)]
OPTIONS = {
    "plain": {},
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"down_proj": 8},
        "alpha_pattern": {"q_proj": 3},
        "target_modules": "all-linear",
    },
    "dora": {"use_dora": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"learnt": 0.004, "target_modules": ["embed_tokens", "q_proj"]},
    "float32": {"dtype": torch.float32},
    "trained tokens": {"tokens": ["<new>", "<two>"]},
    "grown embeddings": {"tokens": MANY},
    "pissa": {"init_lora_weights": "pissa", "learnt": 0.02},
}
CASES = [("llama", o) for o in OPTIONS] + [("qwen3", o) for o in ("plain", "whole head", "grown embeddings")]
CASES += [("gemma3", "plain"), ("gpt2", "plain"), ("gpt2", "dora")]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_the_same_tensors_as_the_merge_in_memory(bases, tmp_path, family, options):
    adapter = adapted(tmp_path / "adapter", bases[family], **OPTIONS[options])
    merge_adapter(adapter, tmp_path / "whole")
    report = merge_sharded(adapter, tmp_path / "sharded", max_shard_size=40_000)
    require_same(tmp_path / "whole", tmp_path / "sharded")
    assert report.passed and report.numbers["tuning_mean"] > 2 * report.numbers["candidate_mean"]
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "sharded", "whole"]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("whole", "sharded"))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_experts_and_quantised_bases_and_other_methods(bases, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=300, num_key_value_heads=2, num_local_experts=4, initializer_range=0.2, **sizes)
    # Its files hold each expert by itself, and the model all of a layer's as one.
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "mixtral")
    letters().save_pretrained(tmp_path / "mixtral")
    cases = {"experts": adapted(tmp_path / "experts", tmp_path / "mixtral", target_modules=["q_proj", "v_proj"])}
    cases["quantised"] = adapted(tmp_path / "quantised", bases["llama"])
    record = json.loads((cases["quantised"] / "luthier_base.json").read_text())
    record |= {"method": "qlora", "quantization": {"bits": 4, "quant_type": "nf4", "double_quant": True}}
    (cases["quantised"] / "luthier_base.json").write_text(json.dumps(record))
    cases["ia3"] = tmp_path / "ia3"
    method, model = get_method("ia3"), load_model(bases["llama"])
    model = method.wrap(model, Ia3Method(), [])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    method.save(model, cases["ia3"])
    letters().save_pretrained(cases["ia3"])
    write_record(cases["ia3"], model, str(bases["llama"]), method=method)
    for name, adapter in cases.items():
        merge_adapter(adapter, tmp_path / f"{name}-whole", shard_by_shard=False)
        merge_sharded(adapter, tmp_path / f"{name}-sharded")
        require_same(tmp_path / f"{name}-whole", tmp_path / f"{name}-sharded")
    assert any("experts.3.w1" in name for name in tensors(tmp_path / "experts-sharded"))


@pytest.mark.slow
def test_the_real_model(smollm2_dir, tmp_path):
    adapter = adapted(tmp_path / "adapter", smollm2_dir, learnt=0.02, r=8)
    merge_adapter(adapter, tmp_path / "whole")
    report = merge_adapter(adapter, tmp_path / "sharded", max_shard_size=100_000_000)
    require_same(tmp_path / "whole", tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in tensors(tmp_path / "sharded").values())
    assert report.numbers["rounding_mean"] > 1e-3


@pytest.mark.parametrize("wrong", ["scale", "layer", "lost", "base"])
def test_a_wrong_merge_is_refused(bases, tmp_path, monkeypatch, wrong):
    adapter = adapted(tmp_path / "adapter", bases["llama"], dtype=torch.float32)
    right = offloaded_adapter._merge_layer

    def broken(layer):
        plain = {k: v.clone() for k, v in layer.get_base_layer().state_dict().items()}
        merged = right(layer)
        if wrong == "layer" and layer.get_base_layer().out_features != 96:
            return merged
        share = {"scale": 0.9, "layer": 0.0, "lost": 0.0, "base": -1.0}[wrong]
        return {k: plain[k] + share * (merged[k] - plain[k]) for k in merged}

    monkeypatch.setattr(offloaded_adapter, "_merge_layer", broken)
    with pytest.raises(UserError, match="parity gate refuses"):
        merge_sharded(adapter, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_what_cannot_be_merged_so_is_refused(bases, tmp_path):
    adapter = adapted(tmp_path / "adapter", bases["qwen3"], tokens=MANY)
    # The head is another matrix than the embeddings; an older PEFT saved no rows of it.
    kept = {name: tensor for name, tensor in tensors(adapter).items() if "lm_head" not in name}
    save_file(kept, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds no rows of lm_head"):
        merge_sharded(adapter, tmp_path / "merged")
    record = json.loads((adapter / "luthier_base.json").read_text())
    (adapter / "luthier_base.json").write_text(json.dumps(record | {"fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="trained on another base"):
        merge_sharded(adapter, tmp_path / "merged")
    (adapter / "luthier_base.json").write_text(json.dumps(record | {"task": "masked_lm"}))
    with pytest.raises(UserError, match="only models that write"):
        merge_sharded(adapter, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    with pytest.raises(UserError, match="holds no earlier merge"):
        merge_sharded(adapted(tmp_path / "good", bases["llama"]), tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "full", "good"]


def test_memory_decides(bases, tmp_path, monkeypatch):
    adapter = adapted(tmp_path / "adapter", bases["llama"])
    assert not sharded_merge.is_needed(adapter)
    monkeypatch.setattr(sharded_merge, "free_memory", lambda device: 300_000)
    assert sharded_merge.is_needed(adapter)
    monkeypatch.setattr(sharded_merge, "free_memory", lambda device: 1_000_000)
    assert not sharded_merge.is_needed(adapter)


MEASURED = """
import re, sys
from pathlib import Path
from luthier.deployment.merge import merge_adapter

def peak():
    # Not ru_maxrss: a child's begins at its parent's.
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

small, adapter, target, way = sys.argv[1:]
merge_adapter(small, target + "-small", shard_by_shard=True)  # what is imported on the way does not count
before = peak()
merge_adapter(adapter, target, shard_by_shard=way == "sharded")
print(before, peak())
"""


def measured(small, adapter, target, way):
    """Bytes by which a merge raises its process's greatest memory, all pages of files that it reads among them."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, (small, adapter, target, way))],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split()[-2:])
    return after - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_holds_a_small_part_of_the_model(bases, tmp_path):
    """1 GB of weights in bfloat16, whose greatest matrix is 16 MB."""
    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=30,
        num_attention_heads=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    base = tmp_path / "base"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(base)
    finally:
        torch.set_default_dtype(torch.float32)
    letters().save_pretrained(base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    adapter = adapted(tmp_path / "adapter", base, learnt=0.02)
    small = adapted(tmp_path / "small", bases["llama"])
    sharded = measured(small, adapter, tmp_path / "sharded", "sharded")
    whole = measured(small, adapter, tmp_path / "whole", "whole")
    require_same(tmp_path / "whole", tmp_path / "sharded")
    assert size > 1e9 and sharded < size / 4 and whole > 2 * size
