"""
The GPU's kernel against the reference in float64. Run: python -m pytest tests/test_triton.py

Where there is no GPU, Triton's interpreter runs the same code on the CPU.
"""

import os
import random

import pytest
import torch

from nanomla.kernels import dequantise, quantise, reference

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton has no wheel for this system")

from nanomla.kernels import triton

DEVICE = "cuda" if GPU else "cpu"
# Weights and results are rounded to q's dtype; the interpreter cuts bfloat16's bits off instead.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3 if GPU else 8e-3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(B, X, T, m, S, D, W, r, dtype, kept, held=None, cut=None):
    """The kernel's result on random rows is the reference's on the same, and of q's dtype."""
    shapes = (X, T * m, D + r), (X, S, D), (X, S, W), (1, S, r)
    q, k, v, beside = (torch.randn(B, *shape, device=DEVICE) for shape in shapes)
    q, keep = q.to(dtype), quantise if kept == torch.int8 else lambda t: t.to(kept)
    rows = [keep(k), keep(v) if W else None, keep(beside) if r else None]
    scale = 1.5 / (D + r) ** 0.5
    assert triton.supports(q, *rows)
    got = triton.attend(q, *rows[:2], T, scale, rows[2], held, cut)
    exact = [None if t is None else dequantise(t, torch.float64) for t in rows]
    want = reference.attend(q.double(), *exact[:2], T, scale, exact[2], held)
    assert got.dtype == dtype and got.shape == want.shape
    error = float((got.double() - want).norm() / want.norm())
    assert error < LIMITS[dtype], error


def drawn(n):
    """n cases in which every size is drawn anew, as keywords of compare."""
    draw, cases = random.Random(1), []
    while len(cases) < n:
        heads = draw.choice([1, 2, 3, 7, 12, 16, 24, 40, 64, 128])
        X = draw.choice([g for g in (1, 1, 1, 2, 4) if heads % g == 0])
        S, m = draw.choice([1, 2, 17, 63, 130, 511, 777, 1023, 2049, 3001, 4999]), heads // X
        B, T = draw.choice([1, 1, 2, 3]), min(draw.choice([1, 1, 2, 3, 5, 8]), S)
        splits = draw.choice([1, 2, 3, 5, 8, 13, 32, 64])
        programs, block = B * X * -(-T * m // 16), draw.choice([16, 64, 128, 128])
        if programs * (splits + S / block) + B * T * heads > 90:
            continue  # which would take the interpreter seconds
        case = {"B": B, "X": X, "T": T, "m": m, "S": S, "cut": triton.Plan(block, splits)}
        case["D"] = draw.choice([16, 20, 33, 64, 96, 100, 160, 192, 225, 256, 384, 512, 576])
        case["W"] = draw.choice([0, 0, 16, 40, 64, min(case["D"], 160)])
        case["r"] = draw.choice([0, 2, 8, 16, 50, 64])
        case["dtype"] = draw.choice(DTYPES)  # in which the rows' numbers have a place
        narrow = DTYPES if case["dtype"] == torch.float32 else [case["dtype"]]
        case["kept"] = draw.choice([*narrow, torch.int8])
        if draw.random() < 0.5:
            case["held"] = [draw.randint(0, S - T) for _ in range(B)]
        cases.append(case)
    return cases


@pytest.mark.parametrize("case", drawn(50), ids=lambda case: "-".join(map(str, case.values())))
def test_drawn_sizes_are_the_reference(case):
    """Latents and own values, keys in two parts, groups, several new tokens, rows of unequal
    lengths, every dtype that rows are kept in, any number of parts."""
    held = case.get("held")
    held = None if held is None else torch.tensor(held, device=DEVICE)
    compare(**{**case, "held": held})


@pytest.mark.parametrize(("L", "r", "heads", "S"), [(16, 0, 1, 1), (512, 64, 128, 5000),
    (576, 64, 12, 5000), (16, 64, 24, 4999), (192, 32, 12, 3333)])  # fmt: skip
def test_latents_of_every_size(L, r, heads, S):
    """The plan that is made for a GPU; latents with rotary numbers behind them, as MLA's cache."""
    compare(1, 1, 1, heads, S, L + r, 0, 0, torch.float16, torch.float16, cut=triton.Plan(128, 2))


def test_the_plan_that_is_made():
    """Without a plan, too, and with more parts than blocks."""
    compare(2, 1, 1, 12, 700, 96, 0, 0, torch.float32, torch.float32)
    compare(1, 2, 2, 3, 70, 24, 8, 6, torch.float32, torch.int8, cut=triton.Plan(16, 64))


@pytest.mark.parametrize("splits", [1, 4])
def test_what_follows_a_row_is_not_read(splits):
    """NaN behind a row's end, or in another row, changes nothing; NaN in a row makes it NaN."""
    q, k = torch.randn(3, 1, 4, 24, device=DEVICE), torch.randn(3, 1, 90, 24, device=DEVICE)
    held, cut = torch.tensor([40, 3, 70], device=DEVICE), triton.Plan(16, splits)
    want = triton.attend(q, k, None, 2, 0.3, None, held, cut)
    for b, n in enumerate(held.tolist()):
        k[b, :, n + 2 :] = float("nan")
    assert torch.equal(triton.attend(q, k, None, 2, 0.3, None, held, cut), want)
    k[1, :, 1] = float("nan")
    got = triton.attend(q, k, None, 2, 0.3, None, held, cut)
    assert got[1].isnan().all() and torch.equal(got[::2], want[::2])


def test_equal_cuts_give_equal_numbers():
    """The length of a cache does not matter if held and the cut are the same: a step that is
    captured for the whole cache is the step without."""
    q, k = torch.randn(1, 1, 4, 24, device=DEVICE), torch.randn(1, 1, 400, 24, device=DEVICE)
    held, cut = torch.tensor([100], device=DEVICE), triton.Plan(16, 5)
    long, short = (triton.attend(q, t, None, 1, 0.3, None, held, cut) for t in (k, k[:, :, :101]))
    assert torch.equal(long, short)


def test_a_cache_is_read_where_it_lies():
    """Rows of a longer cache, of one sequence of several, uncopied."""
    cache = torch.randn(2, 3, 2, 50, 24, device=DEVICE)  # layers, B, heads, max_len, width
    q, k = torch.randn(3, 2, 4, 24, device=DEVICE), cache[1][:, :, :37]
    want = reference.attend(q.double(), k.double(), None, 2, 0.3)
    torch.testing.assert_close(triton.attend(q, k, None, 2, 0.3).double(), want, atol=1e-5, rtol=0)


def test_what_is_not_supported():
    """float64, numbers that do not lie side by side, and rows that are too wide for a GPU."""
    q, k = torch.randn(1, 1, 1, 24), torch.randn(1, 1, 5, 24)
    assert triton.supports(q, k, None, None) and triton.supports(q, quantise(k), None, None)
    assert not triton.supports(q.double(), k, None, None)
    assert not triton.supports(q, k.double(), None, None)
    assert not triton.supports(q, k.mT.contiguous().mT, None, None)
    wide = torch.randn(1, 1, 5, 1000)
    assert not triton.supports(wide, wide, None, None)
    assert triton.supports(wide.half(), wide.half(), None, None)
