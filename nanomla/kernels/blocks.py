"""
Attention of few new tokens on a CPU over keys and values in a narrow dtype: 8-bit integers with
scales, bfloat16 or float16. A block of them at a time is converted to float32, in which all is
computed.

In shape comments N is the number of key heads that are taken together, of one or more sequences,
and T * m are the queries that share a key head. One head alone goes without N.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanomla.kernels.int8 import Quantized, dequantise
from nanomla.kernels.reference import causal_mask, scores_beside

BLOCK = 2**19  # numbers of keys per core at a time: 2 MB in float32
HIDDEN = -1e30  # the score of a key that is not seen; blocks of infinite ones have no maximum


class Narrow(NamedTuple):
    """Keys or values as they are stored."""

    numbers: Tensor  # (N, S, W) int8, bfloat16 or float16
    scale: Tensor | None  # (N, S, 1) float32, of int8 alone


class Partial(NamedTuple):
    """What each block contributes to an average, before the blocks are merged."""

    outs: Tensor  # (blocks, ..., T * m, W) values, added up by their weights
    tops: Tensor  # (blocks, ..., T * m, 1) the highest score, which has the weight 1
    sums: Tensor  # (blocks, ..., T * m, 1) the sum of the weights


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
    nanomla.kernels.attend for a few new tokens, in q's dtype: q (B, X, T * m, D), as by_group makes
    it, to (B, X, T * m, W).

    Keys and values are never multiplied by their scales: the scores and the weights are, which are
    fewer. Measured for one new token on 32,768, one core of a Zen 5: any narrow dtype takes 1.0
    (latents) to 1.3 times (MHA's keys and values) as long as float32. Products in bfloat16 would
    take 0.4 to 0.75 times as long as this, but round every score, and those of 8-bit integers were
    slower.
    """
    B, X, queries, _ = q.shape
    heads = B * X
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    threads = torch.get_num_threads()
    keys = join_heads(k)
    values = keys
    if v is not None:
        values = join_heads(v)
    D = keys.numbers.size(-1)
    S = keys.numbers.size(1)

    q = q.to(wide) * scale
    extra = None  # scores to add, (heads, T * m, S)
    if beside is not None:
        extra = scores_beside(q[..., D:], dequantise(beside, wide)).flatten(0, 1)
    if lengths is not None:
        seen = causal_mask(T, S, queries // T, q.device, lengths)
        hidden = torch.zeros(seen.shape, dtype=wide).masked_fill_(~seen, HIDDEN)
        hidden = hidden.expand(-1, X, -1, -1).flatten(0, 1)
        if extra is None:
            extra = hidden
        else:
            extra = extra + hidden
    q = q[..., :D].flatten(0, 1)  # (heads, T * m, D)

    block_keys = max(BLOCK * threads // D, threads)  # in a block, of all its heads
    if heads == 1 and threads > 1 and (S - T) // threads >= 1024 and extra is None:
        out = split_over_cores(q, keys, values, T, block_keys)
    else:
        out = some_heads_at_a_time(q, keys, values, T, extra, block_keys)
    return out.view(B, X, queries, -1).to(dtype)


def join_heads(x: Tensor | Quantized) -> Narrow:
    """Keys or values (B, X, S, W) with the heads of all sequences in one dimension, uncopied."""
    if isinstance(x, Quantized):
        return Narrow(x.values.flatten(0, 1), x.scale.float().flatten(0, 1))
    return Narrow(x.flatten(0, 1), None)


def split_over_cores(q: Tensor, keys: Narrow, values: Narrow, T: int, block_keys: int) -> Tensor:
    """
    One head (N = 1), whose old keys are cut into a part for each core, which torch is given as
    heads. The new tokens, which alone need a mask, form a last part with the remainder of the
    division. Returns (T * m, W).
    """
    threads = torch.get_num_threads()
    part = (keys.numbers.size(1) - T) // threads
    old_keys, last_keys = cut(keys, threads, part)
    old_values = old_keys
    last_values = last_keys
    if values is not keys:
        old_values, last_values = cut(values, threads, part)
    queries = q.expand(threads, -1, -1)
    old = average_blocks(queries, old_keys, old_values, 0, None, block_keys // threads)
    last = average_blocks(q[0], last_keys, last_values, T, None, block_keys)
    outs = torch.cat([old.outs.flatten(0, 1), last.outs])
    tops = torch.cat([old.tops.flatten(0, 1), last.tops])
    sums = torch.cat([old.sums.flatten(0, 1), last.sums])
    return merge(Partial(outs, tops, sums))


def cut(x: Narrow, parts: int, size: int) -> tuple[Narrow, Narrow]:
    """One head's parts of `size` tokens each, (parts, size, W), and its other tokens, uncopied."""
    end = parts * size
    numbers = x.numbers[0, :end].view(parts, size, -1)
    if x.scale is None:
        return Narrow(numbers, None), Narrow(x.numbers[0, end:], None)
    scale = x.scale[0, :end].view(parts, size, 1)
    return Narrow(numbers, scale), Narrow(x.numbers[0, end:], x.scale[0, end:])


def some_heads_at_a_time(
    q: Tensor, keys: Narrow, values: Narrow, T: int, extra: Tensor | None, block_keys: int
) -> Tensor:
    """Averages (heads, T * m, W); as many heads share a block as have 256 keys each in it."""
    total, queries, _ = q.shape
    heads = min(max(block_keys // 256, 1), total)
    averages = []
    for first in range(0, total, heads):
        some: slice | int = slice(first, first + heads)
        if heads == 1:
            some = first  # a batch of one matrix takes longer than the matrix itself
        some_keys = take_heads(keys, some)
        some_values = some_keys
        if values is not keys:
            some_values = take_heads(values, some)
        some_extra = None
        if extra is not None:
            some_extra = extra[some]
        part = average_blocks(q[some], some_keys, some_values, T, some_extra, block_keys // heads)
        average = merge(part)
        averages.append(average.view(-1, queries, average.size(-1)))
    return torch.cat(averages)


def take_heads(x: Narrow, heads: slice | int) -> Narrow:
    """Some heads, (N, S, W), or one, (S, W)."""
    if x.scale is None:
        return Narrow(x.numbers[heads], None)
    return Narrow(x.numbers[heads], x.scale[heads])


def average_blocks(
    q: Tensor, keys: Narrow, values: Narrow, T: int, extra: Tensor | None, size: int
) -> Partial:
    """
    The contribution of every block of `size` keys, the last of which may have up to T more.

    q (N, T * m, D), keys (N, S, D) and values (N, S, W), or all without N. values may be keys.
    extra (N, T * m, S): added to the scores. T = 0: no key is hidden.
    """
    S = keys.numbers.size(-2)
    last = 0  # the first key of the last block, which has all the new tokens
    if S > T:
        last = (S - T - 1) // size * size
    product = torch.mm
    if q.dim() == 3:
        product = torch.bmm
    widest = max(keys.numbers.numel(), values.numbers.numel()) // S  # numbers of a token
    room = q.new_empty(widest * (size + T))  # for one block in float32, again and again
    outs = []
    tops = []
    sums = []
    for start in range(0, last + 1, size):
        end = start + size
        if start == last:
            end = S
        block = convert(keys.numbers[..., start:end, :], room)
        scores = product(q, block.mT)  # (N, T * m, n), of n keys
        if keys.scale is not None:
            scores *= keys.scale[..., start:end, :].mT
        if extra is not None:
            scores += extra[..., start:end]
        if T > 1 and start == last:
            seen = causal_mask(T, end - start, q.size(-2) // T, q.device)
            scores.masked_fill_(~seen, float("-inf"))
        top = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(top).exp_()
        tops.append(top)
        sums.append(weights.sum(dim=-1, keepdim=True))
        if values is not keys:
            block = convert(values.numbers[..., start:end, :], room)
        if values.scale is not None:
            weights *= values.scale[..., start:end, :].mT
        outs.append(product(weights, block))
    return Partial(torch.stack(outs), torch.stack(tops), torch.stack(sums))


def convert(x: Tensor, room: Tensor) -> Tensor:
    """x in the dtype of `room` and in its memory, which allocates nothing."""
    return room[: x.numel()].view(x.shape).copy_(x)


def merge(blocks: Partial) -> Tensor:
    """One average (..., T * m, W) out of those of blocks, as in flash-decoding."""
    share = (blocks.tops - blocks.tops.amax(dim=0)).exp()
    return (blocks.outs * share).sum(dim=0) / (blocks.sums * share).sum(dim=0)
