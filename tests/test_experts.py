"""Mixtures of experts, beside written-out loops. Run: python -m pytest tests/test_experts.py"""

import pytest
import torch

from model import GPT, MixtureOfExperts
from nanomla import checkpoint, costs, experts
from nanomla.distributed import World
from nanomla.start import without_effect
from tests.conftest import QUICK, all_logits, make, randomise, run, tiny_config
from tests.test_train import entries

# E 6, k 2, width 10 and n_embd 24: no two are equal.
EXPERTS = {"mlp": "swiglu", "moe_experts": 6, "moe_hidden": 10, "moe_dense_layers": 0}
SETTINGS = {
    "two of six": {},
    "gelu, biases, no shared": {"mlp": "gelu", "moe_shared": 0, "moe_active": 3},
    "groups": {"moe_groups": 3, "moe_active_groups": 2, "moe_active": 4, "moe_scale": 2.5},
    "one group of two": {"moe_groups": 2, "moe_active_groups": 1, "moe_shared": 2},
    "all": {"moe_active": 6, "moe_norm": False},
}


def one_token(layer, x):
    """A mixture's output for one token (C,), by the equations of the paper."""
    config = layer.config
    scores = (layer.router.weight @ x).sigmoid()
    biased = (scores + layer.router_bias).tolist()
    size = config.moe_experts // config.moe_groups
    groups = [biased[i * size : (i + 1) * size] for i in range(config.moe_groups)]
    of_groups = [sum(sorted(group)[-2:]) for group in groups]
    best = sorted(range(len(groups)), key=of_groups.__getitem__)[-config.moe_active_groups :]
    eligible = [e for e in range(config.moe_experts) if e // size in best]
    chosen = sorted(eligible, key=biased.__getitem__)[-config.moe_active :]
    total = sum(scores[e] for e in chosen) if config.moe_norm else 1
    y = sum(config.moe_scale * scores[e] / total * layer.experts[e](x) for e in chosen)
    if config.moe_shared:
        y = y + layer.shared(x)
    return y, chosen


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_a_loop_over_tokens(settings):
    """In float64: output, gradients and counts; only what gradients reach has one."""
    layer = randomise(MixtureOfExperts(tiny_config(**{**EXPERTS, **settings}))).double()
    layer.counting = True
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    expected = []
    counts = torch.zeros(6, dtype=torch.int64)
    for token in x.flatten(0, 1):
        y, chosen = one_token(layer, token)
        expected.append(y)
        counts[chosen] += 1
    expected = torch.stack(expected).view(x.shape)
    y = layer(x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    assert torch.equal(layer.loads, counts)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == len(list(layer.parameters())) - 1  # all but the bias
    weight = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *trained], weight)
    want = torch.autograd.grad(expected, [x, *trained], weight, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-12, rtol=0)


def test_shared_expert_is_as_wide_as_several_and_first_layers_are_dense():
    """The default width makes what a token passes as wide as the MLP, in multiples of 8."""
    model = GPT(tiny_config(n_layer=3, mlp_hidden=70, moe_experts=6, moe_shared=2))
    assert [isinstance(b.mlp, MixtureOfExperts) for b in model.transformer.h] == [False, True, True]
    mixture = model.transformer.h[1].mlp
    assert mixture.experts[0].c_fc.out_features == 16 and mixture.shared.c_fc.out_features == 32
    idle = sum(p.numel() for p in costs.idle_parameters(model))
    one = 24 * 16 + 16 + 16 * 24 + 24
    assert idle == 2 * 4 * one


WRONG = [
    ({"moe_experts": -1}, "moe_experts=-1 does not work: moe_experts must be a whole number of at"),
    ({"moe_active": 7}, "moe_active=7 does not work: moe_active must be at most 6"),
    ({"moe_groups": 4}, "moe_groups=4 does not work: moe_groups must be 1 or a divisor of moe_ex"),
    ({"moe_groups": 6}, "moe_groups=6 does not work: moe_groups must be 1 or a divisor of moe_ex"),
    ({"moe_groups": 2, "moe_active_groups": 3}, "moe_active_groups=3 does not work"),
    ({"moe_groups": 3, "moe_active": 3}, "moe_active=3 does not work: moe_active must be at most"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG)
def test_numbers_that_do_not_go_together(settings, words):
    """One line with the field, its value and what works."""
    with pytest.raises(ValueError) as caught:
        tiny_config(**{**EXPERTS, **settings})
    assert str(caught.value).startswith(words), caught.value


@pytest.mark.parametrize("B", [1, 3])
def test_cached_equals_uncached(B):
    """Token by token and in one pass; a single token goes straight to its experts."""
    model = make({**EXPERTS, "moe_groups": 3, "moe_active_groups": 2})
    idx = torch.randint(23, (B, 12))
    cache = model.make_cache(B, 12)
    with torch.no_grad():
        steps = [model(idx[:, i : i + 1], cache=cache)[0] for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), all_logits(model, idx), atol=1e-5, rtol=0)


def test_bias_moves_against_the_loads():
    """By hand: a step up below the mean, a step down above it, and none at it."""
    model = GPT(tiny_config(**{**EXPERTS, "moe_dense_layers": 1}))
    (layer,) = experts.mixtures(model)
    idx = torch.randint(23, (4, 16))
    with experts.counted(model):
        model(idx)
        model(idx)
    model(idx)  # outside
    counts = experts.loads(model, World("cpu", "auto"))
    assert counts.sum() == 2 * 64 * 2 and torch.equal(counts[0], layer.loads.double())
    experts.balance(model, torch.tensor([[3.0, 5, 4, 4, 0, 8]]), 0.25)
    assert layer.router_bias.tolist() == [0.25, -0.25, 0, 0, 0.25, -0.25]
    shares = experts.shares(torch.tensor([[1.0, 3], [2, 2]]))
    assert shares == {"expert_share_min": 0.25, "expert_share_max": 0.75}


def test_recomputed_blocks_have_the_same_gradients_and_shares():
    """With grad_checkpoint, where every token counts twice; autocast computes bfloat16 products."""
    model = GPT(tiny_config(**EXPERTS)).train()
    idx = torch.randint(23, (4, 16))
    results = []
    for model.grad_checkpoint in (False, True):
        with experts.counted(model):
            loss = model(idx, idx)[1]
            model.zero_grad()
            loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        results.append((grads, torch.stack([m.loads for m in experts.mixtures(model)])))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    assert torch.equal(2 * results[0][1], results[1][1])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(idx, idx)[1]
        rounded.backward()
    torch.testing.assert_close(rounded, loss, atol=0.02, rtol=0)


TEXT = [
    *QUICK, "--n_embd=32", "--mlp=swiglu", "--moe_experts=8", "--moe_groups=4",
    "--moe_active_groups=2", "--batch_size=8", "--max_iters=200", "--eval_interval=100",
    "--eval_iters=4",
]


def test_loads_become_even(tmp_path, dataset):
    """After 200 iterations on text every expert has half to twice its share; not so without."""
    shares = {}
    for step in ("0.01", "0"):
        folder = tmp_path / step
        args = [*TEXT, f"--moe_balance_step={step}", f"--dataset={dataset}", f"--out_dir={folder}"]
        done = run("train.py", *args)
        assert done.returncode == 0, done.stderr
        last = entries(folder)[-1]
        shares[step] = last["expert_share_min"], last["expert_share_max"]
        line = "experts' loads {:.1%} to {:.1%}".format(*shares[step])
        assert line in done.stdout and ", of which a token passes " in done.stdout
        bias = checkpoint.load(folder / "ckpt.pt").model["transformer.h.1.mlp.router_bias"]
        assert bias.any() == (step == "0.01")
    assert shares["0.01"][0] > 1 / 16 and shares["0.01"][1] < 1 / 4
    assert shares["0"][0] < 1 / 16 or shares["0"][1] > 1 / 4


def test_inactive_settings_are_named():
    """Without experts their settings do nothing, and a run says so."""
    assert without_effect(tiny_config(moe_active=3, moe_scale=2.5)) == ["moe_active", "moe_scale"]
    assert without_effect(tiny_config(**EXPERTS, moe_active=3)) == []
    assert without_effect(tiny_config(n_layer=1, moe_experts=6)) == ["moe_experts"]


def test_sequences_of_a_batch_do_not_depend_on_each_other():
    """A sequence has in a batch the logits that it has alone."""
    model = make(EXPERTS)
    idx = torch.randint(23, (4, 16))
    alone = torch.cat([all_logits(model, row[None]) for row in idx])
    torch.testing.assert_close(all_logits(model, idx), alone, atol=1e-5, rtol=0)
