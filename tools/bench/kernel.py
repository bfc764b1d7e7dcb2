"""
What tools.bench kernel times: a layer's attention of one new token over cached latents, and other
ways to compute the same. Nothing else of the layer runs.
"""

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanomla.distributed import warn0
from nanomla.kernels import attend
from nanomla.memory import free_memory

HS = 64  # numbers of a head's value, and of its key without position
BEYOND_CACHES = 2**28  # bytes after which no cache of a processor still has the first of them
RUN_SECONDS = 0.05  # of one measurement, about
LAUNCHES = 20  # in one measurement, at least, if they take no longer than that


@dataclass(frozen=True)
class Case:
    """Sizes of an attention, and the dtype of all that it reads and computes with."""

    heads: int
    L: int
    r: int
    tokens: int
    batch: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the cached rows."""
        return self.batch * self.tokens * (self.L + self.r) * self.dtype.itemsize

    def rows(self, device: str) -> list[Tensor]:
        """Cached rows (B, 1, S, L + r), and copies of them, more than caches hold together."""
        shape = self.batch, 1, self.tokens, self.L + self.r
        rows = torch.randn(*shape, device=device, dtype=self.dtype)
        return [rows, *(rows.clone() for _ in range(math.ceil(BEYOND_CACHES / rows.nbytes) - 1))]


def cases(device: str) -> list[Case]:
    """What is timed on a device: the cached rows fit in half of its free memory."""
    if device.startswith("cuda"):
        dtypes, widths = [torch.bfloat16], [(192, 32), (512, 64)]
        heads, tokens, batches = [12, 24, 128], [2**n for n in (10, 12, 14, 16, 17)], [1, 8, 64]
    else:
        dtypes, widths = [torch.float32, torch.bfloat16], [(192, 32)]
        heads, tokens, batches = [12, 24], [1024, 4096], [1]
    every = itertools.product(dtypes, heads, widths, tokens, batches)
    all_cases = [Case(nh, L, r, S, B, dtype) for dtype, nh, (L, r), S, B in every]
    free = free_memory(device)
    return [case for case in all_cases if free is None or case.nbytes <= free / 2]


def ways(case: Case, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """
    Functions of the cached rows, all of one query: "this" is nanomla.kernels.attend. They average
    the rows, (B, nh, 1, L + r), but "expanding" the values (B, nh, 1, HS).
    """
    nh, L, r, like = case.heads, case.L, case.r, {"device": device, "dtype": case.dtype}
    q = torch.randn(case.batch, nh, 1, HS + r, **like)
    W_UK, W_UV = (torch.randn(nh, HS, L, **like) / math.sqrt(L) for _ in range(2))
    content, rotary = q.split([HS, r], dim=-1)
    absorbed = torch.cat([content @ W_UK, rotary], dim=-1)  # (B, nh, 1, L + r)
    scale = 1 / math.sqrt(HS + r)

    def sdpa(rows: Tensor) -> Tensor:
        k = rows.expand(-1, nh, -1, -1)
        return F.scaled_dot_product_attention(absorbed, k, k, scale=scale)

    def flash(rows: Tensor) -> Tensor:
        how = {"scale": scale, "enable_gqa": True}
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(absorbed, rows, rows, **how)

    def expanding(rows: Tensor) -> Tensor:
        c, kr = rows[:, 0].split([L, r], dim=-1)  # (B, S, .)
        k, v = (F.linear(c, W.flatten(0, 1)).unflatten(-1, (nh, HS)) for W in (W_UK, W_UV))
        k = torch.cat([k, kr.unsqueeze(2).expand(-1, -1, nh, -1)], dim=-1).transpose(1, 2)
        v = F.pad(v, (0, r)).transpose(1, 2)  # torch's fast kernels need one width
        return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :HS]

    found = {"this": lambda rows: attend(absorbed, rows, scale=scale), "SDPA": sdpa}
    if device.startswith("cuda"):
        found["FlashAttention"] = flash
    return found | {"expanding": expanding}


def repeated(
    way: Callable[[Tensor], Tensor], rows: list[Tensor], device: str
) -> tuple[Callable[[], None], int]:
    """
    A function that computes a way on one copy of the rows after another, and how often. On a GPU it
    repeats a CUDA graph, which needs rows to stay where they are, so that Python's time to launch
    kernels is not measured; where that cannot be captured, it launches them.
    """
    way(rows[0])  # compiles kernels
    wait(device)
    began = time.perf_counter()
    way(rows[-1])
    wait(device)
    most = max(int(RUN_SECONDS / (time.perf_counter() - began)), 1)
    on_gpu, n = device.startswith("cuda"), max(len(rows), LAUNCHES)
    n = n if on_gpu else min(n, most)  # a graph reads the same copies every time, so all of them
    turns = itertools.cycle(rows)

    def launch() -> None:
        for _ in range(n):
            way(next(turns))

    return (captured(launch, device) if on_gpu else launch), n


def captured(launch: Callable[[], None], device: str) -> Callable[[], None]:
    """What replays the kernels that a function launches; the function if that is impossible."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            launch()
    except RuntimeError as error:
        warn0(f"not captured, so Python's time counts: {str(error).splitlines()[0]}")
        return launch
    return graph.replay


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def possible(
    way: Callable[[Tensor], Tensor], rows: list[Tensor], device: str
) -> tuple[Callable[[], None], int] | None:
    """repeated, or None for a way that torch refuses for these sizes, or that lacks memory."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch says there why it refuses
            return repeated(way, rows, device)
    except RuntimeError:
        return None
    finally:
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def figures(case: Case, seconds: dict[str, float | None], bandwidth: float) -> dict[str, str]:
    """A row of the table: seconds of every way, None for one that is impossible."""
    mine = seconds["this"]
    row = {"heads": f"{case.heads}", "L + r": f"{case.L} + {case.r}"}
    row |= {"tokens": f"{case.tokens:,}", "batch": f"{case.batch}", "us": f"{mine * 1e6:,.1f}"}
    row |= {"GB/s": f"{case.nbytes / mine / 1e9:,.1f}"}
    row |= {"of a copy's": f"{case.nbytes / mine / bandwidth:.0%}"}
    others = {name: t for name, t in seconds.items() if name != "this"}
    ratios = {f"{name} / this": f"{t / mine:.2f}" if t else "no" for name, t in others.items()}
    return row | ratios
