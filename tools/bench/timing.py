"""
Timing, for tools.bench and other tools: what is compared runs in turn, round after round, and the
median of each is taken. Also what figures are printed and written as.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanomla.cache import Cache, dtype_name
from nanomla.errors import UserError
from nanomla.files import json_text, write_text

Rows = list[dict[str, Any]]


@dataclass
class Timed:
    """One thing that is timed, and what its row in a table needs besides the time."""

    name: str
    run: Callable[[], Any]
    slow: bool = False  # runs in 3 rounds only
    cache: Cache | None = None
    nbytes: float = 0.0  # bytes that a step has to read, for the roofline
    flops: float = 0.0  # operations that a step has to compute; 0 stands for no roofline
    steps: int = 1  # tokens or iterations in one run
    seconds: float = 0.0  # the measured median of one step


def alternate(entries: list[Timed], rounds: int, device: str) -> dict[str, Timed]:
    """Time each entry in turn, round after round; returns them by name, with median seconds."""
    times: dict[str, list[float]] = {entry.name: [] for entry in entries}
    for i in range(-1, rounds):  # the first round warms up
        for entry in entries:
            if entry.slow and i >= 3:
                continue
            began = time.perf_counter()
            entry.run()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            if i >= 0:
                times[entry.name].append(time.perf_counter() - began)
    for entry in entries:
        entry.seconds = statistics.median(times[entry.name]) / entry.steps
    return {entry.name: entry for entry in entries}


@dataclass
class Limits:
    """What this machine can do, measured: bytes per second (read and written), and FLOP/s."""

    bandwidth: float
    rate: dict[torch.dtype, float]

    def beside(self, entry: Timed, dtype: torch.dtype) -> str:
        """An entry's time over what its bytes take to move or its operations to be computed."""
        least = max(entry.nbytes / self.bandwidth, entry.flops / self.rate[dtype])
        return f"{entry.seconds / least:.2f}"


def measure_bandwidth(device: str) -> float:
    """Bytes per second of a copy of 256 MB, which is beyond any cache: those read and written."""
    copies = 20 if device.startswith("cuda") else 1
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    took = alternate([Timed("copy", copy, steps=copies)], 7, device)
    return 2 * source.nbytes / took["copy"].seconds


def measure_limits(device: str) -> Limits:
    """Measure and print this machine's limits: a large copy, and products of square matrices."""
    n = 1024
    products = 1
    if device.startswith("cuda"):
        n = 4096
        products = 20
    limits = Limits(measure_bandwidth(device), {})
    print(f"limits: copy {limits.bandwidth / 1e9:.1f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(n, n, device=device).to(dtype)
        square = lambda matrix=matrix: [matrix @ matrix for _ in range(products)]
        entry = Timed("product", square, steps=products)
        alternate([entry], 7, device)
        limits.rate[dtype] = 2 * n**3 / entry.seconds
        print(f"matrix products {limits.rate[dtype] / 1e9:.0f} GFLOP/s in {dtype_name(dtype)}")
    return limits


def machine(device: str) -> str:
    """What this runs on, in words."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    processor = ""
    if hasattr(torch.cpu, "get_capabilities"):  # not in every torch that works here
        processor = torch.cpu.get_capabilities().get("cpu_name", "")
    name = f"{device} {processor}".strip()
    return f"{name}, {torch.get_num_threads()} threads"


def table(title: str, rows: Rows) -> Rows:
    """Print rows, whose keys are the columns, as a Markdown table; returns them with the title."""
    print(f"\n{title}\n", *markdown(rows), sep="\n")
    return [{"table": title, **row} for row in rows]


def markdown(rows: Rows) -> list[str]:
    """The lines of a Markdown table of rows, whose keys are the columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table_rows = [{column: column for column in columns}, *rows]
    widths = {c: max(len(str(row.get(c, ""))) for row in table_rows) for c in columns}
    lines = []
    for row in table_rows:
        cells = [str(row.get(c, "")).ljust(widths[c]) for c in columns]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (widths[c] + 2) for c in columns) + "|"
    return [lines[0], rule, *lines[1:]]


def fill(cache: Cache, pos: int) -> Cache:
    """A cache of `pos` random tokens: the time of a step does not depend on what they are."""
    for t in cache.tensors:
        if t.dtype == torch.int8:
            t.random_(-127, 128)
        elif cache.dtype == torch.int8:  # the scales, such that the rows have a variance of 1
            t.fill_(3**0.5 / 127)
        else:
            t.normal_()
    cache.advance(pos)
    return cache


def write_json(path: str, device: str, rows: Rows) -> None:
    """Write figures and what they were taken on to a file; UserError if that is impossible."""
    figures = {"machine": machine(device), "torch": torch.__version__, "rows": rows}
    try:
        write_text(path, json_text(figures, indent=1))
    except OSError as error:
        raise UserError(f"--json={path}: cannot be written ({error.strerror})") from None


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most bytes that torch holds at a time for what is allocated during a run."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes, initial=0))
