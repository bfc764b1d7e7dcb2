"""What a model costs, by hand. Run: python -m pytest tests/test_costs.py"""

import pytest

from model import GPT
from nanomla import costs
from tests.conftest import TINY_MLA, tiny_config


def test_analysis_counts_real_tensors():
    """Parameters of keys and values against MHA's, and cache sizes, by hand for one
    configuration."""
    model = GPT(tiny_config(**{**TINY_MLA, "bias": True, "n_layer": 3}))
    attn = model.transformer.h[0].attn
    mine = (
        24 * 9 + 9 + 7 + 7 * 4 * 4 + 7 * 24
    )  # kv_latent_proj and its bias, norm, k_expand, v_expand
    assert attn.get_compression_ratio() == pytest.approx(2 * 24 * 25 / mine)
    assert model.get_compression_ratio() == pytest.approx(2 * 24 * 25 / mine)
    assert model.get_memory_savings(100) == pytest.approx(48 / 9) == attn.get_memory_savings(5000)
    assert model.get_cache_size_ratio() == pytest.approx(9 / 48)
    dense = GPT(tiny_config())
    assert (
        dense.get_compression_ratio()
        == dense.get_memory_savings(7)
        == dense.get_cache_size_ratio()
        == 1
    )
    shared = GPT(tiny_config(**{**TINY_MLA, "bias": True, "n_layer": 3, "mla_share_latent": True}))
    assert shared.get_compression_ratio() == pytest.approx(3 * 1200 / (3 * mine - 2 * 225))
    svd = GPT(tiny_config(use_svd=True, svd_rank=2))
    assert svd.get_cache_size_ratio() == pytest.approx((6 + 2) / 12)


def test_flops_by_hand():
    """Two per weight of every matrix, and two per key, head and number in scores and average."""
    model = GPT(tiny_config(**{**TINY_MLA, "bias": False}))
    matrices = 24 * 24 * 2 + 24 * 9 + 7 * 16 + 7 * 24 + 2 * 24 * 96
    weights = 2 * (23 * 24 + 2 * matrices)
    assert costs.flops_per_token(model, 10) == weights + 2 * 2 * 4 * 10 * (6 + 6)
    absorbed = costs.flops_per_token(model, 10, absorbed=True)
    assert absorbed == weights + 2 * 2 * 4 * 10 * (2 * 7 + 2)


def test_use_of_a_gpu(monkeypatch):
    """The longest name that fits decides the peak; None on a CPU, in float32 and for an unknown
    GPU."""
    model = GPT(tiny_config())
    flops = 3 * costs.flops_per_token(model, 16)
    assert costs.mfu(model, 16, 1e6, "cpu", "bfloat16") is None
    assert costs.mfu(model, 16, 1e6, "cuda", "float32") is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(costs.torch.cuda, "get_device_name", lambda name=name: name)
        assert costs.mfu(model, 16, 1e6, "cuda", "bfloat16") == pytest.approx(flops * 1e6 / peak)
    monkeypatch.setattr(costs.torch.cuda, "get_device_name", lambda: "Unknown 1")
    assert costs.mfu(model, 16, 1e6, "cuda", "bfloat16") is None
