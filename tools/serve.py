"""
Serve one model or two: a page to write with, and the completions protocol that other programs know.

    python -m tools.serve --out_dir=out-mla
    python -m tools.serve --out_dir=out-mla --compare=out-mha --port=8001
    python -m tools.serve --out_dir=out-mla --host=0.0.0.0 --token=SECRET
    python -m tools.serve --out_dir=out-mla --public_host=llm.example.org --token=SECRET

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
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from model import GPT
from nanomla import formats
from nanomla.batch import Batch
from nanomla.cache import dtype_name
from nanomla.checkpoint import Checkpoint
from nanomla.checks import Count, Natural, Text, require
from nanomla.costs import cache_in_words, cached_numbers
from nanomla.errors import UsageError, UserError, explain, run_script, say, script_name
from nanomla.inference import ModelSettings, open_model
from nanomla.serve.listener import Listener
from nanomla.serve.protocol import ApiError
from nanomla.serve.stepper import Served, Stepper
from nanomla.settings import configure
from nanomla.signals import Stopped, handled, raise_stopped

GRACE = 10.0  # seconds that running requests get at the end
FLUSH = 3  # seconds that clients get to read the rest


@dataclass
class ServeConfig(ModelSettings):
    """Raises ValueError for a value that cannot work."""

    headings: ClassVar[dict[str, str]] = {**ModelSettings.headings, "compare": "server"}

    compare: Annotated[
        Text | None,
        "A second model that is served beside the first: the folder of a run, or a folder of "
        "weights.",
    ] = None
    host: Annotated[
        Text,
        "The address to listen on. 0.0.0.0 listens on all addresses of the machine and needs a "
        "token.",
    ] = "127.0.0.1"
    port: Annotated[
        Natural, Field(le=65535), "The port to listen on. 0 takes any port that is free."
    ] = 8000
    public_host: Annotated[
        str | None,
        "The name by which browsers reach the server through a proxy on this machine, as in "
        "llm.example.org. It needs a token.",
    ] = None
    token: Annotated[
        str | None, "The token that clients must send, as Authorization: Bearer TOKEN."
    ] = None
    rows: Annotated[
        Count, Field(le=4096), "The number of texts that are written at the same time."
    ] = 16
    queue: Annotated[
        Natural,
        Field(le=10**6),
        "The number of texts of one client and model that may wait until others have ended.",
    ] = 128
    max_tokens: Annotated[
        Count, Field(le=10**9), "The largest number of tokens that one text may ask for."
    ] = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.public_host is not None:
            self.public_host = self.public_host.lower()
            name = re.fullmatch("[a-z0-9.-]+", self.public_host) is not None
            works = "a name such as llm.example.org, without http:// and without a port"
            require(name, "public_host", self.public_host, works)
        if self.token is not None and not re.fullmatch("[!-~]+", self.token):
            raise ValueError("token must be visible ASCII characters without spaces, at least one")


def main(argv: list[str] | None = None) -> None:
    """Open the models and serve them until a signal comes."""
    cfg, _ = configure(ServeConfig, sys.argv[1:] if argv is None else argv)
    try:
        import uvicorn  # noqa: F401  what is missing shows before a model is opened

        from nanomla.serve.app import is_loopback
    except ModuleNotFoundError as error:
        remedy = "pip install -r requirements-serve.txt, or run make serve"
        raise UserError(f"the server needs the package {error.name}: {remedy}") from None
    if cfg.token is None:
        remedy = "others can reach this address; give a secret with --token=..."
        if not is_loopback(cfg.host):
            raise UsageError(f"--host={cfg.host}: {remedy}")
        if cfg.public_host is not None:
            raise UsageError(f"--public_host={cfg.public_host}: {remedy}")
    # One thread does all of torch. OpenMP gives every thread that computes helpers of its own, and
    # lets them sleep if there are more than cores: then a step takes 1.5 times as long.
    with listen(cfg) as listener, ThreadPoolExecutor(1, "engine") as engine:
        try:
            served = engine.submit(open_models, cfg).result()
        except (KeyboardInterrupt, Stopped) as stop:  # the thread may read for seconds more
            end_at_once(getattr(stop, "number", signal.SIGINT))
        number = asyncio.run(serve(cfg, served, listener, engine))
    raise_stopped(number)


def listen(cfg: ServeConfig) -> Listener:
    """A socket on the server's address, which takes no connections yet. Raises UserError."""
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    # asyncio turns Nagle's delay off where the protocol is named.
    listener = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # on Windows it would let other programs take the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((cfg.host, cfg.port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            other = "give another, or 0 for any that is free"
            raise UserError(f"--port={cfg.port}: another program uses it; {other}") from None
        where = f"--host={cfg.host} --port={cfg.port}"
        raise UserError(f"{where}: cannot listen there ({error.strerror})") from None
    return listener


# ---- models


def open_models(cfg: ServeConfig) -> list[Served]:
    """The models to serve, each with its batch, under different names."""
    served = [open_served(cfg, cfg.read(), cfg.init_from or cfg.ckpt or cfg.out_dir)]
    if cfg.compare:
        stored = formats.open_weights(cfg.compare, prefer_best=True, verify=cfg.verify)
        second = open_served(cfg, stored, cfg.compare)
        if second.name == served[0].name:
            second.name += "-2"
        served.append(second)
    widest = max(one.model.config.n_embd for one in served)
    if "OMP_NUM_THREADS" not in os.environ and widest < 256:
        torch.set_num_threads(1)  # tiny matrices gain nothing from more, which wait for others
    return served


def open_served(cfg: ServeConfig, stored: Checkpoint, source: str) -> Served:
    """One model with its batch, under the name of the folder that it comes from."""
    opened = open_model(cfg, stored)
    model = opened.model
    batch = Batch(model, opened.tokenizer, cfg.rows, opened.cache_dtype)
    folder = Path(source).resolve()  # "." has no name
    if folder.is_file():
        folder = folder.parent
    log = folder / "log.jsonl"
    about = {
        **describe(model, batch),
        "device": opened.device,
        "dtype": dtype_name(opened.dtype),
        "parameters": model.get_num_params(non_embedding=False),
        "iteration": stored.iter_num,
        "val_loss": stored.best_val_loss,  # infinity, which JSON has as null, if none is known
        "has_log": log.is_file(),
        "max_tokens": cfg.max_tokens,
    }
    settings = dataclasses.asdict(model.config)  # where a run says None, what that stands for
    for name, value in stored.config.items():
        if value is not None or name not in settings:
            settings[name] = value
    name = folder.name.encode("utf-8", "backslashreplace").decode()  # it goes into metrics
    return Served(
        name=name, model=model, tokenizer=opened.tokenizer, batch=batch,
        about=about, settings=settings, log=log, most=cfg.rows + cfg.queue,
    )


def describe(model: GPT, batch: Batch) -> dict[str, Any]:
    """What a model and its cache are, for /v1/models; sizes of the cache are those of one row."""
    config = model.config
    cache = batch.cache
    numbers = cached_numbers(model)
    heads = 2 * config.n_head
    scale = torch.float16.itemsize if cache.dtype == torch.int8 else 0  # of every token and head
    return {
        "attention": config.attention_name,
        "attention_name": model.transformer.h[0].attn.words,
        "cache_in_words": cache_in_words(model),
        "layers": config.n_layer,
        "heads": config.n_head,
        "width": config.n_embd,
        "context": config.block_size,
        "vocabulary": config.vocab_size,
        "numbers_per_token_and_layer": int(numbers) if numbers == int(numbers) else numbers,
        "mha_numbers_per_token_and_layer": heads * config.hs,
        "cache_dtype": dtype_name(cache.dtype),
        "bytes_per_token": cache.bytes_per_token,
        "state_bytes": 0 if cache.grows else cache.nbytes // cache.batch_size,
        "mha_bytes_per_token": config.n_layer * heads * (config.hs * cache.dtype.itemsize + scale),
        "rows": batch.rows,
    }


# ---- the process


async def serve(
    cfg: ServeConfig, served: list[Served], listener: Listener, engine: ThreadPoolExecutor
) -> int:
    """
    Serve until a signal comes, and let what is running come to its end; returns the signal's
    number. Raises what any part of the server has ended with instead.
    """
    import uvicorn

    from nanomla.serve.app import Site

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # clients that vanish are no news
    stepper = Stepper(served, engine)
    guard = Site(stepper, cfg.max_tokens).app(listener, cfg.host, cfg.public_host, cfg.token)
    server = uvicorn.Server(uvicorn.Config(
        guard, http="h11", ws="none", lifespan="off", log_config=None, log_level="critical",
        access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=FLUSH,
    ))
    server.capture_signals = contextlib.nullcontext  # they are handled here
    signals: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if signals and number == signal.SIGINT:
            end_at_once(number)
        signals.append(number)

    with handled(note, "SIGINT", "SIGTERM"):
        watching = asyncio.create_task(listener.watch())
        running = asyncio.create_task(server.serve([listener]))
        try:
            while not server.started and not running.done():
                await asyncio.sleep(0.01)
            announce(served, listener)
            while not (signals or stepper.failure or running.done() or watching.done()):
                await asyncio.sleep(0.05)
            guard.draining = True
            until = time.monotonic() + GRACE
            while stepper.calls and not stepper.failure and time.monotonic() < until:
                await asyncio.sleep(0.05)
            stepper.fail_all(ApiError(503, "the server is shutting down", code="shutting_down"))
            server.should_exit = True
            await running
            if watching.done():
                watching.result()
            watching.cancel()
        finally:
            stepper.ended = True  # or the engine's thread, which main waits for, would go on
        if stepper.failure:
            raise stepper.failure
        last_step = asyncio.wrap_future(engine.submit(int))
        if not (await asyncio.wait([last_step], timeout=GRACE))[0]:
            end_at_once(signals[0])  # Python must not end below a step that takes this long
    return signals[0]


def end_at_once(number: int) -> None:
    """End the process as run_script does for a signal, but without waiting for the engine."""
    line, status = explain(KeyboardInterrupt() if number == signal.SIGINT else Stopped(number))
    say(f"{script_name()}: {line}", sys.stderr)
    os._exit(status)


def announce(served: list[Served], listener: Listener) -> None:
    """Say what is served, and where."""
    for one in served:
        about = one.about
        say(f"{one.name}: {about['attention_name']}; {about['cache_in_words']}")
    host, port, *_ = listener.getsockname()
    say(f"http://{f'[{host}]' if ':' in host else host}:{port}")


if __name__ == "__main__":
    run_script(main)
