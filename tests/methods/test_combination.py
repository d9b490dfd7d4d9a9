"""Combined updates are what the papers say, on every family, and so are the models that hold them."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.errors import UserError
from luthier.method_options import LoraMethod
from luthier.methods import get_method
from luthier.methods.base import load_peft
from luthier.methods.combination import Combination, Update, add_combined, require_combinable
from luthier.models.loading import load_model

IDS = torch.arange(3, 23)[None]


def ties_of_the_paper(updates, density):
    """Yadav et al., 2023, algorithm 1, with λ = 1; entry by entry."""
    trimmed = []
    for update in updates:
        kept = int(density * update.numel())
        least = update.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(update.abs() >= least, update, 0.0))
    result = torch.zeros_like(updates[0])
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            values = [float(t[i, j]) for t in trimmed]
            sign = math.copysign(1.0, sum(values))
            agreeing = [v for v in values if v * sign > 0]
            result[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


def dare_of_the_paper(updates, density):
    """Yu et al., 2024, section 3.1: drop with probability 1 - density, and divide by density."""
    return [update * torch.bernoulli(torch.full_like(update, density)) / density for update in updates]


def random_updates():
    generator = torch.Generator().manual_seed(4)
    shapes = [(12, 3, 9), (12, 5, 9), (12, 2, 9)]
    return {
        name: Update(torch.randn(o, r, generator=generator), torch.randn(r, i, generator=generator))
        for name, (o, r, i) in zip("abc", shapes, strict=True)
    }


def test_the_weighted_sum_is_that_of_task_arithmetic():
    updates = random_updates()
    combination = Combination({"a": 0.7, "b": -0.4, "c": 2.0})
    wanted = sum(combination.weights[name] * update.b @ update.a for name, update in updates.items())
    whole = combination.whole(updates)
    torch.testing.assert_close(whole, wanted)
    # 3 + 5 + 2 columns are more than 9, which any 12 × 9 matrix can be written with.
    factors = combination.factors(whole, updates)
    assert factors.rank == 9
    torch.testing.assert_close(factors.whole(), wanted)
    del updates["b"]
    factors = combination.factors(combination.whole(updates), updates)
    assert factors.rank == 5
    torch.testing.assert_close(factors.whole(), combination.whole(updates))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_that_of_the_paper(density):
    updates = random_updates()
    wanted = ties_of_the_paper([u.whole() for u in updates.values()], density)
    for scale in (1.0, 0.3):
        whole = Combination(dict.fromkeys(updates, scale), "ties", density).whole(updates)
        torch.testing.assert_close(whole, scale * wanted)
    assert float((wanted == 0).float().mean()) > (0.4 if density == 0.2 else -1)


def test_ties_lets_what_is_taken_away_vote_as_such():
    updates = random_updates()
    negated = updates | {"b": Update(-updates["b"].b, updates["b"].a)}
    whole = Combination({"a": 1.0, "b": -1.0, "c": 1.0}, "ties").whole(updates)
    torch.testing.assert_close(whole, ties_of_the_paper([u.whole() for u in negated.values()], 0.5))


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_is_that_of_the_paper(density):
    updates = random_updates()
    wholes = [u.whole() for u in updates.values()]
    weights = {"a": 0.7, "b": -0.4, "c": 2.0}
    torch.manual_seed(9)
    wanted = sum(w * d for w, d in zip(weights.values(), dare_of_the_paper(wholes, density), strict=True))
    torch.manual_seed(9)
    torch.testing.assert_close(Combination(weights, "dare_linear", density).whole(updates), wanted)
    torch.manual_seed(9)
    wanted = ties_of_the_paper(dare_of_the_paper(wholes, density), 1.0)
    torch.manual_seed(9)
    torch.testing.assert_close(Combination(dict.fromkeys("abc", 1.0), "dare_ties", density).whole(updates), wanted)


def test_a_lower_rank_is_the_nearest_of_its_rank():
    updates = random_updates()
    for combination in (Combination(dict.fromkeys("abc", 1.0), rank=4), Combination({"a": 1, "b": 1}, "ties", rank=4)):
        given = {name: updates[name] for name in combination.weights}
        whole = combination.whole(given)
        factors = combination.factors(whole, given)
        assert factors.rank == 4
        dropped = torch.linalg.svdvals(whole)[4:].square().sum().sqrt()
        torch.testing.assert_close((whole - factors.whole()).norm(), dropped)
    combination = Combination({"a": 1, "b": 1}, "ties", rank="full")
    factors = combination.factors(whole, {"a": updates["a"], "b": updates["b"]})
    assert torch.equal(factors.whole(), whole)


CASES = {
    "same": ({"r": 4}, {"r": 4}),
    # Layers, ranks, scales and targets that differ; PEFT's own function gets all of these wrong.
    "unlike": (
        {"r": 16, "use_rslora": True, "layers_to_transform": [0], "target_modules": "all-linear"},
        {"r": 4, "lora_alpha": 16, "alpha_pattern": {"(layers|h).1.*": 3.0}, "rank_pattern": {"k_proj|c_proj": 2}},
    ),
}


def two_adapters(case, base_dir, folder):
    """A model with the adapters a and b of a case, whose B are noise."""
    for seed, (name, options) in enumerate(zip("ab", CASES[case], strict=True)):
        torch.manual_seed(seed)
        model = get_method("lora").wrap(load_model(base_dir, dtype=torch.float32), LoraMethod(**options), [])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.02)
        model.save_pretrained(folder / name)
    model = load_peft(load_model(base_dir, dtype=torch.float32), folder / "a", "a")
    model.load_adapter(str(folder / "b"), adapter_name="b", autocast_adapter_dtype=False)
    return model.eval()


@torch.no_grad()
def added_by_hand(model, base_dir, combine):
    """Logits of the plain base with ``combine`` of PEFT's own ΔW of a and b added to each weight."""
    plain = load_model(base_dir, dtype=torch.float32)
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            weight = plain.get_submodule(name).weight
            deltas = [module.get_delta_weight(n) if n in module.lora_A else torch.zeros_like(weight) for n in "ab"]
            weight += combine(*deltas)
    return plain(IDS).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_a_combined_adapter_is_its_combination(case, family, family_dirs, tmp_path):
    model = two_adapters(case, family_dirs[family], tmp_path)
    base = family_dirs[family]
    account = add_combined(model, Combination({"a": 0.7, "b": 0.6}), "sum")
    exact = add_combined(model, Combination({"a": 1, "b": 1}, "ties", 0.5, "full"), "ties")
    less = add_combined(model, Combination({"a": 1, "b": 1}, "ties", 0.5, 3), "less")
    assert account.share_lost() < 1e-6 and exact.share_lost() < 1e-6 and 0.05 < less.share_lost() < 1
    wanted = {
        "sum": added_by_hand(model, base, lambda a, b: 0.7 * a + 0.6 * b),
        "ties": added_by_hand(model, base, lambda a, b: _ties(a, b, 0.5)),
    }
    untouched = load_model(base, dtype=torch.float32)(IDS).logits
    for name, logits in wanted.items():
        model.set_adapter(name)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-3, atol=1e-3)
        assert float((logits - untouched).abs().max()) > 0.05
    # Where both have their matrices, the sum lies nearer to the one of the greater weight.
    if case == "same":
        (far_a, cos_a), (far_b, cos_b) = account.of_part("a"), account.of_part("b")
        assert far_a < far_b and cos_a > cos_b


def _ties(a, b, density):
    """:func:`ties_of_the_paper` for two updates, of which one may be nought, all entries at once."""
    trimmed = []
    for update in (a, b):
        kept = int(density * update.numel())
        least = update.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(update.abs() >= least, update, 0.0) if update.any() else update)
    x, y = trimmed
    agree = torch.sign(x) * torch.sign(y)
    larger = torch.where(x.abs() >= y.abs(), x, y)
    return torch.where(agree > 0, (x + y) / 2, torch.where(agree < 0, larger, x + y))


def test_plain_peft_is_wrong_where_this_is_right(family_dirs, tmp_path):
    """Why ``add_weighted_adapter`` is not called; where this fails, PEFT may have been mended."""
    model = two_adapters("unlike", family_dirs["llama"], tmp_path)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.6], "theirs", combination_type="cat")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    wanted = 0.7 * layer.get_delta_weight("a") + 0.6 * layer.get_delta_weight("b")
    torch.testing.assert_close(layer.get_delta_weight("theirs"), math.sqrt(20) * wanted)
    assert "theirs" not in model.get_base_model().model.layers[1].self_attn.q_proj.lora_A


def test_dare_is_repeatable_and_leaves_other_draws_alone(family_dirs, tmp_path):
    model = two_adapters("same", family_dirs["llama"], tmp_path)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in {"one": 1, "again": 1, "other": 2}.items():
        add_combined(model, Combination({"a": 1, "b": 1}, "dare_linear", 0.5, seed=seed), name)
        if name == "one":
            torch.rand(1)
    assert torch.equal(torch.rand(2), wanted[1:])
    found = {}
    for name in ("one", "again", "other"):
        model.set_adapter(name)
        found[name] = model(IDS).logits
    assert torch.equal(found["one"], found["again"]) and not torch.equal(found["one"], found["other"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"combination_type": "sum"}, "unknown combination 'sum'"),
        ({"weights": {"a": 0.0}}, "the weight of 'a' is 0.0"),
        ({"weights": {"a": math.nan}}, "the weight of 'a' is nan"),
        ({"weights": {}}, "no adapter"),
        ({"density": 0.5}, "linear drops no entries"),
        ({"combination_type": "ties", "density": 0.0}, "density is 0.0"),
        ({"combination_type": "dare_ties", "density": 1.5}, "density is 1.5"),
        ({"combination_type": "ties", "seed": 1}, "draws nothing at random"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        Combination(**({"weights": {"a": 1.0}} | given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "tokens"),
        ({"bias": "all"}, "biases"),
    ],
)
def test_adapters_that_do_not_add_up_are_refused(options, message):
    from peft import IA3Config, LoraConfig

    require_combinable({"fine": LoraConfig()})
    with pytest.raises(UserError, match=f"'odd' cannot be combined.*{message}"):
        require_combinable({"fine": LoraConfig(), "odd": LoraConfig(**options)})
    with pytest.raises(UserError, match="of the method ia3"):
        require_combinable({"odd": IA3Config()})
