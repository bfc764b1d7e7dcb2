"""Every fast path against the reference. Run: python -m pytest tests/test_kernels.py"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from nanomla import kernels
from nanomla.kernels import Linear, blocks, sdpa
from nanomla.kernels.reference import by_group, by_head
from tests.conftest import Largest, reference_attend, torch_threads

NEAR = {"atol": 1e-5, "rtol": 1e-5}
FP64, FP32, BF16, HALF, INT8 = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8,
)
# How far a result may be, over its norm: of float32, and of what is rounded to q's dtype.
LIMITS = {FP64: 1e-12, FP32: 2e-6, HALF: 2e-3, BF16: 4e-3}


def stored_as(x, dtype):
    """x as a cache of this dtype stores it."""
    return kernels.quantise(x) if dtype == INT8 else x.to(dtype)


def test_the_reference_by_a_loop():
    """Softmax-weighted means over the keys that each token may see, position by position; the
    weights alone; and a sequence of a shorter length is what it is alone."""
    T, m, S = 3, 2, 7
    q = torch.randn(1, m, T, 4)
    k = torch.randn(1, 1, S, 4)
    v = torch.randn(1, 1, S, 5)
    got = reference_attend(q, k, v, scale=0.5).float()
    weights = kernels.causal_weights(q, k[:, :, :T], 0.5)
    for t, i in itertools.product(range(T), range(m)):
        seen = S - T + t + 1
        want = (k[0, 0, :seen] @ q[0, i, t] * 0.5).softmax(0) @ v[0, 0, :seen]
        torch.testing.assert_close(got[0, i, t], want)
        want = (k[0, 0, : t + 1] @ q[0, i, t] * 0.5).softmax(0)
        torch.testing.assert_close(weights[0, i, t, : t + 1], want)
        assert not weights[0, i, t, t + 1 :].any()
    got = reference_attend(q, k, v, scale=0.5, lengths=torch.tensor([2]))
    want = reference_attend(q, k[:, :, : 2 + T], v[:, :, : 2 + T], scale=0.5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("sizes", "dtype", "stored", "lengths"),
    [  # B, X, T, m, S, D, W (0: the keys are values), r (beside the keys)
        ((1, 1, 1, 4, 2049, 9, 0, 0), FP32, FP32, None),  # few on the cores, latents
        ((1, 1, 5, 2, 1111, 9, 0, 0), FP32, FP32, None),  # the same, with a remainder
        ((2, 3, 4, 2, 40, 7, 5, 0), FP32, FP32, None),  # few, own values
        ((1, 1, 5, 1, 5, 7, 7, 0), FP32, FP32, None),  # all there are
        ((2, 3, 4, 2, 30, 7, 5, 5), FP32, FP32, None),  # few, keys in two parts
        ((3, 2, 5, 2, 700, 8, 0, 4), FP32, FP32, [0, 400, 123]),  # few, unequal lengths
        ((1, 2, 1, 2, 40, 7, 0, 2), FP64, FP32, None),  # the wider dtype is computed in
        ((2, 1, 70, 3, 900, 5, 0, 0), FP32, FP32, None),  # many behind old ones
        ((1, 2, 9, 1, 3000, 8, 8, 0), BF16, BF16, None),
        ((1, 2, 600, 1, 1500, 8, 8, 0), FP32, FP32, None),
        ((2, 3, 20, 2, 20, 7, 5, 5), FP32, FP32, None),  # a prompt, keys in two parts
        ((3, 2, 90, 1, 700, 8, 0, 4), FP32, FP32, [0, 400, 123]),  # many, unequal lengths
        ((1, 2, 20, 2, 40, 7, 0, 2), BF16, FP32, None),
        ((1, 2, 12, 2, 30, 8, 0, 4), FP32, INT8, None),  # many, converted as a whole
        ((1, 1, 3, 4, 2100, 9, 0, 0), FP32, HALF, None),  # narrow: one head on the cores
        ((1, 1, 2, 2, 3500, 9, 5, 0), FP32, INT8, None),
        ((1, 3, 1, 1, 5000, 9, 5, 0), FP32, BF16, None),  # several heads, several blocks
        ((2, 1, 8, 3, 700, 9, 0, 4), HALF, INT8, None),
        ((3, 2, 2, 2, 90, 8, 0, 4), FP64, INT8, [0, 60, 12]),
    ],
)
def test_attend_is_the_reference(sizes, dtype, stored, lengths, monkeypatch):
    """A call of every kind against float64 on what is stored, with scores of up to 30, one thread
    and three, with and without gradients; autocast changes nothing for few tokens."""
    B, X, T, m, S, D, W, r = sizes
    monkeypatch.setattr(blocks, "BLOCK", 9000)
    q = torch.randn(B, X * m, T, D + r).to(dtype)
    k = stored_as(torch.randn(B, X, S, D), stored)
    v = stored_as(torch.randn(B, X, S, W), stored) if W else None
    beside = stored_as(torch.randn(B, 1, S, r), stored) if r else None
    lengths = None if lengths is None else torch.tensor(lengths)
    want = reference_attend(q, k, v, scale=1.5, beside=beside, lengths=lengths)
    computed_in = dtype if stored == INT8 else torch.promote_types(dtype, stored)
    for threads, grad in ((1, False), (3, False), (1, True)):
        with torch_threads(threads), torch.set_grad_enabled(grad):
            got = kernels.attend(q, k, v, scale=1.5, beside=beside, lengths=lengths)
            assert got.dtype == computed_in
            limit = LIMITS[got.dtype]
            if got.dtype.itemsize == 2 and (grad or T > 8):  # torch's own kernel, narrow weights
                limit = 1e-2
            assert (got.double() - want).norm() <= limit * want.norm()
            if T <= 8 and not grad:
                with torch.autocast("cpu", BF16):
                    again = kernels.attend(q, k, v, scale=1.5, beside=beside, lengths=lengths)
                assert torch.equal(got, again)


@torch.no_grad()
@pytest.mark.parametrize(
    ("S", "m", "r", "own_values", "stored"),
    [(600, 1, 4, True, FP32), (1500, 1, 0, True, INT8), (1500, 3, 4, False, BF16)],
)
def test_a_prefill_makes_no_scores(S, m, r, own_values, stored):
    """600 tokens, the first of a context or its last: nothing is as large as their scores."""
    q = torch.randn(1, 2 * m, 600, 8 + r)
    k = stored_as(torch.randn(1, 2, S, 8), stored)
    v = stored_as(torch.randn(1, 2, S, 5), stored) if own_values else None
    beside = stored_as(torch.randn(1, 1, S, r), stored) if r else None
    with Largest() as largest:
        got = kernels.attend(q, k, v, scale=0.3, beside=beside)
    assert largest.numbers < 600 * S
    want = reference_attend(q, k, v, scale=0.3, beside=beside)
    torch.testing.assert_close(got.double(), want, **NEAR)


@pytest.mark.parametrize(("T", "W", "lengths"), [(1, None, None), (4, 9, [0, 30, 12])])
def test_few_tokens_by_torch(T, W, lengths):
    """What a GPU without the kernel takes: torch's attention with a small mask."""
    q = torch.randn(3, 6, T, 7)
    k = torch.randn(3, 2, 40, 7)
    v = torch.randn(3, 2, 40, W) if W else None
    lengths = None if lengths is None else torch.tensor(lengths)
    want = reference_attend(q, k, v, scale=0.3, lengths=lengths)
    got = by_head(sdpa.few(by_group(q, 2), k, v, T, 0.3, lengths), T)
    torch.testing.assert_close(got.double(), want, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 3])
def test_few_rows_through_a_split_weight(threads):
    """Linear's decoding path, which cuts the weight into blocks for the cores, is nn.Linear."""
    with torch_threads(threads):
        for out, bias in ((520, True), (7 * 73, False)):
            layer = Linear(300, out, bias)
            for shape in ((1, 1, 300), (2, 8, 300), (1, 17, 300)):
                x = torch.randn(shape)
                want = F.linear(x, layer.weight, layer.bias)
                torch.testing.assert_close(layer(x), want, **NEAR)
