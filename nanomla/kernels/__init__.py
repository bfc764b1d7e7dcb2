"""
What the model spends its time in, computed the fastest way that a device has.

    attend    causal attention of T new tokens over S cached and new ones
    Linear    a linear layer, faster for the few rows of a decoding step

reference.py defines attend in a few lines, and the others are tested against it. This is its table;
the first line that fits computes a call. "Few" are at most 8 new tokens, without gradients.

    few, on a GPU that has the kernel        triton.py    reads every key once, in parts
    few, on a CPU, keys in a narrow dtype    blocks.py    converts a block of keys at a time
    few, keys in two parts                   reference.py
    few, on a CPU, sequences of any lengths  reference.py
    few, on a CPU, after earlier tokens      cpu.py       splits the keys over the cores
    few, after earlier tokens                sdpa.py      torch's attention with a small mask
    many, or all the tokens that there are   sdpa.py      torch's attention without T x S scores
"""

import contextlib
import functools
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomla.kernels import blocks, cpu, reference, sdpa
from nanomla.kernels.int8 import Quantized, dequantise, quantise
from nanomla.kernels.reference import by_group, by_head, causal_weights

__all__ = ["Linear", "Quantized", "attend", "causal_weights", "dequantise", "quantise"]

FEW = 8  # new tokens that are computed as in decoding
NARROW = (torch.int8, torch.bfloat16, torch.float16)  # keys that a CPU reads block by block


def attend(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized | None = None,
    *,
    scale: float,
    beside: Tensor | Quantized | None = None,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """
    Causal attention of the last T of S tokens: softmax(q [k ; beside]^T scale) v, (B, nh, T, W).

    q (B, nh, T, D). k (B, X, S, D) and v (B, X, S, W), of X heads that nh / X query heads each
    share; v None: the keys are values too, as latents are.
    beside (B, 1, S, r): r more numbers of every key, the same in all X heads; q has them last.
    lengths (B,): sequences of unequal lengths. The new tokens of sequence b come after its first
    lengths[b] keys, and what follows has no weight, but must be finite. None: they are the last T.
    All is computed in the wider dtype of q and k, or in q's if k is Quantized.
    """
    T = q.size(2)
    X = k.size(1)
    if not isinstance(k, Quantized):
        q = q.to(torch.promote_types(q.dtype, k.dtype))
    few = T <= FEW and dropout == 0 and not torch.is_grad_enabled()
    on_cpu = q.device.type == "cpu"

    if few:
        gpu = on_gpu(q.device)
        if gpu is not None and gpu.supports(q, k, v, beside):
            return by_head(gpu.attend(by_group(q, X), k, v, T, scale, beside, lengths), T)
    if few and on_cpu and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # it would round scores and weights
            return attend(q, k, v, scale=scale, beside=beside, lengths=lengths)
    if few and on_cpu and k.dtype in NARROW:
        return by_head(blocks.attend(by_group(q, X), k, v, T, scale, beside, lengths), T)

    k = dequantise(k, q.dtype)  # itself, if it is a tensor of this dtype
    if v is not None:
        v = dequantise(v, q.dtype)
    if beside is not None:
        beside = dequantise(beside, q.dtype)
    if few and (beside is not None or (on_cpu and lengths is not None)):
        return by_head(reference.attend(by_group(q, X), k, v, T, scale, beside, lengths), T)
    if few and on_cpu and T < k.size(2):
        return by_head(cpu.attend(by_group(q, X), k, v, T, scale), T)
    if few and (T < k.size(2) or lengths is not None):
        return by_head(sdpa.few(by_group(q, X), k, v, T, scale, lengths), T)
    return sdpa.many(q, k, v, scale, beside, lengths, dropout)


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
        with contextlib.suppress(OSError):  # nobody can read it
            print(f"warning: decoding goes on without the Triton kernel ({why})", file=sys.stderr)
        return None
    return triton


class Linear(nn.Linear):
    """nn.Linear, but a large weight and the few rows of a decoding step by cpu.linear."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        few_rows = x.numel() <= 16 * weight.size(1)
        large = weight.numel() >= 2**17 and weight.dtype == torch.float32
        if few_rows and large and x.device.type == "cpu":
            if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
                return F.linear(x, weight, self.bias)
            return cpu.linear(x, weight, self.bias)
        return F.linear(x, weight, self.bias)
