"""
Reads prepared datasets: train.bin and val.bin (raw uint16 or uint32 token ids) beside meta.json.

Batches are a pure function of (seed, iteration, micro-batch), so a run that resumes sees what it would have seen,
and one process with two micro-steps sees what two processes with one see.
"""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configurator import UserError

DATA_ROOT = Path(__file__).resolve().parent


class Dataset:
    """
    One dataset folder, memory-mapped.

    name: a folder below data/, or a path. Raises UserError if it is not prepared, is shorter than
    block_size + 1 tokens, or is inconsistent with its meta file.
    """

    def __init__(self, name: str, block_size: int) -> None:
        self.name, self.block_size = name, block_size
        self.folder = DATA_ROOT / name  # an absolute path replaces DATA_ROOT
        if not self.folder.is_dir() and Path(name).is_dir():
            self.folder = Path(name).resolve()
        if not (self.folder / "train.bin").is_file() or not (self.folder / "val.bin").is_file():
            raise UserError(f"dataset {name} is not prepared: no train.bin and val.bin in {self.folder}; {self._remedy()}")
        meta = read_meta(self.folder)
        self.vocab_size: int | None = meta.get("vocab_size")
        self.tokenizer: dict | None = meta.get("tokenizer")
        self.split_bytes: dict[str, int] = meta.get("split_bytes", {})
        dtype = np.dtype(meta.get("dtype", "uint16"))
        self.splits = {split: self._map(split, dtype) for split in ("train", "val")}

    def _remedy(self) -> str:
        script = self.folder / "prepare.py"
        if script.is_file():
            return f"prepare it with: python {os.path.relpath(script)}"
        return "datasets you can prepare: " + ", ".join(sorted(p.parent.name for p in DATA_ROOT.glob("*/prepare.py")))

    def _map(self, split: str, dtype: np.dtype) -> np.ndarray:
        path = self.folder / f"{split}.bin"
        size = path.stat().st_size
        if size % dtype.itemsize:
            raise UserError(f"{path}: {size} bytes is no whole number of {dtype} tokens; prepare the dataset again")
        if size // dtype.itemsize < self.block_size + 1:
            raise UserError(
                f"{path}: {size // dtype.itemsize} tokens are too few for block_size={self.block_size}; "
                f"use --block_size={max(size // dtype.itemsize - 1, 1)} or less, or more text"
            )
        return np.memmap(path, dtype=dtype, mode="r")

    def batch(self, seed: int, iteration: int, micro: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """
        Training inputs and targets, both (batch_size, block_size) int64, at offsets drawn by a counter-based
        generator from (seed, iteration, micro) alone; micro counts the micro-batches of an iteration over all ranks.
        """
        tokens = self.splits["train"]
        draw = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, micro, iteration]))
        return self._windows("train", draw.integers(0, len(tokens) - self.block_size, size=batch_size))

    def eval_batch(self, split: str, index: int, count: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Batch `index` of `count` fixed batches whose windows lie evenly over the split, whatever the seed."""
        last = len(self.splits[split]) - self.block_size - 1
        rows = np.arange(index * batch_size, (index + 1) * batch_size)
        return self._windows(split, rows * last // max(count * batch_size - 1, 1))

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of text a token stands for on average; None if the dataset does not say."""
        return self.split_bytes[split] / len(self.splits[split]) if split in self.split_bytes else None

    def _windows(self, split: str, offsets: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens = self.splits[split]
        window = tokens[offsets[:, None] + np.arange(self.block_size + 1)]  # (B, T + 1)
        if self.vocab_size is not None and int(window.max()) >= self.vocab_size:
            raise UserError(
                f"{self.folder / split}.bin holds token id {int(window.max())}, but the vocabulary has "
                f"{self.vocab_size}; its meta file and its tokens do not belong together: prepare it again"
            )
        ids = torch.from_numpy(window.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def read_meta(folder: Path) -> dict:
    """A dataset's meta.json, or what nanoGPT's meta.pkl says; {} if it has neither. Raises UserError if unreadable."""
    if (folder / "meta.json").is_file():
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if not isinstance(meta, dict) or meta.get("dtype", "uint16") not in ("uint16", "uint32"):
                raise ValueError("dtype is neither uint16 nor uint32")
            return meta
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / 'meta.json'}: not a dataset's meta file ({error})") from None
    if (folder / "meta.pkl").is_file():
        return _read_meta_pkl(folder / "meta.pkl")
    return {}


class _PlainUnpickler(pickle.Unpickler):
    """Dicts, strings and ints need no class lookup; a pickle that asks for one wants to run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_meta_pkl(path: Path) -> dict:
    """nanoGPT's meta.pkl: {'vocab_size': int, 'stoi': {char: id}, 'itos': {id: char}}, admitted only as plain values."""
    try:
        meta = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        itos = meta["itos"]
        chars = "".join(itos[i] for i in range(len(itos)))
        return {"vocab_size": int(meta["vocab_size"]), "tokenizer": {"kind": "char", "chars": chars}}
    except Exception as error:  # noqa: BLE001  a hostile pickle can raise anything
        raise UserError(f"{path}: refused, not a plain nanoGPT meta.pkl ({error})") from None
