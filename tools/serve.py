"""
Serve one model or two: a page to write with, and the completions protocol that other programs know.

    python -m tools.serve --out_dir=out-mla
    python -m tools.serve --out_dir=out-mla --compare=out-mha --port=8001
    python -m tools.serve --out_dir=out-mla --host=0.0.0.0 --token=SECRET

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "ROMEO:", "max_tokens": 100}'

Ctrl-C lets what is being written come to its end, for up to 10 seconds; a second one ends at once.
docs/serve.md has the details.
"""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from model import GPT
from nanomla import checkpoint, formats
from nanomla.batch import Batch
from nanomla.checkpoint import Checkpoint
from nanomla.checks import Count, Natural, check
from nanomla.costs import cache_in_words, cached_numbers
from nanomla.distributed import resolve_device
from nanomla.errors import UsageError, UserError, explain, run_script, say
from nanomla.inference import CacheDtype, Dtype
from nanomla.serve.protocol import ApiError
from nanomla.serve.stepper import Served, Stepper
from nanomla.settings import configure
from nanomla.signals import Stopped, raise_stopped
from nanomla.tokenizer import Tokenizer

GRACE = 10.0  # seconds that running requests get at the end
FLUSH = 3  # seconds that clients get to read the rest
PACKAGES = ("starlette", "uvicorn", "prometheus_client", "h11", "anyio")


@dataclass
class ServeConfig:
    """Raises ValueError for a value that cannot work."""

    headings: ClassVar[dict[str, str]] = {
        "out_dir": "model", "host": "server", "device": "device",
    }  # fmt: skip

    out_dir: Annotated[
        str, "The folder of a run, whose best.pt is read, or its ckpt.pt without a best.pt."
    ] = "out"
    compare: Annotated[
        str | None,
        "A second model that is served beside the first: the folder of a run, or a folder of "
        "weights.",
    ] = None
    ckpt: Annotated[str | None, "A checkpoint file that is read instead of out_dir."] = None
    init_from: Annotated[
        str | None,
        "Weights that are read instead of out_dir: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a "
        "folder of safetensors, or a run.",
    ] = None
    dataset: Annotated[
        str | None,
        "The dataset that has the alphabet of a checkpoint of nanoGPT: a name below data/, a "
        "folder or a file.",
    ] = None
    verify: Annotated[
        bool, "The checkpoint is compared with its checksums. False opens a huge one sooner."
    ] = True

    host: Annotated[
        str,
        "The address to listen on. 0.0.0.0 listens on all addresses of the machine and needs a "
        "token.",
    ] = "127.0.0.1"
    port: Annotated[
        Natural, Field(le=65535), "The port to listen on. 0 takes any port that is free."
    ] = 8000
    token: Annotated[
        str | None, "The token that clients must send, as Authorization: Bearer TOKEN."
    ] = None
    rows: Annotated[
        Count, Field(le=4096), "The number of texts that are written at the same time."
    ] = 16
    queue: Annotated[
        Natural,
        Field(le=10**6),
        "The number of texts of each model that may wait until others have ended.",
    ] = 64
    max_tokens: Annotated[
        Count, Field(le=10**9), "The largest number of tokens that one text may ask for."
    ] = 4096

    device: Annotated[str, "The device to run on: auto, cpu, cuda, cuda:1, ... or mps."] = "auto"
    dtype: Annotated[
        Dtype, "The number format of the weights. auto takes bfloat16 on CUDA, else float32."
    ] = "auto"
    cache_dtype: Annotated[
        CacheDtype, "The number format of the cache. auto takes that of the weights."
    ] = "auto"

    def __post_init__(self) -> None:
        check(self)
        if self.ckpt and self.init_from:
            raise ValueError("ckpt and init_from both say what to read; give one of them")
        token = self.token
        if token is not None and not (token and token.isascii() and token.isprintable()):
            raise ValueError("token must be visible ASCII characters, at least one")
        if token is not None and token != "".join(token.split()):
            raise ValueError("token must have no spaces")


def main(argv: list[str] | None = None) -> None:
    """Open the models and serve them until a signal comes."""
    cfg, _ = configure(ServeConfig, sys.argv[1:] if argv is None else argv)
    try:
        from nanomla.serve.app import is_loopback
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in PACKAGES:
            raise
        remedy = "pip install -r requirements-serve.txt, or run make serve"
        raise UserError(f"the server needs the package {package}: {remedy}") from None
    if cfg.token is None and not is_loopback(cfg.host):
        raise UsageError(
            f"--host={cfg.host}: others can reach this address; give a secret with --token=..."
        )
    # One thread does all of torch. OpenMP gives every thread that computes helpers of its own, and
    # lets them sleep if there are more than cores: then a step takes 1.5 times as long.
    with contextlib.closing(listen(cfg)) as sock, ThreadPoolExecutor(1, "engine") as engine:
        try:
            served = engine.submit(open_models, cfg).result()
        except (KeyboardInterrupt, Stopped) as stop:  # the thread may read for seconds more
            end_at_once(getattr(stop, "number", signal.SIGINT))
        number = asyncio.run(serve(cfg, served, sock, engine))
    raise_stopped(number)


def listen(cfg: ServeConfig) -> socket.socket:
    """A socket on the server's address, which takes no connections yet. Raises UserError."""
    try:
        found = socket.getaddrinfo(cfg.host, cfg.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--host={cfg.host}: no address of this machine ({reason})") from None
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)  # asyncio turns Nagle's delay off for TCP by name
    try:
        if os.name == "posix":  # on Windows it would let other programs take the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            other = "give another, or 0 for any that is free"
            raise UserError(f"--port={cfg.port}: another program uses it; {other}") from None
        flag = "port" if error.errno == errno.EACCES else "host"
        reason = f"--{flag}={getattr(cfg, flag)}: cannot listen there"
        raise UserError(f"{reason} ({error.strerror})") from None
    return sock


# ---- models


def open_models(cfg: ServeConfig) -> list[Served]:
    """The models to serve, each with its batch, under different names."""
    if cfg.init_from:
        stored = [formats.open_weights(cfg.init_from, True, cfg.verify)]
    else:
        file = cfg.ckpt or checkpoint.find(cfg.out_dir, prefer_best=True)
        stored = [checkpoint.load(file, cfg.verify)]
    if cfg.compare:
        stored.append(formats.open_weights(cfg.compare, True, cfg.verify))
    sources = [cfg.init_from or cfg.ckpt or cfg.out_dir, cfg.compare]
    served: list[Served] = []
    for one, source in zip(stored, sources, strict=False):
        path = Path(source)
        folder = path.parent if path.is_file() else path
        name = base = (folder.resolve() if folder.exists() else path).name or "model"
        number = 1
        while name in [other.name for other in served]:
            number += 1
            name = f"{base}-{number}"
        served.append(open_model(cfg, one, name, folder))
    if "OMP_NUM_THREADS" not in os.environ and max(m.about["width"] for m in served) < 256:
        torch.set_num_threads(1)  # tiny matrices gain nothing from more, which wait for others
    return served


def open_model(cfg: ServeConfig, stored: Checkpoint, name: str, folder: Path) -> Served:
    """One model on its device, with its batch."""
    device = resolve_device(cfg.device)
    model, note = checkpoint.build(stored, dropout=0.0)
    if note:
        say(note, sys.stderr)
    tokenizer = Tokenizer(checkpoint.tokenizer_spec(stored, cfg.dataset), stored.source)
    bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    auto = "bfloat16" if bf16 else "float32"
    dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    cache_dtype = None if cfg.cache_dtype == "auto" else getattr(torch, cfg.cache_dtype)
    model.to(device, dtype).eval()
    try:
        batch = Batch(model, tokenizer, cfg.rows, cache_dtype)
    except ValueError as error:
        raise UsageError(f"--cache_dtype={cfg.cache_dtype}: {error}") from None
    log = folder / "log.jsonl"
    about = {
        **describe(model, batch), "device": device, "dtype": _short(dtype),
        "parameters": model.get_num_params(non_embedding=False), "iteration": stored.iter_num,
        "val_loss": stored.best_val_loss if stored.best_val_loss < float("inf") else None,
        "has_log": log.is_file(), "max_tokens": cfg.max_tokens,
    }  # fmt: skip
    shape = dataclasses.asdict(model.config)  # where a run says None, what that stands for
    settings = shape | {k: v for k, v in stored.config.items() if v is not None or k not in shape}
    most = cfg.rows + cfg.queue
    return Served(name, model, tokenizer, batch, about, settings, log, most)


def describe(model: GPT, batch: Batch) -> dict[str, Any]:
    """What a model and its cache are, for /v1/models; sizes of the cache are those of one row."""
    config = model.config
    cache = batch.cache
    numbers = cached_numbers(model)
    heads = 2 * config.n_head
    scale = torch.float16.itemsize if cache.dtype == torch.int8 else 0  # of every token and head
    mha = config.n_layer * heads * (config.hs * cache.dtype.itemsize + scale)
    return {
        "attention": config.attention_name, "attention_name": model.transformer.h[0].attn.words,
        "cache_in_words": cache_in_words(model), "layers": config.n_layer,
        "heads": config.n_head, "width": config.n_embd, "context": config.block_size,
        "vocabulary": config.vocab_size,
        "numbers_per_token_and_layer": int(numbers) if numbers == int(numbers) else numbers,
        "mha_numbers_per_token_and_layer": heads * config.hs, "cache_dtype": _short(cache.dtype),
        "bytes_per_token": cache.bytes_per_token,
        "state_bytes": 0 if cache.grows else cache.nbytes // cache.batch_size,
        "mha_bytes_per_token": mha, "rows": batch.rows,
    }  # fmt: skip



def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the process


async def serve(
    cfg: ServeConfig, served: list[Served], sock: socket.socket, engine: ThreadPoolExecutor
) -> int:
    """
    Serve until a signal comes, and let what is running come to its end; returns the signal's
    number. Raises what the engine's thread has ended with.
    """
    import uvicorn

    from nanomla.serve.app import Connection, Site

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # they are handled below

    stepper = Stepper(served, asyncio.get_running_loop())
    guard = Site(stepper, cfg.max_tokens).app(cfg.host, cfg.token)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # clients that vanish are no news
    server = Server(uvicorn.Config(
        guard, http=Connection, ws="none", lifespan="off", log_config=None, log_level="critical",
        access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=FLUSH,
    ))  # fmt: skip
    signalled = catch_signals()
    stepping = asyncio.get_running_loop().run_in_executor(engine, stepper.run)
    running = asyncio.create_task(server.serve([sock]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started:
        announce(served, sock)
    await asyncio.wait([running, signalled, stepper.failure], return_when="FIRST_COMPLETED")
    if signalled.done() and not stepper.failure.done():
        guard.draining = True
        until = time.monotonic() + GRACE
        while stepper.calls and time.monotonic() < until and not stepper.failure.done():
            await asyncio.sleep(0.05)
        stepper.fail_all(ApiError(503, "the server is shutting down", code="shutting_down"))
    server.should_exit = True
    await running
    stepper.end()
    await asyncio.wait([stepping], timeout=GRACE)
    if stepper.failure.done():
        raise stepper.failure.result()
    if not stepping.done():  # a step that takes this long; Python must not end below it
        end_at_once(signalled.result())
    return signalled.result()


def catch_signals() -> asyncio.Future[int]:
    """A future that gets the number of the first signal; a second Ctrl-C ends the process."""
    loop = asyncio.get_running_loop()
    first: asyncio.Future[int] = loop.create_future()
    seen: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if seen and number == signal.SIGINT:
            end_at_once(number)
        if not seen:
            seen.append(number)
            loop.call_soon_threadsafe(first.set_result, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return first


def end_at_once(number: int) -> None:
    """End the process as run_script does for a signal, but without waiting for the engine."""
    line, status = explain(KeyboardInterrupt() if number == signal.SIGINT else Stopped(number))
    say(f"{Path(sys.argv[0]).name}: {line}", sys.stderr)
    os._exit(status)


def announce(served: list[Served], sock: socket.socket) -> None:
    """Say what is served, and where."""
    for one in served:
        about = one.about
        say(f"{one.name}: {about['attention_name']}; {about['cache_in_words']}")
    host, port, *_ = sock.getsockname()
    say(f"http://{f'[{host}]' if ':' in host else host}:{port}")


if __name__ == "__main__":
    run_script(main)
