"""
The GPU's kernel against the reference in float64. Run: python -m pytest tests/test_triton.py

Where there is no GPU, Triton's interpreter runs the same code on the CPU. As a program this file
compiles the kernel for a GPU that need not be there.
"""

import json
import os
import random
import subprocess
import sys

import pytest
import torch

from nanomla import kernels
from nanomla.kernels import dequantise, quantise, reference
from tests.conftest import ROOT

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="Triton has no wheel for this system")

from nanomla.kernels import triton

DEVICE = "cuda" if GPU else "cpu"
# Weights and results are rounded to q's dtype; the interpreter cuts bfloat16's bits off instead.
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3 if GPU else 8e-3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compare(B, X, T, m, S, D, W, r, dtype, kept, lengths=None, cut=None):
    """
    How far the kernel's result on random rows is from the reference's on the same, over what its
    dtype, which is q's, allows: below 1.
    """
    shapes = (X, T * m, D + r), (X, S, D), (X, S, W), (1, S, r)
    q, k, v, beside = (torch.randn(B, *shape, device=DEVICE) for shape in shapes)
    q = q.to(dtype)
    keep = quantise if kept == torch.int8 else lambda t: t.to(kept)
    rows = [keep(k), keep(v) if W else None, keep(beside) if r else None]
    scale = 1.5 / (D + r) ** 0.5
    assert triton.supports(q, *rows)
    if GPU and cut:  # whose memory is smaller than an interpreter's
        nbytes = triton.row_bytes(dtype, kept, [D, W, r])
        best = triton.plan(q.device, 1, T * m, S, nbytes)
        cut = best._replace(block=min(cut.block, best.block), splits=cut.splits)
    got = triton.attend(q, *rows[:2], T, scale, rows[2], lengths, cut)
    exact = [None if t is None else dequantise(t, torch.float64) for t in rows]
    want = reference.attend(q.double(), *exact[:2], T, scale, exact[2], lengths)
    assert got.dtype == dtype and got.shape == want.shape
    return float((got.double() - want).norm() / want.norm()) / LIMITS[dtype]


def drawn(n):
    """n cases in which every size is drawn anew, as keywords of compare."""
    draw = random.Random(1)
    cases = []
    while len(cases) < n:
        heads = draw.choice([1, 2, 3, 7, 12, 16, 24, 40, 64, 128])
        X = draw.choice([g for g in (1, 1, 1, 2, 4) if heads % g == 0])
        m = heads // X
        S = draw.choice([1, 2, 17, 63, 130, 511, 777, 1023, 2049, 3001, 4999])
        B = draw.choice([1, 1, 2, 3])
        T = min(draw.choice([1, 1, 2, 3, 5, 8]), S)
        splits = draw.choice([1, 2, 3, 5, 8, 13, 32, 64])
        rows = draw.choice([16, 16, 32, 64])
        block = draw.choice([16, 64, 128, 128])
        programs = B * X * -(-T * m // rows)
        if programs * (splits + S / block) + B * T * heads > 90:
            continue  # which would take the interpreter seconds
        case = {"B": B, "X": X, "T": T, "m": m, "S": S, "cut": triton.Plan(block, splits, rows)}
        case["D"] = draw.choice([16, 20, 33, 64, 96, 100, 160, 192, 225, 256, 384, 512, 576])
        case["W"] = draw.choice([0, 0, 16, 40, 64, min(case["D"], 160)])
        case["r"] = draw.choice([0, 2, 8, 16, 50, 64])
        case["dtype"] = draw.choice(DTYPES)  # in which the rows' numbers have a place
        narrow = DTYPES if case["dtype"] == torch.float32 else [case["dtype"]]
        case["kept"] = draw.choice([*narrow, torch.int8])
        if draw.random() < 0.5:
            case["lengths"] = [draw.randint(0, S - T) for _ in range(B)]
        cases.append(case)
    return cases


def slowly(*cases):
    """Cases that take the interpreter long, for make test-slow; a GPU takes them all."""
    return [pytest.param(*case, marks=[] if GPU else pytest.mark.slow) for case in cases]


CASES = drawn(44)
FEW = CASES[7::4]  # enough for a quick run


@pytest.mark.parametrize(
    "case",
    [*FEW, *slowly(*((case,) for case in CASES if case not in FEW))],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_drawn_sizes_are_the_reference(case):
    """Latents and own values, keys in two parts, groups, several new tokens, rows of unequal
    lengths, every dtype that rows are kept in, any number of parts."""
    lengths = case.get("lengths")
    if lengths is not None:
        lengths = torch.tensor(lengths, device=DEVICE)
    assert compare(**{**case, "lengths": lengths}) < 1


@pytest.mark.parametrize(
    ("L", "r", "heads", "S"),
    [
        (16, 0, 1, 1),
        (192, 32, 12, 3333),
        *slowly((512, 64, 128, 5000), (576, 64, 12, 5000), (16, 64, 24, 4999)),
    ],
)
def test_latents_of_every_size(L, r, heads, S):
    """Latents with rotary numbers behind them, as in MLA's cache, to 128 heads."""
    cut = triton.Plan(128, 2, rows=64 if heads > 16 else 16)
    half = torch.float16
    assert compare(1, 1, 1, heads, S, L + r, 0, 0, half, half, cut=cut) < 1


def test_the_plan_that_is_made():
    """Without a plan, too, and with more parts than blocks."""
    assert compare(1, 1, 1, 12, 500, 96, 0, 0, torch.float32, torch.float32) < 1
    cut = triton.Plan(16, 64)
    assert compare(1, 2, 2, 3, 70, 24, 8, 6, torch.float32, torch.int8, cut=cut) < 1


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN, in the interpreter
@pytest.mark.parametrize("splits", [1, 4])
def test_what_follows_a_row_is_not_read(splits):
    """NaN behind a row's end, or in another row, changes nothing; NaN in a row makes it NaN."""
    q = torch.randn(3, 1, 4, 24, device=DEVICE)
    k = torch.randn(3, 1, 90, 24, device=DEVICE)
    lengths = torch.tensor([40, 3, 70], device=DEVICE)
    cut = triton.Plan(16, splits)
    want = triton.attend(q, k, None, 2, 0.3, None, lengths, cut)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n + 2 :] = float("nan")
    assert torch.equal(triton.attend(q, k, None, 2, 0.3, None, lengths, cut), want)
    k[1, :, 1] = float("nan")
    got = triton.attend(q, k, None, 2, 0.3, None, lengths, cut)
    assert got[1].isnan().all() and torch.equal(got[::2], want[::2])


def test_equal_cuts_give_equal_numbers():
    """The length of a cache does not matter if lengths and the cut are the same: a step that is
    captured for the whole cache is the step without."""
    q = torch.randn(1, 1, 4, 24, device=DEVICE)
    k = torch.randn(1, 1, 400, 24, device=DEVICE)
    lengths = torch.tensor([100], device=DEVICE)
    cut = triton.Plan(16, 5)
    long = triton.attend(q, k, None, 1, 0.3, None, lengths, cut)
    short = triton.attend(q, k[:, :, :101], None, 1, 0.3, None, lengths, cut)
    assert torch.equal(long, short)


def test_a_cache_is_read_where_it_lies():
    """Rows of a longer cache, of one sequence of several, uncopied."""
    cache = torch.randn(5, 2, 50, 24, device=DEVICE)  # B, heads, max_len, width
    q = torch.randn(3, 2, 4, 24, device=DEVICE)
    k = cache[1:4, :, :37]
    want = reference.attend(q.double(), k.double(), None, 2, 0.3)
    torch.testing.assert_close(triton.attend(q, k, None, 2, 0.3).double(), want, atol=1e-5, rtol=0)


def test_a_kernel_that_does_not_work_is_not_used(monkeypatch, capsys):
    """What Triton needs is missing, or its numbers are wrong: one line, and torch computes."""
    triton.try_out(torch.device(DEVICE))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    choose = kernels.on_gpu.__wrapped__
    device = torch.device("cuda")

    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nand more")

    monkeypatch.setattr(triton, "attend_part", {(1, 2): fail})
    monkeypatch.setattr(torch, "arange", lambda n, device, arange=torch.arange: arange(n))
    assert choose(device) is None
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "RuntimeError: Failed to find C compiler.)" in err
    monkeypatch.setattr(triton, "attend", lambda q, *_, **__: q)
    assert choose(device) is None and "results are off by" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose(device) is None and capsys.readouterr().err == ""


def test_what_is_not_supported():
    """float64, numbers that do not lie side by side, and rows that are too wide for a GPU."""
    q = torch.randn(1, 1, 1, 24)
    k = torch.randn(1, 1, 5, 24)
    assert triton.supports(q, k, None, None) and triton.supports(q, quantise(k), None, None)
    assert not triton.supports(q.double(), k, None, None)
    assert not triton.supports(q, k.double(), None, None)
    assert not triton.supports(q, k.mT.contiguous().mT, None, None)
    wide = torch.randn(1, 1, 5, 1000)
    assert not triton.supports(wide, wide, None, None)
    assert triton.supports(wide.half(), wide.half(), None, None)
    far = torch.empty_strided((1, 3, 2**28, 24), (0, 0, 8, 1), device="meta")
    assert not triton.supports(q, far, None, None)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_heads_that_lie_far_apart():
    """Offsets of heads over 2^31 numbers."""
    k = torch.empty(2**32, dtype=torch.int8, device=DEVICE)
    k = torch.as_strided(k, (1, 3, 4, 16), (0, 2**30 + 2**29, 16, 1))
    k.copy_(torch.randint(-9, 9, k.shape))
    rows = kernels.Quantized(k, torch.ones(1, 3, 4, 1, device=DEVICE).half())
    q = torch.randn(1, 3, 2, 16, device=DEVICE)
    want = reference.attend(q.double(), dequantise(rows, torch.float64), None, 1, 0.1)
    got = triton.attend(q, rows, None, 1, 0.1)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


# q's and the rows' types, and D, W, r: MLA's latents, DeepSeek's, groups, MHA, and the widest.
COMPILED = [
    ("bf16", "bf16", 192, 0, 0), ("bf16", "bf16", 224, 0, 0), ("bf16", "bf16", 576, 0, 0),
    ("bf16", "i8", 576, 0, 0), ("fp16", "fp16", 48, 0, 32), ("bf16", "i8", 64, 64, 0),
    ("fp32", "fp32", 224, 0, 0), ("fp32", "bf16", 512, 0, 0), ("fp32", "i8", 128, 128, 0),
    ("bf16", "bf16", 1024, 0, 0), ("bf16", "bf16", 512, 512, 64), ("fp32", "fp32", 768, 0, 0),
    ("fp32", "bf16", 320, 0, 0), ("fp32", "i8", 384, 0, 64), ("fp32", "fp32", 320, 0, 0),
]  # fmt: skip


def compiled(function, architecture, types, values, options):
    """Triton's kernel for a GPU of this architecture; what has no type is None."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = function.arg_names
    types = {name: types.get(name, "constexpr") for name in names}
    constants = {(i,): values.get(n) for i, n in enumerate(names) if types[n] == "constexpr"}
    aligned = ("k_b", "k_x", "k_s", "v_b", "v_x", "v_s")
    even = [i for i, n in enumerate(names) if types[n][0] == "*" or n in aligned]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(function, types, constants, attributes)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compile_case(architecture, q, kept, D, W, r, splits):
    """attend_part for rows of unequal lengths if they are split, else of equal ones; its plan."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    nbytes = triton.row_bytes(names[q], names.get(kept, torch.int8), [D, W, r])
    plan = triton.plan(torch.device("cpu"), 1, 128, 4096, nbytes)
    halves = [half for width in (D, W, r) for half in triton._halves(width)]
    names = triton.attend_part.arg_names
    values = dict(zip(names[-11:], [D, W, r, *halves, plan.rows, plan.block], strict=True))
    rows = {"k": True, "v": W, "e": r}
    types = {n: "i32" for n in names if n not in (*values, *rows) and "scale" not in n}
    types |= {"q": f"*{q}", "scale": "fp32"} | {n: f"*{kept}" for n, there in rows.items() if there}
    if kept == "i8":
        types |= {f"{n}_scale": "*fp16" for n, there in rows.items() if there}
    split = {"lengths": "*i64", "sums": "*fp32"}
    types = {n: t for n, t in types.items() if n not in split} | {"out": f"*{q}"}
    types |= split | {"out": "*fp32"} if splits else {}
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return plan, compiled(triton.attend_part, architecture, types, values, options)


def compile_all(architecture):
    """Print the shared memory, and what else is looked at, of COMPILED as JSON."""
    for splits, case in [(False, COMPILED[0]), *((True, case) for case in COMPILED)]:
        plan, kernel = compile_case(architecture, *case, splits)
        row = {"case": case, "plan": plan, "shared": kernel.metadata.shared}
        row |= {w: kernel.asm["ptx"].count(w) for w in ("mma", "cp.async.cg", "fma.rn.f32")}
        print(json.dumps(row), flush=True)
    for parts, N in ((2, 256), (64, 64), (256, 16)):
        types = {"averages": "*fp32", "sums": "*fp32", "out": "*bf16", "parts": "i32"}
        compiled(triton.merge, architecture, types, {"WIDTH": 224, "PARTS": parts, "N": N}, {})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_it_compiles_for_a_gpu(architecture):
    """Machine code for Ampere and Hopper, without one: it fits the shared memory of the smallest
    (99 KB), loads ahead, and takes products of narrow numbers on tensor cores."""
    command = [sys.executable, "-m", "tests.test_triton", str(architecture)]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, check=False, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(COMPILED) + 1
    for row in rows:
        q, kept, *_ = row["case"]
        assert row["shared"] <= 99 * 1024, row
        assert kept == "i8" or row["cp.async.cg"] > 0, row
        assert row["mma" if q != "fp32" else "fma.rn.f32"] > 0, row


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
