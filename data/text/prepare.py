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

The text is read once to check and measure it, and once more for each split. It is tokenized on all
cores, a long text in pieces that are cut between tokens, so that memory does not grow with it. Only
a tokenizer.json, which may treat the start of a text in its own way, gets every document whole.
"""

import functools
import gzip
import hashlib
import json
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the repository, from wherever this script is started

from nanomla.checks import Positive, Text, check
from nanomla.dataset import Meta, write_dataset
from nanomla.errors import UsageError, UserError, run_script, say
from nanomla.prepare import Piece, encode_chars, encode_split, report
from nanomla.settings import configure
from nanomla.tokenizer import HF_TOKENIZER, Tokenizer, end_of_text, read_hf

TOKENIZERS = ("gpt2", "cl100k_base", "o200k_base", "char", "byte")  # all others are files
SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # the files that are read in a folder
PIECE = 1 << 19  # characters of a long text that are tokenized at a time
NEAR = 4096  # characters after the share of train in which val may begin
# Where text may be cut, as BPE begins a new token here: before a space that follows anything but
# white space, and after a line end between two characters that are no white space, the second of
# them no "/".
CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")


@dataclass
class PrepareConfig:
    usage: ClassVar[str] = "FILE_OR_FOLDER ... [--key=value ...]"
    headings: ClassVar[dict[str, str]] = {
        "name": "output", "tokenizer": "tokens", "val_fraction": "split", "field": "text",
    }

    name: Annotated[Text | None, "The dataset is written to data/NAME, for --dataset=NAME."] = None
    out: Annotated[Text | None, "The dataset is written to this folder instead."] = None
    tokenizer: Annotated[
        Text, f"The tokenizer: {', '.join(TOKENIZERS)}, or a folder with a {HF_TOKENIZER}."
    ] = "gpt2"
    val_fraction: Annotated[Positive, Field(lt=1), "The share of the text that is val."] = 0.1
    split: Annotated[
        Literal["tail", "document"],
        "How val is chosen: tail takes the end of the text, document takes documents by their "
        "hash.",
    ] = "tail"
    seed: Annotated[int, "The seed that chooses the documents of --split=document."] = 1337
    field: Annotated[Text, "The field of a line of a .jsonl file that holds the text."] = "text"
    errors: Annotated[
        Literal["strict", "replace"],
        "What happens at invalid UTF-8: strict stops, replace puts U+FFFD in its place.",
    ] = "strict"

    def __post_init__(self) -> None:
        check(self)
        if bool(self.name) == bool(self.out):
            raise ValueError("say where to write: --name=NAME for data/NAME, or --out=FOLDER")


def main(argv: list[str] | None = None) -> None:
    paths: list[str] = []
    cfg, _ = configure(PrepareConfig, sys.argv[1:] if argv is None else argv, files=paths)
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
    if cfg.tokenizer != "char":
        tokenizer = make_tokenizer(cfg.tokenizer)
    meta = Meta(source=", ".join(paths[:3]))
    if len(paths) > 3:
        meta.source += f", and {len(paths) - 3} more"
    characters, chars = survey(files, cfg, meta)
    if tokenizer is None:
        tokenizer = Tokenizer({"kind": "char", "chars": chars})
    meta.vocab_size = tokenizer.vocab_size
    meta.tokenizer = tokenizer.spec
    encode = encoder(tokenizer)
    between = separator(tokenizer)
    start = time.perf_counter()
    name = Path(cfg.tokenizer).name
    with tqdm(total=meta.bytes, unit="B", unit_scale=True, desc=name, disable=None) as bar:
        splits = {}
        for split in ("train", "val"):
            pieces = select_split(split, read_pieces(files, cfg), cfg, characters)
            splits[split] = encode_split(split, pieces, encode, between, meta, bar)
        meta = write_dataset(folder, splits, meta)
    speed = meta.bytes / 1e6 / (time.perf_counter() - start)
    report(folder, meta)
    size = f"{meta.documents:,} documents, {meta.bytes / 1e6:,.1f} MB"
    say(f"{size}, tokenized at {speed:.1f} MB/s")


# ---- Reading


def find_files(paths: list[str]) -> list[Path]:
    """
    The given files, and the text files in the given folders. What is no regular file, such as a
    pipe or a device, is left out with a line in a folder. Raises UsageError if it was given, as
    the text is read several times, and if there is no file.
    """
    if not paths:
        raise UsageError("say what to read, as in prepare.py my/*.txt --name=mine")
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            if path.exists() and not path.is_file():
                problem = "not a regular file, which can be read more than once"
                raise UsageError(f"{path}: {problem}; write the text to one")
            files.append(path)
            continue
        for inner in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in inner.relative_to(path).parts)
            if not inner.name.removesuffix(".gz").endswith(SUFFIXES) or hidden or inner.is_dir():
                continue
            if inner.is_file():
                files.append(inner)
            else:
                say(f"warning: {inner} is left out: it is no regular file", sys.stderr)
    if not files:
        suffixes = ", ".join(SUFFIXES)
        raise UsageError(f"{', '.join(paths)}: no {suffixes} file in there, gzipped or not")
    return files


def survey(files: list[Path], cfg: PrepareConfig, meta: Meta) -> tuple[int, str]:
    """
    Read everything once, to find errors before anything is written and to measure the text.

    Fills in what meta tells of the text and its split. Returns the number of characters, and the
    vocabulary of the char tokenizer: these characters and, if needed, the separator.
    """
    meta.split = {"by": cfg.split, "val_fraction": cfg.val_fraction}
    if cfg.split == "document":
        meta.split["seed"] = cfg.seed
    meta.bytes = 0
    meta.documents = 0
    digest = hashlib.sha256()
    characters = 0
    chars = set()
    with tqdm(unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for text, begins in read_pieces(files, cfg):
            raw = text.encode("utf-8")
            digest.update(raw)
            meta.bytes += len(raw)
            meta.documents += begins
            characters += len(text)
            if cfg.tokenizer == "char":
                chars.update(text)
            bar.update(len(raw))
    if not characters:
        raise UserError(f"{meta.source}: no text in there")
    if meta.documents > 1:
        chars.add("\n")
    meta.sha256 = digest.hexdigest()
    return characters, "".join(sorted(chars))


def read_pieces(files: list[Path], cfg: PrepareConfig) -> Iterator[Piece]:
    """
    The documents that are not empty, long texts in pieces.

    Raises UserError naming the file, and the byte or line, for what cannot be read.
    """
    for path in files:
        opened = open
        if path.suffix == ".gz":
            opened = gzip.open
        try:
            if path.name.removesuffix(".gz").endswith(".jsonl"):
                with opened(path, "rb") as file:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            text = read_line(line, f"{path}: line {number}", cfg)
                            if text:
                                yield Piece(text)
            else:
                begins = True
                for text in read_text(path, opened, cfg):
                    yield Piece(text, begins)
                    begins = False
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: broken gzip file ({error})") from None


def read_text(path: Path, opened: Callable[..., IO], cfg: PrepareConfig) -> Iterator[str]:
    """A text in pieces of about PIECE characters, cut between tokens."""
    rest = ""
    try:
        with opened(path, "rt", encoding="utf-8", errors=cfg.errors, newline="") as file:
            while block := file.read(PIECE):
                rest += block
                if cfg.tokenizer in TOKENIZERS:
                    cut = _last_cut(rest)
                    yield rest[:cut]
                    rest = rest[cut:]
    except UnicodeDecodeError:  # which knows the place in a block of the file only
        with opened(path, "rb") as file:
            decode(file.read(), str(path), cfg)
    if rest:
        yield rest


def _last_cut(text: str) -> int:
    """The last place in a text where no token is cut; its end if there is none."""
    for start in (max(len(text) - NEAR, 1), 1):  # it is nearly always close to the end
        places = [match.start() for match in CUT.finditer(text, start)]
        if places:
            return places[-1]
    return len(text)


def read_line(line: bytes, where: str, cfg: PrepareConfig) -> str:
    """The text in a line of a .jsonl file."""
    try:
        entry = json.loads(decode(line, where, cfg))
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or too deep
        raise UserError(f"{where} cannot be read ({error})") from None
    if not isinstance(entry, dict):
        entry = {}
    text = entry.get(cfg.field)
    if not isinstance(text, str):
        raise UserError(
            f"{where} has no text in the field {cfg.field!r} "
            f"(it has: {', '.join(entry) or 'none'}); use --field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, UTF-8 cannot hold it
        if cfg.errors == "strict":
            raise UserError(
                f"{where} escapes half a character; --errors=replace goes on"
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def decode(raw: bytes, where: str, cfg: PrepareConfig) -> str:
    try:
        return raw.decode("utf-8", cfg.errors)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 at byte {error.start}; "
            "convert the file, or go on with --errors=replace"
        ) from None


# ---- Splitting


def select_split(
    split: str, pieces: Iterator[Piece], cfg: PrepareConfig, characters: int
) -> Iterator[Piece]:
    """The pieces, or parts of pieces, in this split. characters: those of all the text."""
    boundary = int((1 - cfg.val_fraction) * characters)
    document = -1
    start = 0  # characters before this piece
    for text, begins in pieces:
        document += begins
        end = start + len(text)
        if cfg.split == "tail":
            cut = _tail_cut(text, boundary - start, is_last=end >= characters)
        elif _in_val(document, cfg):
            cut = 0
        else:
            cut = len(text)
        start = end
        part = text[cut:]
        if split == "train":
            part = text[:cut]
        if part:
            yield Piece(part, begins)


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


def make_tokenizer(name: str) -> Tokenizer:
    """
    The tokenizer of this name, or of a folder of weights or the tokenizer.json in it, with the spec
    that a checkpoint read from there has.

    Raises UserError if tokenizer.json or a settings file beside it cannot be used.
    """
    if name == "byte":
        return Tokenizer({"kind": "byte"})
    if name in TOKENIZERS:
        return Tokenizer({"kind": "tiktoken", "name": name})
    path = Path(name)
    if path.is_dir():
        path = path / HF_TOKENIZER
    if not path.is_file():
        raise UsageError(
            f"--tokenizer={name}: tokenizer must be one of {', '.join(TOKENIZERS)}, "
            f"or a folder with a {HF_TOKENIZER}"
        )
    tokenizer = Tokenizer(read_hf(path), str(path))
    if tokenizer.kind == "hf":
        tokenizer.hf.encode_special_tokens = True  # as ordinary text
    return tokenizer


def encoder(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    """A function from a text to its ids; special tokens are neither added nor seen in the text."""
    if tokenizer.kind == "byte":
        return lambda text: np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    if tokenizer.kind == "char":
        return lambda text: encode_chars(text, tokenizer.chars)
    if tokenizer.kind == "hf":
        return lambda text: np.array(
            tokenizer.hf.encode(text, add_special_tokens=False).ids, dtype=np.uint32
        )
    # This method releases the GIL, so that threads help, and makes no Python list.
    return functools.partial(tokenizer.bpe.encode_to_numpy, disallowed_special=())


def separator(tokenizer: Tokenizer) -> np.ndarray:
    """The ids between two documents."""
    end = end_of_text(tokenizer.spec)
    if end is not None:
        return np.array([end], dtype=np.uint32)
    encode = encoder(tokenizer)
    if tokenizer.kind == "char" and "\n" not in tokenizer.chars:  # there is a single document
        return encode("")
    if tokenizer.kind == "hf":
        # Some tokenizers put a space before the first word of a text, so not at its beginning.
        before = encode("a")
        ids = encode("a\n")
        if np.array_equal(ids[: len(before)], before):
            return ids[len(before) :]
    return encode("\n")


if __name__ == "__main__":
    run_script(main)
