"""What attend computes, in plain torch. The faster versions are tested against this one."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(
    T: int, S: int, m: int, device: torch.device, lengths: Tensor | None = None
) -> Tensor:
    """
    (T * m, S) bool, True where the t-th of T new tokens may look; a token has m queries. With
    lengths (B,), the keys before sequence b's new ones, which then need not be the last:
    (B, 1, T * m, S).
    """
    if lengths is None:
        last = torch.arange(S - T, S, device=device)
    else:
        last = lengths[:, None, None] + torch.arange(T, device=device)  # (B, 1, T)
    return torch.arange(S, device=device) <= last.repeat_interleave(m, dim=-1).unsqueeze(-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    T: int,
    scale: float,
    beside: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """
    nanomla.kernels.attend, softmax(q [k ; beside]^T scale) v, for query heads that are grouped by
    the key head that they share: q (B, X, T * m, D), as by_group makes it, to (B, X, T * m, W).
    """
    q = q * scale  # queries are fewer than keys, so they are scaled
    scores = q[..., : k.size(-1)] @ k.mT  # (..., T * m, S)
    if beside is not None:
        scores = scores + scores_beside(q[..., k.size(-1) :], beside)
    if T > 1 or lengths is not None:
        mask = causal_mask(T, k.size(-2), q.size(-2) // T, q.device, lengths)
        scores = scores.masked_fill(~mask, float("-inf"))
    if v is None:
        v = k
    return F.softmax(scores, dim=-1) @ v


def scores_beside(q: Tensor, beside: Tensor) -> Tensor:
    """q (B, X, T * m, r) times the key part (B, 1, S, r) that X heads share: (B, X, T * m, S)."""
    return (q.flatten(1, 2) @ beside.squeeze(1).mT).unflatten(1, (q.size(1), -1))


def causal_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What every token reads of all, (B, nh, T, T): softmax(q k^T scale), q and k (B, nh, T, D)."""
    T = q.size(2)
    scores = q @ k.mT * scale
    seen = causal_mask(T, T, 1, q.device)
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


def by_group(y: Tensor, G: int) -> Tensor:
    """y (B, nh, T, w) -> (B, G, T * m, w), at t * m + i: token t's i-th of m = nh / G heads."""
    B, nh, T, w = y.shape
    m = nh // G
    return y.view(B, G, m, T, w).transpose(2, 3).reshape(B, G, T * m, w)


def by_head(y: Tensor, T: int) -> Tensor:
    """The inverse of by_group: (B, G, T * m, w) -> (B, nh, T, w)."""
    return y.unflatten(2, (T, y.size(2) // T)).transpose(2, 3).flatten(1, 2)
