"""What a model costs, by hand. Run: python -m pytest tests/test_costs.py"""

import time

import pytest
import torch

from model import GPT, GPTConfig
from nanomla import costs
from nanomla.errors import UserError
from tests.conftest import TINY_MLA, tiny_config
from tests.test_model import GRID


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


def test_parameters_by_arithmetic():
    """As many as the built model has, for every variant; sizes that cannot be built take no time,
    either."""
    with torch.device("meta"):
        for settings in GRID:
            config = tiny_config(**settings)
            assert costs.parameters(config) == GPT(config).get_num_params(False), settings
    began = time.perf_counter()
    deep = costs.parameters(GPTConfig(n_layer=100_000))
    assert deep == costs.parameters(GPTConfig(n_layer=1)) + 99_999 * 7_087_872
    wide = costs.parameters(GPTConfig(n_embd=12 * 10**12, use_mla=True, mla_share_latent=True))
    assert wide > 12 * 8 * (12 * 10**12) ** 2 and time.perf_counter() - began < 0.5


def test_free_memory(tmp_path, monkeypatch):
    """MemAvailable, or what a control group leaves of it, in which cached files can be dropped."""
    for name in ("MEMINFO", "OWN_CGROUPS", "CGROUPS"):
        monkeypatch.setattr(costs, name, str(tmp_path / name))
    assert costs.free_memory("cpu") is None and costs.free_memory("meta") is None
    (tmp_path / "MEMINFO").write_text("MemTotal: 99 kB\nMemAvailable:   50 kB\n")
    assert costs.free_memory("cpu") == 50 * 1024
    group = tmp_path / "CGROUPS" / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "OWN_CGROUPS").write_text("1:cpu:/x\n0::/a/b\n")
    stat = "anon 7\ninactive_file 2000\nactive_file 1000\nfile 9999\n"
    for folder, limit in ((group, "max\n"), (group.parent, "20000\n")):
        for name, text in (("max", limit), ("current", "12000\n"), ("stat", stat)):
            (folder / f"memory.{name}").write_text(text)
    assert costs.free_memory("cpu") == 20000 - 12000 + 3000
    (group.parent / "memory.max").write_text("1000\n")
    assert costs.free_memory("cpu") == 0


def test_what_does_not_fit_is_one_line(monkeypatch):
    """Needed and free bytes in units that people read, and the remedy; also for a cache."""
    monkeypatch.setattr(costs, "free_memory", lambda device: 22_100_000_000)
    costs.require_memory(22_100_000_000, "the model", "cpu", "try less")
    with pytest.raises(UserError, match="^a run needs 4.0 TB, 22.1 GB are free; try less$"):
        costs.require_memory(4 * 10**12, "a run", "cpu", "try less")
    assert costs.in_units(999) == "999 bytes" and costs.in_units(10**400) == "over 1,000 EB"
    for settings in ({}, TINY_MLA, {"use_latent_tokens": True, "n_latent_tokens": 5}):
        model = GPT(tiny_config(**settings))
        with pytest.raises(UserError, match=r"the cache needs .* [TP]B, 22.1 GB are free; "):
            model.make_cache(10**12, 16)
    monkeypatch.setattr(costs, "free_memory", lambda device: None)
    costs.require_memory(10**30, "the model", "tpu", "try less")


def test_training_bytes_by_hand():
    """Weights, gradients and optimizer state; logits twice; the stream before every layer."""
    config = tiny_config()
    parameters = GPT(config).get_num_params(False)
    tokens = 3 * 16
    numbers = 2 * 23 * tokens + 2 * 24 * tokens
    assert costs.training_bytes(config, 3) == 16 * parameters + 4 * numbers
    assert costs.training_bytes(config, 3, 4) == 12 * parameters + 4 * numbers


def test_flops_of_low_rank_values():
    """Training multiplies by the dense map; decoding by down and, for every query head, by up. A
    rotary latent is read by its factors in both."""
    C, nh, hs, rank, L, n = 24, 4, 6, 2, 8, 10
    svd = {"use_svd": True, "svd_rank": rank, "n_layer": 1, "bias": False}
    rest = 23 * C + C * C + 2 * C * 4 * C  # lm_head, c_proj and the MLP

    def flops(absorbed=False, **settings):
        return costs.flops_per_token(GPT(tiny_config(**settings, **svd)), n, absorbed)

    for nkv in (1, 2, 4):
        keys = rest + C * C + C * nkv * hs
        factors = C * nkv * rank + nh * hs * rank
        assert flops(n_kv_head=nkv) == 2 * (keys + C * nkv * hs + nh * n * 2 * hs)
        assert flops(True, n_kv_head=nkv) == 2 * (keys + factors + nh * n * (hs + rank))
    latent, factors = {**TINY_MLA, "mla_latent_dim": L}, L * nh * rank + nh * hs * rank
    latent = {k: v for k, v in latent.items() if k != "n_layer"}
    keys = rest + C * C + C * (L + 2) + L * nh * 4
    assert flops(**latent) == 2 * (keys + L * nh * hs + nh * n * 2 * hs)
    assert flops(True, **latent) == 2 * (keys + factors + nh * n * (2 * L + 2))
    turning = {**latent, "mla_rope": "latent", "mla_rope_dim": 4}
    both = 2 * (rest + C * nh * L + C * L + factors + nh * n * 2 * L)
    assert flops(**turning) == flops(True, **turning) == both


def test_caches_in_words():
    """Beside MHA's where they differ from it, fewer or more."""
    fewer = "9 cached numbers per token and layer, 5.33x fewer than MHA"
    assert costs.cache_in_words(tiny_config(**TINY_MLA)) == fewer
    assert costs.cache_in_words(tiny_config()) == "48 cached numbers per token and layer"
    state = {"use_latent_tokens": True, "block_size": 16}
    words = "a state of {} numbers per layer{}".format
    more = words(48 * 40, ", 2.5x more than MHA at 16 tokens")
    assert costs.cache_in_words(tiny_config(**state, n_latent_tokens=40)) == more
    assert costs.cache_in_words(tiny_config(**state, n_latent_tokens=16)) == words(48 * 16, "")
