"""Weights made into other weights. Run: python -m pytest tests/test_surgery.py"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model import GPT, apply_rope
from nanomla.convert import (
    METHODS,
    Plan,
    _ranks,
    calibrate,
    choose,
    crop_block_size,
    factorise,
    factorise_values,
    to_mla,
    without_svd,
)
from tests.conftest import TINY_MLA, all_logits, randomise, tiny_config

TINY_LLAMA = {"pos_emb": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}

DENSE = [
    {},
    {"bias": False},
    {"n_kv_head": 2, "pos_emb": "rope"},
    TINY_MLA,
    {**TINY_MLA, "mla_groups": 4, "mla_latent_dim": 3},
    {**TINY_MLA, "mla_nope_dim": 5},
    {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8},
]


@pytest.mark.parametrize("settings", DENSE)
def test_full_rank_svd_is_the_dense_model(settings):
    """
    A dense state dict factorised at rank hs gives the dense logits; a lower rank gives others and
    returns what it kept.
    """
    dense, idx = randomise(GPT(tiny_config(**settings))), torch.randint(23, (2, 12))
    differences, shares = [], []
    for rank in (6, 3, 1):
        svd = GPT(tiny_config(**settings, use_svd=True, svd_rank=rank)).eval()
        state, kept = factorise_values(dense.state_dict(), svd.config)
        svd.load_state_dict(state)
        differences.append((all_logits(svd, idx) - all_logits(dense, idx)).abs().max())
        shares.append(kept)
    assert differences[0] < 1e-5 and shares[0] == pytest.approx(1)
    assert shares[0] >= shares[1] > shares[2] and differences[2] > 1e-2
    again, kept = factorise_values(svd.state_dict(), svd.config)  # from rank 1 to 1 nothing is lost
    assert kept == pytest.approx(1)
    with pytest.raises(ValueError, match="svd_rank=3 does not work: the checkpoint holds rank 1"):
        factorise_values(again, tiny_config(**settings, use_svd=True, svd_rank=3))


def test_randomized_svd_beside_the_exact_one():
    """
    Halko's range finder comes within 1% of the best possible error on a decaying spectrum, and
    repeats itself.
    """
    U, V = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(200, 64))[0]
    W = (U * 0.8 ** torch.arange(64)) @ V.T
    W = W[None]
    errors = {}
    for method in ("exact", "randomized"):
        down, up, kept = factorise(W, 16, method)
        errors[method] = (W - up @ down.view(1, 16, -1)).norm()
        assert kept == pytest.approx(1 - float(errors[method] / W.norm()) ** 2, abs=1e-3)
    best = (W - W @ V[:, :16] @ V[:, :16].T).norm()  # Eckart-Young
    assert errors["exact"] <= best * 1.0001
    assert errors["exact"] <= errors["randomized"] < 1.01 * best
    assert torch.equal(factorise(W, 16, "randomized")[0], down)


def test_a_rank_above_the_width_keeps_its_directions():
    """
    Maps from fewer inputs than the rank come back exactly; the directions beyond the width are
    orthonormal, with zeros in v_down.
    """
    W = torch.randn(2, 6, 3)
    down, up, kept = factorise(W, 5)
    down = down.view(2, 5, 3)
    torch.testing.assert_close(up @ down, W, atol=1e-5, rtol=1e-5)
    assert kept == pytest.approx(1) and not down[:, 3:].any()
    torch.testing.assert_close(up[:, :, 3:].mT @ up[:, :, 3:], torch.eye(2).expand(2, 2, 2))
    assert factorise(torch.zeros(2, 6, 3), 4)[2] == 1.0  # nothing is lost of nothing


def test_crop_block_size():
    """A shorter context computes what the longer one did there; a longer one is refused."""
    for settings in ({}, {"pos_emb": "rope"}):
        model, idx = randomise(GPT(tiny_config(**settings))), torch.randint(23, (2, 9))
        before = all_logits(model, idx)
        crop_block_size(model, 9)
        assert torch.equal(all_logits(model, idx), before)
        with pytest.raises(ValueError, match="block_size=12"):
            crop_block_size(model, 12)


# ---- ordinary attention into MLA
LEARNED = {
    "MHA": {},
    "MHA, no biases": {"bias": False},
    "GQA": {"n_kv_head": 2},
    "MQA, wide heads": {"n_kv_head": 1, "head_dim": 10},
}
ROTARY = {
    "MHA": {"pos_emb": "rope"},
    "GQA": {"pos_emb": "rope", "n_kv_head": 2, "rope_theta": 50.0},
    "Llama": {**TINY_LLAMA, "n_kv_head": 1},
}


def ids(rows=8):
    return torch.randint(23, (rows, 16))


def ordinary(**settings):
    """A model whose inputs have a mean and whose keys, values and queries have biases."""
    return randomise(GPT(tiny_config(**settings)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LEARNED)
def test_the_rank_of_keys_and_values_is_exact(kind, method):
    """n_embd numbers, or those of the grouped heads, give the source's logits and greedy text."""
    model = ordinary(**LEARNED[kind])
    config, found = model.config, calibrate(model, [ids() for _ in range(4)])
    L = min(config.n_embd, 2 * config.nkv * config.hs)
    twin, layers = to_mla(model, found, Plan(L, method))
    assert twin.config.attention_name == "mla" and twin.config.mla_latent_dim == L
    idx = ids()
    torch.testing.assert_close(all_logits(twin, idx), all_logits(model, idx), atol=1e-4, rtol=1e-4)
    texts = [m.generate(idx[:, :3], 13, temperature=0) for m in (model, twin)]
    assert torch.equal(*texts)
    assert all(0.9999 < layer.kept <= 1.00001 for layer in layers)
    assert sum(abs(layer.predicted) for layer in layers) < 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ROTARY)
def test_a_rotary_key_for_every_key_head_is_exact(kind, method):
    """As many rotary numbers as the keys have, and as many for the values, lose nothing."""
    model = ordinary(**ROTARY[kind])
    n, found = model.config.nkv * model.config.hs, calibrate(model, [ids() for _ in range(4)])
    twin, _ = to_mla(model, found, Plan(2 * n, method, rope_dim=n))
    assert twin.make_cache(1, 4).bytes_per_token == model.make_cache(1, 4).bytes_per_token
    assert sorted(set(twin.config.rope_freqs)) == sorted(model.config.frequencies.tolist())
    idx = ids()
    torch.testing.assert_close(all_logits(twin, idx), all_logits(model, idx), atol=1e-4, rtol=1e-4)
    texts = [m.generate(idx[:, :3], 13, temperature=0) for m in (model, twin)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_mean_costs_no_rank(method):
    """
    The attention of one layer without positions sees as many inputs as there are tokens, V: a
    latent of V - 1 numbers is exact on them, as the mean of keys and values is taken care of.
    """
    model = ordinary(n_layer=1, vocab_size=5)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    text = [torch.randint(5, (8, 16)) for _ in range(4)]
    found, idx = calibrate(model, text), torch.randint(5, (8, 16))
    want = all_logits(model, idx)
    twin, _ = to_mla(model, found, Plan(4, method))
    torch.testing.assert_close(all_logits(twin, idx), want, atol=1e-4, rtol=1e-4)
    for worse in (Plan(3, method), Plan(4, "plain")):
        assert (all_logits(to_mla(model, found, worse)[0], idx) - want).abs().max() > 1e-2


def explicit_attention(attn, x, added, rotation):
    """Attention by its formula; added (B, T, parts, nkv, hs) to keys, content keys and values."""
    (B, T, _), hs, m = x.shape, attn.hs, attn.nh // attn.nkv
    q, k, v = (t.view(B, T, -1, hs) for t in attn.c_attn(x).split(attn.parts, dim=2))
    k, v = k + added[:, :, 0], v + added[:, :, -1]
    scores = torch.einsum(
        "bihc,bjhc->bhij", apply_rope(q, rotation),
        apply_rope(k, rotation).repeat_interleave(m, dim=2),
    )  # fmt: skip
    if rotation is not None:
        scores = scores + torch.einsum(
            "bihc,bjhc->bhij", q, added[:, :, 1].repeat_interleave(m, dim=2)
        )
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")) / hs**0.5
    y = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v.repeat_interleave(m, dim=2))
    return attn.c_proj(y.flatten(2))


@pytest.mark.parametrize("settings", [{}, {"pos_emb": "rope", "n_kv_head": 2}])
def test_calibration_against_autograd(settings, monkeypatch):
    """
    The moments of inputs and gradients of a layer, computed once more by attention's formula, with
    token 0 as every target.
    """
    model, batches = ordinary(n_layer=1, **settings), [ids(3), ids(2)]
    config = model.config
    monkeypatch.setattr(torch, "rand", lambda *size, **how: torch.zeros(*size))
    found = calibrate(model, batches)
    assert found.tokens == 80 and all(p.requires_grad for p in model.parameters())
    inputs = gradients = 0
    for idx in batches:
        x = model.transformer.wte(idx)
        rotation = (model.rope_cos, model.rope_sin) if config.rotary_dim else None
        if rotation is None:
            x = x + model.transformer.wpe.weight
        block, parts = model.transformer.h[0], 2 if rotation is None else 3
        a = block.ln_1(x)
        added = torch.zeros(*idx.shape, parts, config.nkv, config.hs, requires_grad=True)
        y = x + explicit_attention(block.attn, a, added, rotation)
        y = y + block.mlp(block.ln_2(y))
        logits = model.lm_head(model.transformer.ln_f(y)).flatten(0, 1)
        loss = F.cross_entropy(logits, torch.zeros_like(idx).flatten(), reduction="sum")
        (g,) = torch.autograd.grad(loss, added)
        g, one = g.flatten(0, 1).flatten(1).double(), F.pad(a, (0, 1), value=1.0).flatten(0, 1)
        inputs, gradients = inputs + one.double().T @ one.double(), gradients + g.T @ g
    torch.testing.assert_close(found.inputs[0], inputs / 80, atol=1e-5, rtol=1e-5)
    scale = float(gradients.abs().max()) / 80
    torch.testing.assert_close(found.gradients[0], gradients / 80, atol=1e-4 * scale, rtol=1e-4)


def test_calibration_leaves_the_model_as_it_was():
    """Its mode, what is trained and its logits; and it may be run again."""
    model, idx = ordinary(dropout=0.5).train(), ids()
    model.transformer.wte.requires_grad_(False)
    first, second = (calibrate(model, [idx]) for _ in range(2))
    assert torch.equal(first.gradients[1], second.gradients[1])
    assert model.training and not model.transformer.wte.weight.requires_grad
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.h[0].attn.c_attn.weight.requires_grad
    assert "forward" not in vars(model.transformer.h[0].attn)


def test_the_predicted_change_of_the_loss():
    """It is within a factor of 2 of the mean KL divergence from the source, where that is small."""
    model = ordinary(n_layer=1)
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.6
    found, idx = calibrate(model, [ids(64) for _ in range(8)]), ids(256)
    kept = [to_mla(model, found, Plan(L)) for L in (8, 12, 16)]
    predicted = [layers[0].predicted for _, layers in kept]
    assert predicted[0] > predicted[1] > predicted[2] > 0
    want = all_logits(model.double(), idx).log_softmax(-1)
    for (twin, _), guess in zip(kept, predicted, strict=True):
        now = all_logits(twin.double(), idx).log_softmax(-1)
        change = F.kl_div(now, want, reduction="none", log_target=True).sum(-1).mean()
        assert 0.5 < guess / float(change) < 2, (guess, change)


def test_a_rotary_model_without_rotary_numbers():
    """All keys become content, whose positions are those on average."""
    model = ordinary(pos_emb="rope")
    twin, _ = to_mla(model, calibrate(model, [ids()]), Plan(20))
    assert (twin.config.mla_rope_dim, twin.config.rope_freqs) == (0, None)
    assert all_logits(twin, ids()).isfinite().all()


def test_ranks_follow_the_singular_values():
    """Their sum is the budget, and what is left out is smaller than what is kept."""
    spectra = [torch.tensor([9.0, 8.0, 7.0, 6.0, 0, 0]), torch.tensor([1.0, 0.5, 0, 0, 0, 0])]
    assert _ranks(spectra, 3, 6, spread=True) == [4, 2]
    assert _ranks(spectra, 3, 6, spread=False) == [3, 3]
    assert _ranks(spectra, 3, 3, spread=True) == [3, 3]
    long = [torch.arange(100, 0, -1.0) * scale for scale in (1, 10, 3)]
    dims = _ranks(long, 50, 100, spread=True)
    assert sum(dims) == 150 and dims[0] < dims[2] < dims[1] and max(dims) <= 100
    assert _ranks(long, 1000, 100, spread=True) == [100, 100, 100]


def test_randomized_factors_come_near_the_exact_ones():
    """A conversion by the range finder loses hardly more than by the exact SVD."""
    model = ordinary(n_layer=1, n_embd=48, n_head=4)
    found = calibrate(model, [ids() for _ in range(8)])
    lost = {}
    for method in ("exact", "randomized"):
        _, (layer,) = to_mla(model, found, Plan(4, svd_method=method, spread=False))
        lost[method] = layer.predicted
    assert lost["exact"] <= lost["randomized"] * 1.0001 < lost["exact"] * 1.1


def test_values_in_a_subspace_are_multiplied_out():
    """A model of MHA + SVD is converted as the dense model that it computes."""
    for settings in ({}, {"bias": False, "n_kv_head": 2, "pos_emb": "rope"}):
        model, idx = ordinary(**settings, use_svd=True, svd_rank=3), ids()
        dense = without_svd(model)
        assert not dense.config.use_svd and without_svd(dense) is dense
        torch.testing.assert_close(all_logits(dense, idx), all_logits(model, idx))


def test_the_best_plan_is_chosen():
    """One field after the other; the plan that was given stays if nothing is better."""
    model = ordinary()
    found, idx = calibrate(model, [ids() for _ in range(4)]), ids()
    far = lambda twin: float((all_logits(twin, idx) - all_logits(model, idx)).square().mean())
    start = Plan(8, "output", balance=30.0, spread=False)
    best = choose(model, found, start, {"spread": [True], "balance": [0.3, 1.0]}, far)
    plans = [start, *(dataclasses.replace(start, spread=True, balance=b) for b in (30.0, 0.3, 1.0))]
    losses = [far(to_mla(model, found, plan)[0]) for plan in plans]
    assert far(best.model) == min(losses) < losses[0]
    assert best.plan == plans[losses.index(min(losses))]
    assert choose(model, found, start, {}, far).plan == start


@pytest.mark.parametrize("rope_dim", [3, -2, 16, 26])
def test_rotary_numbers_that_cannot_be(rope_dim):
    """An odd number, one that leaves no latent, more than the keys have."""
    model = ordinary(pos_emb="rope")
    found = calibrate(model, [ids()])
    with pytest.raises(ValueError, match=f"rope_dim={rope_dim} does not work.* to "):
        to_mla(model, found, Plan(16 if rope_dim < 20 else 48, rope_dim=rope_dim))
    learned = ordinary()
    with pytest.raises(ValueError, match="from 0 to 0"):
        to_mla(learned, calibrate(learned, [ids()]), Plan(16, rope_dim=2))
