"""
Your own text as a dataset.

    python data/text/prepare.py my/*.txt --name=mine        writes data/mine; train with --dataset=mine

Arguments without dashes are what to read: text files of any name, or folders, of which every .txt, .md, .py and .jsonl
is taken, sorted by path, hidden ones left out. A file is one document; of a .jsonl, every line is one, its text in the
--field. Each may be gzipped (.txt.gz). Text must be UTF-8 and is taken as it is, line ends and marks included; empty
documents are left out.

Between two documents goes the tokenizer's end-of-text token; char and byte have none, there it is a newline.
"<|endoftext|>" written in a text stays ordinary text.

--split=tail: val is the last --val_fraction of the characters; it begins at the next place, within 4,096 characters,
where a document begins or a piece may be cut (see below), else at that very character. --split=document: a document
is in val if the hash of --seed and its number is below --val_fraction. Both depend on the text alone: every tokenizer
gets the same val text, so that bits per byte compare.

Text is read twice or more, first to check and measure it, and tokenized in pieces of at most 524,288 characters, so
memory does not grow with the input (only one line of .jsonl is held whole). A piece ends before a space that follows
something else than white space, or after a line end between two such characters, the second of them no "/". There all
three BPE tokenizers begin a new token whatever comes before and after, so the ids are those of whole documents. Only a
stretch of 524,288 characters without any such place is cut regardless.
"""

import codecs
import gzip
import hashlib
import itertools
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, however this script was started

from configurator import UsageError, UserError, configure, run_script
from data import helpers
from data.tokenizer import Tokenizer

SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # what is taken of a folder
PIECE = 1 << 19  # characters tokenized at a time; tiktoken gives up at a million blanks in a row
NEAR = 4096  # characters after its place within which the split looks for a place to cut
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")  # where pieces may end: the docstring's last paragraph

Piece = tuple[int, str]  # the number of a document, and the next part of its text


@dataclass
class PrepareConfig:
    name: Annotated[str | None, "write data/NAME, for --dataset=NAME"] = None
    out: Annotated[str | None, "write this folder instead"] = None
    tokenizer: Annotated[Literal["gpt2", "cl100k_base", "o200k_base", "char", "byte"], "what makes tokens of text"] = (
        "gpt2"
    )
    val_fraction: Annotated[float, "how much of the text is val, between 0 and 1"] = 0.1
    split: Annotated[Literal["tail", "document"], "val is the end of the text, or documents drawn by hash"] = "tail"
    seed: Annotated[int, "chooses the documents of --split=document"] = 1337
    field: Annotated[str, "which field of a .jsonl line is the text"] = "text"
    errors: Annotated[Literal["strict", "replace"], "at invalid UTF-8: stop, or put U+FFFD and go on"] = "strict"

    def __post_init__(self) -> None:
        if (self.name is None) == (self.out is None):
            raise ValueError("say where to write: --name=NAME for data/NAME, or --out=FOLDER")
        if self.name is not None and (self.name in ("", ".", "..") or Path(self.name).name != self.name):
            raise ValueError(f"--name={self.name} is not a folder's name; --out=FOLDER takes any path")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"--val_fraction={self.val_fraction} is not between 0 and 1")


@dataclass
class Survey:
    """What the first reading finds."""

    files: list[Path]
    documents: int = 0
    characters: int = 0
    bytes: int = 0
    sha256: str = ""  # of the documents' UTF-8 text, one after the other; of one plain file, the file's
    chars: set[str] = field(default_factory=set)  # only for the char tokenizer


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    cfg, _ = configure(PrepareConfig, [arg for arg in argv if arg.startswith("-")])
    paths = [arg for arg in argv if not arg.startswith("-")]
    folder = HERE.parent / cfg.name if cfg.out is None else Path(cfg.out)
    if (folder / "prepare.py").exists():
        raise UsageError(f"{folder} belongs to the prepare.py in it; choose another place to write to")
    found = survey(find_files(paths), cfg)
    tokenizer = make_tokenizer(cfg.tokenizer, found)
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.spec,
        "source": _abridged(paths),
        "sha256": found.sha256,
        "bytes": found.bytes,
        "documents": found.documents,
        "split": {"by": cfg.split, "val_fraction": cfg.val_fraction},
        "split_bytes": {},  # filled in while the splits are written
    }
    if cfg.split == "document":
        meta["split"]["seed"] = cfg.seed
    start = time.perf_counter()
    with tqdm(total=found.bytes, unit="B", unit_scale=True, desc=cfg.tokenizer, disable=None) as bar:
        sizes = meta["split_bytes"]
        splits = {split: encode_split(split, cfg, found, tokenizer, sizes, bar) for split in ("train", "val")}
        meta = helpers.write_dataset(folder, splits, meta)
    speed = found.bytes / 1e6 / (time.perf_counter() - start)
    helpers.report(folder, meta)
    print(f"{found.documents:,} documents, {found.bytes / 1e6:,.1f} MB, tokenized at {speed:.1f} MB/s")


def find_files(paths: Iterable[str]) -> list[Path]:
    """The files that the given files and folders stand for. Raises UsageError for none, a missing or an empty one."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(Path(top, name) for top, _, names in os.walk(path, onerror=_refuse) for name in names)
            visible = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            texts = [p for p in visible if p.name.removesuffix(".gz").endswith(SUFFIXES)]
            if not texts:
                raise UsageError(f"{path}: no {', '.join(SUFFIXES)} file in this folder, gzipped or not")
            files += texts
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"{path}: no such file or folder")
    if not files:
        raise UsageError("say what to read: text files or folders, as in prepare.py my/*.txt --name=mine")
    return files


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})")


def _abridged(names: list[Any]) -> str:
    return ", ".join(map(str, names[:3])) + (f", and {len(names) - 3} more" if len(names) > 3 else "")


def survey(files: list[Path], cfg: PrepareConfig) -> Survey:
    """Read everything once: is it sound, how much is it, which characters are there."""
    found, digest, last = Survey(files), hashlib.sha256(), -1
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for index, text in read_documents(files, cfg):
            raw = text.encode("utf-8")
            digest.update(raw)
            found.bytes += len(raw)
            found.characters += len(text)
            found.documents += index != last
            last = index
            if cfg.tokenizer == "char":
                found.chars.update(text)
            bar.update(len(raw))
    if not found.characters:
        raise UserError(f"{_abridged(files)}: no text in there")
    found.sha256 = digest.hexdigest()
    return found


def make_tokenizer(name: str, found: Survey) -> Tokenizer:
    if name == "char":
        newline = {"\n"} if found.documents > 1 else set()
        return Tokenizer({"kind": "char", "chars": "".join(sorted(found.chars | newline))})
    return Tokenizer({"kind": "byte"} if name == "byte" else {"kind": "tiktoken", "name": name})


def read_documents(files: list[Path], cfg: PrepareConfig) -> Iterator[Piece]:
    """
    The documents in blocks of text, none of them empty; the blocks of one document bear its number and come together.
    Raises UserError naming the file, and the byte or line, for what cannot be read.
    """
    index = -1
    for path in files:
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                if path.name.removesuffix(".gz").endswith(".jsonl"):
                    for text in read_jsonl(path, file, cfg):
                        index += 1
                        yield index, text
                else:
                    for block, text in enumerate(read_text(path, file, cfg.errors)):
                        index += block == 0
                        yield index, text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: broken gzip file ({error})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_text(path: Path, file: IO[bytes], errors: str) -> Iterator[str]:
    """A plain text in blocks. A decoder keeps what is left of a character at a block's end."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    done = 0  # bytes of the file before `block`
    while True:
        block = file.read(PIECE)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(path, done - held + error.start)) from None
        if text:
            yield text
        if not block:
            return
        done += len(block)


def read_jsonl(path: Path, file: IO[bytes], cfg: PrepareConfig) -> Iterator[str]:
    """The text of every line that has any; blank lines count as lines, not as documents."""
    done = 0
    for number, line in enumerate(file, start=1):
        try:
            entry = json.loads(line.decode("utf-8", cfg.errors)) if line.strip() else {cfg.field: ""}
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(path, done + error.start)) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON ({getattr(error, 'msg', error)})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get(cfg.field), str):
            has = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise UserError(
                f"{path}: line {number} has no text in the field {cfg.field!r} (it has: {has}); use --field"
            )
        text = entry[cfg.field]
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, UTF-8 cannot hold it
            if cfg.errors == "strict":
                raise UserError(f"{path}: line {number} escapes half a character; --errors=replace goes on") from None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            yield text
        done += len(line)


def _not_utf8(path: Path, offset: int) -> str:
    where = f"byte {offset} of what it unpacks to" if path.suffix == ".gz" else f"byte {offset}"
    return f"{path}: not UTF-8 at {where}; convert the file, or go on with --errors=replace"


def cut_pieces(blocks: Iterable[Piece]) -> Iterator[Piece]:
    """The same documents in pieces of at most PIECE characters, cut where no token lies across."""
    for index, document in itertools.groupby(blocks, key=lambda block: block[0]):
        rest = ""
        for _, text in document:
            rest += text
            while len(rest) > PIECE:
                cut = _last_cut(rest)
                yield index, rest[:cut]
                rest = rest[cut:]
        yield index, rest


def _last_cut(text: str) -> int:
    for start in (PIECE - NEAR, 1):  # nearly always it is near the end
        if places := [m.start() for m in CUT.finditer(text, start, PIECE + 1)]:
            return places[-1]
    return PIECE


def select_split(split: str, pieces: Iterable[Piece], cfg: PrepareConfig, characters: int) -> Iterator[Piece]:
    """The pieces, or the part of a piece, that are in this split, of a text of so many characters."""
    boundary = int((1 - cfg.val_fraction) * characters)
    start = 0
    for index, text in pieces:
        if cfg.split == "document":
            cut = 0 if _in_val(index, cfg) else len(text)
        else:
            cut = min(max(boundary - start, 0), len(text))
            if 0 < cut < len(text):
                if place := CUT.search(text, cut, cut + NEAR):
                    cut = place.start()
                elif len(text) - cut <= NEAR and start + len(text) < characters:
                    cut = len(text)  # where the next piece begins
        start += len(text)
        if part := text[:cut] if split == "train" else text[cut:]:
            yield index, part


def _in_val(index: int, cfg: PrepareConfig) -> bool:
    draw = hashlib.sha256(f"{cfg.seed} {index}".encode()).digest()[:8]
    return int.from_bytes(draw, "big") < cfg.val_fraction * 2**64


def encode_split(
    split: str, cfg: PrepareConfig, found: Survey, tokenizer: Tokenizer, split_bytes: dict[str, int], bar: tqdm
) -> Iterator[np.ndarray]:
    """
    The ids of one split in order, tokenized on all cores; notes the split's bytes in split_bytes and moves the bar.
    Raises UserError if the split has less than two tokens.
    """
    encode = batch_encoder(tokenizer)
    pieces = select_split(split, cut_pieces(read_documents(found.files, cfg)), cfg, found.characters)
    tokens = n_bytes = 0
    for ids, size in helpers.in_order(encode, _batches(pieces), helpers.cores()):
        tokens += len(ids)
        n_bytes += size
        bar.update(size)
        yield ids
    if tokens < 2:
        raise UserError(
            f"{found.documents} documents of {found.characters} characters leave {tokens} tokens for {split}; "
            f"use more text, another --val_fraction, or --split={'document' if cfg.split == 'tail' else 'tail'}"
        )
    split_bytes[split] = n_bytes
    if split == "val" and sum(split_bytes.values()) != found.bytes:
        raise UserError("the files changed while they were read; run this again")


def _batches(pieces: Iterable[Piece]) -> Iterator[list[tuple[bool, str]]]:
    """Small documents together, as (begins a document that is not the split's first, text)."""
    batch, size, last = [], 0, None
    for index, text in pieces:
        if size and size + len(text) > PIECE:
            yield batch
            batch, size = [], 0
        batch.append((last is not None and index != last, text))
        size += len(text)
        last = index
    if batch:
        yield batch


def batch_encoder(tokenizer: Tokenizer) -> Callable[[list[tuple[bool, str]]], tuple[np.ndarray, int]]:
    """A function from a batch to its ids, separators included, and the bytes of its text."""
    if tokenizer.kind == "tiktoken":
        separator = [tokenizer.bpe.eot_token]
    else:
        separator = [10] if tokenizer.kind == "byte" else [tokenizer.ids[c] for c in "\n" if c in tokenizer.ids]
    separator = np.array(separator, dtype=np.uint32)

    def ids_of(text: str, raw: bytes) -> np.ndarray:
        if tokenizer.kind == "byte":
            return np.frombuffer(raw, dtype=np.uint8)
        if tokenizer.kind == "char":
            return helpers.encode_chars(text, tokenizer.chars)
        return tokenizer.bpe.encode_to_numpy(text, disallowed_special=())  # without the GIL, and with no list of ints

    def encode(batch: list[tuple[bool, str]]) -> tuple[np.ndarray, int]:
        parts, size = [], 0
        for separate, text in batch:
            raw = text.encode("utf-8")
            size += len(raw)
            parts += [separator, ids_of(text, raw)] if separate else [ids_of(text, raw)]
        return np.concatenate(parts), size

    return encode


if __name__ == "__main__":
    run_script(main)
