"""
The GPU's kernel against the reference in float64. Run: python -m pytest tests/test_triton.py

Where there is no GPU, Triton's interpreter runs the same code on the CPU. As a program this file
compiles the kernel for a GPU that need not be there.
"""

import json
import os
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
FP32, BF16, HALF, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def distance(B, X, T, m, S, D, W, r, dtype, stored, lengths=None, cut=None):
    """
    How far the kernel's result on random rows is from the reference's on the same, over what its
    dtype, which is q's, allows: below 1.
    """
    shapes = (X, T * m, D + r), (X, S, D), (X, S, W), (1, S, r)
    q, k, v, beside = (torch.randn(B, *shape, device=DEVICE) for shape in shapes)
    q = q.to(dtype)
    store = quantise if stored == torch.int8 else lambda t: t.to(stored)
    rows = [store(k), store(v) if W else None, store(beside) if r else None]
    scale = 1.5 / (D + r) ** 0.5
    if lengths is not None:
        lengths = torch.tensor(lengths, device=DEVICE)
    assert triton.supports(q, *rows)
    if GPU and cut:  # whose memory is smaller than an interpreter's
        nbytes = triton.row_bytes(dtype, stored, [D, W, r])
        best = triton.plan(q.device, 1, T * m, S, nbytes)
        cut = best._replace(block=min(cut.block, best.block), splits=cut.splits)
    got = triton.attend(q, *rows[:2], T, scale, rows[2], lengths, cut)
    exact = [None if t is None else dequantise(t, torch.float64) for t in rows]
    want = reference.attend(q.double(), *exact[:2], T, scale, exact[2], lengths)
    assert got.dtype == dtype and got.shape == want.shape
    return float((got.double() - want).norm() / want.norm()) / LIMITS[dtype]


@pytest.mark.parametrize(
    ("sizes", "dtype", "stored", "lengths", "cut"),
    [  # B, X, T, m, S, D, W, r
        ((1, 1, 1, 12, 500, 96, 0, 0), FP32, FP32, None, None),  # the plan that is made
        ((1, 1, 1, 12, 1111, 192, 0, 32), HALF, HALF, None, (128, 2)),  # latents, a rotary key
        ((1, 2, 2, 3, 70, 24, 8, 6), FP32, INT8, None, (16, 8)),  # more parts than blocks
        ((3, 2, 3, 2, 130, 33, 40, 2), HALF, INT8, [0, 127, 50], (64, 3)),  # unequal lengths
        ((2, 1, 2, 3, 63, 100, 16, 0), BF16, BF16, [60, 1], (16, 5, 32)),  # own values
        ((1, 4, 1, 1, 17, 225, 0, 50), FP32, BF16, None, (16, 1)),  # groups, narrow rows
        ((1, 1, 5, 7, 40, 20, 0, 0), BF16, INT8, [30], (128, 1, 64)),  # several new tokens
        ((1, 1, 1, 1, 1, 16, 0, 0), HALF, HALF, None, (16, 1)),  # one key
        # DeepSeek's latents, long contexts: seconds each in the interpreter
        slow((1, 1, 1, 128, 5000, 576, 0, 0), HALF, HALF, None, (128, 2, 64)),
        slow((1, 1, 2, 7, 3001, 225, 40, 50), FP32, INT8, None, (64, 32)),
        slow((1, 1, 1, 24, 4999, 512, 0, 64), BF16, BF16, None, None),
        slow((2, 4, 8, 3, 777, 96, 64, 16), HALF, INT8, None, None),
    ],
)
def test_attention_is_the_reference(sizes, dtype, stored, lengths, cut):
    """Latents and own values, keys in two parts, groups, several new tokens, rows of unequal
    lengths, every dtype that rows are stored in, any number of parts."""
    cut = None if cut is None else triton.Plan(*cut)
    assert distance(*sizes, dtype, stored, lengths, cut) < 1


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN, in the interpreter
def test_what_follows_a_row_is_not_read():
    """NaN behind a row's end, or in another row, changes nothing; NaN in a row makes it NaN."""
    q = torch.randn(3, 1, 4, 24, device=DEVICE)
    k = torch.randn(3, 1, 60, 24, device=DEVICE)
    lengths = torch.tensor([20, 3, 50], device=DEVICE)
    cut = triton.Plan(16, 3)
    want = triton.attend(q, k, None, 2, 0.3, None, lengths, cut)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n + 2 :] = float("nan")
    assert torch.equal(triton.attend(q, k, None, 2, 0.3, None, lengths, cut), want)
    k[1, :, 1] = float("nan")
    got = triton.attend(q, k, None, 2, 0.3, None, lengths, cut)
    assert got[1].isnan().all() and torch.equal(got[::2], want[::2])


def test_equal_cuts_give_equal_numbers():
    """The length of a cache, which is read where it lies, does not matter if lengths and the cut
    are the same: a step that is captured for the whole cache is the step without."""
    cache = torch.randn(3, 1, 150, 24, device=DEVICE)  # B, heads, max_len, width
    k = cache[1:2]
    q = torch.randn(1, 1, 4, 24, device=DEVICE)
    lengths = torch.tensor([60], device=DEVICE)
    cut = triton.Plan(16, 3)
    long = triton.attend(q, k, None, 1, 0.3, None, lengths, cut)
    short = triton.attend(q, k[:, :, :61], None, 1, 0.3, None, lengths, cut)
    assert torch.equal(long, short)
    want = reference.attend(q.double(), k.double(), None, 1, 0.3, None, lengths)
    torch.testing.assert_close(short.double(), want, atol=1e-5, rtol=0)


def test_a_kernel_that_does_not_work_is_not_used(monkeypatch, capsys):
    """What Triton needs is missing, or its numbers are wrong: one line, and torch computes."""
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


def test_what_is_not_supported():
    """float64, numbers that do not lie side by side, and rows that are too wide for a GPU."""
    q = torch.randn(1, 1, 1, 24)
    k = torch.randn(1, 1, 5, 24)
    assert triton.supports(q, k, None, None) and triton.supports(q, quantise(k), None, None)
    assert not triton.supports(q.double(), k, None, None)
    assert not triton.supports(q, k.mT.contiguous().mT, None, None)
    wide = torch.randn(1, 1, 5, 1000)
    assert not triton.supports(wide, wide, None, None)
    assert triton.supports(wide.half(), wide.half(), None, None)


# q's and the rows' types, and D, W, r: MLA's latents, DeepSeek's, groups, MHA, and the widest.
COMPILED = [
    ("bf16", "bf16", 224, 0, 0), ("bf16", "bf16", 576, 0, 0), ("bf16", "i8", 576, 0, 0),
    ("fp16", "fp16", 48, 0, 32), ("fp32", "i8", 128, 128, 0), ("fp32", "bf16", 512, 0, 0),
    ("bf16", "bf16", 512, 512, 64), ("fp32", "fp32", 768, 0, 0),
]


def compiled(function, architecture, types, values, **options):
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


def compile_all(architecture):
    """Print the shared memory, and what else is looked at, of COMPILED as JSON."""
    dtypes = {"fp32": FP32, "bf16": BF16, "fp16": HALF, "i8": INT8}
    names = triton.attend_part.arg_names
    for q, stored, D, W, r in COMPILED:
        nbytes = triton.row_bytes(dtypes[q], dtypes[stored], [D, W, r])
        plan = triton.plan(torch.device("cpu"), 1, 128, 4096, nbytes)
        halves = [half for width in (D, W, r) for half in triton._halves(width)]
        values = dict(zip(names[-11:], [D, W, r, *halves, plan.rows, plan.block], strict=True))
        types = dict.fromkeys((name for name in names if name not in values), "i32")
        types |= {"q": f"*{q}", "scale": "fp32", "lengths": "*i64", "sums": "*fp32", "out": "*fp32"}
        for name, width in (("k", D), ("v", W), ("e", r)):
            types[name] = f"*{stored}"
            types[f"{name}_scale"] = "*fp16"
            if stored != "i8" or not width:
                del types[f"{name}_scale"]
            if not width:
                del types[name]
        kernel = compiled(
            triton.attend_part, architecture, types, values,
            num_warps=plan.warps, num_stages=plan.stages,
        )
        row = {"q": q, "stored": stored, "shared": kernel.metadata.shared}
        row |= {w: kernel.asm["ptx"].count(w) for w in ("mma", "cp.async.cg", "fma.rn.f32")}
        print(json.dumps(row), flush=True)
    types = {"averages": "*fp32", "sums": "*fp32", "out": "*bf16", "parts": "i32"}
    compiled(triton.merge, architecture, types, {"WIDTH": 224, "PARTS": 64, "N": 64})


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
    assert len(rows) == len(COMPILED)
    for row in rows:
        assert row["shared"] <= 99 * 1024, row
        assert row["stored"] == "i8" or row["cp.async.cg"] > 0, row
        assert row["mma" if row["q"] != "fp32" else "fma.rn.f32"] > 0, row


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
