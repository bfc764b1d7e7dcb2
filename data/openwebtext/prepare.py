"""
OpenWebText as GPT-2 tokens, through Hugging Face datasets: 8 million documents, 54 GB of text, 9 billion tokens.

    python data/openwebtext/prepare.py                                   everything
    python data/openwebtext/prepare.py --limit=10000                     the first documents only, streamed
    python data/openwebtext/prepare.py --data_files='my/*.parquet'       local copies: .json, .jsonl, .parquet or .txt

As in nanoGPT every document ends with the end-of-text token, and 0.05% of the documents, drawn with seed 2357, are val;
the order is shuffled. Of .txt files each is one document. datasets keeps the text in its own cache; the tokens are
written once, a shard of documents at a time. The sha256 in meta.json is that of the text in the order written.
"""

import functools
import glob
import hashlib
import math
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
    import tiktoken
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
    num_proc: Annotated[int, "cores that download, unpack and tokenize"] = helpers.cores()
    shards: Annotated[int, "parts in which each split is tokenized; more take less memory"] = 8192
    out: Annotated[str, "folder to write train.bin, val.bin and meta.json to"] = str(HERE)

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction={self.val_fraction} is not between 0 and 1")
        for name, least in (("limit", 2), ("num_proc", 1), ("shards", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)} is less than {least}")


def main(argv: list[str] | None = None) -> None:
    cfg, _ = configure(PrepareConfig, sys.argv[1:] if argv is None else argv)
    bpe = load_encoding("gpt2")
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
    digest = hashlib.sha256()
    splits = {
        split: encode_split(split, parts[part], cfg, bpe, digest, meta)
        for split, part in (("train", "train"), ("val", "test"))
    }
    meta = helpers.write_dataset(Path(cfg.out), splits, meta)
    helpers.report(Path(cfg.out), meta)


def load_documents(cfg: PrepareConfig) -> "Dataset":
    """The documents, one a row. Raises UserError if they cannot be had, UsageError for files of no known kind."""
    try:
        import datasets
    except ImportError:
        raise UserError("this dataset comes through Hugging Face datasets: pip install datasets") from None
    name, files = HUB, None
    if cfg.data_files is not None:
        files = sorted(f for pattern in cfg.data_files.split(",") for f in glob.glob(pattern, recursive=True))
        kinds = {READERS.get(Path(f.removesuffix(".gz")).suffix) for f in files}
        if len(kinds) != 1 or None in kinds:
            raise UsageError(f"--data_files={cfg.data_files}: {len(files)} files, not all of one kind of {[*READERS]}")
        name = kinds.pop()
    options = {"data_files": files, "split": "train"} | ({"sample_by": "document"} if name == "text" else {})
    try:
        if cfg.limit is not None:
            stream = datasets.load_dataset(name, streaming=True, **options)
            documents = datasets.Dataset.from_list(list(stream.take(cfg.limit)))
        else:
            processes = min(cfg.num_proc, len(files) if files else cfg.num_proc)
            documents = datasets.load_dataset(name, num_proc=processes if processes > 1 else None, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        remedy = "check the files" if files else "check the network, or read local copies with --data_files"
        raise UserError(f"cannot load {cfg.data_files or HUB} ({cause}); {remedy}") from None
    if cfg.field not in documents.column_names:
        raise UserError(
            f"no column {cfg.field!r} (there are: {', '.join(documents.column_names)}); choose with --field"
        )
    if documents.data.column(cfg.field).null_count or "string" not in str(documents.features[cfg.field]):
        raise UserError(f"the column {cfg.field!r} does not hold a text in every document; choose with --field")
    return documents.select_columns(cfg.field)


def encode_split(
    split: str, documents: "Dataset", cfg: PrepareConfig, bpe: "tiktoken.Encoding", digest: Any, meta: dict[str, Any]
) -> Iterator[np.ndarray]:
    """The ids of one split in order, tokenized a shard at a time on all cores; keeps count of bytes and text in meta."""
    count = min(cfg.shards, len(documents))
    shards = (documents.shard(count, index, contiguous=True) for index in range(count))
    texts = (shard[:][cfg.field] for shard in shards)
    meta["split_bytes"][split] = 0
    with tqdm(unit="B", unit_scale=True, desc=f"gpt2 {split}", disable=None) as bar:
        for raw, ids in helpers.in_order(functools.partial(encode_documents, bpe), texts, cfg.num_proc):
            digest.update(raw)
            meta["split_bytes"][split] += len(raw)
            bar.update(len(raw))
            yield ids
    meta |= {"sha256": digest.hexdigest(), "bytes": sum(meta["split_bytes"].values())}


def encode_documents(bpe: "tiktoken.Encoding", texts: list[str]) -> tuple[bytes, np.ndarray]:
    """The text's bytes, and its tokens with the end-of-text token after each document."""
    ids = [np.append(bpe.encode_to_numpy(text, disallowed_special=()), np.uint32(bpe.eot_token)) for text in texts]
    return "".join(texts).encode("utf-8"), np.concatenate(ids).astype(np.uint16)


if __name__ == "__main__":
    run_script(main)
