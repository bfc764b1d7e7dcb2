"""
What a server takes: clients of another process ask tools.serve for completions, one alone, many at
once, and many at once of a server that writes one text at a time.
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
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nanomla.checkpoint import Checkpoint, save
from nanomla.errors import UserError
from nanomla.settings import configure
from tools.bench.timing import Rows, table
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def measure(device: str, rounds: int, clients: int, tokens: int) -> Rows:
    """
    A server of train_mla.py's model and one of a 124M model, each for 1 client and for many. Each
    asks for so many tokens, of the 124M model for a quarter of them.
    """
    recipe, _ = configure(TrainConfig, [str(ROOT / "config/train_mla.py")])
    small = dataclasses.replace(recipe.model, vocab_size=65)
    large = GPTConfig(bias=False, use_mla=True, mla_latent_dim=160, pos_emb="rope", mla_rope_dim=32)
    rows: Rows = []
    for name, config, asked in (
        ("config/train_mla.py", small, tokens),
        ("a 124M GPT with MLA, L = 160, r = 32", large, max(tokens // 4, 1)),
    ):
        title = f"{name}: {asked} tokens behind a prompt of 16, {rounds} rounds"
        rows += table(title, under_load(config, device, clients, asked, rounds))
    return rows


def under_load(config: GPTConfig, device: str, clients: int, tokens: int, rounds: int) -> Rows:
    """Rows of figures of a model of random weights: medians over rounds, taken in turn."""
    prompts = torch.randint(config.vocab_size, (4 * clients, min(16, config.block_size))).tolist()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        save_random(Path(folder), config)
        flags = (f"--device={device}", "--queue=1000")
        batched = stack.enter_context(server(folder, f"--rows={clients}", *flags))
        one = stack.enter_context(server(folder, "--rows=1", *flags))
        cases = {  # address, clients, requests of each
            "1 client": (batched, 1, 4),
            f"{clients} clients": (batched, clients, 2),
            f"{clients} clients, one text at a time": (one, clients, 1),
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        first: dict[str, list[float]] = {name: [] for name in cases}
        for i in range(-1, rounds):  # the first round warms up
            for name, (address, n, each) in cases.items():
                rate, seconds = load(address, n, each, prompts, tokens)
                if i >= 0:
                    rates[name].append(rate)
                    first[name] += seconds
    rows = []
    alone = statistics.median(rates["1 client"])
    for name in cases:
        rate = statistics.median(rates[name])
        seconds = sorted(first[name])
        row = {"server": name, "tokens/s": f"{rate:,.0f}"}
        row["of 1 client's"] = f"{rate / alone:.1f}x"
        row["first token, median"] = f"{statistics.median(seconds) * 1e3:,.0f} ms"
        row["95% within"] = f"{seconds[int(0.95 * (len(seconds) - 1))] * 1e3:,.0f} ms"
        rows.append(row)
    return rows


def save_random(folder: Path, config: GPTConfig) -> None:
    """A run's checkpoint of random weights, with an alphabet of as many characters."""
    letters = (chr(c) for c in range(256, 0x110000) if not 0xD800 <= c < 0xE000)
    tokenizer = {"kind": "char", "chars": "".join(next(letters) for _ in range(config.vocab_size))}
    weights = GPT(config).state_dict()
    save(folder, Checkpoint(weights, dataclasses.asdict(config), tokenizer=tokenizer), best=False)


@contextlib.contextmanager
def server(folder: Path | str, *flags: str) -> Iterator[str]:
    """tools.serve on a free port of this machine, in a process of its own; gives HOST:PORT."""
    command = [sys.executable, "-m", "tools.serve", f"--out_dir={folder}", "--port=0", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                address = re.search(r"http://([\d.]+:\d+)", line)
                if address:
                    yield address[1]
                    break
            else:
                raise UserError("the server did not start; its error is above")
        finally:
            process.kill()


def load(
    address: str, clients: int, each: int, prompts: list[list[int]], tokens: int
) -> tuple[float, list[float]]:
    """
    `clients` at once, each with `each` requests after another, no two with one prompt: tokens/s,
    and the seconds to the first token of every request.
    """

    def client(number: int) -> list[tuple[int, float]]:
        numbers = range(number, clients * each, clients)
        return [ask(address, prompts[i], tokens, seed=i) for i in numbers]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for some in pool.map(client, range(clients)) for answer in some]
    seconds = time.perf_counter() - began
    return sum(made for made, _ in answers) / seconds, [first for _, first in answers]


def ask(address: str, prompt: list[int], tokens: int, seed: int) -> tuple[int, float]:
    """One streamed completion: its tokens, and the seconds to the first."""
    body = {
        "prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(address, timeout=300)
    began = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    first = 0.0
    last = b""
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            last = line
    connection.close()
    usage = json.loads(last.removeprefix(b"data: ") or b"{}").get("usage")
    if not usage:
        raise UserError(f"the server did not answer as it should: {last.decode()[:200]}")
    return usage["completion_tokens"], first
