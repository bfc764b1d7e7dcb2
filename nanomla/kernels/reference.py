"""What attend and linear compute, in plain torch. The fast versions are tested against these."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(T: int, S: int, m: int, device: torch.device) -> Tensor:
    """(T * m, S) bool, True where the t-th of the last T tokens may look; a token has m rows."""
    last = torch.arange(S - T, S, device=device).repeat_interleave(m)
    return torch.arange(S, device=device) <= last[:, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor | None, T: int, scale: float, extra: Tensor | None = None
) -> Tensor:
    """softmax((q k^T + extra) scale) v, causal; the shapes are those of nanomla.kernels.attend."""
    scores = (q * scale) @ k.mT  # (..., T * m, S); queries are fewer than keys, so they are scaled
    if extra is not None:
        scores = scores + (extra * scale).to(scores.dtype)
    if T > 1:
        mask = causal_mask(T, k.size(-2), q.size(-2) // T, q.device)
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.softmax(scores, dim=-1) @ (k if v is None else v)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) through weight (out, in): (..., out)."""
    return F.linear(x, weight, bias)
