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
    B, X, n, _ = q.shape
    S = k.size(2)
    q = q.contiguous()
    keys, key_scales = _stored(k)
    values, value_scales = _stored(v)
    more, more_scales = _stored(beside)
    widths = [_width(keys), _width(values), _width(more)]
    width = widths[1] or widths[0]  # of an average
    if cut is None:
        cut = plan(q.device, B * X, n, S, row_bytes(q.dtype, keys.dtype, widths))
    out = q.new_empty(B, X, n, width)
    averages = out
    sums = None
    if cut.splits > 1:
        averages = q.new_empty(B * X * n, cut.splits, width, dtype=torch.float32)
        sums = q.new_empty(B * X * n, cut.splits, dtype=torch.float32)
    rows = []
    for tensor in (keys, key_scales, values, value_scales, more, more_scales):
        rows.append(tensor)
        rows.extend(_strides(tensor))
    sizes = widths.copy()
    for each in widths:
        sizes.extend(_halves(each))
    with torch.cuda.device_of(q):
        attend_part[(B * X * triton.cdiv(n, cut.rows), cut.splits)](
            q, *rows, lengths, averages, sums, n, n // T, S - T, T, X, scale / math.log(2),
            *sizes, cut.rows, cut.block, num_warps=cut.warps, num_stages=cut.stages,
        )
        if sums is not None:
            parts = triton.next_power_of_2(cut.splits)
            columns = min(MERGED // parts, triton.next_power_of_2(width))
            grid = (B * X * n, triton.cdiv(width, columns))
            merge[grid](averages, sums, out, cut.splits, width, parts, columns)
    return out


def plan(device: torch.device, heads: int, n: int, S: int, nbytes: int) -> Plan:
    """
    How to cut the work of so many key heads, each n queries on S keys of nbytes.

    More queries in a program mean fewer that load the same keys. As many as here were found to fit
    registers and shared memory by compiling for sm_80 and sm_90; nothing was timed.
    """
    most = 16
    if nbytes <= 512:
        most = 64
    elif nbytes <= 1280:
        most = 32
    rows = min(max(triton.next_power_of_2(n), 16), most)
    block = min(max(2 ** int(math.log2(BLOCK_BYTES / nbytes)), 16), 64)
    cores = 16  # in the interpreter
    if device.type == "cuda":
        cores = torch.cuda.get_device_properties(device).multi_processor_count
    programs = heads * triton.cdiv(n, rows)
    splits = max(min(2 * cores // programs, triton.cdiv(S, 2 * block), SPLITS), 1)
    splits = 1 << (splits.bit_length() - 1)  # the fewer there are, the less often merge is compiled
    warps = 4
    if nbytes >= 1024 or rows == 64:
        warps = 8
    stages = 2
    if block * nbytes <= BLOCK_BYTES // 2:
        stages = 3
    return Plan(block, splits, rows, warps, stages)


def try_out(device: torch.device) -> None:
    """A first small call, on a GPU that may lack what Triton needs. Raises what goes wrong."""
    q = torch.sin(torch.arange(64 * 2, device=device)).bfloat16().view(1, 1, 2, 64)
    k = torch.sin(torch.arange(64 * 40, device=device)).bfloat16().view(1, 1, 40, 64)
    out = attend(q, k, None, 1, 0.2, cut=Plan(block=16, splits=2)).float()
    error = float((out - reference.attend(q.float(), k.float(), None, 1, 0.2)).abs().max())
    if not error < 0.02:
        raise ArithmeticError(f"its results are off by {error:.2g}")


def supports(q: Tensor, *rows: Tensor | Quantized | None) -> bool:
    """Whether queries can attend to such keys, values and what is beside them."""
    tensors = [_stored(one)[0] for one in rows if one is not None]
    if q.dtype not in DTYPES:
        return False
    for tensor in tensors:
        if tensor.dtype not in DTYPES and tensor.dtype != torch.int8:
            return False
        # Within a head, an offset is a number of 32 bits.
        if tensor.stride(3) != 1 or tensor.size(2) * tensor.stride(2) >= 2**31:
            return False
    widths = [tensor.size(3) for tensor in tensors]
    return 16 * row_bytes(q.dtype, tensors[0].dtype, widths) <= BLOCK_BYTES


def _stored(rows: Tensor | Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    """The numbers that rows are stored as, and their scales."""
    if isinstance(rows, Quantized):
        return rows.values, rows.scale
    return rows, None


def _width(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.size(-1)


def _strides(rows: Tensor | None) -> tuple[int, int, int]:
    """From one sequence, head and token to the next."""
    return (0, 0, 0) if rows is None else rows.stride()[:3]


def _halves(width: int) -> tuple[int, int]:
    """
    The largest power of two in a width, and one that holds the rest, both at least 16, the least
    that a matrix product takes; 0 for what is empty.
    """
    if width == 0:
        return 0, 0
    first = max(2 ** (width.bit_length() - 1), 16)
    if first >= width:
        return first, 0
    return first, max(triton.next_power_of_2(width - first), 16)


def row_bytes(dtype: torch.dtype, stored: torch.dtype, widths: list[int]) -> int:
    """What a key, its value and what is beside it take in shared memory, with their conversion."""
    size = dtype.itemsize
    if dtype.itemsize == 4 and stored.itemsize < 4:
        size += 2
    return size * sum(sum(_halves(width)) for width in widths)


# ---- what runs on the GPU
@triton.jit
def load_rows(
    start, stride, row, present, WIDTH: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """
    Rows (WIDTH,) in two halves, filled up with zeros to N1 and N2. Rows that are not present are
    zeros. With N2 = 0 there is one half, returned twice.
    """
    at = start + row[:, None] * stride
    present = present[:, None]
    column = tl.arange(0, N1)[None, :]
    half1 = tl.load(at + column, mask=present & (column < WIDTH), other=0)
    half2 = half1
    if N2 > 0:
        column = N1 + tl.arange(0, N2)[None, :]
        half2 = tl.load(at + column, mask=present & (column < WIDTH), other=0)
    if INTERPRETED:
        half1 = half1.to(tl.float32)
        half2 = half2.to(tl.float32)
    return half1.to(DTYPE), half2.to(DTYPE)


@triton.jit
def product(a, b, sums):
    """sums + a b: products as exact as their dtype's are, sums in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=sums, input_precision="ieee")


@triton.jit
def scores(q1, q2, keys1, keys2, N2: tl.constexpr):
    """Queries times keys, each in two halves."""
    s = product(q1, tl.trans(keys1), tl.full([q1.shape[0], keys1.shape[0]], 0.0, tl.float32))
    if N2 > 0:
        s = product(q2, tl.trans(keys2), s)
    return s


@triton.jit
def load_scales(start, stride, key, present):
    """The scales of a block of keys, as one row."""
    return tl.load(start + key * stride, mask=present, other=0).to(tl.float32)[None, :]


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
    left = tl.exp2(top - shift)
    p = tl.exp2(s - shift[:, None])
    return p, left[:, None], higher, total * left + tl.sum(p, 1)


@triton.jit
def weighted(p, values1, values2, sums1, sums2, N2: tl.constexpr):
    """sums + p values, each in two halves."""
    sums1 = product(p, values1, sums1)
    if N2 > 0:
        sums2 = product(p, values2, sums2)
    return sums1, sums2


@triton.jit
def store_rows(
    start, half1, half2, present, WIDTH: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr
):
    """Rows (WIDTH,) in two halves to where they begin, `start` (rows,)."""
    at = start[:, None]
    present = present[:, None]
    column = tl.arange(0, N1)[None, :]
    tl.store(at + column, half1.to(at.dtype.element_ty), mask=present & (column < WIDTH))
    if N2 > 0:
        column = N1 + tl.arange(0, N2)[None, :]
        tl.store(at + column, half2.to(at.dtype.element_ty), mask=present & (column < WIDTH))


@triton.jit(do_not_specialize=["n", "m", "before", "T", "X"])
def attend_part(
    q, k, k_b, k_x, k_s, k_scale, ks_b, ks_x, ks_s, v, v_b, v_x, v_s, v_scale, vs_b, vs_x, vs_s,
    e, e_b, e_x, e_s, e_scale, es_b, es_x, es_s, lengths, out, sums, n, m, before, T, X, scale,
    D: tl.constexpr, W: tl.constexpr, R: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    W1: tl.constexpr, W2: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """
    The averages of a part of the keys for ROWS of n queries: out (B * X * n, parts, W or D), and
    sums (B * X * n, parts), log2 of the sums of their weights, -inf for no key; None: of one part.
    e is what is beside the keys. _b, _x, _s: strides of sequences, heads, tokens. scale: for log2.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    if W > 0:
        WIDTH: tl.constexpr = W
        N1: tl.constexpr = W1
        N2: tl.constexpr = W2
    else:
        WIDTH: tl.constexpr = D
        N1: tl.constexpr = D1
        N2: tl.constexpr = D2
    # Which queries, and which keys.
    part = tl.program_id(1)
    blocks = tl.cdiv(n, ROWS)
    head = tl.program_id(0) // blocks
    b = (head // X).to(tl.int64)
    x = (head % X).to(tl.int64)
    head = head.to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    if lengths is not None:
        before = tl.load(lengths + b).to(tl.int32)
    begin, end = keys_of_part(part, before + T, BLOCK)
    newest = (before + row // m)[:, None]  # the last key that a row sees
    q += head * n * (D + R)
    q1, q2 = load_rows(q, D + R, row, row < n, D, D1, D2, DTYPE)
    if R > 0:
        q3, q4 = load_rows(q + D, D + R, row, row < n, R, R1, R2, DTYPE)
    # The keys, block by block: their scores, their weights, and the weighted sum of their values.
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    out1 = tl.full([ROWS, N1], 0.0, tl.float32)
    out2 = tl.full([ROWS, N2 if N2 > 0 else N1], 0.0, tl.float32)
    for start in range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        present = key < end
        keys1, keys2 = load_rows(k + b * k_b + x * k_x, k_s, key, present, D, D1, D2, DTYPE)
        s = scores(q1, q2, keys1, keys2, D2)
        if k_scale is not None:
            key_scales = load_scales(k_scale + b * ks_b + x * ks_x, ks_s, key, present)
            s *= key_scales
        if R > 0:
            more1, more2 = load_rows(e + b * e_b, e_s, key, present, R, R1, R2, DTYPE)
            more = scores(q3, q4, more1, more2, R2)
            if e_scale is not None:
                more *= load_scales(e_scale + b * es_b, es_s, key, present)
            s += more
        s = tl.where(present[None, :] & (key[None, :] <= newest), s * scale, float("-inf"))
        p, left, top, total = weigh(s, top, total)
        if W > 0:
            values1, values2 = load_rows(v + b * v_b + x * v_x, v_s, key, present, W, W1, W2, DTYPE)
            if v_scale is not None:
                p *= load_scales(v_scale + b * vs_b + x * vs_x, vs_s, key, present)
        else:
            values1 = keys1
            values2 = keys2
            if k_scale is not None:
                p *= key_scales
        out1, out2 = weighted(p.to(DTYPE), values1, values2, out1 * left, out2 * left, N2)

    at = (head * n + row) * tl.num_programs(1) + part
    total = tl.where(total == 0, 1.0, total)
    if sums is not None:
        tl.store(sums + at, top + tl.log2(total), mask=row < n)
    total = total[:, None]
    present = row < tl.where(begin < end, n, 0)
    store_rows(out + at * WIDTH, out1 / total, out2 / total, present, WIDTH, N1, N2)


@triton.jit(do_not_specialize=["parts"])
def merge(
    averages, sums, out, parts, WIDTH: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr
):
    """N columns of out (WIDTH,), a row's average, from those of its parts (parts, WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    column = (tl.program_id(1) * N + tl.arange(0, N))[None, :]
    s = tl.load(sums + row * parts + part, mask=part < parts, other=float("-inf"))
    share = tl.exp2(s - tl.max(s, 0))[:, None]  # NaN, which makes all NaN, where s is
    at = averages + (row * parts + part)[:, None] * WIDTH + column
    y = tl.load(at, mask=(s > float("-inf"))[:, None] & (column < WIDTH), other=0.0)
    y = tl.sum(y * share, 0, keep_dims=True) / tl.sum(share)
    tl.store(out + row * WIDTH + column, y.to(out.dtype.element_ty), mask=column < WIDTH)
