"""Latent tokens against the recurrence token by token, and against themselves along other paths.
Run: python -m pytest tests/test_latent_tokens.py"""

import pytest
import torch
from torch.func import functional_call

from model import GPT
from nanomla import latent_tokens
from nanomla.cache import Cache
from nanomla.generate import Sampler, stream_tokens
from nanomla.latent_tokens import LatentTokenAttention
from tests.conftest import randomise, tiny_config

M = 5  # slots; nh 4, hs 6, C 24


def config(**changes):
    wanted = {"block_size": 64, "use_latent_tokens": True, "n_latent_tokens": M}
    return tiny_config(**{**wanted, **changes})


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


def cache_of(*layers, batch_size=3, max_len=40, dtype=torch.float32):
    """A whole cache of these layers, as a GPT's."""
    caches = [attn.new_cache(batch_size, max_len, dtype) for attn in layers]
    return Cache(caches, layers[0].config)


@pytest.fixture(params=[(1, 2**20), (3, 2000), (16, 1), (64, 2**20)], ids=str)
def cut(request, monkeypatch):
    """Chunks of 1 to 64 tokens, one, a few or all of them at a time."""
    c, numbers = request.param
    monkeypatch.setattr(latent_tokens, "CHUNK", c)
    monkeypatch.setattr(latent_tokens, "NUMBERS", numbers)


@pytest.mark.parametrize("T", [1, 16, 50])
def test_chunks_are_the_recurrence(T, cut):
    """Outputs, and gradients of x and all parameters, in float64 to 1e-12."""
    attn = layer().double()
    x = torch.randn(3, T, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, T, 24, dtype=torch.float64)
    wanted = [x, *attn.parameters()]
    want = recurrence(attn, x)
    got = attn(x)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    got = torch.autograd.grad((got * weight).sum(), wanted)
    want = torch.autograd.grad((want * weight).sum(), wanted)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("gate_bias", [-60.0, -8.0, 8.0, 60.0, "both"])
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

    got, want = results(attn, attn, x), results(twin, lambda x: recurrence(twin, x), x.double())
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.double(), b, atol=1e-4 * b.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("gate_bias", [-60.0, 4.0, 60.0])
def test_long_in_bfloat16(gate_bias):
    """16,384 tokens under bfloat16 autocast: nothing overflows, and the outputs are float32's to 3%
    of their size; so are they with weights in bfloat16."""
    attn = layer(std=0.1, gate_bias=gate_bias, bias=False)
    x = torch.randn(1, 16384, 24)
    with torch.no_grad():
        want = attn(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = attn(x)
        half = attn.bfloat16()(x.bfloat16())
    want = want.double()  # a gate that never opens leaves numbers whose squares float32 lacks
    for got in (mixed, half):
        assert torch.isfinite(got).all()
        assert (got.double() - want).norm() < 0.03 * want.norm()


def test_long_gradients_in_bfloat16():
    """The backward pass at 16,384 tokens under bfloat16 autocast: finite, and float32's to 5%."""
    attn = layer(std=0.1, gate_bias=4.0, bias=False)
    x = torch.randn(1, 16384, 24)

    def gradients():
        return torch.autograd.grad(attn(x).float().square().mean(), list(attn.parameters()))

    want = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients()
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() < 0.05 * b.norm()


def test_causal():
    """Another token t leaves all outputs before t bit-identical and changes those from t on."""
    attn = layer()
    x = torch.randn(2, 50, 24)
    with torch.no_grad():
        want = attn(x)
        for t in (0, 15, 16, 31, 49):
            other = x.clone()
            other[:, t] += 1
            got = attn(other)
            assert torch.equal(got[:, :t], want[:, :t])
            assert ((got - want)[:, t:].abs().amax(dim=(0, 2)) > 1e-6).all()


def test_batch_invariant():
    """A row alone gives what it gives among others, 1e-6."""
    attn = layer()
    x = torch.randn(3, 50, 24)
    with torch.no_grad():
        torch.testing.assert_close(attn(x[1:2]), attn(x)[1:2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(1,) * 40, (17, 23), (39, 1), (1, 16, 5, 18), (16, 16, 8)])
def test_cached_is_whole(sizes, dtype):
    """However the tokens are cut into passes, the outputs are those of one pass."""
    attn = layer(n_layer=2).to(dtype)
    x = torch.randn(3, 40, 24, dtype=dtype)
    cache = attn.new_cache(3, 40, dtype)
    end = 0
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    with torch.no_grad():
        want = attn(x)
        for T in sizes:
            got = attn(x[:, end : end + T], cache)
            torch.testing.assert_close(got, want[:, end : end + T], atol=tol, rtol=tol)
            cache.advance(T)
            end += T
            assert cache.pos == end


@pytest.mark.parametrize(("dtype", "tol"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_rounded_states(dtype, tol):
    """A state in 16 bits, rounded with every token, stays near float32's over 300 tokens."""
    attn = layer(std=0.1, bias=False)
    x = torch.randn(2, 300, 24)
    cache = attn.new_cache(2, 300, dtype)
    out = []
    with torch.no_grad():
        want = attn(x)
        for t in range(300):
            out.append(attn(x[:, t : t + 1], cache))
            cache.advance(1)
    got = torch.cat(out, dim=1)
    assert got.dtype == torch.float32 and (got - want).norm() < tol * want.norm()


def test_a_pass_counts_once():
    """A pass that is not followed by advance leaves the state as it was: repeated, it gives the
    same; after truncate it is forgotten."""
    attn = layer()
    x = torch.randn(3, 9, 24)
    cache = cache_of(attn, max_len=9)
    state = cache.layers[0]
    with torch.no_grad():
        want = attn(x)
        attn(x[:, :7], state)
        attn(x[:, :7], state)
        cache.advance(7)
        for _ in range(3):
            torch.testing.assert_close(attn(x[:, 7:8], state), want[:, 7:8], atol=1e-5, rtol=1e-5)
        cache.truncate(7)  # the tokens held: nothing to forget
        held = cache.tensors[0].clone()
        cache.advance(0)
        assert cache.pos == 7 and torch.equal(cache.tensors[0], held)
        attn(x[:, 7:8], state)
        cache.advance(1)
        torch.testing.assert_close(attn(x[:, 8:], state), want[:, 8:], atol=1e-5, rtol=1e-5)
        cache.truncate(0)
        assert cache.pos == 0
        torch.testing.assert_close(attn(x, state), want, atol=1e-5, rtol=1e-5)


def test_truncate_and_rewind():
    """A state goes back to 0 or stays; what lies between is refused, and rewind takes 0 for it."""
    attn = layer()
    x = torch.randn(3, 9, 24)
    cache = cache_of(attn, max_len=9)
    state = cache.layers[0]
    with torch.no_grad():
        attn(x, state)
    cache.advance(9)
    for pos in (1, 8, 10, -1):
        with pytest.raises(ValueError, match=f"pos={pos} does not work: pos must be 0 or 9"):
            cache.truncate(pos)
    cache.rewind(9)
    assert cache.pos == 9 and cache.tensors[0].any()
    cache.rewind(8)
    assert cache.pos == 0 and not cache.tensors[0].any()


def test_shared_prefill():
    """One row read in pieces and copied to all rows equals all rows read at once."""
    attn = layer()
    x = torch.randn(1, 20, 24).expand(3, -1, -1)
    cache = cache_of(attn)
    with torch.no_grad():
        first = cache.row(0)
        for start, end in ((0, 12), (12, 19)):
            attn(x[:1, start:end], first.layers[0])
            first.advance(end - start)
        assert first.pos == 19 and cache.pos == 0 and not cache.tensors[0][1:].any()
        cache.advance(19)
        cache.broadcast_row(0)
        got = attn(x[:, 19:], cache.layers[0])
        torch.testing.assert_close(got, attn(x)[:, 19:], atol=1e-5, rtol=1e-5)


def test_the_state_is_constant():
    """2 m hs numbers per head and layer, whatever the context and however many are held."""
    for max_len, dtype in ((1, torch.float32), (64, torch.float64), (64, torch.bfloat16)):
        cache = cache_of(layer(), layer(), max_len=max_len, dtype=dtype)
        size = 3 * 2 * 4 * (2 * M * 6) * dtype.itemsize  # rows, layers, heads
        assert cache.nbytes == cache.nbytes_at(1) == cache.nbytes_at(10**6) == size
        assert cache.bytes_per_token == 0 and cache.max_len == max_len
        cache.advance(max_len)
        assert cache.nbytes == size
        with pytest.raises(ValueError, match="T=1 does not work"):
            cache.advance(1)


def test_what_a_cache_refuses():
    """int8, sizes below 1, gradients, other sequences, too many tokens."""
    model = randomise(GPT(config()))
    idx = torch.randint(23, (2, 3))
    with pytest.raises(ValueError, match="dtype=torch.int8 does not work"):
        model.make_cache(2, 9, torch.int8)
    with pytest.raises(ValueError, match="dtype=torch.int8 does not work"):
        layer().new_cache(2, 9, torch.int8)
    with pytest.raises(ValueError, match="max_len=0 does not work"):
        model.make_cache(2, 0)
    cache = model.make_cache(2, 9)
    with pytest.raises(RuntimeError, match="inference"):
        model(idx, cache=cache)
    cache.advance(3)
    assert cache.pos == 3 and not cache.tensors[0].any()
    with torch.no_grad():
        for B, T, words in (
            (3, 1, "2 rows, the input 3"),
            (2, 7, "the cache is full: 3 tokens held, 7 to add, max_len=9"),
        ):
            with pytest.raises(ValueError, match=words):
                model(torch.zeros(B, T, dtype=torch.int64), cache=cache)
        assert cache.pos == 3 and not cache.tensors[0].any()
        model(torch.zeros(2, 6, dtype=torch.int64), cache=cache)


@pytest.mark.parametrize("changes", [{"head_dim": 10}, {"bias": False}, {"n_head": 1}])
def test_other_shapes(changes):
    """A head size of its own, no biases but the gate's, a single head: still the recurrence."""
    attn = layer(**changes).double()
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    torch.testing.assert_close(attn(x), recurrence(attn, x), atol=1e-12, rtol=1e-12)
    assert attn.gate.bias is not None


def test_gpt_with_a_cache():
    """Logits of a prompt in pieces are those of the whole; greedy text with the cache, streamed
    with a shared prefill, and past max_len, is that without."""
    model = randomise(GPT(config(block_size=32)))
    idx = torch.randint(23, (3, 20))
    with torch.no_grad():
        want, _ = model(idx, idx)
        for sizes in ((1,) * 20, (7, 13), (19, 1)):
            cache = model.make_cache(3, 20)
            end = 0
            for T in sizes:
                logits, _ = model(idx[:, end : end + T], cache=cache)
                end += T
                torch.testing.assert_close(logits[:, 0], want[:, end - 1], atol=1e-5, rtol=1e-4)
    same = idx[:1].expand(3, -1)
    for prompt in (idx, same):
        greedy = model.generate(prompt, 12, temperature=0)
        assert torch.equal(greedy, model.generate(prompt, 12, temperature=0, use_cache=False))
        streamed = list(stream_tokens(model, prompt, 12, Sampler(0)))
        assert torch.equal(torch.cat(streamed, dim=1), greedy[:, 20:])
    long = model.generate(idx, 30, temperature=0)  # goes on with half the context from 33 on
    start = long[:, 33 - 16 : 33]
    assert torch.equal(long[:, 33:35], model.generate(start, 2, temperature=0)[:, -2:])


def test_generate_goes_on_from_a_cache():
    """From a cache that holds all of the prompt, which is then read again, or a part of it."""
    model = randomise(GPT(config(block_size=32)))
    idx = torch.randint(23, (3, 20))
    want = model.generate(idx, 5, temperature=0)
    for held in (20, 19, 7):
        cache = model.make_cache(3, 32)
        with torch.no_grad():
            model(idx[:, :held], cache=cache)
        assert torch.equal(model.generate(idx, 5, temperature=0, cache=cache), want)
        assert cache.pos == 24


def test_gradcheck(monkeypatch):
    """Numerical derivatives in float64, by x and every parameter, over several groups of chunks."""
    monkeypatch.setattr(latent_tokens, "CHUNK", 3)
    monkeypatch.setattr(latent_tokens, "NUMBERS", 1)
    attn = layer().double()
    names, values = zip(*attn.named_parameters(), strict=True)
    x = torch.randn(1, 8, 24, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return functional_call(attn, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)
