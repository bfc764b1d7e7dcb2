"""
Rows kept as 8-bit integers with one float16 scale each, and attention over them on a CPU.

A row x is kept as round(x / scale) with scale = max|x| / 127, rounded to float16. Every number
comes back within half a scale or 127 * 2^-25 = 4e-6, whichever is larger: below float16's smallest
number a scale becomes 0, and its row zeros. A row with a number over 127 * 65,504 has no float16
scale and is refused; NaN makes the scale, and with it the whole row, NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanomla.kernels.reference import causal_mask

LARGEST = 127 * torch.finfo(torch.float16).max
BLOCK = 5 * 2**16  # numbers of rows per core at a time; in float32 its cache holds them


class Quantized(NamedTuple):
    """Row j is values[..., j, :] * scale[..., j, :]."""

    values: Tensor  # (..., S, W) int8, from -127 to 127
    scale: Tensor  # (..., S, 1) float16, 0 or more


def quantise(x: Tensor) -> Quantized:
    """x (..., S, W) rounded to nearest. Raises ValueError for a number that no scale reaches."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = (largest / 127).half()
    if bool(scale.isinf().any()):
        raise ValueError(
            f"dtype=torch.int8 does not work: a number to cache is {largest.max():.3g}, over the "
            f"{LARGEST:.3g} that a float16 scale reaches, so dtype must be torch.float32"
        )
    values = x / scale.float().masked_fill(scale == 0, float("inf"))
    return Quantized(values.round().clamp(-127, 127).to(torch.int8), scale)


def dequantise(rows: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """Rows (..., S, W) as a tensor of a floating dtype, in whichever way they are kept."""
    if isinstance(rows, Tensor):
        return rows.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (rows.values.to(wide) * rows.scale.to(wide)).to(dtype)


def attend(
    q: Tensor,
    k: Quantized,
    v: Quantized | None,
    T: int,
    scale: float,
    extra: Tensor | None = None,
) -> Tensor:
    """
    nanomla.kernels.attend on a CPU for a few new tokens, in q's dtype.

    Rows are converted to float32 block by block, and never multiplied by their scales: the scores
    and the weights are, which are fewer. Measured for one new token on 32,768, one layer: latents
    take as long as on a float32 cache, of which four times as many bytes are read, MHA's keys and
    values 1.04 (one core) to 1.2 times (two) as long. A bfloat16 cache of latents is 1.5 times as
    fast on a CPU with AMX. Products of 8-bit integers (torch._int_mm, the query in two digits and
    the weights in three) were slower: the digits cost more than the conversion.
    """
    (B, X, rows, D), dtype, threads = q.shape, q.dtype, torch.get_num_threads()
    wide = torch.promote_types(dtype, torch.float32)
    q = (q.to(wide) * scale).flatten(0, 1)
    extra = None if extra is None else extra.flatten(0, 1).to(wide) * scale
    kept = [t.flatten(0, 1) for t in (*k, *(v or ()))]  # (B * X, S, .)
    kept = [t if t.dtype == torch.int8 else t.to(wide) for t in kept]
    numbers = max(BLOCK * threads // D, threads)
    cut = (kept[0].size(1) - T) // threads
    if B * X == 1 and threads > 1 and cut >= 1024 and extra is None:  # one part for each core
        old = [t[:, : threads * cut].view(threads, cut, -1) for t in kept]
        new = [t[0, threads * cut :] for t in kept]
        parts = by_blocks(q.expand(threads, -1, -1), old, 0, None, numbers // threads)
        tail = by_blocks(q[0], new, T, None, numbers)
        out = merge(*(torch.cat([a.flatten(0, 1), b]) for a, b in zip(parts, tail, strict=True)))
        return out.view(B, X, rows, -1).to(dtype)
    heads = min(max(numbers // 256, 1), B * X)  # so many share a block
    outs = []
    for i in range(0, B * X, heads):
        some = slice(i, i + heads) if heads > 1 else i  # a batch of one matrix takes longer than it
        extra_some = None if extra is None else extra[some]
        out = by_blocks(q[some], [t[some] for t in kept], T, extra_some, numbers // heads)
        outs.append(merge(*out).view(-1, rows, out[0].size(-1)))
    return torch.cat(outs).view(B, X, rows, -1).to(dtype)


def by_blocks(
    q: Tensor, kept: list[Tensor], T: int, extra: Tensor | None, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Unnormalised averages of `size` rows at a time, or in the last block up to T more, for heads
    that are taken together: q (..., T * m, D); kept is int8 keys and their scales, and the same of
    values unless keys are values. Every block's average (..., T * m, W) comes with its largest
    score and the sum of its weights, (..., T * m, 1), stacked over the blocks. T = 0: no mask.
    """
    S = kept[0].size(-2)
    full = (S - T - 1) // size if S > T else 0
    blocks = zip(*(t.split([size] * full + [S - full * size], dim=-2) for t in kept), strict=True)
    widest = max(t.numel() // S for t in kept)  # of all heads together
    room, outs, tops, sums = q.new_empty(widest * (size + T)), [], [], []
    product = torch.bmm if q.dim() == 3 else torch.mm
    for n, (keys, k_scale, *own) in enumerate(blocks):
        rows = room[: keys.numel()].view(keys.shape).copy_(keys)  # (..., n, D)
        p = product(q, rows.mT).mul_(k_scale.mT)  # (..., T * m, n)
        if extra is not None:
            p += extra[..., n * size : n * size + keys.size(-2)]
        if T > 1 and n == full:  # the new tokens are all in the last block
            seen = causal_mask(T, keys.size(-2), q.size(-2) // T, q.device)
            p.masked_fill_(~seen, float("-inf"))
        tops.append(p.amax(dim=-1, keepdim=True))
        p.sub_(tops[-1]).exp_()
        sums.append(p.sum(dim=-1, keepdim=True))
        values, v_scale = own or (None, k_scale)
        if values is not None:
            rows = room[: values.numel()].view(values.shape).copy_(values)
        outs.append(product(p.mul_(v_scale.mT), rows))
    return torch.stack(outs), torch.stack(tops), torch.stack(sums)


def merge(outs: Tensor, tops: Tensor, sums: Tensor) -> Tensor:
    """One average out of those of blocks, as in flash-decoding."""
    share = (tops - tops.amax(dim=0)).exp()
    return (outs * share).sum(dim=0) / (sums * share).sum(dim=0)
