"""Every fast path against the reference. Run: python -m pytest tests/test_kernels.py"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nanomla import kernels
from nanomla.kernels import Linear, blocks, cpu, reference, sdpa
from nanomla.kernels.reference import by_group, by_head
from tests.conftest import TINY_MLA, Largest, make, reference_attend, torch_threads

NEAR = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=[1, 3])
def threads(request):
    """Runs a test with one thread and with several."""
    with torch_threads(request.param):
        yield request.param


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_through_a_split_weight(n, bias):
    """Linear's decoding path, which cuts the weight into blocks for the cores, is nn.Linear; so is
    a head count of 7."""
    with torch_threads(n):
        for out in (520, 7 * 73):
            layer = Linear(300, out, bias)
            for shape in ((1, 1, 300), (4, 1, 300), (2, 8, 300), (1, 17, 300)):
                x = torch.randn(shape)
                want = F.linear(x, layer.weight, layer.bias)
                torch.testing.assert_close(layer(x), want, **NEAR)


CASES = [  # B, X, T, m, S, D, W
    (1, 1, 1, 4, 2049, 9, None), (1, 1, 3, 2, 1500, 9, None), (2, 4, 1, 2, 300, 8, None),
    (1, 1, 1, 1, 1, 1, 1), (1, 1, 5, 1, 5, 7, 7), (2, 3, 4, 2, 40, 7, 5), (2, 3, 9, 1, 40, 7, 7),
    (3, 2, 6, 2, 6, 8, None), (2, 3, 11, 2, 40, 7, 5), (1, 1, 70, 3, 40000, 5, None),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attend_is_the_reference(case, dtype, tolerance, threads):
    """Decoding, chunks and whole prompts, own values and latents, against float64."""
    B, X, T, m, S, D, W = case
    q = torch.randn(B, X * m, T, D).to(dtype)
    k = torch.randn(B, X, S, D).to(dtype)
    v = None if W is None else torch.randn(B, X, S, W).to(dtype)
    want = reference_attend(q, k, v, scale=0.3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = kernels.attend(q, k, v, scale=0.3)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 4, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_wider_dtype_is_computed_in(dtype, T):
    """Queries wider than the rows, and rows wider than the queries, lose nothing further."""
    q = torch.randn(1, 4, T, 9).to(dtype)
    k = torch.randn(1, 2, 40, 7)
    beside = torch.randn(1, 1, 40, 2)
    got = kernels.attend(q, k, scale=0.3, beside=beside)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    want = reference_attend(q, k, scale=0.3, beside=beside)
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "S"), [(1, 5000), (3, 2100), (4, 4), (20, 60)])
@pytest.mark.parametrize(("X", "m", "W", "r"), [(3, 1, 5, 0), (1, 4, None, 0), (2, 2, None, 3)])
def test_narrow_rows_are_computed_in_float32(X, m, W, r, T, S, kept, threads, monkeypatch):
    """float32 queries on a bfloat16 or float16 cache lose nothing but what the rows have lost, and
    narrow queries no more than one rounding of the result, with scores of up to 30."""
    monkeypatch.setattr(blocks, "BLOCK", 9000)
    q = torch.randn(1, X * m, T, 9 + r)
    k = torch.randn(1, X, S, 9).to(kept)
    v = torch.randn(1, X, S, W).to(kept) if W else None
    beside = torch.randn(1, 1, S, r).to(kept) if r else None
    for dtype, limit in ((torch.float32, 1e-5), (kept, 4e-3)):
        if dtype == kept and T > 8:
            continue  # torch's own kernel, whose weights are narrow too
        q = q.to(dtype)
        got = kernels.attend(q, k, v, scale=2.0, beside=beside)
        with torch.autocast("cpu", torch.bfloat16, enabled=T <= 8):  # which changes nothing
            again = kernels.attend(q, k, v, scale=2.0, beside=beside)
        want = reference_attend(q, k, v, scale=2.0, beside=beside)
        assert got.dtype == dtype and torch.equal(got, again)
        assert (got.double() - want).norm() <= limit * want.norm()


def test_split_keys_is_the_reference():
    """Every number of chunks, with remainders, one new token and several."""
    for T, S, chunks in itertools.product((1, 3, 8), (19, 64, 257), (1, 2, 5, 9)):
        q = torch.randn(2, 1, T * 4, 9)
        rows = torch.randn(2, 1, S, 9)
        got = cpu.split_keys(q, rows, T, 0.3, chunks)
        torch.testing.assert_close(got, reference.attend(q, rows, None, T, 0.3), **NEAR)


@pytest.mark.parametrize("W", [None, 5])
@pytest.mark.parametrize(("T", "S"), [(1, 30), (4, 30), (4, 4), (20, 20), (12, 30)])
def test_a_key_part_that_heads_share(T, S, W):
    """Keys in two parts, one of which all heads share, are the longer keys."""
    q = torch.randn(2, 6, T, 12)
    k = torch.randn(2, 3, S, 7)
    beside = torch.randn(2, 1, S, 5)
    v = None if W is None else torch.randn(2, 3, S, W)
    whole = torch.cat([k, beside.expand(-1, 3, -1, -1)], dim=-1)
    want = reference_attend(q, whole, k if v is None else v, scale=0.3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = kernels.attend(q, k, v, scale=0.3, beside=beside)
        torch.testing.assert_close(got.double(), want, **NEAR)
    torch.testing.assert_close(reference_attend(q, k, v, scale=0.3, beside=beside), want, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("own_values", [True, False])
@pytest.mark.parametrize(("S", "m", "r"), [(600, 1, 4), (600, 2, 0), (1500, 1, 0), (1500, 3, 4)])
def test_a_prefill_makes_no_scores(S, m, r, own_values, kept):
    """600 tokens, the first of a context or its last: nothing is as large as their scores."""
    keep = kernels.quantise if kept == torch.int8 else lambda t: t.to(kept)
    q = torch.randn(1, 2 * m, 600, 8 + r)
    k = keep(torch.randn(1, 2, S, 8))
    v = keep(torch.randn(1, 2, S, 5)) if own_values else None
    beside = keep(torch.randn(1, 1, S, r)) if r else None
    with Largest() as largest:
        got = kernels.attend(q, k, v, scale=0.3, beside=beside)
    assert largest.numbers < 600 * S
    want = reference_attend(q, k, v, scale=0.3, beside=beside)
    torch.testing.assert_close(got.double(), want, **NEAR)


def test_the_reference_by_a_loop():
    """Softmax-weighted means over the keys that each token may see, position by position; and the
    weights alone."""
    T, m, S = 3, 2, 7
    q = torch.randn(1, m, T, 4)
    k = torch.randn(1, 1, S, 4)
    v = torch.randn(1, 1, S, 5)
    got = reference_attend(q, k, v, scale=0.5).float()
    for t, i in itertools.product(range(T), range(m)):
        seen = S - T + t + 1
        weights = (k[0, 0, :seen] @ q[0, i, t] * 0.5).softmax(0)
        torch.testing.assert_close(got[0, i, t], weights @ v[0, 0, :seen])
    weights = kernels.causal_weights(q, k[:, :, :T], 0.5)
    for t, i in itertools.product(range(T), range(m)):
        want = (k[0, 0, : t + 1] @ q[0, i, t] * 0.5).softmax(0)
        torch.testing.assert_close(weights[0, i, t, : t + 1], want)
        assert not weights[0, i, t, t + 1 :].any()


@torch.no_grad()
@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("settings", [{"mla_groups": 4, "mla_latent_dim": 3}, {}], ids=str)
def test_prompts_of_a_model_make_no_scores(settings, absorb):
    """A prompt in two pieces of 300 tokens through MLA's cache, in both forms: what the whole
    prompt gives, and no tensor as large as the scores of a piece."""
    attn = make({**TINY_MLA, **settings}).transformer.h[0].attn
    cache = attn.new_cache(1, 600)
    x = torch.randn(1, 600, 24)
    want = attn(x, absorb=not absorb)
    got = []
    for piece in x.split(300, dim=1):
        with Largest() as largest:
            got.append(attn(piece, cache, absorb=absorb))
        cache.advance(300)
        assert largest.numbers < 300 * cache.pos
    torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("X", "m", "r"), [(1, 3, 0), (2, 1, 4), (2, 2, 0)])
@pytest.mark.parametrize("T", [1, 5, 9, 300])
def test_sequences_of_unequal_lengths(T, X, m, r):
    """Few new tokens and many: what every sequence gives alone, and no scores of many."""
    B, S = 3, 700
    q = torch.randn(B, X * m, T, 8 + r)
    k = torch.randn(B, X, S, 8)
    beside = torch.randn(B, 1, S, r) if r else None
    lengths = torch.tensor([0, 400, 123])
    with Largest() as largest:
        got = kernels.attend(q, k, scale=0.3, beside=beside, lengths=lengths)
    assert T < 300 or largest.numbers < B * X * T * m * S / 2
    for b, n in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        more = None if beside is None else beside[one, :, : n + T]
        want = reference_attend(q[one], k[one, :, : n + T], scale=0.3, beside=more)
        torch.testing.assert_close(got[one].double(), want, **NEAR)


@pytest.mark.parametrize("lengths", [None, [0, 30, 12]])
@pytest.mark.parametrize(("T", "W"), [(1, 5), (1, None), (4, 9), (4, None)])
def test_few_tokens_by_torch(T, W, lengths):
    """What a GPU without the kernel takes: torch's attention with a small mask."""
    q = torch.randn(3, 6, T, 7)
    k = torch.randn(3, 2, 40, 7)
    v = torch.randn(3, 2, 40, W) if W else None
    lengths = None if lengths is None else torch.tensor(lengths)
    want = reference_attend(q, k, v, scale=0.3, lengths=lengths)
    got = by_head(sdpa.few(by_group(q, 2), k, v, T, 0.3, lengths), T)
    torch.testing.assert_close(got.double(), want, **NEAR)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "S"), [(9, 10), (9, 3000), (600, 601), (600, 1500)])
def test_many_tokens_behind_old_ones(T, S, dtype):
    """The old keys and the new ones, each by torch's kernel, merged: scores of up to 30."""
    q, k, v = (torch.randn(1, 2, n, 8).to(dtype) * 2 for n in (T, S, S))
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3}.get(dtype, 2e-2)
    want = reference_attend(q, k, v, scale=1.0)
    got = cpu.go_on(q, k, v, 1.0)
    assert got.dtype == dtype and float((got.double() - want).norm() / want.norm()) < limit
