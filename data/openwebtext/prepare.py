"""
OpenWebText as GPT-2 tokens, through Hugging Face datasets: 8 million documents, 54 GB of text, 9 billion tokens.

    python data/openwebtext/prepare.py                                   everything; needs about 100 GB of disk
    python data/openwebtext/prepare.py --limit=10000                     the first documents only, streamed
    python data/openwebtext/prepare.py --data_files='my/*.parquet'       local copies: .json, .jsonl, .parquet or .txt

As in nanoGPT every document ends with the end-of-text token, and 0.05% of the documents, drawn with seed 2357, are val.
Of .txt files each is one document. The sha256 in meta.json is that of the documents' sha256 digests, train then val.
"""

import glob
import hashlib
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, however this script was started

from configurator import UsageError, UserError, configure, run_script
from data import helpers
from data.bpe import load_encoding

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "Skylion007/openwebtext"
SEED = 2357
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class PrepareConfig:
    data_files: Annotated[str | None, "read these files instead of the hub's; patterns, separated by commas"] = None
    field: Annotated[str, "the column that holds the text"] = "text"
    limit: Annotated[int | None, "take only the first documents, and keep them in memory"] = None
    val_fraction: Annotated[float, "how many of the documents are val, at least one"] = 0.0005
    num_proc: Annotated[int, "processes that tokenize"] = os.cpu_count() or 1
    shards: Annotated[int, "steps in which the tokens are written; more take less memory"] = 1024
    out: Annotated[str, "folder to write train.bin, val.bin and meta.json to"] = str(HERE)

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction={self.val_fraction} is not between 0 and 1")
        for name, least in (("limit", 2), ("num_proc", 1), ("shards", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)} is less than {least}")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(PrepareConfig, sys.argv[1:] if argv is None else argv)
    bpe = load_encoding("gpt2")  # here, so that the processes inherit it
    documents = load_documents(cfg)
    if math.ceil(cfg.val_fraction * len(documents)) >= len(documents):
        raise UserError(f"{cfg.data_files or HUB}: {len(documents)} documents are too few to split into train and val")
    parts = documents.train_test_split(test_size=cfg.val_fraction, seed=SEED, shuffle=True)
    meta = {
        "vocab_size": bpe.n_vocab,
        "tokenizer": {"kind": "tiktoken", "name": "gpt2"},
        "source": cfg.data_files or HUB,
        "sha256": "",  # this and the bytes are filled in while the splits are written
        "bytes": 0,
        "documents": len(documents),
        "split": {"by": "document", "val_fraction": cfg.val_fraction, "seed": SEED},
        "split_bytes": {},
    }
    digest, splits = hashlib.sha256(), {}
    for split, part in (("train", parts["train"]), ("val", parts["test"])):
        tokens = part.map(
            encode_documents,
            fn_kwargs={"field": cfg.field},
            batched=True,
            batch_size=100,
            remove_columns=part.column_names,
            num_proc=_processes(cfg, len(part)),
            desc=f"gpt2 {split}",
        )
        splits[split] = shard_ids(tokens, cfg.shards, split, digest, meta)
    meta = helpers.write_dataset(Path(cfg.out), splits, meta)
    helpers.report(Path(cfg.out), meta)


def _processes(cfg: PrepareConfig, tasks: int) -> int | None:
    """As datasets wants it: None for this process alone."""
    return min(cfg.num_proc, tasks) if min(cfg.num_proc, tasks) > 1 else None


def load_documents(cfg: PrepareConfig) -> "Dataset":
    """The documents, one a row. Raises UserError if they cannot be had, UsageError for files of no known kind."""
    try:
        import datasets
    except ImportError:
        raise UserError("this dataset comes through Hugging Face datasets: pip install datasets") from None
    name, options = HUB, {"num_proc": _processes(cfg, cfg.num_proc)}
    if cfg.data_files is not None:
        files = sorted(f for pattern in cfg.data_files.split(",") for f in glob.glob(pattern, recursive=True))
        kinds = {READERS.get(Path(f.removesuffix(".gz")).suffix) for f in files}
        if len(kinds) != 1 or None in kinds:
            raise UsageError(f"--data_files={cfg.data_files}: {len(files)} files, not all of one kind of {[*READERS]}")
        name, options = kinds.pop(), {"data_files": files, "num_proc": _processes(cfg, len(files))}
        if name == "text":
            options["sample_by"] = "document"
    try:
        if cfg.limit is not None:
            del options["num_proc"]
            stream = datasets.load_dataset(name, split="train", streaming=True, **options)
            documents = datasets.Dataset.from_list(list(stream.take(cfg.limit)))
        else:
            documents = datasets.load_dataset(name, split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        remedy = "check the files" if cfg.data_files else "check the network, or read local copies with --data_files"
        raise UserError(f"cannot load {cfg.data_files or HUB} ({cause}); {remedy}") from None
    if cfg.field not in documents.column_names:
        raise UserError(
            f"no column {cfg.field!r} (there are: {', '.join(documents.column_names)}); choose with --field"
        )
    if documents.data.column(cfg.field).null_count or "string" not in str(documents.features[cfg.field]):
        raise UserError(f"the column {cfg.field!r} does not hold a text in every document; choose with --field")
    return documents


def encode_documents(rows: dict[str, list], field: str) -> dict[str, list]:
    """Tokens with the end-of-text token, the bytes of the text, and its sha256, for each of some documents."""
    bpe = load_encoding("gpt2")
    raw = [text.encode("utf-8") for text in rows[field]]
    ids = [np.append(bpe.encode_to_numpy(text, disallowed_special=()), bpe.eot_token) for text in rows[field]]
    return {
        "ids": [i.astype(np.uint16) for i in ids],
        "bytes": [len(r) for r in raw],
        "sha256": [hashlib.sha256(r).digest() for r in raw],
    }


def shard_ids(tokens: "Dataset", shards: int, split: str, digest: Any, meta: dict[str, Any]) -> Iterator[np.ndarray]:
    """The ids of one split, a shard at a time; keeps count of bytes and digest in meta."""
    count = min(shards, len(tokens))
    meta["split_bytes"][split] = 0
    for index in tqdm(range(count), desc=f"writing {split}", disable=None):
        rows = tokens.shard(num_shards=count, index=index, contiguous=True).with_format("arrow")[:]
        digest.update(b"".join(rows["sha256"].to_pylist()))
        meta["split_bytes"][split] += sum(rows["bytes"].to_pylist())
        yield np.concatenate([chunk.flatten().to_numpy() for chunk in rows["ids"].chunks])
    meta |= {"sha256": digest.hexdigest(), "bytes": sum(meta["split_bytes"].values())}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill cleans up as Ctrl-C does
    run_script(main)
