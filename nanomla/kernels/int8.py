"""
Rows kept as 8-bit integers with one float16 scale each. blocks.py computes attention over them.

A row x is kept as round(x / scale) with scale = max|x| / 127, rounded to float16. Every number
comes back within half a scale or 127 * 2^-25 = 4e-6, whichever is larger: a scale below float16's
smallest number becomes 0, and the row zeros. A row with a number over 127 * 65,504 has no float16
scale: on a CPU it is refused, elsewhere it becomes NaN, because to look would mean to wait for the
device. A NaN makes the scale NaN, and with it the whole row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 127 * torch.finfo(torch.float16).max


class Quantized(NamedTuple):
    """Row j is values[..., j, :] * scale[..., j, :]."""

    values: Tensor  # (..., S, W) int8, from -127 to 127
    scale: Tensor  # (..., S, 1) float16, 0 or more

    @property
    def dtype(self) -> torch.dtype:
        """torch.int8."""
        return self.values.dtype

    def size(self, dim: int) -> int:
        """That of the values."""
        return self.values.size(dim)


def quantise(x: Tensor) -> Quantized:
    """x (..., S, W) rounded to nearest. On a CPU, ValueError for a number that no scale reaches."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True)
    scale = (largest / 127).half()
    if x.device.type == "cpu" and bool(scale.isinf().any()):
        raise ValueError(
            f"dtype=torch.int8 does not work: a number to cache is {largest.max():.3g}, over the "
            f"{LARGEST:.3g} that a float16 scale reaches, so dtype must be torch.float32"
        )
    values = x / scale.float().masked_fill(scale == 0, float("inf"))
    return Quantized(values.round().clamp(-127, 127).to(torch.int8), scale)


def dequantise(rows: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """Rows (..., S, W), quantised or not, as a tensor of a floating dtype."""
    if rows.dtype == dtype:  # a tensor, as a Quantized is int8
        return rows
    if isinstance(rows, Tensor):
        return rows.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (rows.values.to(wide) * rows.scale.to(wide)).to(dtype)


def columns(rows: Tensor | Quantized, begin: int, end: int) -> Tensor | Quantized:
    """Some numbers of every row, (..., S, end - begin), quantised or not, uncopied."""
    if isinstance(rows, Tensor):
        return rows[..., begin:end]
    return Quantized(rows.values[..., begin:end], rows.scale)
