"""Tokenizers and streamed text. Run: python -m pytest tests/test_tokenizer.py"""

import pytest

from nanomla.settings import UserError
from nanomla.tokenizer import StreamDecoder, Tokenizer


def test_char_tokenizer():
    """Text goes round; a character outside the vocabulary is named."""
    tokenizer = Tokenizer({"kind": "char", "chars": "\n abé"})
    assert tokenizer.decode(tokenizer.encode("a béa\n")) == "a béa\n" and tokenizer.vocab_size == 5
    with pytest.raises(UserError, match="'ß'"):
        tokenizer.encode("aß")


def test_byte_tokenizer_streams_complete_characters():
    """A character of several bytes appears when its last byte does; other bytes become a mark."""
    tokenizer = Tokenizer({"kind": "byte"})
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(b) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert decoder.push(0xE2) == "" and decoder.finish() == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("aé€")) == "aé€"


def test_unknown_tokenizer():
    """A spec nobody knows is refused by name."""
    with pytest.raises(UserError, match="unknown tokenizer"):
        Tokenizer({"kind": "runes"})
