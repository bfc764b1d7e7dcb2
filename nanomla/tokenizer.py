"""Tokenizers, each built from the plain spec that meta.json and checkpoints carry."""

import contextlib
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanomla.bpe import MERGES, TABLES, load_encoding
from nanomla.errors import UserError, printable
from nanomla.files import parse_json, read_json
from nanomla.prepare import sha256

HF_TOKENIZER = "tokenizer.json"
TIKTOKEN_SIZES = {"gpt2": 50257, "cl100k_base": 100277, "o200k_base": 200019}
LARGEST_JSON = 1 << 26  # bytes; the tokenizer.json of 256,000 tokens has 2**25
LARGEST_ID = (1 << 24) - 1

# Byte-level BPE writes a byte as one visible letter: as itself where it is one in Latin-1, and as
# the letters from 256 on otherwise.
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = [b for b in range(256) if b not in _VISIBLE]
BYTE_LETTERS = [chr(b) if b in _VISIBLE else chr(256 + _OTHERS.index(b)) for b in range(256)]
LETTER_BYTES = {letter: b for b, letter in enumerate(BYTE_LETTERS)}


def _is_chars(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) == len(set(value))


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_ID


FIELDS = {  # kind -> its fields, with a check and what it checks
    "char": {"chars": (_is_chars, "a text that has every character once")},
    "byte": {},
    "tiktoken": {
        "name": (
            lambda name: isinstance(name, str) and name in TIKTOKEN_SIZES,
            f"an encoding, one of {', '.join(TIKTOKEN_SIZES)}",
        )
    },
    "hf": {
        "json": (
            lambda text: isinstance(text, str) and len(text) <= LARGEST_JSON,
            f"the text of a {HF_TOKENIZER} of at most {LARGEST_JSON:,} characters",
        ),
        "end": (lambda token: token is None or _is_id(token), "the id of a token"),
        "bos": (lambda token: token is None or _is_id(token), "the id of a token"),
    },
}


def end_of_text(spec: dict[str, Any] | None) -> int | None:
    """The id that ends a text in this tokenizer; None if it has none or it is not known."""
    if not spec:
        return None
    if spec.get("kind") == "tiktoken":
        known = {"gpt2": 50256, "cl100k_base": 100257, "o200k_base": 199999}
        return known.get(spec.get("name"))
    return spec.get("end") if spec.get("kind") == "hf" else None


def start_of_text(spec: dict[str, Any] | None) -> int | None:
    """The id that begins a text; tiktoken's encodings begin one with the end of the text before."""
    if spec and spec.get("kind") == "hf":
        return spec.get("bos")
    return end_of_text(spec)


def check_spec(spec: Any, source: str = "", vocab_size: int | None = None) -> int:
    """
    Hold a tokenizer's spec, which may come from anywhere, against the one that Tokenizer takes.

    source: the file or checkpoint that it comes from, for the error. vocab_size: that of its model,
    which may know more ids than the tokenizer, but not fewer.
    Returns the number of the tokenizer's ids. Raises UserError.
    """
    try:
        count = _count_ids(spec)
        if vocab_size is not None and count > vocab_size:
            problem = f"the tokenizer has ids up to {count - 1}, the model only {vocab_size=}"
            raise UserError(f"{problem}; they do not belong together")
    except UserError as error:
        raise UserError(f"{source}: {error}" if source else str(error)) from None
    return count


def _count_ids(spec: Any) -> int:
    """The number of ids of a tokenizer, from its spec alone. Raises UserError if it is none."""
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        known = ", ".join(FIELDS)
        raise UserError(f"unknown tokenizer {_brief(spec)}; known kinds: {known}")
    if unknown := [name for name in spec if name not in ("kind", *FIELDS[kind])]:
        raise UserError(f"tokenizer of kind {kind}: there is no field {_brief(unknown[0])}")
    for name, (works, must) in FIELDS[kind].items():
        if not works(spec.get(name)):
            wrong = f"{name} must be {must}, not {_brief(spec.get(name))}"
            raise UserError(f"tokenizer of kind {kind}: {wrong}")
    if kind == "hf":
        count = _count_hf(parse_json(spec["json"], HF_TOKENIZER), HF_TOKENIZER)
        for name in ("end", "bos"):
            if (spec.get(name) or 0) >= count:
                raise UserError(f"tokenizer of kind hf: {name} is none of its {count} ids")
        return count
    if kind == "tiktoken":
        return TIKTOKEN_SIZES[spec["name"]]
    return 256 if kind == "byte" else len(spec["chars"])


def _brief(value: Any) -> str:
    """A value of a spec as an error names it, on one short line."""
    try:
        return printable(reprlib.repr(value))
    except ValueError:  # Python does not print whole numbers of thousands of digits
        return f"of type {type(value).__name__}"


class Tokenizer:
    """
    Text to ids and back.

    spec: {"kind": "char", "chars": ...}, {"kind": "byte"}, {"kind": "tiktoken", "name": "gpt2"} or
    {"kind": "hf", "json": the text of a tokenizer.json, "end": the id that ends a text, "bos": the
    id that begins one}; the last two are left out where they are not known.
    source: the file or checkpoint that it comes from, for errors.
    Raises UserError for a spec that is none of these.
    """

    def __init__(self, spec: dict[str, Any], source: str = "") -> None:
        self.vocab_size = check_spec(spec, source)
        self.spec, self.kind = spec, spec["kind"]
        if self.kind == "char":
            self.chars: str = spec["chars"]
            self.ids = {c: i for i, c in enumerate(self.chars)}
        elif self.kind == "tiktoken":
            self.bpe = load_encoding(spec["name"])
        elif self.kind == "hf":
            self.hf, self.decoders = _open_hf(spec["json"], self.vocab_size, source)
            self.added = self.hf.get_added_tokens_decoder()  # ids whose bytes are their name's

    def encode(self, text: str) -> list[int]:
        """
        Text as ids. Raises UserError for a character outside a char vocabulary, or that UTF-8 does
        not have; Python reads bytes that are not UTF-8 as such characters.

        A tokenizer of Hugging Face puts before them what its models expect at the start of a text.
        """
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            wrong = f"{text[error.start]!r} at character {error.start}"
            raise UserError(f"the text is not UTF-8: it has {wrong}") from None
        if self.kind == "byte":
            return list(raw)
        if self.kind == "tiktoken":
            return self.bpe.encode(text, allowed_special="all")
        if self.kind == "hf":
            with _their_errors(f"{HF_TOKENIZER} cannot encode this text"):
                return self.hf.encode(text).ids
        try:
            return [self.ids[c] for c in text]
        except KeyError as missing:
            raise UserError(
                f"the character {missing.args[0]!r} is not in this model's vocabulary of "
                f"{self.vocab_size} characters"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        """
        The UTF-8 bytes of one token.

        Ids past the vocabulary have none; a model can draw one if its lm_head is padded.
        """
        if not 0 <= token < self.vocab_size:
            return b""
        if self.kind == "char":
            return self.chars[token].encode("utf-8", "surrogatepass")
        if self.kind == "byte":
            return bytes([token])
        if self.kind == "hf":
            return self._hf_bytes(token)
        try:
            return self.bpe.decode_single_token_bytes(token)
        except KeyError:  # cl100k_base skips ids between its ordinary and its special tokens
            return b""

    def _hf_bytes(self, token: int) -> bytes:
        text = self.hf.id_to_token(token)
        if text is None:  # ids may have gaps
            return b""
        if token in self.added:
            return text.encode("utf-8")
        for decoder in self.decoders:
            kind = decoder["type"]
            if kind == "ByteLevel" and all(letter in LETTER_BYTES for letter in text):
                return bytes(LETTER_BYTES[letter] for letter in text)
            if kind == "ByteFallback" and re.fullmatch("<0x[0-9A-F]{2}>", text):
                return bytes([int(text[3:5], 16)])
            if kind == "Metaspace":
                text = text.replace(decoder["replacement"], " ")
            elif kind == "Replace":
                text = text.replace(decoder["pattern"]["String"], decoder["content"])
        return text.encode("utf-8")

    def decode(self, ids: Iterable[int]) -> str:
        """
        Ids as text. U+FFFD stands for bytes that are not UTF-8.

        The ids go on from earlier text: a space that some tokenizers put before the first word of a
        text stays.
        """
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")


def _count_hf(content: dict[str, Any], source: str) -> int:
    """One more than the largest id in a tokenizer.json, added tokens with it."""
    try:
        vocab = content["model"]["vocab"]  # of Unigram, a list
        ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))]
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        if not ids or not all(map(_is_id, ids)):
            raise ValueError(f"its ids are not whole numbers from 0 to {LARGEST_ID:,}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _not_hf(source, error) from None
    return max(ids) + 1


def _not_hf(source: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {str(error)[:90]!r}"
    return UserError(f"{source}: not a tokenizer of Hugging Face ({reason})")


def read_hf(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """
    The spec of the tokenizer in a tokenizer.json.

    settings: what the config.json beside it holds; the ids that begin and end a text are there.
    Raises UserError naming the file if it is missing or no tokenizer.
    """
    content = read_json(path, limit=LARGEST_JSON)
    count = _count_hf(content, str(path))
    try:
        merges = content["model"].get("merges") or ()
        merges = [m if isinstance(m, str) else " ".join(m) for m in merges]
    except TypeError as error:
        raise _not_hf(str(path), error) from None
    text = "\n".join(["#version: 0.2", *merges, ""])
    if count == 50257 and sha256(text.encode("utf-8", "replace")) == TABLES["gpt2"][MERGES]:
        return {"kind": "tiktoken", "name": "gpt2"}  # the same ids as those of data/
    spec = {"kind": "hf", "json": path.read_text(encoding="utf-8")}
    for name, key in (("end", "eos_token_id"), ("bos", "bos_token_id")):
        token = settings.get(key)
        token = token[0] if isinstance(token, list) and token else token
        if _is_id(token) and token < count:
            spec[name] = token
    return spec


@contextlib.contextmanager
def _their_errors(problem: str) -> Iterator[None]:
    """What the library tokenizers raises inside, plain Exceptions and panics, as a UserError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C
        reason = printable(f"{type(error).__name__}: {str(error)[:100]}")
        raise UserError(f"{problem} ({reason})") from None


def _open_hf(text: str, count: int, source: str) -> tuple[Any, list[dict[str, Any]]]:
    """
    The tokenizer in the text of a tokenizer.json with `count` ids, and the steps that turn its
    tokens into text.

    Raises UserError if it is damaged, or if its tokens have no bytes of their own.
    """
    where = f"{source}: " if source else ""
    try:
        import tokenizers
    except ImportError:
        problem = "this model's tokenizer.json needs Hugging Face tokenizers"
        raise UserError(f"{problem}: pip install tokenizers") from None
    with _their_errors(f"{where}tokenizer.json cannot be read"):
        opened = tokenizers.Tokenizer.from_str(text)
        opened.no_truncation()  # settings of the training that made it
        opened.no_padding()
        decoder = json.loads(text).get("decoder") or {"type": None}
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        for step in steps:
            if step["type"] == "Replace":
                _ = step["pattern"]["String"]  # a regular expression may need several tokens
        if max(opened.get_vocab().values()) >= count:  # it numbers some of them itself
            raise ValueError("its added tokens have other ids than those it lists")
    known = ("ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip")
    for step in steps:
        if step["type"] not in known:
            problem = f"tokenizer.json has the decoder {step['type']}, which is not supported"
            raise UserError(f"{where}{problem}, only {', '.join(known)}")
    return opened, steps
