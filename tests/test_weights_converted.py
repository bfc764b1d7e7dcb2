"""Weights made into other weights. Run: python -m pytest tests/test_weights_converted.py"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model import GPT, apply_rope, factorise
from nanomla.conversion import choose
from nanomla.convert import (
    METHODS,
    Plan,
    _ranks,
    calibrate,
    crop_block_size,
    factorise_values,
    to_mla,
    without_svd,
)
from tests.conftest import TINY_MLA, all_logits, make, tiny_config


# ---- values as low-rank factors, a shorter context
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": False, "n_kv_head": 2, "pos_emb": "rope"}, {**TINY_MLA, "mla_groups": 2}],
)
def test_full_rank_svd_is_the_dense_model(settings):
    """At rank hs the logits are the dense ones; a lower rank says what it kept, once."""
    dense, idx = make(settings), torch.randint(23, (2, 12))
    differences, shares = [], []
    for rank in (6, 3, 1):
        svd = GPT(tiny_config(**settings, use_svd=True, svd_rank=rank)).eval()
        state, share = factorise_values(dense.state_dict(), svd.config)
        svd.load_state_dict(state)
        differences.append((all_logits(svd, idx) - all_logits(dense, idx)).abs().max())
        shares.append(share)
    assert differences[0] < 1e-5 and shares[0] == pytest.approx(1)
    assert shares[0] >= shares[1] > shares[2] and differences[2] > 1e-2
    again, share = factorise_values(svd.state_dict(), svd.config)  # from rank 1 to 1
    assert share == pytest.approx(1)
    with pytest.raises(ValueError, match="svd_rank=3 does not work: the checkpoint holds rank 1"):
        factorise_values(again, tiny_config(**settings, use_svd=True, svd_rank=3))


def test_randomized_svd_beside_the_exact_one():
    """Halko's range finder comes within 1% of the least possible error, and repeats itself."""
    U, V = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(200, 64))[0]
    W = ((U * 0.8 ** torch.arange(64)) @ V.T)[None]
    errors = {}
    for method in ("exact", "randomized"):
        down, up, share = factorise(W, 16, method)
        errors[method] = (W - up @ down.view(1, 16, -1)).norm()
        assert share == pytest.approx(1 - float(errors[method] / W.norm()) ** 2, abs=1e-3)
    best = (W - W @ V[:, :16] @ V[:, :16].T).norm()  # Eckart-Young
    assert errors["exact"] <= best * 1.0001
    assert errors["exact"] <= errors["randomized"] < 1.01 * best
    assert torch.equal(factorise(W, 16, "randomized")[0], down)


def test_a_rank_above_the_width_keeps_its_directions():
    """They are orthonormal, with zeros in v_down; maps from so few inputs come back exactly."""
    W = torch.randn(2, 6, 3)
    down, up, share = factorise(W, 5)
    down = down.view(2, 5, 3)
    torch.testing.assert_close(up @ down, W, atol=1e-5, rtol=1e-5)
    assert share == pytest.approx(1) and not down[:, 3:].any()
    torch.testing.assert_close(up[:, :, 3:].mT @ up[:, :, 3:], torch.eye(2).expand(2, 2, 2))


@pytest.mark.parametrize("settings", [{}, {"pos_emb": "rope"}])
def test_crop_block_size(settings):
    """A shorter context computes what the longer one did there; a longer one is refused."""
    model, idx = make(settings), torch.randint(23, (2, 9))
    before = all_logits(model, idx)
    crop_block_size(model, 9)
    assert torch.equal(all_logits(model, idx), before)
    with pytest.raises(ValueError, match="block_size=12"):
        crop_block_size(model, 12)


# ---- ordinary attention into MLA
ORDINARY = {
    "MHA, no biases": {"bias": False},
    "MQA, wide heads": {"n_kv_head": 1, "head_dim": 10},
    "rotary GQA": {"pos_emb": "rope", "n_kv_head": 2, "rope_theta": 50.0},
    "Llama": {"pos_emb": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 1},
}


def ids(rows=8):
    return torch.randint(23, (rows, 16))


@pytest.mark.parametrize("kind", ORDINARY)
def test_the_rank_of_the_map_is_exact(kind):
    """
    By every method: n_embd numbers, or those of the grouped heads; with rotary positions as many
    rotary numbers as the keys have, and as many for the values, at the source's own cache.
    """
    model = make(ORDINARY[kind])
    config, calibration = model.config, calibrate(model, [ids() for _ in range(4)])
    n = config.nkv * config.hs
    plan = Plan(2 * n, rope_dim=n) if config.rotary_dim else Plan(min(config.n_embd, 2 * n))
    idx = ids()
    for method in METHODS:
        twin, layers = to_mla(model, calibration, dataclasses.replace(plan, method=method))
        assert twin.config.attention_name == "mla"
        assert twin.make_cache(1, 4).bytes_per_token == 2 * 4 * plan.numbers
        want = all_logits(model, idx)
        torch.testing.assert_close(all_logits(twin, idx), want, atol=1e-4, rtol=1e-4)
        assert all(0.9999 < layer.kept <= 1.00001 for layer in layers)
        assert sum(abs(layer.predicted) for layer in layers) < 1e-4
        if config.rotary_dim:
            assert sorted(set(twin.config.rope_freqs)) == sorted(config.frequencies.tolist())


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_mean_costs_no_rank(method):
    """
    The attention of one layer without positions sees as many inputs as there are tokens, V: a
    latent of V - 1 numbers is exact on them, as the mean of keys and values is taken care of.
    """
    model = make({}, n_layer=1, vocab_size=5)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    text = [torch.randint(5, (8, 16)) for _ in range(4)]
    calibration, idx = calibrate(model, text), torch.randint(5, (8, 16))
    want = all_logits(model, idx)
    twin, _ = to_mla(model, calibration, Plan(4, method))
    torch.testing.assert_close(all_logits(twin, idx), want, atol=1e-4, rtol=1e-4)
    for worse in (Plan(3, method), Plan(4, "plain")):
        assert (all_logits(to_mla(model, calibration, worse)[0], idx) - want).abs().max() > 1e-2


def explicit_attention(attn, x, added, rotation):
    """Attention by its formula; added (B, T, parts, nkv, hs) to keys, content keys and values."""
    B, T, _ = x.shape
    q, k, v = (t.view(B, T, -1, attn.hs) for t in attn.c_attn(x).split(attn.parts, dim=2))
    shared = attn.nh // attn.nkv
    k = apply_rope(k + added[:, :, 0], rotation).repeat_interleave(shared, dim=2)
    v = (v + added[:, :, -1]).repeat_interleave(shared, dim=2)
    scores = torch.einsum("bihc,bjhc->bhij", apply_rope(q, rotation), k)
    if rotation is not None:
        content = added[:, :, 1].repeat_interleave(shared, dim=2)
        scores = scores + torch.einsum("bihc,bjhc->bhij", q, content)
    future = torch.ones(T, T).triu(1).bool()
    scores = scores.masked_fill(future, float("-inf")) / attn.hs**0.5
    y = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v)
    return attn.c_proj(y.flatten(2))


@pytest.mark.parametrize("settings", [{}, {"pos_emb": "rope", "n_kv_head": 2}])
def test_calibration_against_autograd(settings, monkeypatch):
    """
    The moments of inputs and gradients of a layer, computed once more by attention's formula, with
    token 0 as every target.
    """
    model, batches = make(settings, n_layer=1), [ids(3), ids(2)]
    config, block = model.config, model.transformer.h[0]
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.zeros(*size))
    calibration = calibrate(model, batches)
    assert calibration.tokens == 80
    rotation = (model.rope_cos, model.rope_sin) if config.rotary_dim else None
    inputs = gradients = 0
    for idx in batches:
        x = model.transformer.wte(idx)
        if rotation is None:
            x = x + model.transformer.wpe.weight
        a = block.ln_1(x)
        parts = 2 if rotation is None else 3
        added = torch.zeros(*idx.shape, parts, config.nkv, config.hs, requires_grad=True)
        y = x + explicit_attention(block.attn, a, added, rotation)
        y = y + block.mlp(block.ln_2(y))
        logits = model.lm_head(model.transformer.ln_f(y)).flatten(0, 1)
        loss = F.cross_entropy(logits, torch.zeros_like(idx).flatten(), reduction="sum")
        g = torch.autograd.grad(loss, added)[0].flatten(0, 1).flatten(1).double()
        x1 = F.pad(a, (0, 1), value=1.0).flatten(0, 1).double()
        inputs, gradients = inputs + x1.T @ x1, gradients + g.T @ g
    torch.testing.assert_close(calibration.inputs[0], inputs / 80, atol=1e-5, rtol=1e-5)
    atol = 1e-4 * float(gradients.abs().max()) / 80
    torch.testing.assert_close(calibration.gradients[0], gradients / 80, atol=atol, rtol=1e-4)


def test_the_predicted_change_of_the_loss():
    """It is within a factor of 2 of the mean KL divergence from the source, where that is small."""
    model = make({}, n_layer=1)
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.6
    calibration, idx = calibrate(model, [ids(64) for _ in range(8)]), ids(256)
    made = [to_mla(model, calibration, Plan(L)) for L in (8, 12, 16)]
    predicted = [layers[0].predicted for _, layers in made]
    assert predicted[0] > predicted[1] > predicted[2] > 0
    want = all_logits(model.double(), idx).log_softmax(-1)
    for (twin, _), guess in zip(made, predicted, strict=True):
        now = all_logits(twin.double(), idx).log_softmax(-1)
        change = F.kl_div(now, want, reduction="none", log_target=True).sum(-1).mean()
        assert 0.5 < guess / float(change) < 2, (guess, change)


def test_ranks_follow_the_singular_values():
    """Their sum is the budget, and what is left out is smaller than what is in."""
    ranks = lambda squares, L, spread: _ranks(squares, Plan(L, spread=spread), tiny_config())
    squares = [torch.tensor([9.0, 8.0, 7.0, 6.0, 0, 0]), torch.tensor([1.0, 0.5, 0, 0, 0, 0])]
    assert ranks(squares, 3, True) == [4, 2] and ranks(squares, 3, False) == [3, 3]
    long = [torch.arange(40, 0, -1.0) * scale for scale in (1, 10, 3)]
    spread = ranks(long, 20, True)
    assert sum(spread) == 60 and spread[0] < spread[2] < spread[1] <= 40
    assert ranks(long, 1000, True) == [40, 40, 40]


@pytest.mark.parametrize("settings", [{}, {"bias": False, "n_kv_head": 2, "pos_emb": "rope"}])
def test_values_in_a_subspace_are_multiplied_out(settings):
    """A model of MHA + SVD is converted as the dense model that it computes."""
    model, idx = make(settings, use_svd=True, svd_rank=3), ids()
    dense = without_svd(model)
    assert not dense.config.use_svd and without_svd(dense) is dense
    torch.testing.assert_close(all_logits(dense, idx), all_logits(model, idx))


def test_the_best_plan_is_chosen():
    """One field after the other; the plan that was given stays if nothing is better."""
    model, idx = make({}), ids()
    calibration = calibrate(model, [ids() for _ in range(4)])
    far = lambda twin: float((all_logits(twin, idx) - all_logits(model, idx)).square().mean())
    start = Plan(8, "output", balance=30.0, spread=False)
    best = choose(model, calibration, start, {"spread": [True], "balance": [0.3, 1.0]}, far)
    plans = [start, *(dataclasses.replace(start, spread=True, balance=b) for b in (30.0, 0.3, 1.0))]
    losses = [far(to_mla(model, calibration, plan)[0]) for plan in plans]
    assert far(best.model) == min(losses) < losses[0]
    assert best.plan == plans[losses.index(min(losses))]
    assert choose(model, calibration, start, {}, far).plan == start


def test_keys_without_position():
    """A rotary source can be given no rotary numbers at all."""
    model = make({"pos_emb": "rope"})
    twin, _ = to_mla(model, calibrate(model, [ids()]), Plan(16))
    assert (twin.config.mla_rope_dim, twin.config.rope_freqs) == (0, None)
    assert all_logits(twin, ids()).isfinite().all()
