"""
A layer's attention of one new token over cached latents, beside other ways to compute the same.
Nothing else of the layer runs.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanomla.distributed import warn0
from nanomla.kernels import attend, on_gpu
from nanomla.memory import free_memory
from tools.bench.timing import Rows, Timed, alternate, measure_bandwidth, name_of, table

HS = 64  # numbers of a head's value, and of its key without position
BEYOND_CACHES = 2**28  # bytes after which no cache of a processor still has the first of them
LAUNCHES = 20  # in one measurement, at least

Attention = Callable[[Tensor], Tensor]  # of the cached latents


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
        """Bytes of the cached latents."""
        return self.batch * self.tokens * (self.L + self.r) * self.dtype.itemsize

    def copies(self, device: str) -> list[Tensor]:
        """Cached latents (B, 1, S, L + r) and copies of them, more than caches hold together."""
        shape = self.batch, 1, self.tokens, self.L + self.r
        latents = torch.randn(*shape, device=device, dtype=self.dtype)
        more = math.ceil(BEYOND_CACHES / latents.nbytes) - 1
        return [latents] + [latents.clone() for _ in range(more)]


@torch.inference_mode()
def measure(device: str, rounds: int) -> Rows:
    """
    A table for every dtype. GB/s are the bytes of the cached latents, each counted once, over the
    time.
    """
    bandwidth = measure_bandwidth(device)
    tables: dict[torch.dtype, Rows] = {}
    for case in cases(device):
        row = figures(case, seconds_of(case, device, rounds), bandwidth)
        tables.setdefault(case.dtype, []).append(row)
    by = "Triton" if on_gpu(torch.device(device)) else "torch"
    print(f"a copy reads and writes {bandwidth / 1e9:,.1f} GB/s, both counted")
    rows: Rows = []
    for dtype, lines in tables.items():
        title = f"One new token over cached latents, {name_of(dtype)}, by nanomla.kernels with {by}"
        rows += table(title, lines)
    return rows


def cases(device: str) -> list[Case]:
    """What is timed on a device: the cached latents fit in half of its free memory."""
    dtypes = [torch.float32, torch.bfloat16]
    widths = [(192, 32)]
    heads = [12, 24]
    tokens = [1024, 4096]
    batches = [1]
    if device.startswith("cuda"):
        dtypes = [torch.bfloat16]
        widths = [(192, 32), (512, 64)]
        heads = [12, 24, 128]
        tokens = [2**10, 2**12, 2**14, 2**16, 2**17]
        batches = [1, 8, 64]
    free = free_memory(device)
    fitting = []
    for dtype, nh, (L, r), S, B in itertools.product(dtypes, heads, widths, tokens, batches):
        case = Case(nh, L, r, S, B, dtype)
        if free is None or case.nbytes <= free / 2:
            fitting.append(case)
    return fitting


def attentions(case: Case, device: str) -> dict[str, Attention]:
    """
    Ways to attend with one query; "this" is nanomla.kernels.attend. They average the latents,
    (B, nh, 1, L + r), but "expanding" the values, (B, nh, 1, HS).
    """
    nh, L, r = case.heads, case.L, case.r
    like = {"device": device, "dtype": case.dtype}
    q = torch.randn(case.batch, nh, 1, HS + r, **like)
    W_UK = torch.randn(nh, HS, L, **like) / math.sqrt(L)
    W_UV = torch.randn(nh, HS, L, **like) / math.sqrt(L)
    content, rotary = q.split([HS, r], dim=-1)
    absorbed = torch.cat([content @ W_UK, rotary], dim=-1)  # (B, nh, 1, L + r)
    scale = 1 / math.sqrt(HS + r)

    def this(latents: Tensor) -> Tensor:
        return attend(absorbed, latents, scale=scale)

    def sdpa(latents: Tensor) -> Tensor:
        k = latents.expand(-1, nh, -1, -1)
        return F.scaled_dot_product_attention(absorbed, k, k, scale=scale)

    def flash(latents: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                absorbed, latents, latents, scale=scale, enable_gqa=True
            )

    def expanding(latents: Tensor) -> Tensor:
        c, kr = latents[:, 0].split([L, r], dim=-1)  # (B, S, .)
        k = F.linear(c, W_UK.flatten(0, 1)).unflatten(-1, (nh, HS))
        v = F.linear(c, W_UV.flatten(0, 1)).unflatten(-1, (nh, HS))
        k = torch.cat([k, kr.unsqueeze(2).expand(-1, -1, nh, -1)], dim=-1).transpose(1, 2)
        v = F.pad(v, (0, r)).transpose(1, 2)  # torch's fast kernels need one width
        return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :HS]

    by_name: dict[str, Attention] = {"this": this, "SDPA": sdpa}
    if device.startswith("cuda"):
        by_name["FlashAttention"] = flash
    by_name["expanding"] = expanding
    return by_name


def seconds_of(case: Case, device: str, rounds: int) -> dict[str, float | None]:
    """
    Seconds of every way to compute a case, others than this in 3 rounds; None for what torch
    refuses for these sizes, or what lacks memory.
    """
    copies = case.copies(device)  # in a variable while graphs read them
    seconds: dict[str, float | None] = {}
    entries = []
    for name, attention in attentions(case, device).items():
        seconds[name] = None
        try:
            with warnings.catch_warnings(action="ignore"):  # torch says there why it refuses
                run, launches = repeated(attention, copies, device)
        except RuntimeError:
            if name == "this":
                raise
        else:
            entries.append(Timed(name, run, slow=name != "this", steps=launches))
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    for name, entry in alternate(entries, rounds, device).items():
        seconds[name] = entry.seconds
    return seconds


def repeated(
    attention: Attention, copies: list[Tensor], device: str
) -> tuple[Callable[[], None], int]:
    """
    A function that attends to one copy of the latents after another, and how often. On a GPU it
    repeats a CUDA graph, so that Python's time to launch kernels is not measured; where that cannot
    be captured, it launches them.
    """
    attention(copies[0])  # compiles kernels
    on_cuda = device.startswith("cuda")
    launches = LAUNCHES
    if on_cuda:  # a graph reads the same copies every time, so it reads all of them
        launches = max(launches, len(copies))
    turns = itertools.cycle(copies)

    def launch() -> None:
        for _ in range(launches):
            attention(next(turns))

    if not on_cuda:
        return launch, launches
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            launch()
    except RuntimeError as error:
        warn0(f"not captured, so Python's time counts: {str(error).splitlines()[0]}")
        return launch, launches
    return graph.replay, launches


def figures(case: Case, seconds: dict[str, float | None], bandwidth: float) -> dict[str, str]:
    """A row of the table: seconds of every way, None for one that is impossible."""
    this = seconds["this"]
    row = {"heads": f"{case.heads}", "L + r": f"{case.L} + {case.r}"}
    row |= {"tokens": f"{case.tokens:,}", "batch": f"{case.batch}", "us": f"{this * 1e6:,.1f}"}
    row["GB/s"] = f"{case.nbytes / this / 1e9:,.1f}"
    row["of a copy's"] = f"{case.nbytes / this / bandwidth:.0%}"
    for name, taken in seconds.items():
        if name != "this":
            row[f"{name} / this"] = "no" if taken is None else f"{taken / this:.2f}"
    return row
