"""
OpenWebText as GPT-2 tokens, through Hugging Face datasets: 8 million documents, 54 GB, 9 billion
tokens.

    python data/openwebtext/prepare.py                                 everything
    python data/openwebtext/prepare.py --limit=10000                   the first documents, streamed
    python data/openwebtext/prepare.py --data_files='my/*.parquet'     local files

Local files are .json, .jsonl, .parquet or .txt; a .txt file is one document. As in nanoGPT, the
documents are shuffled, 0.05% of them (drawn with seed 2357) are val, and every document ends with
the end-of-text token. Hugging Face datasets keeps the text in its own cache. The sha256 in
meta.json is that of the text in the order of writing.
"""

import functools
import glob
import hashlib
import itertools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, from wherever this script is started

from nanomla.bpe import load_encoding
from nanomla.checks import Count, Positive, Text, check
from nanomla.dataset import Meta, write_dataset
from nanomla.errors import UsageError, UserError, run_script
from nanomla.prepare import Piece, cores, encode_split, report
from nanomla.settings import configure

if TYPE_CHECKING:
    from datasets import Dataset

CORES = cores()
HUB = "Skylion007/openwebtext"
SEED = 2357
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class PrepareConfig:
    headings: ClassVar[dict[str, str]] = {
        "data_files": "text", "val_fraction": "split", "num_proc": "speed", "out": "output",
    }

    data_files: Annotated[
        Text | None,
        "Files that are read instead of the hub's, as patterns with commas between them.",
    ] = None
    field: Annotated[Text, "The name of the column that holds the text."] = "text"
    limit: Annotated[
        Annotated[int, Field(ge=2)] | None,
        "Only so many documents are taken, from the start, and kept in memory.",
    ] = None
    val_fraction: Annotated[
        Positive, Field(lt=1), "The share of the documents that is val, which has at least one."
    ] = 0.0005
    num_proc: Annotated[Count, "The number of processes that download and unpack."] = CORES
    out: Annotated[
        Text | None,
        "The folder for train.bin, val.bin and meta.json. None stands for that of this script.",
    ] = None

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(PrepareConfig, sys.argv[1:] if argv is None else argv)
    bpe = load_encoding("gpt2")
    encode = functools.partial(bpe.encode_to_numpy, disallowed_special=())
    end = np.array([bpe.eot_token], dtype=np.uint32)
    source = cfg.data_files or HUB
    documents = load_documents(cfg, source)
    if math.ceil(cfg.val_fraction * len(documents)) >= len(documents):
        raise UserError(f"{source}: {len(documents)} documents are too few for train and val")
    halves = documents.train_test_split(test_size=cfg.val_fraction, seed=SEED, shuffle=True)
    parts = {"train": halves["train"], "val": halves["test"]}
    meta = Meta(
        vocab_size=bpe.n_vocab,
        tokenizer={"kind": "tiktoken", "name": "gpt2"},
        source=source,
        bytes=0,
        documents=len(documents),
        split={"by": "document", "val_fraction": cfg.val_fraction, "seed": SEED},
    )
    digest = hashlib.sha256()

    def texts(documents: "Dataset") -> Iterator[Piece]:
        for batch in documents.iter(batch_size=1000):
            for text in batch[cfg.field]:
                raw = text.encode("utf-8")
                digest.update(raw)
                meta.bytes += len(raw)
                yield Piece(text)
        meta.sha256 = digest.hexdigest()

    with tqdm(unit="B", unit_scale=True, desc="gpt2", disable=None) as bar:
        splits = {}
        for split, part in parts.items():
            ids = encode_split(split, texts(part), encode, end, meta, bar)
            splits[split] = itertools.chain(ids, [end])
        meta = write_dataset(Path(cfg.out or HERE), splits, meta)
    report(Path(cfg.out or HERE), meta)


def load_documents(cfg: PrepareConfig, source: str) -> "Dataset":
    """
    The documents, one per row.

    Raises UserError if they cannot be loaded, UsageError for files of no known kind.
    """
    import datasets

    name = HUB
    options: dict[str, Any] = {"split": "train"}
    remedy = "check the network, or read local copies with --data_files"
    processes = cfg.num_proc
    if cfg.data_files is not None:
        files = []
        for pattern in cfg.data_files.split(","):
            files += filter(os.path.isfile, glob.glob(pattern, recursive=True))
        kinds = {READERS.get(Path(file.removesuffix(".gz")).suffix) for file in files}
        if len(kinds) != 1 or None in kinds:
            raise UsageError(
                f"--data_files={source}: {len(files)} files, not all of one kind of {[*READERS]}"
            )
        name = kinds.pop()
        options["data_files"] = sorted(files)
        remedy = "check the files"
        processes = min(processes, len(files))
    if name == "text":
        options["sample_by"] = "document"
    try:
        if cfg.limit is not None:
            stream = datasets.load_dataset(name, streaming=True, **options)
            documents = datasets.Dataset.from_list(list(stream.take(cfg.limit)))
        else:
            documents = datasets.load_dataset(name, num_proc=processes, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"cannot load {source} ({cause}); {remedy}") from None
    if cfg.field not in documents.column_names:
        columns = ", ".join(documents.column_names)
        raise UserError(f"no column {cfg.field!r} (there are: {columns}); choose with --field")
    return documents.select_columns(cfg.field)


if __name__ == "__main__":
    run_script(main)
