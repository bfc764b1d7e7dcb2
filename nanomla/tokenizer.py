"""Tokenizers, each built from the plain spec that meta.json and checkpoints carry."""

import codecs
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanomla.bpe import MERGES, TABLES, load_encoding
from nanomla.errors import UserError
from nanomla.files import read_json
from nanomla.prepare import sha256

HF_TOKENIZER = "tokenizer.json"
LARGEST = 2**26  # bytes of one; those of large vocabularies have 35 MB

# Byte-level BPE writes a byte as one visible letter: as itself where it is one in Latin-1, and as
# the letters from 256 on otherwise.
_VISIBLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = [b for b in range(256) if b not in _VISIBLE]
BYTE_LETTERS = [chr(b) if b in _VISIBLE else chr(256 + _OTHERS.index(b)) for b in range(256)]
LETTER_BYTES = {letter: b for b, letter in enumerate(BYTE_LETTERS)}


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


class Tokenizer:
    """
    Text to ids and back.

    spec: {"kind": "char", "chars": ...}, {"kind": "byte"}, {"kind": "tiktoken", "name": "gpt2"} or
    {"kind": "hf", "json": the text of a tokenizer.json, "end": the id that ends a text, "bos": the
    id that begins one}; the last two are left out where they are not known.
    Raises UserError for an unknown spec.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if kind == "char":
            self.chars: str = spec["chars"]
            self.ids = {c: i for i, c in enumerate(self.chars)}
            self.vocab_size = len(self.chars)
        elif kind == "byte":
            self.vocab_size = 256
        elif kind == "tiktoken":
            self.bpe = load_encoding(spec["name"])
            self.vocab_size = self.bpe.n_vocab
        elif kind == "hf":
            self.hf, self.decoders = _open_hf(spec.get("json"))
            self.added = self.hf.get_added_tokens_decoder()  # ids whose bytes are their name's
            self.vocab_size = 1 + max(self.hf.get_vocab().values(), default=-1)
        else:
            raise UserError(f"unknown tokenizer {spec!r}; known kinds: char, byte, tiktoken, hf")
        self.kind: str = kind

    def encode(self, text: str) -> list[int]:
        """
        Text as ids. Raises UserError for a character outside a char vocabulary.

        A tokenizer of Hugging Face puts before them what its models expect at the start of a text.
        """
        if self.kind == "byte":
            return list(text.encode("utf-8"))
        if self.kind == "tiktoken":
            return self.bpe.encode(text, allowed_special="all")
        if self.kind == "hf":
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


def read_hf(path: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """
    The spec of the tokenizer in a tokenizer.json, and the largest id of its vocabulary.

    settings: what the config.json beside it holds; the ids that begin and end a text are there.
    Raises UserError naming the file if it is missing or no tokenizer.
    """
    content = read_json(path, limit=LARGEST)
    try:
        model = content["model"]
        vocab = model["vocab"]
        largest = max(vocab.values()) if isinstance(vocab, dict) else len(vocab) - 1
        last = max([largest, *(token["id"] for token in content.get("added_tokens") or ())])
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
        if type(last) is not int:
            raise TypeError("its ids are no whole numbers")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:60]!r}"
        raise UserError(f"{path}: not a tokenizer of Hugging Face ({reason})") from None
    text = "\n".join(["#version: 0.2", *merges, ""])
    if largest == 50256 and sha256(text.encode("utf-8", "replace")) == TABLES["gpt2"][MERGES]:
        return {"kind": "tiktoken", "name": "gpt2"}, largest  # the same ids as those of data/
    spec = {"kind": "hf", "json": path.read_text(encoding="utf-8")}
    for name, key in (("end", "eos_token_id"), ("bos", "bos_token_id")):
        token = settings.get(key)
        token = token[0] if isinstance(token, list) and token else token
        if type(token) is int and 0 <= token <= last:
            spec[name] = token
    return spec, largest


def _open_hf(text: Any) -> tuple[Any, list[dict[str, Any]]]:
    """
    The tokenizer in the text of a tokenizer.json, and the steps that turn its tokens into text.

    Raises UserError if it is damaged, or if its tokens have no bytes of their own.
    """
    try:
        import tokenizers
    except ImportError:
        problem = "this model's tokenizer.json needs Hugging Face tokenizers"
        raise UserError(f"{problem}: pip install tokenizers") from None
    try:
        opened = tokenizers.Tokenizer.from_str(text)
        opened.no_truncation()  # settings of the training that made it
        opened.no_padding()
        decoder = json.loads(text).get("decoder") or {"type": None}
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        for step in steps:
            if step["type"] == "Replace":
                _ = step["pattern"]["String"]  # a regular expression may need several tokens
    except Exception as error:  # noqa: BLE001  tokenizers raises plain Exceptions
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"tokenizer.json cannot be read ({reason})") from None
    known = ("ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip")
    for step in steps:
        if step["type"] not in known:
            problem = f"tokenizer.json has the decoder {step['type']}, which is not supported"
            raise UserError(f"{problem}, only {', '.join(known)}")
    return opened, steps


class StreamDecoder:
    """Decodes token by token. The bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        return self.decoder.decode(self.tokenizer.token_bytes(token))

    def finish(self) -> str:
        """U+FFFD for the bytes of a character that was never completed."""
        return self.decoder.decode(b"", final=True)
