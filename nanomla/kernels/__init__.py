"""
The two functions that model.py spends its time in, computed the fastest way that a device has.

reference.py defines each in a few lines; cpu.py holds what is faster on a CPU. This module chooses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomla.kernels import cpu, reference


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    T: int,
    scale: float,
    extra: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """
    Causal attention of the last T of S tokens.

    q (B, X, T * m, D): m query heads share each of X key heads; row t * m + i is token t's i-th.
    k (B, X, S, D) and v (B, X, S, W); v None: the rows of k are values too, as latents are.
    extra (B, X, T * m, S): scores to add before scaling. Returns (B, X, T * m, W).
    """
    S, rows = k.size(2), q.size(2)
    if extra is not None:
        return reference.attend(q, k, v, T, scale, extra)
    if T == S == rows:  # nothing came before the new tokens: the common case in training
        values = k if v is None else v
        return F.scaled_dot_product_attention(
            q, k, values, dropout_p=dropout, is_causal=True, scale=scale
        )
    if T <= 8 and q.device.type == "cpu" and not torch.is_grad_enabled():
        out = cpu.attend(q, k, v, T, scale)
        if out is not None:
            return out
    mask = None if T == 1 else reference.causal_mask(T, S, rows // T, q.device)
    values = k if v is None else v
    return F.scaled_dot_product_attention(
        q, k, values, attn_mask=mask, dropout_p=dropout, scale=scale
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) through weight (out, in): (..., out)."""
    if (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.numel() <= 16 * weight.size(1)  # at most 16 rows
        and weight.numel() >= 2**16
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    ):
        return cpu.linear(x, weight, bias)
    return F.linear(x, weight, bias)
