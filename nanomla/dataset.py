"""
Prepared datasets: folders with meta.json, and train.bin and val.bin of raw uint16 or uint32 ids.

The rows of a batch are a pure function of (seed, iteration, row). So a resumed run sees the batches
that it would have seen without the stop, and the rows of an iteration can be shared out over any
number of processes and micro-steps.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from nanomla.checks import Natural, check
from nanomla.errors import UserError
from nanomla.files import one_line, read_json, write_text

if TYPE_CHECKING:
    from torch import Tensor

DATA_ROOT = Path(__file__).resolve().parents[1] / "data"
UINT16_VOCAB = 65536  # the largest vocabulary whose ids fit uint16
UNFINISHED = ".unfinished"  # a folder in which a new dataset is written
READY = ".ready"  # its name once all of it is there; see write_dataset


@dataclass
class Meta:
    """
    The schema of meta.json. Every key is optional; what is None or {} is left out of the file.

    Raises ValueError for a value of another type.
    """

    # ids are below it; None: unknown, so ids are not checked
    vocab_size: Annotated[int, Field(ge=1, le=2**32)] | None = None
    tokenizer: dict[str, Any] | None = None  # the spec for nanomla.tokenizer.Tokenizer
    source: str | None = None  # where the text came from, for people to read
    sha256: str | None = None  # hex digest of the text in UTF-8, for people to compare
    bytes: int | None = None  # length of the text in UTF-8
    documents: Natural | None = None  # number of documents in the text
    split: dict[str, Any] | None = None  # how val was chosen: "by", "val_fraction", maybe "seed"
    # per split, its text's UTF-8 bytes and, last, the number of its ids
    split_bytes: dict[str, Natural] = field(default_factory=dict)
    dtype: Literal["uint16", "uint32"] = "uint16"  # of the ids in the .bin files
    tokens: dict[str, Natural] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)


class Dataset:
    """
    One dataset folder, memory-mapped. Every row of a batch is a window, or with `ends` a document's
    part of one; these are padded behind, to the longest, and have targets of -1 there.

    name: a folder below data/, or a path.
    Raises UserError if the folder is not prepared, if a split has fewer than block_size + 1 tokens,
    or if a .bin file contradicts the meta file.
    """

    def __init__(self, name: str, block_size: int) -> None:
        self.name = name
        self.block_size = block_size
        self.folder = DATA_ROOT / name  # an absolute path replaces DATA_ROOT
        if not self.folder.is_dir() and Path(name).is_dir():
            self.folder = Path(name).resolve()
        meta = read_meta(self.folder)
        if not all((self.folder / file).is_file() for file in ("train.bin", "val.bin")):
            raise UserError(
                f"dataset {name} is not prepared: no train.bin and val.bin in {self.folder}; "
                + self._remedy()
            )
        self.vocab_size = meta.vocab_size
        self.model_vocab_size: int | None = None  # of the model that reads it
        # ids at which windows are cut, so that no document sees the one before it; (): at none
        self.ends: tuple[int, ...] = ()
        self.tokenizer = meta.tokenizer
        self.split_bytes = meta.split_bytes
        self.splits = {split: self._map(split, meta) for split in ("train", "val")}

    def _remedy(self) -> str:
        script = self.folder / "prepare.py"
        if script.is_file():
            return f"prepare it with: python {os.path.relpath(script)}"
        names = sorted(path.parent.name for path in DATA_ROOT.glob("*/prepare.py"))
        return "datasets you can prepare: " + ", ".join(names)

    def _map(self, split: str, meta: Meta) -> np.ndarray:
        path = self.folder / f"{split}.bin"
        size = path.stat().st_size
        item = np.dtype(meta.dtype).itemsize
        if size % item:
            raise UserError(
                f"{path} has {size} bytes, which is no multiple of the {item} of a {meta.dtype}; "
                "it is cut off or of another kind: prepare the dataset again"
            )
        tokens = size // item
        if tokens != meta.tokens.get(split, tokens):
            raise UserError(
                f"{path} holds {tokens} tokens, but its meta file counts {meta.tokens[split]}; "
                "they do not belong together: prepare the dataset again"
            )
        if tokens < self.block_size + 1:
            raise UserError(
                f"{path}: {tokens} tokens are too few for block_size={self.block_size}; "
                f"use --block_size={max(tokens - 1, 1)} or less, or more text"
            )
        return np.memmap(path, dtype=meta.dtype, mode="r")

    def batch(self, seed: int, iteration: int, rows: range) -> tuple["Tensor", "Tensor"]:
        """
        Some rows of an iteration: training inputs and targets, both (len(rows), block_size) int64.
        """
        tokens = self.splits["train"]
        draw = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, iteration]))
        offsets = draw.integers(0, len(tokens) - self.block_size, size=rows.stop)
        return self._windows("train", offsets[rows.start :])

    def eval_batch(
        self, split: str, index: int, count: int, batch_size: int
    ) -> tuple["Tensor", "Tensor"]:
        """
        One of `count` fixed batches: inputs and targets, both (batch_size, block_size) int64.

        The windows of all of them together are spread evenly over the split, whatever the seed.
        """
        last = len(self.splits[split]) - self.block_size - 1
        rows = np.arange(index * batch_size, (index + 1) * batch_size)
        return self._windows(split, rows * last // max(count * batch_size - 1, 1))

    def spread(
        self, split: str, tokens: int, batch_size: int
    ) -> list[tuple["Tensor", "Tensor"]]:
        """Fixed batches of about so many tokens, spread evenly over the split, or all of it."""
        windows = -(-(len(self.splits[split]) - 1) // self.block_size)
        wanted = min(windows, max(tokens // self.block_size, 1))
        batch_size = min(batch_size, wanted)
        count = -(-wanted // batch_size)
        return [self.eval_batch(split, i, count, batch_size) for i in range(count)]

    def tokens(self, split: str) -> np.ndarray:
        """All token ids of a split, (N,). Raises UserError for one beyond the vocabulary."""
        self._check_ids(split, int(self.splits[split].max()))
        return self.splits[split]

    def bytes_per_token(self, split: str) -> float | None:
        """Average UTF-8 bytes of text per token; None if the meta file has no byte counts."""
        if split not in self.split_bytes:
            return None
        return self.split_bytes[split] / len(self.splits[split])

    def _windows(self, split: str, offsets: np.ndarray) -> tuple["Tensor", "Tensor"]:
        import torch  # not above: prepare.py scripts import this file, and torch takes seconds

        tokens = self.splits[split]
        window = tokens[offsets[:, None] + np.arange(self.block_size + 1)]  # (B, T + 1)
        self._check_ids(split, int(window.max()))
        ids = window.astype(np.int64)
        inputs = ids[:, :-1]
        targets = ids[:, 1:]
        if self.ends:
            cuts = np.isin(inputs, self.ends)  # an end is the first token of the next document
            inputs = cut_rows(inputs, cuts, 0)
            targets = cut_rows(targets, cuts, -1)
        return torch.from_numpy(inputs.copy()), torch.from_numpy(targets.copy())

    def _check_ids(self, split: str, largest: int) -> None:
        """Raise UserError if an id is beyond the vocabulary of the meta file or of the model."""
        holds = f"{self.folder / split}.bin holds token id {largest}, but the"
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise UserError(
                f"{holds} vocabulary has {self.vocab_size}; its meta file and its tokens do not "
                "belong together: prepare it again"
            )
        if self.model_vocab_size is not None and largest >= self.model_vocab_size:
            raise UserError(
                f"{holds} model has vocab_size={self.model_vocab_size}; it needs "
                f"{largest + 1} or more"
            )


def cut_rows(ids: np.ndarray, cuts: np.ndarray, padding: int) -> np.ndarray:
    """The parts of all rows of ids (B, T), which begin at every cut (B, T) bool, padded behind."""
    parts = []
    for row, begins in zip(ids, cuts, strict=True):
        parts += np.split(row, np.flatnonzero(begins[1:]) + 1)
    padded = np.full((len(parts), max(map(len, parts))), padding)
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded


def read_meta(place: Path) -> Meta:
    """
    A dataset's meta.json, else nanoGPT's meta.pkl, else an empty Meta. Unknown keys are ignored.

    place: the dataset's folder, or such a file itself.
    Raises UserError if the file cannot be read or a field has the wrong type.
    """
    if (place / READY).is_dir():  # a writer was killed before it had moved all files
        with locked(place, "writing this dataset"):
            _move_files(place)
    path = place / "meta.json"
    if place.is_file():
        path = place
    if path.suffix == ".pkl" or not path.exists():
        pickled = path.with_suffix(".pkl")
        if pickled.is_file():
            return _read_meta_pkl(pickled)
        return Meta()
    content = read_json(path)
    fields = {key: value for key, value in content.items() if key in Meta.__dataclass_fields__}
    try:
        return Meta(**fields)
    except ValueError as error:
        raise UserError(f"{path}: not a dataset's meta file ({error})") from None


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class, so no code can run; dicts, strings and ints need none."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_meta_pkl(path: Path) -> Meta:
    """
    nanoGPT's {'vocab_size': int, 'stoi': {char: id}, 'itos': {id: char}}.

    Raises UserError for anything else: what a model has learnt of ids could not be read as text.
    """
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file).load()
        letters = content["itos"]
        chars = [letters[i] for i in range(len(letters))]
        vocab_size = content["vocab_size"]
        single = all(isinstance(char, str) and len(char) == 1 for char in chars)
        if not single or not len(chars) == len(set(chars)) == vocab_size:
            wanted = f"one character, each another, for every id below {vocab_size=}"
            remedy = "to train on the ids alone, rename this file and give --vocab_size"
            raise ValueError(f"itos must have {wanted}; {remedy}")
        return Meta(vocab_size, {"kind": "char", "chars": "".join(chars)})
    except Exception as error:  # noqa: BLE001  a hostile pickle can raise anything
        reason = one_line(error)
        raise UserError(f"{path}: refused, not a plain nanoGPT meta.pkl ({reason})") from None


def write_dataset(folder: Path, splits: dict[str, Iterable[np.ndarray]], meta: Meta) -> Meta:
    """
    Write a .bin file for every split, and meta.json, into `folder`. Returns the Meta written.

    splits: each split's token ids, in pieces.
    meta: must have vocab_size; dtype and tokens are filled in here. As meta.json is written last,
        generators of pieces may set the other fields while they run.

    All files are first written to a folder inside `folder`. One rename of that folder, to READY,
    decides that they are the dataset; then each file is moved to its place. If the process is
    killed before the last move, the next reader or writer ends the moves.
    Raises UserError if another run is writing the same folder, or if a file cannot be written.
    """
    unfinished = folder / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "writing this dataset"):
            _move_files(folder)
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            try:
                unfinished.mkdir()
                meta = _write_files(unfinished, splits, meta)
                os.rename(unfinished, folder / READY)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            _move_files(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the dataset ({error})") from None
    return meta


def _write_files(folder: Path, splits: dict[str, Iterable[np.ndarray]], meta: Meta) -> Meta:
    dtype = np.dtype(np.uint16)
    if meta.vocab_size > UINT16_VOCAB:
        dtype = np.dtype(np.uint32)
    counts = {}
    for split, pieces in splits.items():
        counts[split] = 0
        with open(folder / f"{split}.bin", "wb") as file:
            for piece in pieces:
                file.write(np.ascontiguousarray(piece, dtype=dtype).data)
                counts[split] += len(piece)
            file.flush()
            os.fsync(file.fileno())
    meta = dataclasses.replace(meta, dtype=dtype.name, tokens=counts)
    content = {key: value for key, value in vars(meta).items() if value is not None and value != {}}
    write_text(folder / "meta.json", json.dumps(content, indent=1) + "\n")
    return meta


def _move_files(folder: Path) -> None:
    """Move the files of READY, if there is one, to their places. The caller holds the lock."""
    ready = folder / READY
    if ready.is_dir():
        for path in ready.iterdir():
            os.replace(path, folder / path.name)
        ready.rmdir()


@contextlib.contextmanager
def locked(folder: Path, doing: str) -> Iterator[bool]:
    """
    Lock an existing folder against other processes; gives whether that is possible here (POSIX).

    Raises UserError, with what the other one is `doing`, if it is locked already.
    """
    if os.name != "posix":
        yield False
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:  # the kernel releases this lock however the process ends
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is {doing}") from None
        yield True
    finally:
        os.close(handle)
