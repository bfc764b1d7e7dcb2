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
from dataclasses import dataclass
from pathlib import Path

import torch

from model import GPT, GPTConfig
from nanomla.checkpoint import Checkpoint, save
from nanomla.errors import UserError
from nanomla.settings import declared, run_config_file
from tools.bench.timing import Rows, table

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Load:
    """What all clients of one measurement got."""

    tokens: int
    seconds: float
    first: list[float]  # seconds to the first token of every request


def measure(device: str, rounds: int, clients: int, tokens: int) -> Rows:
    """A server of train_mla.py's model and one of a 124M model, each for 1 client and for many."""
    recipe = run_config_file(str(ROOT / "config/train_mla.py"))
    shape = {name: value for name, value in recipe.items() if name in declared(GPTConfig)}
    small = GPTConfig(**{**shape, "bias": False, "vocab_size": 65})
    large = GPTConfig(bias=False, use_mla=True, mla_latent_dim=160, pos_emb="rope", mla_rope_dim=32)
    rows: Rows = []
    for name, config, n in (
        ("config/train_mla.py", small, tokens),
        ("a 124M GPT with MLA, L = 160, r = 32", large, max(tokens // 4, 1)),
    ):
        title = f"{name}: {n} tokens behind a prompt of 16, {rounds} rounds"
        rows += table(title, under_load(config, device, clients, n, rounds))
    return rows


def under_load(config: GPTConfig, device: str, clients: int, tokens: int, rounds: int) -> Rows:
    """Rows of figures of a model of random weights: medians over rounds, taken in turn."""
    prompts = torch.randint(config.vocab_size, (4 * clients, min(16, config.block_size))).tolist()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run = random_run(Path(folder) / "run", config)
        flags = (f"--device={device}", "--queue=1000")
        batched = stack.enter_context(server(run, f"--rows={clients}", *flags))
        one = stack.enter_context(server(run, "--rows=1", *flags))
        cases = {  # address, clients, requests of each
            "1 client": (batched, 1, 4),
            f"{clients} clients": (batched, clients, 2),
            f"{clients} clients, one text at a time": (one, clients, 1),
        }
        loads: dict[str, list[Load]] = {name: [] for name in cases}
        for i in range(-1, rounds):  # the first round warms up
            for name, (address, n, each) in cases.items():
                measured = load(address, n, each, prompts, tokens)
                if i >= 0:
                    loads[name].append(measured)
    rates = {name: statistics.median(x.tokens / x.seconds for x in loads[name]) for name in cases}
    rows = []
    for name, rate in rates.items():
        first = sorted(seconds for x in loads[name] for seconds in x.first)
        row = {"server": name, "tokens/s": f"{rate:,.0f}"}
        row["of 1 client's"] = f"{rate / rates['1 client']:.1f}x"
        row["first token, median"] = f"{statistics.median(first) * 1e3:,.0f} ms"
        row["95% within"] = f"{first[int(0.95 * (len(first) - 1))] * 1e3:,.0f} ms"
        rows.append(row)
    return rows


def random_run(folder: Path, config: GPTConfig) -> Path:
    """A run's folder with a model of random weights, and an alphabet of as many characters."""
    letters = (c for c in range(256, 0x110000) if not 0xD800 <= c < 0xE000)
    chars = "".join(chr(next(letters)) for _ in range(config.vocab_size))
    tokenizer = {"kind": "char", "chars": chars}
    weights = GPT(config).state_dict()
    folder.mkdir()
    save(folder, Checkpoint(weights, dataclasses.asdict(config), tokenizer=tokenizer), best=False)
    return folder


@contextlib.contextmanager
def server(folder: Path, *flags: str) -> Iterator[str]:
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


def load(address: str, clients: int, each: int, prompts: list[list[int]], tokens: int) -> Load:
    """`clients` at once, each with `each` requests after another, no two with one prompt."""

    def client(number: int) -> list[tuple[int, float]]:
        numbers = range(number, clients * each, clients)
        return [ask(address, prompts[i], tokens, seed=i) for i in numbers]

    began = time.perf_counter()
    try:
        with ThreadPoolExecutor(clients) as pool:
            answers = [answer for some in pool.map(client, range(clients)) for answer in some]
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"a client failed: {error}") from None
    seconds = time.perf_counter() - began
    return Load(sum(made for made, _ in answers), seconds, [first for _, first in answers])


def ask(address: str, prompt: list[int], tokens: int, seed: int) -> tuple[int, float]:
    """One streamed completion: its tokens, and the seconds to the first."""
    body = {
        "prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    connection = http.client.HTTPConnection(address, timeout=300)
    began = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    first = 0.0
    last = b""
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            last = line
    connection.close()
    usage = json.loads(last.removeprefix(b"data: ") or b"{}").get("usage")
    if response.status != 200 or not usage:
        raise UserError(f"the server answered {response.status}: {last.decode()[:200]}")
    return usage["completion_tokens"], first
