"""
The two functions that model.py spends its time in, computed the fastest way that a device has.

reference.py defines each in a few lines; cpu.py holds what is faster on a CPU, int8.py what takes
rows of 8-bit integers. This module chooses. slots.py computes latent tokens, which have no keys.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomla.kernels import cpu, int8, reference
from nanomla.kernels.int8 import Quantized, dequantise, quantise
from nanomla.kernels.reference import by_group, by_head

__all__ = ["Quantized", "attend", "by_group", "by_head", "dequantise", "linear", "quantise"]


def attend(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized | None,
    T: int,
    scale: float,
    extra: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """
    Causal attention of the last T of S tokens.

    q (B, X, T * m, D): m query heads share each of X key heads; row t * m + i is token t's i-th.
    k (B, X, S, D) and v (B, X, S, W); v None: the rows of k are values too, as latents are.
    extra (B, X, T * m, S): scores to add before scaling. Returns (B, X, T * m, W) in k's dtype,
    which q is taken in, or in q's if k is Quantized. Many queries on quantized rows, and a GPU,
    take them converted as a whole.
    """
    few = T <= 8 and q.device.type == "cpu" and not torch.is_grad_enabled()
    if isinstance(k, Quantized):
        if few:
            return int8.attend(q, k, v, T, scale, extra)
        k, v = dequantise(k, q.dtype), None if v is None else dequantise(v, q.dtype)
    q = q.to(k.dtype)  # a cache can be narrower than the model
    S, rows = k.size(2), q.size(2)
    if extra is not None:
        return reference.attend(q, k, v, T, scale, extra)
    if T == S == rows:  # nothing came before the new tokens: the common case in training
        return _sdpa(q, k, k if v is None else v, dropout_p=dropout, is_causal=True, scale=scale)
    if few:
        out = cpu.attend(q, k, v, T, scale)
        if out is not None:
            return out
    mask = None if T == 1 else reference.causal_mask(T, S, rows // T, q.device)
    return _sdpa(q, k, k if v is None else v, attn_mask=mask, dropout_p=dropout, scale=scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """torch's attention, whose fast kernels need keys and values of one width: zeros fill up."""
    missing = k.size(-1) - v.size(-1)
    if missing == 0:
        return F.scaled_dot_product_attention(q, k, v, **how)
    if missing > 0:
        return F.scaled_dot_product_attention(q, k, F.pad(v, (0, missing)), **how)[..., :-missing]
    q, k = F.pad(q, (0, -missing)), F.pad(k, (0, -missing))
    return F.scaled_dot_product_attention(q, k, v, **how)


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
    return reference.linear(x, weight, bias)
