"""
Your own text as a dataset.

    python data/text/prepare.py my/*.txt --name=mine      writes data/mine, for --dataset=mine

The arguments without dashes name what to read: text files of any name, or folders. In a folder
every .txt, .md, .py and .jsonl file is read, sorted by path, hidden ones left out. A file is one
document; in a .jsonl file every line is one, with its text in the --field. Files may be gzipped
(.txt.gz). Text must be UTF-8 and is not changed: line ends and byte-order marks stay. Empty
documents are left out.

The tokenizer's end-of-text token separates documents; char, byte and a tokenizer.json whose folder
names none use a newline. "<|endoftext|>" in a text is ordinary text.

--tokenizer=FOLDER takes the tokenizer.json of a folder of weights, so that train.py can fine-tune
them (--init_from=FOLDER). Documents are then encoded without the tokens that begin or end a text.

--split=tail: val is the last --val_fraction of the characters. So that no token is cut, it begins
up to 4,096 characters later, at the first place where a document begins or text may be cut;
without such a place it begins exactly there. --split=document: a document is in val if the
hash of --seed and its number is below --val_fraction. Both depend on the text alone, so every
tokenizer gets the same val text, and bits per byte can be compared.

The text is read once to check and measure it, and once more for each split. It is tokenized in
pieces of at most 524,288 characters, so memory does not grow with the input, except that a line of
.jsonl must fit in memory. A piece ends where BPE tokenizers begin a new token whatever comes before
and after, so the ids are those of the uncut documents.
"""

import codecs
import gzip
import hashlib
import itertools
import json
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, from wherever this script is started

from nanomla.checks import Positive, check
from nanomla.dataset import Meta, write_dataset
from nanomla.errors import UsageError, UserError, run_script
from nanomla.files import read_json
from nanomla.prepare import cores, encode_chars, in_order, report
from nanomla.settings import configure
from nanomla.tokenizer import HF_TOKENIZER, Tokenizer, end_of_text, read_hf

TOKENIZERS = ("gpt2", "cl100k_base", "o200k_base", "char", "byte")  # all others are files
SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # the files that are read in a folder
PIECE = 1 << 19  # characters tokenized at a time; tiktoken fails at a million blanks in a row
NEAR = 4096  # characters in which a place to cut is looked for first
# Where text may be cut, as BPE begins a new token here: before a space that follows anything but
# white space, and after a line end between two characters that are no white space, the second of
# them no "/".
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")

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
        if bool(self.name) == bool(self.out):
            raise ValueError("say where to write: --name=NAME for data/NAME, or --out=FOLDER")


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
    if argv is None:
        argv = sys.argv[1:]
    paths: list[str] = []
    cfg, _ = configure(PrepareConfig, argv, files=paths)
    if cfg.name:
        folder = HERE.parent / cfg.name
    else:
        folder = Path(cfg.out)
    if (folder / "prepare.py").exists():
        raise UsageError(
            f"{folder} belongs to the prepare.py in it; choose another place to write to"
        )
    files = find_files(paths)
    tokenizer = None
    if cfg.tokenizer not in TOKENIZERS:
        tokenizer = read_tokenizer(cfg.tokenizer)
    found = survey(files, cfg)
    if tokenizer is None:
        tokenizer = make_tokenizer(cfg.tokenizer, found)
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
    name = Path(cfg.tokenizer).name
    with tqdm(total=found.bytes, unit="B", unit_scale=True, desc=name, disable=None) as bar:
        encoding = (cfg, found, tokenizer, meta.split_bytes, bar)
        splits = {split: encode_split(split, *encoding) for split in ("train", "val")}
        meta = write_dataset(folder, splits, meta)
    speed = found.bytes / 1e6 / (time.perf_counter() - start)
    report(folder, meta)
    size = f"{found.documents:,} documents, {found.bytes / 1e6:,.1f} MB"
    print(f"{size}, tokenized at {speed:.1f} MB/s")


def read_tokenizer(name: str) -> Tokenizer:
    """
    The tokenizer of a folder of weights, with the spec that a checkpoint read from there has.

    name: the folder, or the tokenizer.json in it.
    Raises UserError if tokenizer.json or the config.json beside it cannot be used.
    """
    path = Path(name)
    if path.is_dir():
        path = path / HF_TOKENIZER
    if not path.is_file():
        raise UsageError(
            f"--tokenizer={name}: tokenizer must be one of {', '.join(TOKENIZERS)}, "
            f"or a folder with a {HF_TOKENIZER}"
        )
    config = path.with_name("config.json")
    settings = {}
    if config.exists():
        settings = read_json(config)
    return Tokenizer(read_hf(path, settings), str(path))


def make_tokenizer(name: str, found: Survey) -> Tokenizer:
    """The --tokenizer; char's vocabulary is the text's characters and, if needed, the separator."""
    if name == "byte":
        return Tokenizer({"kind": "byte"})
    if name != "char":
        return Tokenizer({"kind": "tiktoken", "name": name})
    chars = found.chars
    if found.documents > 1:
        chars = chars | {"\n"}
    return Tokenizer({"kind": "char", "chars": "".join(sorted(chars))})


# ---- Reading


def find_files(paths: Iterable[str]) -> list[Path]:
    """
    The given files, and the text files in the given folders.

    Raises UsageError if there are none, for a path that does not exist, a folder without any, or
    one of the files in config/.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            texts = [inner for inner in sorted(path.rglob("*")) if _is_text(inner, path)]
            if not texts:
                suffixes = ", ".join(SUFFIXES)
                raise UsageError(f"{path}: no {suffixes} file in this folder, gzipped or not")
            files += texts
        elif not path.is_file():
            raise UsageError(f"{path}: no such file or folder")
        elif path.suffix == ".py" and HERE.parents[1] / "config" in path.resolve().parents:
            raise UsageError(
                f"{path} is a config file, which is not read here; give settings as --key=value"
            )
        else:
            files.append(path)
    if not files:
        raise UsageError(
            "say what to read: text files or folders, as in prepare.py my/*.txt --name=mine"
        )
    return files


def _is_text(path: Path, folder: Path) -> bool:
    """Whether this is a file that is read in a folder."""
    if any(part.startswith(".") for part in path.relative_to(folder).parts):
        return False
    return path.name.removesuffix(".gz").endswith(SUFFIXES) and path.is_file()


def _abridged(names: list[str] | list[Path]) -> str:
    text = ", ".join(str(name) for name in names[:3])
    if len(names) > 3:
        text += f", and {len(names) - 3} more"
    return text


def survey(files: list[Path], cfg: PrepareConfig) -> Survey:
    """Read everything once, to find errors before anything is written and to measure the text."""
    found = Survey(files)
    digest = hashlib.sha256()
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for index, text in read_documents(files, cfg):
            raw = text.encode("utf-8")
            digest.update(raw)
            found.bytes += len(raw)
            found.characters += len(text)
            found.documents = index + 1
            if cfg.tokenizer == "char":
                found.chars.update(text)
            bar.update(len(raw))
    if not found.characters:
        raise UserError(f"{_abridged(files)}: no text in there")
    found.sha256 = digest.hexdigest()
    return found


def read_documents(files: list[Path], cfg: PrepareConfig) -> Iterator[Piece]:
    """
    The documents in blocks of text, none of them empty. A document's blocks follow each other.

    Raises UserError naming the file, and the byte or line, for what cannot be read.
    """
    index = 0
    for path in files:
        opened = open
        if path.suffix == ".gz":
            opened = gzip.open
        try:
            with opened(path, "rb") as file:
                if path.name.removesuffix(".gz").endswith(".jsonl"):
                    for text in read_jsonl(path, file, cfg):
                        yield index, text
                        index += 1
                else:
                    text = ""
                    for text in read_text(path, file, cfg.errors):
                        yield index, text
                    if text:
                        index += 1
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: broken gzip file ({error})") from None


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
            raise _not_utf8(path, done - pending + error.start) from None
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
        except UnicodeDecodeError as error:
            raise _not_utf8(path, done + error.start) from None
        done += len(line)
        if not line.strip():
            continue
        try:
            entry = json.loads(decoded)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from None
        if not isinstance(entry, dict):
            entry = {}
        text = entry.get(cfg.field)
        if not isinstance(text, str):
            raise UserError(
                f"{path}: line {number} has no text in the field {cfg.field!r} "
                f"(it has: {', '.join(entry) or 'none'}); use --field"
            )
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


def _not_utf8(path: Path, offset: int) -> UserError:
    where = f"byte {offset}"
    if path.suffix == ".gz":
        where += " of what it unpacks to"
    return UserError(
        f"{path}: not UTF-8 at {where}; convert the file, or go on with --errors=replace"
    )


# ---- Cutting


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
    """The last place to cut in the first PIECE characters, or their end if there is none."""
    for start in (PIECE - NEAR, 1):  # the last place is nearly always close to the end
        places = [match.start() for match in CUT.finditer(text, start, PIECE + 1)]
        if places:
            return places[-1]
    return PIECE


def select_split(
    split: str, pieces: Iterable[Piece], cfg: PrepareConfig, characters: int
) -> Iterator[Piece]:
    """The pieces, or parts of pieces, in this split. characters: the length of all the text."""
    boundary = int((1 - cfg.val_fraction) * characters)
    start = 0  # characters before this piece
    for index, text in pieces:
        end = start + len(text)
        if cfg.split == "tail":
            cut = _tail_cut(text, boundary - start, is_last=end >= characters)
        elif _in_val(index, cfg):
            cut = 0
        else:
            cut = len(text)
        start = end
        part = text[cut:]
        if split == "train":
            part = text[:cut]
        if part:
            yield index, part


def _tail_cut(text: str, boundary: int, is_last: bool) -> int:
    """Where val begins in a piece: at its boundary, or soon after it where no token is cut."""
    if boundary <= 0:
        return 0
    if boundary >= len(text):
        return len(text)
    place = CUT.search(text, boundary, boundary + NEAR)
    if place:
        return place.start()
    if len(text) - boundary <= NEAR and not is_last:
        return len(text)  # where the next piece begins
    return boundary


def _in_val(index: int, cfg: PrepareConfig) -> bool:
    draw = hashlib.sha256(f"{cfg.seed} {index}".encode()).digest()[:8]
    return int.from_bytes(draw, "big") < cfg.val_fraction * 2**64


# ---- Encoding


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

    Moves the bar, and sets the split's entry of split_bytes.
    Raises UserError if the split has fewer than two tokens.
    """
    pieces = cut_pieces(read_documents(found.files, cfg))
    batches = _batches(select_split(split, pieces, cfg, found.characters))
    tokens = 0
    split_bytes[split] = 0
    for ids, size in in_order(batch_encoder(tokenizer), batches, cores()):
        tokens += len(ids)
        split_bytes[split] += size
        bar.update(size)
        yield ids
    if tokens < 2:
        raise UserError(
            f"{found.documents} documents of {found.characters} characters leave {tokens} tokens "
            f"for {split}; use more text, another --val_fraction, or another --split"
        )


def _batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """
    Batches of pieces, up to PIECE characters together, as a thread for each small one costs time.

    A batch's items are (what is before the text in this split, text).
    """
    batch = []
    size = 0
    last = None
    for index, text in pieces:
        if size and size + len(text) > PIECE:
            yield batch
            batch = []
            size = 0
        before = "other"
        if last is None:
            before = "nothing"
        elif index == last:
            before = "rest"
        batch.append((before, text))
        size += len(text)
        last = index
    if batch:
        yield batch


def batch_encoder(tokenizer: Tokenizer) -> Callable[[Batch], tuple[np.ndarray, int]]:
    """A function from a batch to its ids, separators included, and its text's number of bytes."""
    if tokenizer.kind == "hf":
        encode_hf = hf_encoder(tokenizer)
    end = end_of_text(tokenizer.spec)
    if end is not None:
        ids_between = [end]
    elif tokenizer.kind == "hf":
        ids_between = encode_hf("\n", True)
    elif tokenizer.kind == "byte":
        ids_between = [ord("\n")]
    else:  # a vocabulary without newline is that of a single document
        ids_between = [tokenizer.ids[c] for c in "\n" if c in tokenizer.ids]
    separator = np.array(ids_between, dtype=np.uint32)

    def ids_of(text: str, inside: bool) -> np.ndarray:
        if tokenizer.kind == "byte":
            return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        if tokenizer.kind == "char":
            return encode_chars(text, tokenizer.chars)
        if tokenizer.kind == "hf":
            return np.array(encode_hf(text, inside), dtype=np.uint32)
        # This method releases the GIL, so that threads help, and makes no Python list.
        return tokenizer.bpe.encode_to_numpy(text, disallowed_special=())

    def encode(batch: Batch) -> tuple[np.ndarray, int]:
        parts = []
        size = 0
        for before, text in batch:
            if before == "other":
                parts.append(separator)
            parts.append(ids_of(text, inside=before == "rest"))
            size += len(text.encode("utf-8"))
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
    ids_of_fronts = {front: ids_of(front) for front in "a\n"}

    def encode(text: str, inside: bool) -> list[int]:
        if inside:
            front = "\n"
            if text[:1].isspace():
                front = "a"
            ids = ids_of(front + text)
            front_ids = ids_of_fronts[front]
            if ids[: len(front_ids)] == front_ids:
                return ids[len(front_ids) :]
        return ids_of(text)

    return encode


if __name__ == "__main__":
    run_script(main)
