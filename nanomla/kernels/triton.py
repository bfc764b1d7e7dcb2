"""
Attention of few new tokens on a GPU: split-KV decoding (flash-decoding), written in Triton.

A program takes 16 to 64 queries that share a key head, and a part of its keys. It loads a block of
keys at a time, once: latents, which are keys and values, are used as both. Its averages, in
float32, come with the logarithm of the sum of their weights, by which a second kernel merges them.
Where a part begins is computed from the number of keys that a row has, which only the GPU need
know: a step that was captured in a CUDA graph can be repeated while the context grows.

A width is cut in two: the largest power of two in it, and the rest, filled up to one. 576 numbers
are computed as 512 and 64, not as 1,024.

TRITON_INTERPRET=1, set before this file is imported, runs all of it on a CPU: the tests do.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanomla.kernels import reference
from nanomla.kernels.int8 import Quantized

MERGED = 4096  # numbers that a program merges, of all parts together
SPLITS = 256  # at most
BLOCK_BYTES = 48 * 1024  # of keys and values at a time, at most: any GPU since 2020 holds two
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton's interpreter takes the bits of bfloat16 for integers, unless it is made float32.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Plan(NamedTuple):
    """How the work is cut."""

    block: int  # keys that are loaded at a time
    splits: int  # parts of the keys
    rows: int = 16  # queries per program: tensor cores take no fewer
    warps: int = 4
    stages: int = 2  # blocks on their way at a time


def attend(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized | None,
    T: int,
    scale: float,
    beside: Tensor | Quantized | None = None,
    lengths: Tensor | None = None,
    cut: Plan | None = None,
) -> Tensor:
    """
    nanomla.kernels.attend for a few new tokens, in q's dtype, one of DTYPES.

    Products are taken in q's dtype, sums and the softmax in float32. Rows of int8 are never
    multiplied by their scales: the scores and the weights are. What follows a row's last key is not
    read. The result is the same whatever S is, if lengths and cut are.
    """
    (B, X, n, _), m, q = q.shape, q.size(2) // T, q.contiguous()
    kept = [_tensors(rows) for rows in (k, v, beside)]
    D, W, _ = widths = [0 if t is None else t.size(-1) for t, _ in kept]
    keys = kept[0][0]
    cut = cut or plan(q.device, B * X, n, keys.size(2), row_bytes(q.dtype, keys.dtype, widths))
    out = averages = q.new_empty(B, X, n, W or D)
    sums = None
    if cut.splits > 1:
        averages = q.new_empty(B * X * n, cut.splits, W or D, dtype=torch.float32)
        sums = q.new_empty(B * X * n, cut.splits, dtype=torch.float32)
    args = [a for t, s in kept for a in (t, *_strides(t), s, *_strides(s))]
    halves = [half for width in widths for half in _halves(width)]
    with torch.cuda.device_of(q):
        attend_part[(B * X * triton.cdiv(n, cut.rows), cut.splits)](
            q, *args, lengths, averages, sums, n, m, keys.size(2) - T, T, X, scale / math.log(2),
            *widths, *halves, cut.rows, cut.block, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        if sums is not None:
            padded = triton.next_power_of_2(cut.splits)
            columns = min(MERGED // padded, triton.next_power_of_2(W or D))
            grid = (B * X * n, triton.cdiv(W or D, columns))
            merge[grid](averages, sums, out, cut.splits, W or D, padded, columns)
    return out


def plan(device: torch.device, heads: int, n: int, S: int, nbytes: int) -> Plan:
    """
    How to cut the work of so many key heads, each n queries on S keys of nbytes.

    More queries in a program mean fewer that load the same keys. As many as here were found to fit
    registers and shared memory by compiling for sm_80 and sm_90; nothing was timed.
    """
    most = 64 if nbytes <= 512 else 32 if nbytes <= 1280 else 16
    rows = min(max(triton.next_power_of_2(n), 16), most)
    block = min(max(2 ** int(math.log2(BLOCK_BYTES / nbytes)), 16), 64)
    cores = 16  # in the interpreter
    if device.type == "cuda":
        cores = torch.cuda.get_device_properties(device).multi_processor_count
    programs = heads * triton.cdiv(n, rows)
    splits = max(min(2 * cores // programs, triton.cdiv(S, 2 * block), SPLITS), 1)
    splits = 1 << (splits.bit_length() - 1)  # the fewer there are, the less often merge is compiled
    stages = 3 if block * nbytes <= BLOCK_BYTES // 2 else 2
    return Plan(block, splits, rows, 8 if nbytes >= 1024 or rows == 64 else 4, stages)


def try_out(device: torch.device) -> None:
    """A first small call, on a GPU that may lack what Triton needs. Raises what goes wrong."""
    q, k = (torch.sin(torch.arange(64 * n, device=device)).bfloat16() for n in (2, 40))
    q, k = q.view(1, 1, 2, 64), k.view(1, 1, 40, 64)
    got = attend(q, k, None, 1, 0.2, cut=Plan(block=16, splits=2)).float()
    error = float((got - reference.attend(q.float(), k.float(), None, 1, 0.2)).abs().max())
    if not error < 0.02:
        raise ArithmeticError(f"its results are off by {error:.2g}")


def supports(q: Tensor, *rows: Tensor | Quantized | None) -> bool:
    """Whether queries can attend to such keys, values and what is beside them."""
    tensors = [t for t, _ in map(_tensors, rows) if t is not None]
    known = q.dtype in DTYPES and all(t.dtype in (*DTYPES, torch.int8) for t in tensors)
    widths = [t.size(3) for t in tensors]
    fits = 16 * row_bytes(q.dtype, tensors[0].dtype, widths) <= BLOCK_BYTES
    # Within a head, an offset is a number of 32 bits.
    near = all(t.stride(3) == 1 and t.size(2) * t.stride(2) < 2**31 for t in tensors)
    return known and fits and near


def _tensors(rows: Tensor | Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    """What rows are kept in, and their scales."""
    return (rows.values, rows.scale) if isinstance(rows, Quantized) else (rows, None)


def _strides(rows: Tensor | None) -> tuple[int, int, int]:
    """From one sequence, head and token to the next."""
    return (0, 0, 0) if rows is None else rows.stride()[:3]


def _halves(width: int) -> tuple[int, int]:
    """
    The largest power of two in a width, and one that holds the rest, both at least 16, the least
    that a matrix product takes; 0 for what is empty.
    """
    whole = max(2 ** (width.bit_length() - 1), 16) if width else 0
    left = width - whole
    return whole, max(triton.next_power_of_2(left), 16) if left > 0 else 0


def row_bytes(dtype: torch.dtype, kept: torch.dtype, widths: list[int]) -> int:
    """What a key, its value and what is beside it take in shared memory, with their conversion."""
    size = dtype.itemsize + (2 if dtype.itemsize == 4 and kept.itemsize < 4 else 0)
    return size * sum(sum(_halves(width)) for width in widths)


@triton.jit
def load_rows(
    at, stride, row, there, WIDTH: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """
    Rows (WIDTH,) in two halves, filled up with zeros to N1 and N2. Rows that are not there are
    zeros. With N2 = 0 there is one half, returned twice.
    """
    at, there = at + row[:, None] * stride, there[:, None]
    d = tl.arange(0, N1)[None, :]
    first = tl.load(at + d, mask=there & (d < WIDTH), other=0)
    second = first
    if N2 > 0:
        d = N1 + tl.arange(0, N2)[None, :]
        second = tl.load(at + d, mask=there & (d < WIDTH), other=0)
    if INTERPRETED:
        first, second = first.to(tl.float32), second.to(tl.float32)
    return first.to(DTYPE), second.to(DTYPE)


@triton.jit
def product(a, b, sums):
    """sums + a b: products as exact as their dtype's are, sums in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=sums, input_precision="ieee")


@triton.jit
def scores(q1, q2, rows1, rows2, N2: tl.constexpr):
    """Queries times keys, each in two halves."""
    s = product(q1, tl.trans(rows1), tl.full([q1.shape[0], rows1.shape[0]], 0.0, tl.float32))
    if N2 > 0:
        s = product(q2, tl.trans(rows2), s)
    return s


@triton.jit
def load_scales(at, stride, key, there):
    """The scales of a block of keys, as one row."""
    return tl.load(at + key * stride, mask=there, other=0).to(tl.float32)[None, :]


@triton.jit
def keys_of_part(part, length, BLOCK: tl.constexpr):
    """The first of a part of the keys, whole blocks of all, and the first that follows it."""
    each = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(1)) * BLOCK
    return part * each, tl.minimum(part * each + each, length)


@triton.jit
def weigh(s, top, total):
    """
    Weights of keys with scores s (rows, BLOCK) in units of log2, and what is left of the weights
    before them; with the largest score and the sum of weights so far, which are updated.
    """
    higher = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # where no key is seen yet
    left, p = tl.exp2(top - shift), tl.exp2(s - shift[:, None])
    return p, left[:, None], higher, total * left + tl.sum(p, 1)


@triton.jit
def weighted(p, rows1, rows2, sums1, sums2, N2: tl.constexpr):
    """sums + p rows, each in two halves."""
    sums1 = product(p, rows1, sums1)
    if N2 > 0:
        sums2 = product(p, rows2, sums2)
    return sums1, sums2


@triton.jit
def store_rows(
    at, rows1, rows2, there, WIDTH: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr
):  # fmt: skip
    """Rows (WIDTH,) in two halves to where they begin, `at` (rows,)."""
    at, there, d = at[:, None], there[:, None], tl.arange(0, N1)[None, :]
    tl.store(at + d, rows1.to(at.dtype.element_ty), mask=there & (d < WIDTH))
    if N2 > 0:
        d = N1 + tl.arange(0, N2)[None, :]
        tl.store(at + d, rows2.to(at.dtype.element_ty), mask=there & (d < WIDTH))


@triton.jit(do_not_specialize=["n", "m", "before", "T", "X"])
def attend_part(
    q, k, k_b, k_x, k_s, k_scale, ks_b, ks_x, ks_s, v, v_b, v_x, v_s, v_scale, vs_b, vs_x, vs_s,
    e, e_b, e_x, e_s, e_scale, es_b, es_x, es_s, lengths, out, sums, n, m, before, T, X, scale,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    W1: tl.constexpr, W2: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    The averages of a part of the keys for ROWS of n queries: out (B * X * n, parts, W or D), and
    sums (B * X * n, parts), log2 of the sums of their weights, -inf for no key; None: of one part.
    e is what is beside the keys. _b, _x, _s: strides of sequences, heads, tokens. scale: for log2.
    """
    part, blocks = tl.program_id(1), tl.cdiv(n, ROWS)
    DTYPE: tl.constexpr = q.dtype.element_ty
    head, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    head, b, x = head.to(tl.int64), (head // X).to(tl.int64), (head % X).to(tl.int64)
    if lengths is not None:
        before = tl.load(lengths + b).to(tl.int32)
    begin, end = keys_of_part(part, before + T, BLOCK)
    newest = (before + row // m)[:, None]  # the last key that a row sees
    q += head * n * (D + R)
    q1, q2 = load_rows(q, D + R, row, row < n, D, D1, D2, DTYPE)
    if R > 0:
        q3, q4 = load_rows(q + D, D + R, row, row < n, R, R1, R2, DTYPE)
    WIDTH: tl.constexpr = W if W > 0 else D
    N1: tl.constexpr = W1 if W > 0 else D1
    N2: tl.constexpr = W2 if W > 0 else D2
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.full([ROWS], 0.0, tl.float32)
    out1 = tl.full([ROWS, N1], 0.0, tl.float32)
    out2 = tl.full([ROWS, N2 if N2 > 0 else N1], 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        there = key < end
        rows1, rows2 = load_rows(k + b * k_b + x * k_x, k_s, key, there, D, D1, D2, DTYPE)
        s = scores(q1, q2, rows1, rows2, D2)
        if k_scale is not None:
            scales = load_scales(k_scale + b * ks_b + x * ks_x, ks_s, key, there)
            s *= scales
        if R > 0:
            more1, more2 = load_rows(e + b * e_b, e_s, key, there, R, R1, R2, DTYPE)
            more = scores(q3, q4, more1, more2, R2)
            if e_scale is not None:
                more *= load_scales(e_scale + b * es_b, es_s, key, there)
            s += more
        s = tl.where(there[None, :] & (key[None, :] <= newest), s * scale, float("-inf"))
        p, left, top, total = weigh(s, top, total)
        if W > 0:
            rows1, rows2 = load_rows(v + b * v_b + x * v_x, v_s, key, there, W, W1, W2, DTYPE)
            if v_scale is not None:
                scales = load_scales(v_scale + b * vs_b + x * vs_x, vs_s, key, there)
        if k_scale is not None:
            p *= scales
        out1, out2 = weighted(p.to(DTYPE), rows1, rows2, out1 * left, out2 * left, N2)

    at = (head * n + row) * tl.num_programs(1) + part
    total = tl.where(total == 0, 1.0, total)
    if sums is not None:
        tl.store(sums + at, top + tl.log2(total), mask=row < n)
    there, total = row < tl.where(begin < end, n, 0), total[:, None]
    store_rows(out + at * WIDTH, out1 / total, out2 / total, there, WIDTH, N1, N2)


@triton.jit(do_not_specialize=["parts"])
def merge(
    averages, sums, out, parts, WIDTH: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """N columns of out (WIDTH,), a row's average, from those of its parts (parts, WIDTH)."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    column = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    s = tl.load(sums + row * parts + part, mask=part < parts, other=float("-inf"))
    share = tl.exp2(s - tl.max(s, 0))[:, None]  # NaN, which makes all NaN, where s is
    at = averages + (row * parts + part)[:, None] * WIDTH + column
    y = tl.load(at, mask=(s > float("-inf"))[:, None] & (column < WIDTH), other=0.0)
    y = tl.sum(y * share, 0, keep_dims=True) / tl.sum(share)
    tl.store(out + row * WIDTH + column, y.to(out.dtype.element_ty), mask=column < WIDTH)
