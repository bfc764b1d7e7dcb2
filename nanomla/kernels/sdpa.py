"""Attention by torch's own kernels, on any device, with gradients and dropout."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomla.kernels.cpu import go_on
from nanomla.kernels.reference import causal_mask


def few(
    q: Tensor, k: Tensor, v: Tensor | None, T: int, scale: float, lengths: Tensor | None = None
) -> Tensor:
    """A few new tokens after earlier ones: q (B, X, T * m, D), k (B, X, S, D), v (B, X, S, W)."""
    mask = None
    if T > 1 or lengths is not None:
        mask = causal_mask(T, k.size(2), q.size(2) // T, q.device, lengths)
    if v is None:
        v = k
    return torch_attention(q, k, v, attn_mask=mask, scale=scale)


def many(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float,
    beside: Tensor | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """nanomla.kernels.attend for any T, q (B, nh, T, D), with no T x S mask or scores."""
    B, nh, T, _ = q.shape
    X = k.size(1)
    m = nh // X
    if v is None:
        width = k.size(-1)
    else:
        width = v.size(-1)
    if beside is not None:
        k = torch.cat([k, beside.expand(-1, X, -1, -1)], dim=-1)
    if v is None:
        v = k  # with beside at its end, which is cut off below
    if m > 1:  # a key head becomes a sequence, whose keys its m query heads share uncopied
        q = q.reshape(B * X, m, T, -1)
        k = k.flatten(0, 1).unsqueeze(1).expand(-1, m, -1, -1)
        v = v.flatten(0, 1).unsqueeze(1).expand(-1, m, -1, -1)
        if lengths is not None:
            lengths = lengths.repeat_interleave(X)

    gradients = torch.is_grad_enabled() or dropout > 0
    if T == k.size(2) and lengths is None:
        out = torch_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    elif q.device.type == "cpu" and not gradients and lengths is None and k.shape == v.shape:
        out = go_on(q, k, v, scale)
    else:
        out = some_queries_at_a_time(q, k, v, scale, lengths, dropout)
    return out[..., :width].reshape(B, nh, T, width)


def some_queries_at_a_time(
    q: Tensor, k: Tensor, v: Tensor, scale: float, lengths: Tensor | None, dropout: float
) -> Tensor:
    """
    Many new tokens after earlier ones, some queries at a time, so that no mask is T x S: one of 2
    million numbers fits a CPU's cache, one of 64 million occupies a GPU.
    """
    T = q.size(2)
    S = k.size(2)
    numbers_per_query = S
    if lengths is not None:
        numbers_per_query = S * q.size(0)  # every sequence has a mask of its own
    if q.device.type == "cpu":
        queries = min(2**21 // numbers_per_query, 256)
    else:
        queries = 2**26 // numbers_per_query
    queries = max(queries, 32)
    outs = []
    for first in range(0, T, queries):
        some = q[:, :, first : first + queries]
        new = some.size(2)
        if lengths is None:
            end = S - T + first + new  # what follows is masked for all of these queries
            mask = causal_mask(new, end, 1, q.device)
        else:
            end = S
            mask = causal_mask(new, end, 1, q.device, lengths + first)
        keys = k[:, :, :end]
        values = v[:, :, :end]
        out = torch_attention(some, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale)
        outs.append(out)
    return torch.cat(outs, dim=2)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """torch's attention, whose fast kernels need keys and values of one width: zeros fill up."""
    width = v.size(-1)
    missing = k.size(-1) - width
    if missing > 0:
        v = F.pad(v, (0, missing))
    elif missing < 0:
        q = F.pad(q, (0, -missing))
        k = F.pad(k, (0, -missing))
    out = F.scaled_dot_product_attention(q, k, v, **settings)
    return out[..., :width]
