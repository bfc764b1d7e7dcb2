"""
What a server takes: tools.bench serve. Clients of another process ask tools.serve for completions,
one alone, many at once, and many at once of a server that writes one text at a time.
"""

import contextlib
import dataclasses
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig
from nanomla.checkpoint import Checkpoint, save
from nanomla.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Load:
    """What clients got, all together."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = dataclasses.field(default_factory=list)  # seconds to the first token


def random_run(folder: Path, config: GPTConfig) -> Path:
    """A run's folder with a model of random weights, and an alphabet of as many characters."""
    letters = (c for c in range(256, 0x110000) if not 0xD800 <= c < 0xE000)
    chars = "".join(chr(next(letters)) for _ in range(config.vocab_size))
    spec = {"kind": "char", "chars": chars}
    model, args = GPT(config), dataclasses.asdict(config)
    folder.mkdir()
    save(folder, Checkpoint(model.state_dict(), args, tokenizer=spec), best=False)
    return folder


@contextlib.contextmanager
def server(folder: Path, *flags: str) -> Iterator[str]:
    """tools.serve on a free port of this machine, in a process of its own; gives HOST:PORT."""
    command = [sys.executable, "-m", "tools.serve", f"--out_dir={folder}", "--port=0", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if found := re.search(r"http://([\d.]+:\d+)", line):
                    yield found[1]
                    break
            else:
                raise UserError("the server did not start; its error is above")
        finally:
            process.kill()


def ask(address: str, prompt: list[int], tokens: int, seed: int) -> tuple[int, float]:
    """One streamed completion: its tokens, and the seconds to the first."""
    body = {
        "prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    connection = http.client.HTTPConnection(address, timeout=300)
    began, first, last = time.perf_counter(), 0.0, b""
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    for line in response:
        if line.startswith(b"data: {"):
            first, last = first or time.perf_counter() - began, line
    connection.close()
    usage = json.loads(last.removeprefix(b"data: ") or b"{}").get("usage")
    if response.status != 200 or not usage:
        raise UserError(f"the server answered {response.status}: {last.decode()[:200]}")
    return usage["completion_tokens"], first


def load(address: str, clients: int, each: int, prompts: list[list[int]], tokens: int) -> Load:
    """`clients` at once, each with `each` requests after another, no two with one prompt."""
    total, lock, failures = Load(), threading.Lock(), []

    def client(number: int) -> None:
        try:
            for i in range(number, clients * each, clients):
                made, first = ask(address, prompts[i], tokens, seed=i)
                with lock:
                    total.tokens += made
                    total.first.append(first)
        except (OSError, UserError) as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total.seconds = time.perf_counter() - began
    if failures:
        raise UserError(f"a client failed: {failures[0]}")
    return total


def measure(
    config: GPTConfig, device: str, clients: int, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows of figures of a model of random weights: medians over rounds, taken in turn."""
    prompts = torch.randint(config.vocab_size, (4 * clients, min(16, config.block_size))).tolist()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = random_run(Path(folder) / "run", config)
        flags = (f"--device={device}", "--queue=1000")
        batched = stack.enter_context(server(run, f"--rows={clients}", *flags))
        one = stack.enter_context(server(run, "--rows=1", *flags))
        cases = {
            "1 client": (batched, 1, 4),
            f"{clients} clients": (batched, clients, 2),
            f"{clients} clients, one text at a time": (one, clients, 1),
        }
        got: dict[str, list[Load]] = {name: [] for name in cases}
        for i in range(-1, rounds):  # the first round warms up
            for name, (address, n, each) in cases.items():
                taken = load(address, n, each, prompts, tokens)
                if i >= 0:
                    got[name].append(taken)
    rows, base = [], 0.0
    for name, taken in got.items():
        rate = statistics.median(one.tokens / one.seconds for one in taken)
        base = base or rate
        first = sorted(seconds for one in taken for seconds in one.first)
        row = {"server": name, "tokens/s": f"{rate:,.0f}", "of 1 client's": f"{rate / base:.1f}x"}
        row["first token, median"] = f"{statistics.median(first) * 1e3:,.0f} ms"
        row["95% within"] = f"{first[int(0.95 * (len(first) - 1))] * 1e3:,.0f} ms"
        rows.append(row)
    return rows
