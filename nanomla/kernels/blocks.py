"""
Attention of few new tokens on a CPU over rows that are kept narrow: 8-bit integers with scales,
bfloat16 or float16. A block of them at a time is converted to float32, in which all is computed.
"""

import torch
from torch import Tensor

from nanomla.kernels.int8 import Quantized, dequantise
from nanomla.kernels.reference import causal_mask, scores_beside

BLOCK = 2**19  # numbers of rows per core at a time: 2 MB in float32
HIDDEN = -1e30  # the score of a key that is not seen; blocks of infinite ones have no maximum


def attend(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized | None,
    T: int,
    scale: float,
    beside: Tensor | Quantized | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """
    nanomla.kernels.attend for a few new tokens, in q's dtype.

    Rows are never multiplied by their scales: the scores and the weights are, which are fewer.
    Measured for one new token on 32,768, one layer, one core of a Zen 5: rows of any narrow dtype
    take 1.0 (latents) to 1.3 times (MHA's keys and values) as long as float32 rows. Products in
    bfloat16 take 0.4 and 0.75 times as long as this, but they round every score: an error of 5e-3.
    torch's flash kernel was never faster, and 2 to 4 times slower on MHA's rows and in float16.
    Products of 8-bit integers (torch._int_mm, the query in two digits and the weights in three)
    were slower: the digits cost more than the conversion.
    """
    (B, X, rows, _), dtype, threads = q.shape, q.dtype, torch.get_num_threads()
    wide = torch.promote_types(dtype, torch.float32)
    q, extra = (q.to(wide) * scale).flatten(0, 1), None
    D = tensors(k)[0].size(-1)
    if beside is not None:
        q, q_beside = q.split([D, q.size(-1) - D], dim=-1)
        extra = scores_beside(q_beside.unflatten(0, (B, X)), dequantise(beside, wide)).flatten(0, 1)
    if lengths is not None:
        seen = causal_mask(T, tensors(k)[0].size(2), rows // T, q.device, lengths)
        hidden = torch.zeros(seen.shape, dtype=wide).masked_fill_(~seen, HIDDEN)
        hidden = hidden.expand(-1, X, -1, -1).flatten(0, 1)  # (B * X, T * m, S)
        extra = hidden if extra is None else extra + hidden
    kept = [t.flatten(0, 1) for t in (*tensors(k), *tensors(v))]  # (B * X, S, .)
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


def tensors(rows: Tensor | Quantized | None) -> tuple[Tensor, ...]:
    """What rows are kept in: one tensor, or integers and their scales in float32."""
    if isinstance(rows, Quantized):
        return rows.values, rows.scale.float()
    return () if rows is None else (rows,)


def by_blocks(
    q: Tensor, kept: list[Tensor], T: int, extra: Tensor | None, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Unnormalised averages of `size` rows at a time, or in the last block up to T more, for heads
    that are taken together: q (..., T * m, D); kept is keys, followed by their scales if they are
    int8, and the same of values unless keys are values. Every block's average (..., T * m, W) comes
    with its largest score and the sum of its weights, (..., T * m, 1), stacked over the blocks.
    T = 0: no mask.
    """
    S, scaled = kept[0].size(-2), kept[0].dtype == torch.int8
    full = (S - T - 1) // size if S > T else 0
    blocks = zip(*(t.split([size] * full + [S - full * size], dim=-2) for t in kept), strict=True)
    widest = max(t.numel() // S for t in kept)  # of all heads together
    room, outs, tops, sums = q.new_empty(widest * (size + T)), [], [], []
    product = torch.bmm if q.dim() == 3 else torch.mm
    for n, block in enumerate(blocks):
        keys, values = block[0], block[-2 if scaled else -1]
        rows = room[: keys.numel()].view(keys.shape).copy_(keys)  # (..., n, D)
        p = product(q, rows.mT)  # (..., T * m, n)
        if scaled:
            p *= block[1].mT
        if extra is not None:
            p += extra[..., n * size : n * size + keys.size(-2)]
        if T > 1 and n == full:  # the new tokens are all in the last block
            seen = causal_mask(T, keys.size(-2), q.size(-2) // T, q.device)
            p.masked_fill_(~seen, float("-inf"))
        tops.append(p.amax(dim=-1, keepdim=True))
        p.sub_(tops[-1]).exp_()
        sums.append(p.sum(dim=-1, keepdim=True))
        if values is not keys:
            rows = room[: values.numel()].view(values.shape).copy_(values)
        outs.append(product(p.mul_(block[-1].mT) if scaled else p, rows))
    return torch.stack(outs), torch.stack(tops), torch.stack(sums)


def merge(outs: Tensor, tops: Tensor, sums: Tensor) -> Tensor:
    """One average out of those of blocks, as in flash-decoding."""
    share = (tops - tops.amax(dim=0)).exp()
    return (outs * share).sum(dim=0) / (sums * share).sum(dim=0)
