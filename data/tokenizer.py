"""Tokenizers, each built from the plain spec that meta.json and checkpoints carry."""

import codecs
from collections.abc import Iterable
from typing import Any

from configurator import UserError


class Tokenizer:
    """
    spec: {"kind": "char", "chars": "..."}, {"kind": "byte"} or {"kind": "tiktoken", "name": "gpt2"}.

    encode(text) -> list of ids; decode(ids) -> text; token_bytes(id) -> the UTF-8 bytes of one token.
    Raises UserError for a spec it does not know and for a character outside a char vocabulary.
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
            from data.bpe import load_encoding  # tiktoken only when a dataset uses it

            self.bpe = load_encoding(spec["name"])
            self.vocab_size = self.bpe.n_vocab
        else:
            raise UserError(f"unknown tokenizer {spec!r}; known kinds: char, byte, tiktoken")
        self.kind: str = kind

    def encode(self, text: str) -> list[int]:
        if self.kind == "byte":
            return list(text.encode("utf-8"))
        if self.kind == "tiktoken":
            return self.bpe.encode(text, allowed_special="all")
        try:
            return [self.ids[c] for c in text]
        except KeyError as missing:
            raise UserError(
                f"the character {missing.args[0]!r} is not in this model's vocabulary of {self.vocab_size} characters"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; ids past the vocabulary (a padded lm_head can draw one) have none."""
        if not 0 <= token < self.vocab_size:
            return b""
        if self.kind == "char":
            return self.chars[token].encode("utf-8", "surrogatepass")
        if self.kind == "byte":
            return bytes([token])
        try:
            return self.bpe.decode_single_token_bytes(token)
        except KeyError:  # a gap between the ordinary and the special tokens
            return b""

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")


class StreamDecoder:
    """Turns tokens into text one at a time, holding back bytes until they complete a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.decoder.decode(self.tokenizer.token_bytes(token))

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)
