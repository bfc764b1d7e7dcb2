"""Weights made into other weights. Run: python -m pytest tests/test_surgery.py"""

import pytest
import torch

from model import GPT
from nanomla.surgery import crop_block_size, factorise, factorise_values
from tests.conftest import TINY_MLA, randomise, tiny_config

DENSE = [
    {},
    {"bias": False},
    {"n_kv_head": 2, "pos_emb": "rope"},
    TINY_MLA,
    {**TINY_MLA, "mla_groups": 4, "mla_latent_dim": 3},
    {**TINY_MLA, "mla_nope_dim": 5},
    {**TINY_MLA, "mla_rope": "latent", "mla_latent_dim": 8},
]


def all_logits(model, idx):
    with torch.no_grad():
        return model(idx, idx)[0]


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
