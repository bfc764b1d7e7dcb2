"""
Your own text as a dataset.

    python data/text/prepare.py my/*.txt --name=mine      writes data/mine, for --dataset=mine

The arguments without dashes name what to read: text files of any name, or folders. In a folder
every .txt, .md, .py and .jsonl file is read, sorted by path, hidden ones left out. A file is one
document; in a .jsonl file every line is one, with its text in the --field. Files may be gzipped
(.txt.gz). Text must be UTF-8 and is not changed: line ends and byte-order marks stay. Empty
documents are left out. A config file is refused, as it is no text that anyone means.

The tokenizer's end-of-text token separates documents; char, byte and a tokenizer.json whose folder
names none use a newline. "<|endoftext|>" in a text is ordinary text.

--tokenizer=FOLDER takes the tokenizer.json of a folder of weights, so that train.py can fine-tune
them (--init_from=FOLDER). Documents are then encoded without the tokens that begin or end a text.

--split=tail: val is the last --val_fraction of the characters. So that no token is cut, it begins
up to 4,096 characters later, at the first place where a document begins or text may be cut (see
below); without such a place it begins exactly there. --split=document: a document is in val if the
hash of --seed and its number is below --val_fraction. Both depend on the text alone, so every
tokenizer gets the same val text, and bits per byte can be compared.

The text is read once to check and measure it, and once more for each split. It is tokenized in
pieces of at most 524,288 characters, so memory does not grow with the input, except that a line of
.jsonl must fit in memory. A piece ends before a space that follows anything but white space, or
after a line end between two characters that are no white space, the second of them no "/". At these
places all three BPE tokenizers begin a new token whatever comes before and after, so the ids are
those of the uncut documents. A stretch of 524,288 characters without such a place is cut at its
end. Byte-level and SentencePiece BPE in a tokenizer.json begin tokens at these places too.
"""

import ast
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
from typing import IO, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, from wherever this script is started

from nanomla.checks import Positive, check
from nanomla.dataset import Meta, write_dataset
from nanomla.errors import UsageError, UserError, run_script
from nanomla.prepare import cores, encode_chars, in_order, report
from nanomla.settings import configure, declared
from nanomla.tokenizer import HF_TOKENIZER, Tokenizer, end_of_text, read_hf, read_json

TOKENIZERS = ("gpt2", "cl100k_base", "o200k_base", "char", "byte")  # all others are files
SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # the files that are read in a folder
PIECE = 1 << 19  # characters tokenized at a time; tiktoken fails at a million blanks in a row
NEAR = 4096  # characters in which a place to cut is looked for first
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")  # the docstring's last paragraph says why

Piece = tuple[int, str]  # the number of a document, and the next part of its text
# Texts, each with what is before it: nothing, another document, or the rest of its own.
Batch = list[tuple[Literal["nothing", "other", "rest"], str]]


@dataclass
class PrepareConfig:
    usage: ClassVar[str] = "FILE_OR_FOLDER ... [--key=value ...]"
    headings: ClassVar[dict[str, str]] = {
        "name": "output", "tokenizer": "tokens", "val_fraction": "split", "field": "text",
    }  # fmt: skip

    name: Annotated[str | None, "The dataset is written to data/NAME, for --dataset=NAME."] = None
    out: Annotated[str | None, "The dataset is written to this folder instead."] = None
    tokenizer: Annotated[
        str, f"The tokenizer: {', '.join(TOKENIZERS)}, or a folder with a {HF_TOKENIZER}."
    ] = "gpt2"
    val_fraction: Annotated[Positive, Field(lt=1), "The share of the text that is val."] = 0.1
    split: Annotated[
        Literal["tail", "document"],
        "How val is chosen: tail takes the end of the text, document takes documents by their "
        "hash.",
    ] = "tail"
    seed: Annotated[int, "The seed that chooses the documents of --split=document."] = 1337
    field: Annotated[str, "The field of a line of a .jsonl file that holds the text."] = "text"
    errors: Annotated[
        Literal["strict", "replace"],
        "What happens at invalid UTF-8: strict stops, replace puts U+FFFD in its place.",
    ] = "strict"

    def __post_init__(self) -> None:
        check(self)
        if self.tokenizer not in TOKENIZERS and not hf_file(self.tokenizer).is_file():
            raise ValueError(
                f"--tokenizer={self.tokenizer}: tokenizer must be one of {', '.join(TOKENIZERS)}, "
                f"or a folder with a {HF_TOKENIZER}"
            )
        if (self.name is None) == (self.out is None):
            raise ValueError("say where to write: --name=NAME for data/NAME, or --out=FOLDER")
        if self.name is not None and (
            self.name in ("", ".", "..") or Path(self.name).name != self.name
        ):
            raise ValueError(
                f"--name={self.name} is not a folder's name; --out=FOLDER takes any path"
            )


@dataclass
class Survey:
    """What the first reading finds."""

    files: list[Path]
    documents: int = 0
    characters: int = 0
    bytes: int = 0  # of the documents' UTF-8 text
    sha256: str = ""  # of the documents' UTF-8 text, joined; for one plain file, that of the file
    chars: set[str] = field(default_factory=set)  # the alphabet, only for the char tokenizer


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    paths: list[str] = []
    cfg, _ = configure(PrepareConfig, argv, files=paths)
    if configs := [path for path in paths if is_config(Path(path))]:
        remedy = "give settings as --key=value; a copy of it that ends in .txt is read as text"
        raise UsageError(f"{configs[0]} is a config file, which is not read here; {remedy}")
    folder = HERE.parent / cfg.name if cfg.out is None else Path(cfg.out)
    if (folder / "prepare.py").exists():
        raise UsageError(
            f"{folder} belongs to the prepare.py in it; choose another place to write to"
        )
    files = find_files(paths)
    imported = None if cfg.tokenizer in TOKENIZERS else read_tokenizer(cfg.tokenizer)
    found = survey(files, cfg)
    tokenizer = imported or make_tokenizer(cfg.tokenizer, found)
    meta = Meta(
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.spec,
        source=_abridged(paths),
        sha256=found.sha256,
        bytes=found.bytes,
        documents=found.documents,
        split={"by": cfg.split, "val_fraction": cfg.val_fraction},
    )
    if cfg.split == "document":
        meta.split["seed"] = cfg.seed
    start = time.perf_counter()
    with tqdm(
        total=found.bytes, unit="B", unit_scale=True, desc=Path(cfg.tokenizer).name, disable=None
    ) as bar:
        splits = {
            split: encode_split(split, cfg, found, tokenizer, meta.split_bytes, bar)
            for split in ("train", "val")
        }
        meta = write_dataset(folder, splits, meta)
    speed = found.bytes / 1e6 / (time.perf_counter() - start)
    report(folder, meta)
    size = f"{found.documents:,} documents, {found.bytes / 1e6:,.1f} MB"
    print(f"{size}, tokenized at {speed:.1f} MB/s")


def is_config(path: Path) -> bool:
    """
    Whether a file is one of config/, or Python that only assigns to names, some of them settings.

    It is parsed, and not run.
    """
    if path.suffix != ".py" or not path.is_file():
        return False
    if HERE.parents[1] / "config" in path.resolve().parents:
        return True
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # no Python, or too nested
        return False
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # its docstring
    targets = [target for s in body for target in getattr(s, "targets", [None])]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    settings = {*declared(PrepareConfig), "dataset", "out_dir", "max_iters"}
    assigns = all(isinstance(s, ast.Assign) for s in body)
    return assigns and all(isinstance(t, ast.Name) for t in targets) and bool(names & settings)


def hf_file(name: str) -> Path:
    """The tokenizer.json that --tokenizer names, by itself or by its folder."""
    return Path(name) / HF_TOKENIZER if Path(name).is_dir() else Path(name)


def read_tokenizer(name: str) -> Tokenizer:
    """
    The tokenizer of a folder of weights, with the spec that a checkpoint read from there has.

    Raises UserError if tokenizer.json or the config.json beside it cannot be used.
    """
    path = hf_file(name)
    config = path.with_name("config.json")
    spec = read_hf(path, read_json(config) if config.exists() else {})
    return Tokenizer(spec, str(path))


def find_files(paths: Iterable[str]) -> list[Path]:
    """
    The given files, and the text files in the given folders.

    Raises UsageError if there are none, or for a path that does not exist or a folder without any.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            walk = os.walk(path, onerror=_refuse)
            inside = sorted(Path(top, name) for top, _, names in walk for name in names)
            texts = [p for p in inside if p.name.removesuffix(".gz").endswith(SUFFIXES)]
            texts = [
                p for p in texts if not any(n.startswith(".") for n in p.relative_to(path).parts)
            ]
            if not texts:
                suffixes = ", ".join(SUFFIXES)
                raise UsageError(f"{path}: no {suffixes} file in this folder, gzipped or not")
            files += texts
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"{path}: no such file or folder")
    if not files:
        raise UsageError(
            "say what to read: text files or folders, as in prepare.py my/*.txt --name=mine"
        )
    return files


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})")


def _abridged(names: list[Any]) -> str:
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more


def survey(files: list[Path], cfg: PrepareConfig) -> Survey:
    """Read everything once, to find errors before anything is written and to measure the text."""
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
    """The --tokenizer; char's vocabulary is the text's characters and, if needed, the separator."""
    if name == "char":
        newline = {"\n"} if found.documents > 1 else set()
        return Tokenizer({"kind": "char", "chars": "".join(sorted(found.chars | newline))})
    return Tokenizer({"kind": "byte"} if name == "byte" else {"kind": "tiktoken", "name": name})


def read_documents(files: list[Path], cfg: PrepareConfig) -> Iterator[Piece]:
    """
    The documents in blocks of text, none of them empty. A document's blocks follow each other.

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
    """A plain text in blocks. The decoder keeps an unfinished character at the end of a block."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    done = 0  # bytes of the file before `block`
    while True:
        block = file.read(PIECE)
        pending = len(decoder.getstate()[0])  # bytes of an unfinished character from before
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(path, done - pending + error.start)) from None
        if text:
            yield text
        if not block:
            return
        done += len(block)


def read_jsonl(path: Path, file: IO[bytes], cfg: PrepareConfig) -> Iterator[str]:
    """The texts that are not empty. Blank lines count only in the line numbers of errors."""
    done = 0  # bytes of the file before `line`
    for number, line in enumerate(file, start=1):
        try:
            decoded = line.decode("utf-8", cfg.errors)
            entry = json.loads(decoded) if line.strip() else {cfg.field: ""}
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(path, done + error.start)) from None
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise UserError(f"{path}: line {number} is not JSON ({reason})") from None
        if not isinstance(entry, dict) or not isinstance(entry.get(cfg.field), str):
            has = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise UserError(
                f"{path}: line {number} has no text in the field {cfg.field!r} (it has: {has}); "
                "use --field"
            )
        text = entry[cfg.field]
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, UTF-8 cannot hold it
            if cfg.errors == "strict":
                raise UserError(
                    f"{path}: line {number} escapes half a character; --errors=replace goes on"
                ) from None
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text:
            yield text
        done += len(line)


def _not_utf8(path: Path, offset: int) -> str:
    where = f"byte {offset} of what it unpacks to" if path.suffix == ".gz" else f"byte {offset}"
    return f"{path}: not UTF-8 at {where}; convert the file, or go on with --errors=replace"


def cut_pieces(blocks: Iterable[Piece]) -> Iterator[Piece]:
    """The same documents in pieces of at most PIECE characters, cut between tokens if possible."""
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
    for start in (PIECE - NEAR, 1):  # the last place is nearly always close to the end
        if places := [m.start() for m in CUT.finditer(text, start, PIECE + 1)]:
            return places[-1]
    return PIECE


def select_split(
    split: str, pieces: Iterable[Piece], cfg: PrepareConfig, characters: int
) -> Iterator[Piece]:
    """The pieces, or parts of pieces, in this split. characters: the length of all the text."""
    boundary = int((1 - cfg.val_fraction) * characters)
    start = 0  # characters before this piece
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
    split: str,
    cfg: PrepareConfig,
    found: Survey,
    tokenizer: Tokenizer,
    split_bytes: dict[str, int],
    bar: tqdm,
) -> Iterator[np.ndarray]:
    """
    The ids of one split in order, tokenized on all cores.

    Moves the bar, and sets the split's entry of split_bytes at the end.
    Raises UserError if the split has fewer than two tokens, or if the files have changed.
    """
    encode = batch_encoder(tokenizer)
    pieces = cut_pieces(read_documents(found.files, cfg))
    batches = _batches(select_split(split, pieces, cfg, found.characters))
    tokens = n_bytes = 0
    for ids, size in in_order(encode, batches, cores()):
        tokens += len(ids)
        n_bytes += size
        bar.update(size)
        yield ids
    if tokens < 2:
        other = "document" if cfg.split == "tail" else "tail"
        raise UserError(
            f"{found.documents} documents of {found.characters} characters leave {tokens} tokens "
            f"for {split}; use more text, another --val_fraction, or --split={other}"
        )
    split_bytes[split] = n_bytes
    if split == "val" and sum(split_bytes.values()) != found.bytes:
        raise UserError("the files changed while they were read; run this again")


def _batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """
    Batches of pieces, up to PIECE characters together, as a thread for each small one costs time.

    A batch's items are (what is before the text in this split, text).
    """
    batch, size, last = [], 0, None
    for index, text in pieces:
        if size and size + len(text) > PIECE:
            yield batch
            batch, size = [], 0
        batch.append(("nothing" if last is None else "rest" if index == last else "other", text))
        size += len(text)
        last = index
    if batch:
        yield batch


def batch_encoder(tokenizer: Tokenizer) -> Callable[[Batch], tuple[np.ndarray, int]]:
    """A function from a batch to its ids, separators included, and its text's number of bytes."""
    end = end_of_text(tokenizer.spec)
    if tokenizer.kind == "hf":
        encode_hf = hf_encoder(tokenizer)
        separator = encode_hf("\n", True) if end is None else [end]
    elif end is not None:
        separator = [end]
    elif tokenizer.kind == "byte":
        separator = [ord("\n")]
    else:  # a vocabulary without newline is that of a single document
        separator = [tokenizer.ids[c] for c in "\n" if c in tokenizer.ids]
    separator = np.array(separator, dtype=np.uint32)

    def ids_of(text: str, raw: bytes, inside: bool) -> np.ndarray:
        if tokenizer.kind == "byte":
            return np.frombuffer(raw, dtype=np.uint8)
        if tokenizer.kind == "char":
            return encode_chars(text, tokenizer.chars)
        if tokenizer.kind == "hf":
            return np.array(encode_hf(text, inside), dtype=np.uint32)
        # This method releases the GIL, so that threads help, and makes no Python list.
        return tokenizer.bpe.encode_to_numpy(text, disallowed_special=())

    def encode(batch: Batch) -> tuple[np.ndarray, int]:
        parts, size = [], 0
        for before, text in batch:
            raw = text.encode("utf-8")
            size += len(raw)
            ids = ids_of(text, raw, before == "rest")
            parts += [separator, ids] if before == "other" else [ids]
        return np.concatenate(parts), size

    return encode


def hf_encoder(tokenizer: Tokenizer) -> Callable[[str, bool], list[int]]:
    """
    A function from (text, whether it goes on within a document) to ids, for a tokenizer.json.

    Special tokens are neither added nor seen in the text.
    """
    tokenizer.hf.encode_special_tokens = True  # as ordinary text

    def ids_of(text: str) -> list[int]:
        return tokenizer.hf.encode(text, add_special_tokens=False).ids

    # Some tokenizers put a space before the first word of a text. So a text that goes on is encoded
    # after a character, whose own ids are then dropped.
    fronts = {front: ids_of(front) for front in "a\n"}

    def encode(text: str, inside: bool) -> list[int]:
        if inside:
            front = "a" if text[:1].isspace() else "\n"
            ids, known = ids_of(front + text), fronts[front]
            if ids[: len(known)] == known:
                return ids[len(known) :]
        return ids_of(text)

    return encode


if __name__ == "__main__":
    run_script(main)
