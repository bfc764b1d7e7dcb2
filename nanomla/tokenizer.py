"""Tokenizers, each built from the plain spec that meta.json and checkpoints carry."""

import codecs
from collections.abc import Iterable
from typing import Any

from nanomla.settings import UserError


class Tokenizer:
    """
    Text to ids and back.

    spec: {"kind": "char", "chars": ...}, {"kind": "byte"} or {"kind": "tiktoken", "name": "gpt2"}.
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
            from nanomla.bpe import load_encoding  # the other kinds should not need tiktoken

            self.bpe = load_encoding(spec["name"])
            self.vocab_size = self.bpe.n_vocab
        else:
            raise UserError(f"unknown tokenizer {spec!r}; known kinds: char, byte, tiktoken")
        self.kind: str = kind

    def encode(self, text: str) -> list[int]:
        """Text as ids. Raises UserError for a character outside a char vocabulary."""
        if self.kind == "byte":
            return list(text.encode("utf-8"))
        if self.kind == "tiktoken":
            return self.bpe.encode(text, allowed_special="all")
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
        try:
            return self.bpe.decode_single_token_bytes(token)
        except KeyError:  # cl100k_base skips ids between its ordinary and its special tokens
            return b""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids as text. U+FFFD stands for bytes that are not UTF-8."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")


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
