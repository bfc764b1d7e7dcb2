"""Every fast path against the reference. Run: python -m pytest tests/test_kernels.py"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, Linear
from nanomla import kernels
from nanomla.kernels import blocks, cpu, reference
from tests.conftest import TINY_MLA, randomise, tiny_config


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_through_a_split_weight(threads, bias):
    """Linear's decoding path, which cuts the weight into blocks for the cores, is nn.Linear; so is
    a head count of 7."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for out in (520, 7 * 73):
            layer = Linear(300, out, bias)
            for shape in ((1, 1, 300), (4, 1, 300), (2, 8, 300), (1, 17, 300)):
                x = torch.randn(shape)
                with torch.no_grad():
                    torch.testing.assert_close(
                        layer(x),
                        reference.linear(x, layer.weight, layer.bias),
                        atol=1e-5,
                        rtol=1e-5,
                    )
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=[1, 3, 5])
def threads(request):
    """Runs a test with several numbers of threads, by which the fast paths cut their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


CASES = [  # B, X, T, m, S, D, W
    (1, 1, 1, 4, 2049, 9, None), (1, 1, 3, 2, 1500, 9, None), (2, 1, 8, 3, 5000, 9, None),
    (1, 1, 1, 1, 1, 1, 1), (1, 1, 5, 1, 5, 7, 7), (2, 3, 1, 1, 40, 7, 5), (2, 3, 4, 2, 40, 7, 5),
    (2, 3, 9, 1, 40, 7, 7), (3, 2, 6, 2, 6, 8, None), (2, 4, 1, 2, 300, 8, None),
    (2, 3, 11, 2, 40, 7, 5), (2, 3, 11, 2, 11, 7, 5), (1, 1, 70, 3, 40000, 5, None),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attend_is_the_reference(case, dtype, tolerance, threads):
    """Decoding, chunks and whole prompts, own values and latents, against float64."""
    B, X, T, m, S, D, W = case
    q, k = torch.randn(B, X, T * m, D), torch.randn(B, X, S, D)
    v = None if W is None else torch.randn(B, X, S, W)
    q, k, v = (t if t is None else t.to(dtype) for t in (q, k, v))
    exact = [t if t is None else t.double() for t in (q, k, v)]
    want = reference.attend(*exact, T, 0.3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = kernels.attend(q, k, v, T, 0.3)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("T", [1, 4, 20])
@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("bfloat16", "float32")], ids=str)
def test_the_wider_dtype_is_computed_in(dtypes, T):
    """Queries wider than the rows, and rows wider than the queries, lose nothing further."""
    q, k, beside = torch.randn(1, 2, T * 2, 9), torch.randn(1, 2, 40, 7), torch.randn(1, 1, 40, 2)
    q, k, beside = q.to(getattr(torch, dtypes[0])), k.float(), beside.float()
    with torch.no_grad():
        got = kernels.attend(q, k, None, T, 0.3, beside)
    want = reference.attend(q.double(), k.double(), None, T, 0.3, beside.double())
    tolerance = 1e-10 if got.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "S"), [(1, 5000), (3, 2100), (4, 4), (20, 60)])
@pytest.mark.parametrize(("X", "m", "W", "r"), [(3, 1, 5, 0), (1, 4, None, 0), (2, 2, None, 3)])
def test_narrow_rows_are_computed_in_float32(X, m, W, r, T, S, kept, threads, monkeypatch):
    """float32 queries on a bfloat16 or float16 cache lose nothing but what the rows have lost, and
    narrow queries no more than one rounding of the result, with scores of up to 30."""
    monkeypatch.setattr(blocks, "BLOCK", 9000)
    shapes = (X, T * m, 9 + r), (X, S, 9), (X, S, W or 1), (1, S, r)
    q, k, v, beside = (torch.randn(1, *shape) for shape in shapes)
    k, v, beside = k.to(kept), v.to(kept) if W else None, beside.to(kept) if r else None
    exact = [None if t is None else t.double() for t in (k, v, beside)]
    for dtype, limit in ((torch.float32, 1e-5), (kept, 4e-3)):
        if dtype == kept and T > 8:
            continue  # torch's own kernel, whose weights are narrow too
        q = q.to(dtype)
        with torch.no_grad():
            got = kernels.attend(q, k, v, T, 2.0, beside)
            with torch.autocast("cpu", torch.bfloat16, enabled=T <= 8):  # which changes nothing
                again = kernels.attend(q, k, v, T, 2.0, beside)
        want = reference.attend(q.double(), *exact[:2], T, 2.0, exact[2])
        assert got.dtype == dtype and torch.equal(got, again)
        assert (got.double() - want).norm() <= limit * want.norm()


def test_split_keys_is_the_reference():
    """Every number of chunks, with remainders, one new token and several."""
    for T, S, chunks in itertools.product((1, 3, 8), (19, 64, 257), (1, 2, 5, 9)):
        q, rows = torch.randn(2, 1, T * 4, 9), torch.randn(2, 1, S, 9)
        got = cpu.split_keys(q, rows, T, 0.3, chunks)
        torch.testing.assert_close(
            got, reference.attend(q, rows, None, T, 0.3), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("v", [None, 5])
@pytest.mark.parametrize(("T", "S"), [(1, 30), (4, 30), (4, 4), (20, 20), (12, 30)])
def test_a_key_part_that_heads_share(T, S, v):
    """Keys in two parts, one of which all heads share, are the longer keys."""
    q, k, beside = torch.randn(2, 3, T * 2, 12), torch.randn(2, 3, S, 7), torch.randn(2, 1, S, 5)
    v = None if v is None else torch.randn(2, 3, S, v)
    whole = torch.cat([k, beside.expand(-1, 3, -1, -1)], dim=-1)
    want = reference.attend(q, whole, k if v is None else v, T, 0.3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = kernels.attend(q, k, v, T, 0.3, beside)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got = reference.attend(q, k, v, T, 0.3, beside)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that any operation makes, views aside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.itemsize)
        return out


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("own_values", [True, False])
@pytest.mark.parametrize(("S", "m", "r"), [(600, 1, 0), (600, 2, 4), (1500, 1, 4), (1500, 3, 0)])
def test_a_prefill_makes_no_scores(S, m, r, own_values, kept):
    """600 tokens, the first of a context or its last: nothing is as large as their scores."""
    q, k, v, beside = (torch.randn(1, h, n, w) for h, n, w in [
        (2, 600 * m, 8 + r), (2, S, 8), (2, S, 5), (1, S, r)
    ])  # fmt: skip
    rows = [k, v if own_values else None, beside if r else None]
    keep = kernels.quantise if kept == torch.int8 else lambda t: t.to(kept)
    rows = [t if t is None else keep(t) for t in rows]
    with torch.no_grad(), Largest() as largest:
        got = kernels.attend(q, *rows[:2], 600, 0.3, rows[2])
    assert largest.numbers < 600 * S
    exact = [t if t is None else kernels.dequantise(t, torch.float64) for t in rows]
    want = reference.attend(q.double(), *exact[:2], 600, 0.3, exact[2])
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_the_reference_by_a_loop():
    """Softmax-weighted means over the keys that each token may see, position by position."""
    T, m, S = 3, 2, 7
    q, k, v = torch.randn(1, 1, T * m, 4), torch.randn(1, 1, S, 4), torch.randn(1, 1, S, 5)
    got = reference.attend(q, k, v, T, 0.5)
    for t, i in itertools.product(range(T), range(m)):
        seen = S - T + t + 1
        weights = (k[0, 0, :seen] @ q[0, 0, t * m + i] * 0.5).softmax(0)
        torch.testing.assert_close(got[0, 0, t * m + i], weights @ v[0, 0, :seen])


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("settings", [{"mla_groups": 4, "mla_latent_dim": 3}, {}], ids=str)
def test_prompts_of_a_model_make_no_scores(settings, absorb):
    """A prompt in two pieces of 300 tokens through MLA's cache, in both forms: what the whole
    prompt gives, and no tensor as large as the scores of a piece."""
    model = randomise(GPT(tiny_config(**{**TINY_MLA, **settings, "block_size": 600})))
    attn, cache, x = model.transformer.h[0].attn, model.make_cache(1, 600), torch.randn(1, 600, 24)
    with torch.no_grad():
        want, got = attn(x, absorb=not absorb), []
        for piece in x.split(300, dim=1):
            with Largest() as largest:
                got.append(attn(piece, cache, absorb=absorb))
            cache.advance(300)
            assert largest.numbers < 300 * cache.pos
    torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("X", "m", "r"), [(1, 3, 0), (2, 1, 4), (2, 2, 0)])
@pytest.mark.parametrize("T", [1, 5, 9, 300])
def test_rows_of_unequal_lengths(T, X, m, r):
    """Few new tokens and many: what every row gives alone, and no scores of many."""
    B, S = 3, 700
    q, k, beside = torch.randn(B, X, T * m, 8 + r), torch.randn(B, X, S, 8), torch.randn(B, 1, S, r)
    held, beside = torch.tensor([0, 400, 123]), beside if r else None
    with torch.no_grad(), Largest() as largest:
        got = kernels.attend(q, k, None, T, 0.3, beside, held=held)
    assert T < 300 or largest.numbers < B * X * T * m * S / 2
    for b, n in enumerate(held.tolist()):
        row = slice(b, b + 1)
        keys, more = k[row, :, : n + T], None if beside is None else beside[row, :, : n + T]
        want = reference.attend(q[row], keys, None, T, 0.3, more)
        torch.testing.assert_close(got[row], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("T", "S"), [(9, 10), (9, 3000), (600, 601), (600, 1500)])
def test_many_tokens_behind_old_ones(T, S, dtype, threads):
    """The old keys and the new ones, each by torch's kernel, merged: scores of up to 30."""
    q, k, v = (torch.randn(1, 2, n, 8).to(dtype) * 2 for n in (T, S, S))
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3}.get(dtype, 2e-2)
    want = reference.attend(q.double(), k.double(), v.double(), T, 1.0)
    got = cpu.go_on(q, k, v, 1.0)
    assert got.dtype == dtype and float((got.double() - want).norm() / want.norm()) < limit
