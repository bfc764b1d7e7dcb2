"""
A layer's attention of one new token over cached latents, beside torch's own on the same. Nothing
else of the layer runs.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomla.cache import dtype_name
from nanomla.kernels import attend
from nanomla.memory import free_memory
from tools.bench.timing import Rows, Timed, alternate, measure_bandwidth, table

BEYOND_CACHES = 2**28  # bytes after which no cache of a processor still has the first of them
LAUNCHES = 20  # in one measurement, at least
HEADS = (12, 24, 128)
WIDTHS = (192 + 32, 512 + 64)
TOKENS = (2**10, 2**12, 2**14, 2**16, 2**17)
BATCHES = (1, 8, 64)


@torch.inference_mode()
def measure(device: str, rounds: int) -> Rows:
    """One table. GB/s are the bytes of the cached latents, each counted once, over the time."""
    bandwidth = measure_bandwidth(device)
    print(f"a copy reads and writes {bandwidth / 1e9:,.1f} GB/s, both counted")
    cases = itertools.product([torch.bfloat16], HEADS, WIDTHS, TOKENS, BATCHES)
    if not device.startswith("cuda"):
        dtypes = (torch.float32, torch.bfloat16)
        cases = itertools.product(dtypes, HEADS[:2], WIDTHS[:1], TOKENS[:2], BATCHES[:1])
    rows = []
    for dtype, nh, width, S, B in cases:
        free = free_memory(device)
        if free is None or B * S * width * dtype.itemsize <= free / 2:
            q = torch.randn(B, nh, 1, width, device=device, dtype=dtype)
            latents = torch.randn(B, 1, S, width, device=device, dtype=dtype)
            rows.append(figures(q, latents, rounds, bandwidth))
    return table("One new token over cached latents", rows)


def figures(q: Tensor, latents: Tensor, rounds: int, bandwidth: float) -> dict[str, str]:
    """
    A row of the table: queries (B, nh, 1, L + r) attend to cached latents (B, 1, S, L + r), by
    nanomla.kernels and by scaled_dot_product_attention.
    """
    B, nh, _, width = q.shape
    device = str(q.device)
    scale = 1 / math.sqrt(width)
    more = math.ceil(BEYOND_CACHES / latents.nbytes) - 1
    copies = [latents] + [latents.clone() for _ in range(more)]
    launches = LAUNCHES
    if q.is_cuda:  # a graph reads the same copies every time, so it reads all of them
        launches = max(LAUNCHES, len(copies))

    def this(latents: Tensor) -> Tensor:
        return attend(q, latents, scale=scale)

    def sdpa(latents: Tensor) -> Tensor:
        k = latents.expand(-1, nh, -1, -1)
        return F.scaled_dot_product_attention(q, k, k, scale=scale)

    run = repeated(this, copies, launches)
    entries = [Timed("this", run, steps=launches)]
    try:
        run = repeated(sdpa, copies, launches)
        entries.append(Timed("SDPA", run, slow=True, steps=launches))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    took = alternate(entries, rounds, device)
    seconds = took["this"].seconds
    row = {"dtype": dtype_name(q.dtype), "heads": f"{nh}", "L + r": f"{width}"}
    row |= {"tokens": f"{latents.size(2):,}", "batch": f"{B}"}
    row["us"] = f"{seconds * 1e6:,.1f}"
    row["GB/s"] = f"{latents.nbytes / seconds / 1e9:,.1f}"
    row["of a copy's"] = f"{latents.nbytes / seconds / bandwidth:.0%}"
    row["SDPA / this"] = "no memory"
    if "SDPA" in took:
        row["SDPA / this"] = f"{took['SDPA'].seconds / seconds:.2f}"
    return row


def repeated(
    attention: Callable[[Tensor], Tensor], copies: list[Tensor], launches: int
) -> Callable[[], None]:
    """
    A function that attends to one copy of the latents after another. On a GPU it repeats a CUDA
    graph, so that Python's time to launch kernels is not measured.
    """
    attention(copies[0])  # compiles kernels
    turns = itertools.cycle(copies)

    def launch() -> None:
        for _ in range(launches):
            attention(next(turns))

    if not copies[0].is_cuda:
        return launch
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(copies[0].device), torch.cuda.graph(graph):
        launch()
    return graph.replay
