"""
On a CPU, without gradients: few new tokens, and many behind old ones.

torch gives one query block, or one row of a product, to one core. Here the keys, or the weight,
are cut into blocks that torch receives as heads, or as a batch, so that all cores take part. The
figures below were measured on two cores of a Zen 4 without AMX (docs/results.md has others).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomla.kernels.reference import attend as two_products
from nanomla.kernels.reference import causal_mask


def attend(q: Tensor, k: Tensor, v: Tensor | None, T: int, scale: float) -> Tensor:
    """
    A few new tokens after earlier ones: q (B, X, T * m, D), k (B, X, S, D), v (B, X, S, W) or None.

    Measured for one new token: torch's flash kernel is 1.3x slower than two matrix products on
    MHA's keys. On latents, which are keys and values at once, it is 1.4x faster if its keys are
    split over the cores. Keys narrower than float32 are computed by blocks.py.
    """
    latents = v is None and k.size(1) == 1 and k.dtype == torch.float32
    if not latents:
        return plain_products(q, k, v, T, scale)
    threads = torch.get_num_threads()
    chunks = min(4 * threads, (k.size(2) - T) // 256)  # fewer than 256 keys do not repay the merge
    if q.size(0) < threads and chunks > 1:  # more sequences occupy the cores without a split
        return split_keys(q, k, T, scale, chunks)
    mask = None
    if T > 1:
        mask = causal_mask(T, k.size(2), q.size(2) // T, q.device)
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=scale)


def plain_products(q: Tensor, k: Tensor, v: Tensor | None, T: int, scale: float) -> Tensor:
    """The two matrix products of the reference."""
    if q.shape[:2] != (1, 1):
        return two_products(q, k, v, T, scale)
    # A batch of one matrix takes longer than the matrix itself.
    if v is not None:
        v = v[0, 0]
    return two_products(q[0, 0], k[0, 0], v, T, scale)[None, None]


def split_keys(q: Tensor, latents: Tensor, T: int, scale: float, chunks: int) -> Tensor:
    """
    Queries (B, 1, T * m, W) over latents (B, 1, S, W), keys and values at once, on all cores.

    The old keys are cut into chunks that are passed as heads. Each chunk's output comes with its
    log-sum-exp, by which the chunks are merged, as in flash-decoding. The new tokens, which alone
    need a mask, form a last chunk together with the remainder of the division.
    """
    size = (latents.size(2) - T) // chunks
    old = latents[:, 0, : chunks * size].unflatten(1, (chunks, size))  # (B, chunks, size, W)
    tail = latents[:, :, chunks * size :]
    mask = None
    if T > 1:
        seen = causal_mask(T, tail.size(2), q.size(2) // T, q.device)
        mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_old, lse_old = flash(q.expand(-1, chunks, -1, -1), old, old, scale=scale)
    out_tail, lse_tail = flash(q, tail, tail, attn_mask=mask, scale=scale)
    out = torch.cat([out_old, out_tail], dim=1)  # (B, chunks + 1, T * m, W)
    share = torch.cat([lse_old, lse_tail], dim=1).softmax(dim=1)  # (B, chunks + 1, T * m)
    return (out * share.unsqueeze(-1).to(q.dtype)).sum(dim=1, keepdim=True)


def go_on(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """
    The last T of S tokens, q (B, X, T, D) against k (B, X, S, D) and v (B, X, S, D).

    The S - T keys before them need no mask, and their own are those of a prompt, of which torch's
    kernel leaves out the half that is not seen. Averages over both are merged by their log-sum-exp.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    old = k.size(2) - q.size(2)
    before, lse = flash(q, k[:, :, :old], v[:, :, :old], scale=scale)
    own, own_lse = flash(q, k[:, :, old:], v[:, :, old:], is_causal=True, scale=scale)
    return own.lerp_(before, (lse - own_lse).sigmoid_().unsqueeze(-1).to(own.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    A few rows x (..., in) through a large weight (out, in), which all cores read together.

    Blocks of the weight's rows are passed as a batch, so that every core gets some. Measured on a
    Zen 5 beside F.linear: 1.5x at 1 row, 1.4x at 8 and 16; in bfloat16 nothing is gained. 2 to 4
    rows are multiplied the other way round, the weight times x, unless it is wider than high: 2 to
    3x, with one thread 1.3 to 1.7x, as MKL does not copy the weight then.
    """
    width = x.size(-1)
    rows = x.numel() // width
    # as many blocks as keep the cores busy and divide the weight evenly
    blocks = math.gcd(weight.size(0), 4 * torch.get_num_threads())
    if 2 <= rows <= 4 and weight.size(0) >= width:
        columns = x.reshape(rows, width).mT.expand(blocks, -1, -1)  # (blocks, in, rows)
        y = torch.bmm(weight.view(blocks, -1, width), columns)  # (blocks, out / blocks, rows)
        y = y.flatten(0, 1).mT  # (rows, out)
    elif blocks == 1 or torch.get_num_threads() == 1:
        return F.linear(x, weight, bias)
    else:
        blocked = weight.view(blocks, -1, width).mT  # (blocks, in, out / blocks)
        y = torch.bmm(x.reshape(1, rows, -1).expand(blocks, -1, -1), blocked)
        y = y.transpose(0, 1)
    y = y.reshape(*x.shape[:-1], weight.size(0))  # (..., out)
    if bias is not None:
        y = y + bias
    return y
