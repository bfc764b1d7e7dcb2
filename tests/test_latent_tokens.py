"""Latent tokens against the recurrence token by token, and against themselves along other paths.
Run: python -m pytest tests/test_latent_tokens.py"""

import pytest
import torch

from model import GPT
from nanomla import latent_tokens
from nanomla.latent_tokens import LatentTokenAttention
from tests.conftest import randomise, tiny_config

M = 5  # slots; nh 4, hs 6, C 24


def config(**changes):
    defaults = {"block_size": 64, "use_latent_tokens": True, "n_latent_tokens": M}
    return tiny_config(**{**defaults, **changes})


def layer(std=0.3, gate_bias=None, **changes):
    attn = randomise(LatentTokenAttention(config(**changes)), std)
    if gate_bias is not None:
        attn.gate.bias.data.fill_(gate_bias)
    return attn


def recurrence(attn, x):
    """
    The definition, one token after the other: K~_t = a_t K~_{t-1} + (1 - a_t) k_t^T. 1 - a is
    computed from the gate's logit, as 1 - 0.99... has few digits.
    """
    B, T, _ = x.shape
    nh, hs, m = attn.nh, attn.hs, attn.m
    q, k, v = attn.c_attn(x).view(B, T, 3, nh, hs).unbind(2)
    gate = attn.gate(x).view(B, T, nh, m, 1)
    gates = gate.sigmoid().pow(1 / 8)
    keys = torch.zeros(B, nh, m, hs, dtype=x.dtype)
    values = torch.zeros(B, nh, m, hs, dtype=x.dtype)
    out = []
    for t in range(T):
        a = gates[:, t]
        new = -torch.expm1(torch.nn.functional.logsigmoid(gate[:, t]) / 8)
        keys = a * keys + new * k[:, t, :, None]
        values = a * values + new * v[:, t, :, None]
        scores = torch.einsum("bhmd,bhd->bhm", keys, q[:, t]) / hs**0.5
        out.append(torch.einsum("bhm,bhmd->bhd", scores.softmax(-1), values))
    return attn.c_proj(torch.stack(out, dim=1).flatten(2))


@pytest.mark.parametrize("cut", [(3, 2000), (16, 1), (64, 2**20)], ids=str)
@pytest.mark.parametrize(("T", "shape"), [(1, {}), (33, {"head_dim": 10, "bias": False})])
def test_chunks_are_the_recurrence(T, shape, cut, monkeypatch):
    """In chunks of 3 to 64 tokens, one, a few or all of them at a time: outputs, and gradients of x
    and all parameters, in float64 to 1e-12."""
    monkeypatch.setattr(latent_tokens, "CHUNK", cut[0])
    monkeypatch.setattr(latent_tokens, "NUMBERS", cut[1])
    attn = layer(**shape).double()
    x = torch.randn(3, T, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, T, 24, dtype=torch.float64)
    inputs = [x, *attn.parameters()]
    want = recurrence(attn, x)
    got = attn(x)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    got = torch.autograd.grad((got * weight).sum(), inputs)
    want = torch.autograd.grad((want * weight).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("gate_bias", [-60.0, 60.0, "both"])
def test_extreme_gates(gate_bias):
    """Gates near 0 forget at once, gates near 1 keep everything: float32 against the recurrence in
    float64, 1e-4 of the largest number; gradients are finite and agree."""
    attn = layer(gate_bias=0.0 if gate_bias == "both" else gate_bias)
    if gate_bias == "both":  # slots that forget beside slots that keep
        attn.gate.bias.data = torch.tensor([-60.0, 60.0, -8.0, 8.0]).repeat(M)
    x = torch.randn(2, 50, 24)
    twin = layer().double()
    twin.load_state_dict(attn.state_dict())

    def results(module, call, x):
        x = x.clone().requires_grad_()
        out = call(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]

    got = results(attn, attn, x)
    want = results(twin, lambda x: recurrence(twin, x), x.double())
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.double(), b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)


def test_long_in_bfloat16():
    """8,192 tokens under bfloat16 autocast: nothing overflows, the outputs are float32's to 3% of
    their size, the gradients to 5%."""
    attn = layer(std=0.1, gate_bias=4.0, bias=False)
    x = torch.randn(1, 8192, 24)

    def results():
        out = attn(x).float()
        return [out, *torch.autograd.grad(out.square().mean(), list(attn.parameters()))]

    want = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results()
    for share, a, b in zip([0.03] + [0.05] * len(want[1:]), got, want, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() < share * b.norm()


@torch.no_grad()
def test_a_state_forgets_all_or_nothing():
    """2 m hs numbers per head and layer however many tokens; what lies between 0 and pos cannot be
    gone back to, rewind takes 0 for it; a pass that is not advanced leaves nothing."""
    model = randomise(GPT(config()))
    x = torch.randint(23, (3, 9))
    cache = model.make_cache(3, 9)
    size = 3 * 2 * 4 * (2 * M * 6) * 4  # sequences, layers, heads, bytes
    assert cache.nbytes == cache.nbytes_at(1) == size and cache.bytes_per_token == 0
    want, _ = model(x)
    attn = model.transformer.h[0].attn
    attn(torch.randn(3, 4, 24), cache.layers[0])  # is replaced by the next pass
    model(x[:, :8], cache=cache)
    cache.truncate(8)  # the tokens held: nothing to forget
    got, _ = model(x[:, 8:], cache=cache)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for pos in (1, 10, -1):
        with pytest.raises(ValueError, match=f"pos={pos} does not work: pos must be 0 or 9"):
            cache.truncate(pos)
    cache.rewind(8)
    assert cache.pos == 0 and not any(t.any() for t in cache.tensors)
    with pytest.raises(ValueError, match="dtype=torch.int8 does not work"):
        model.make_cache(2, 9, torch.int8)
