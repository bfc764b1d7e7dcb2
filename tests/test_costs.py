"""What a model costs, by hand. Run: python -m pytest tests/test_costs.py"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from nanomla import costs, memory
from nanomla.errors import UserError
from tests.conftest import KINDS, TINY_MLA, reference_attend, tiny_config


def test_analysis_counts_real_tensors():
    """Parameters of keys and values against MHA's, and cache sizes, by hand for one
    configuration."""
    model = GPT(tiny_config(**{**TINY_MLA, "bias": True, "n_layer": 3}))
    attn = model.transformer.h[0].attn
    # kv_latent_proj and its bias, norm, k_expand, v_expand
    mla = 24 * 9 + 9 + 7 + 7 * 4 * 4 + 7 * 24
    assert attn.get_compression_ratio() == pytest.approx(2 * 24 * 25 / mla)
    assert model.get_compression_ratio() == pytest.approx(2 * 24 * 25 / mla)
    assert model.get_memory_savings(100) == pytest.approx(48 / 9) == attn.get_memory_savings(5000)
    assert model.get_cache_size_ratio() == pytest.approx(9 / 48)
    assert costs.count_kv_parameters(model) == 3 * mla
    dense = GPT(tiny_config())
    assert dense.get_compression_ratio() == dense.get_memory_savings(7) == 1
    shared = GPT(tiny_config(**{**TINY_MLA, "bias": True, "n_layer": 3, "mla_share_latent": True}))
    assert shared.get_compression_ratio() == pytest.approx(3 * 1200 / (3 * mla - 2 * 225))
    svd = GPT(tiny_config(use_svd=True, svd_rank=2))
    assert svd.get_cache_size_ratio() == pytest.approx((6 + 2) / 12)


NOPE = {**TINY_MLA, "mla_nope_dim": 9}
COUNTED = {
    **KINDS,
    "MLA, nope": NOPE,
    "MLA, nope, groups, low-rank queries": {**NOPE, "mla_groups": 2, "mla_q_latent_dim": 5},
    "MLA + SVD, nope": {**TINY_MLA, "mla_nope_dim": 1, "use_svd": True, "svd_rank": 2},
    "rotary latent + SVD": {**KINDS["rotary latent"], "use_svd": True, "svd_rank": 2},
    "SwiGLU, untied": {"mlp": "swiglu", "tie_weights": False},
    "experts": {"moe_experts": 6, "moe_active": 2, "moe_hidden": 5},
    "experts in all layers": {
        "mlp": "swiglu", "moe_experts": 5, "moe_active": 3, "moe_shared": 0, "moe_dense_layers": 0,
    },
}


def counted_flops(run) -> int:
    """What torch counts while it runs, by kernels that it knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", COUNTED)
def test_flops_of_training_as_torch_counts_them(kind):
    """
    A forward pass, operation for operation, where scores are counted for all T x T pairs. Two
    things are not a token's: value maps are multiplied out once a pass, and torch's kernels take
    keys and values of one width, for which zeros are added. The backward pass is twice as much.
    """
    B, T = 3, 16  # a whole chunk of latent tokens
    model = GPT(tiny_config(**COUNTED[kind]))
    config = model.config
    idx = torch.randint(0, config.vocab_size, (B, T))
    flops = B * T * costs.flops_per_token(model, T)
    for block in model.transformer.h:
        attn = block.attn
        if getattr(attn, "low_rank", False) and attn.dense_values_in_training:
            flops += 2 * attn.v_down.weight.numel() * config.hs
        if config.attention_name == "mla":
            zeros = abs(config.nope + config.mla_rope_dim - config.hs)
            flops += B * T * T * 2 * config.n_head * zeros
    assert counted_flops(lambda: model(idx, idx)) == flops
    if config.attention_name != "latent_tokens":  # which does a part of it number by number
        assert counted_flops(lambda: model(idx, idx)[1].backward()) == 3 * flops


@pytest.mark.parametrize("kind", COUNTED)
def test_flops_of_decoding_as_torch_counts_them(kind, monkeypatch):
    """
    One token with a cache, whose attention the reference computes, in products that torch counts.
    Where [latent ; rotary key] lie side by side, the reference averages the rotary keys too.
    """
    B, S = 3, 16
    monkeypatch.setattr("model.attend", lambda *args, **settings: reference_attend(
        *args, **{name: value for name, value in settings.items() if name != "dropout"}
    ).float())
    model = GPT(tiny_config(**COUNTED[kind])).eval()
    config = model.config
    idx = torch.randint(0, config.vocab_size, (B, S))
    cache = model.make_cache(B, S)
    with torch.no_grad():
        model(idx[:, :-1], cache=cache)
        counted = counted_flops(lambda: model(idx[:, -1:], cache=cache))
    flops = B * costs.flops_per_token(model, S, absorbed=True)
    if config.attention_name == "latent_tokens":  # writes into the slots by torch.lerp
        flops -= B * config.n_layer * 2 * cache.layers[0].state[0].numel()
    if config.attention_name == "mla" and config.mla_groups == 1:
        flops += B * config.n_layer * S * 2 * config.n_head * config.mla_rope_dim
    assert counted == flops


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


@pytest.mark.parametrize("kind", [*KINDS, "experts"])
def test_parameters_without_memory(kind):
    """As many as the built model has; what no machine holds takes no time."""
    for changes in ({}, {"mla_share_latent": kind == "MLA", "tie_weights": False, "bias": False}):
        config = tiny_config(**{**COUNTED[kind], **changes})
        assert costs.parameters(config) == GPT(config).get_num_params(False), changes
    one = costs.parameters(GPTConfig(n_layer=1))
    assert costs.parameters(GPTConfig(n_layer=100_000)) == one + 99_999 * 7_087_872


def test_what_does_not_fit_is_one_line(monkeypatch):
    """Needed and free bytes in units that people read, and the remedy."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 22_100_000_000)
    memory.require_memory(22_100_000_000, "the model", "cpu", "try less")
    with pytest.raises(UserError, match=r"the cache needs .* [TP]B, 22.1 GB are free; "):
        GPT(tiny_config(**TINY_MLA)).make_cache(10**12, 16)


def test_training_bytes_by_hand():
    """Weights, gradients and optimizer state; logits twice; the stream before every layer."""
    config = tiny_config()
    parameters = GPT(config).get_num_params(False)
    tokens = 3 * 16
    numbers = 2 * 23 * tokens + 2 * 24 * tokens
    assert costs.training_bytes(config, 3, moments=2) == 16 * parameters + 4 * numbers
    assert costs.training_bytes(config, 3, moments=1) == 12 * parameters + 4 * numbers


def test_flops_of_decoding_with_low_rank_values():
    """By hand: decoding multiplies by down and, for every query head, by up."""
    C, nh, hs, rank, L, n = 24, 4, 6, 2, 8, 10
    svd = {"use_svd": True, "svd_rank": rank, "n_layer": 1, "bias": False}
    rest = 23 * C + C * C + 2 * C * 4 * C  # lm_head, c_proj and the MLP

    def flops(**settings):
        return costs.flops_per_token(GPT(tiny_config(**{**settings, **svd})), n, absorbed=True)

    keys = C * C + C * 2 * hs  # of two key/value heads
    factors = C * 2 * rank + nh * hs * rank
    assert flops(n_kv_head=2) == 2 * (rest + keys + factors + nh * n * (hs + rank))
    latent = {**TINY_MLA, "mla_latent_dim": L}
    keys = C * C + C * (L + 2) + L * nh * 4
    factors = L * nh * rank + nh * hs * rank
    assert flops(**latent) == 2 * (rest + keys + factors + nh * n * (2 * L + 2))
    rotary = {**latent, "mla_rope": "latent", "mla_rope_dim": 4}
    keys = C * nh * L + C * L
    assert flops(**rotary) == 2 * (rest + keys + factors + nh * n * 2 * L)


def test_caches_in_words():
    """Beside MHA's where they differ from it."""
    latents = costs.on_meta(tiny_config(**TINY_MLA))
    words = "9 cached numbers per token and layer, 5.33x fewer than MHA"
    assert costs.cache_in_words(latents) == words
    state = costs.on_meta(tiny_config(use_latent_tokens=True, n_latent_tokens=40))
    words = "a state of 1920 numbers per layer, 2.5x more than MHA at 16 tokens"
    assert costs.cache_in_words(state) == words


def test_caches_of_models_by_others():
    """The bytes that docs/claims.md has of one sequence in two bytes a number, by our caches."""

    def gigabytes(tokens, **shape):
        shape = {"vocab_size": 8, "block_size": tokens, "pos_emb": "rope", **shape}
        with torch.device("meta"):
            return GPT(GPTConfig(**shape)).make_cache(1, tokens, torch.bfloat16).nbytes / 1e9

    gpt3 = {"n_layer": 96, "n_head": 96, "n_embd": 12288}
    assert gigabytes(2048, **gpt3) == 2 * 12288 * 96 * 2048 * 2 / 1e9 == pytest.approx(9.66, 1e-3)
    llama2 = {"n_layer": 80, "n_head": 64, "n_embd": 8192}
    assert gigabytes(4096, **llama2, n_kv_head=8) == pytest.approx(1.342, 1e-3)
    assert gigabytes(4096, **llama2) == pytest.approx(10.74, 1e-3)
    deepseek = {"n_layer": 60, "n_head": 128, "head_dim": 128, "n_embd": 5120}
    mla = {"use_mla": True, "mla_latent_dim": 512, "mla_rope_dim": 64, "mla_nope_dim": 128}
    mha = gigabytes(4096, **deepseek)
    assert mha == pytest.approx(16.11, 1e-3)
    assert mha / gigabytes(4096, **deepseek, **mla) == pytest.approx(56.89, 1e-3)
    # the paper's 93.3%: 6 bits a number against DeepSeek 67B's 16
    deepseek_67b = {"n_layer": 95, "n_head": 64, "n_embd": 8192, "n_kv_head": 8}
    share = gigabytes(4096, **deepseek, **mla) / gigabytes(4096, **deepseek_67b)
    assert 1 - share == pytest.approx(0.822, 1e-3)
    assert 1 - share * 6 / 16 == pytest.approx(0.933, 1e-3)
