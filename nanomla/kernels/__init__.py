"""
The two functions that model.py spends its time in, computed the fastest way that a device has.

reference.py defines each in a few lines; cpu.py holds what is faster on a CPU, blocks.py what takes
narrow rows, int8.py rows of 8-bit integers, triton.py what is faster on a GPU. This module chooses.
slots.py computes latent tokens, which have no keys.
"""

import functools
import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomla.kernels import blocks, cpu, reference
from nanomla.kernels.int8 import Quantized, dequantise, quantise
from nanomla.kernels.reference import by_group, by_head

__all__ = ["Quantized", "attend", "by_group", "by_head", "dequantise", "linear", "quantise"]


def attend(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized | None,
    T: int,
    scale: float,
    beside: Tensor | Quantized | None = None,
    dropout: float = 0.0,
    held: Tensor | None = None,
) -> Tensor:
    """
    Causal attention of the last T of S tokens.

    q (B, X, T * m, D): m query heads share each of X key heads; row t * m + i is token t's i-th.
    k (B, X, S, D) and v (B, X, S, W); v None: the rows of k are values too, as latents are.
    beside (B, 1, S, r): r more numbers of every key, the same in all X heads; q has them last.
    held (B,): rows of different lengths. The new tokens of row b come after its first held[b] keys,
    and what follows has no weight, but must be finite. None: after the first S - T in every row.
    Returns (B, X, T * m, W) in the wider dtype of q and k, in which all is computed, or in q's if k
    is Quantized. Many queries on narrower rows take them converted as a whole.
    """
    dtype = q.dtype if isinstance(k, Quantized) else torch.promote_types(q.dtype, k.dtype)
    few, q = T <= 8 and not torch.is_grad_enabled() and dropout == 0, q.to(dtype)
    gpu = on_gpu(q.device) if few else None
    if gpu is not None and gpu.supports(q, k, v, beside):
        return gpu.attend(q, k, v, T, scale, beside, held)
    on_cpu, narrow = few and q.device.type == "cpu", isinstance(k, Quantized) or k.itemsize == 2
    if not (on_cpu and narrow):
        k, v, beside = (t if t is None else dequantise(t, dtype) for t in (k, v, beside))
    if on_cpu:
        return _few_on_cpu(q, k, v, T, scale, beside, held)
    if few and beside is not None:
        return reference.attend(q, k, v, T, scale, beside, held)
    W = (k if v is None else v).size(-1)
    if beside is not None:
        k = torch.cat([k, beside.expand(-1, k.size(1), -1, -1)], dim=-1)
    return _causal(q, k, k if v is None else v, T, scale, dropout, held)[..., :W]


@functools.cache
def on_gpu(device: torch.device) -> ModuleType | None:
    """nanomla.kernels.triton on an NVIDIA GPU since Ampere, if it is found to work there."""
    if device.type != "cuda" or torch.version.hip:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from nanomla.kernels import triton
    except ImportError:
        return None
    try:
        triton.try_out(device)
    except Exception as error:  # noqa: BLE001  no C compiler, for one; torch computes the same
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(f"warning: decoding goes on without the Triton kernel ({why})", file=sys.stderr)
        return None
    return triton


def _few_on_cpu(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized | None,
    T: int,
    scale: float,
    beside: Tensor | Quantized | None,
    held: Tensor | None,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):  # which would round scores and weights
        with torch.autocast("cpu", enabled=False):
            return _few_on_cpu(q, k, v, T, scale, beside, held)
    if isinstance(k, Quantized) or k.itemsize == 2:
        return blocks.attend(q, k, v, T, scale, beside, held)
    if beside is not None or held is not None:
        return reference.attend(q, k, v, T, scale, beside, held)
    out = cpu.attend(q, k, v, T, scale) if T < k.size(2) else None
    return _causal(q, k, k if v is None else v, T, scale, 0.0, None) if out is None else out


def _causal(
    q: Tensor, k: Tensor, v: Tensor, T: int, scale: float, dropout: float, held: Tensor | None
) -> Tensor:
    """nanomla.kernels.attend by torch's attention, with no T x S mask or scores for large T."""
    (B, X, rows, _), S = q.shape, k.size(2)
    if T <= 8 and (T < S or held is not None):
        last = T == 1 and held is None
        mask = None if last else reference.causal_mask(T, S, rows // T, q.device, held)
        return _sdpa(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    if (m := rows // T) > 1:  # the m query heads become heads, for which keys are not copied
        q = q.reshape(B * X, T, m, -1).transpose(1, 2)  # (B * X, m, T, D)
        k, v = (t.flatten(0, 1).unsqueeze(1).expand(-1, m, -1, -1) for t in (k, v))
        held = None if held is None else held.repeat_interleave(X)
    on_cpu = q.device.type == "cpu" and not torch.is_grad_enabled() and dropout == 0
    if T == S and held is None:
        out = _sdpa(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
    elif on_cpu and held is None and k.size(-1) == v.size(-1):
        out = cpu.go_on(q, k, v, scale)
    else:
        # Queries at a time: a mask that a CPU's cache holds, or that occupies a GPU.
        numbers = (2**21 if q.device.type == "cpu" else 2**26) // (S if held is None else S * B)
        n, outs = max(min(numbers, 256) if q.device.type == "cpu" else numbers, 32), []
        for i, part in zip(range(0, T, n), q.split(n, dim=2), strict=True):
            new = part.size(2)
            end = S if held is not None else S - T + i + new  # what follows is masked for all
            before = None if held is None else held + i
            mask = reference.causal_mask(new, end, 1, q.device, before)
            how = {"attn_mask": mask, "dropout_p": dropout, "scale": scale}
            outs.append(_sdpa(part, k[:, :, :end], v[:, :, :end], **how))
        out = torch.cat(outs, dim=2)
    return out if m == 1 else out.transpose(1, 2).reshape(B, X, rows, -1)


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
        and weight.numel() >= 2**17
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    ):
        return cpu.linear(x, weight, bias)
    return reference.linear(x, weight, bias)
