"""Text in pieces: stop strings and characters, cut anywhere. Run: pytest tests/test_text.py"""

import random

import pytest

from nanomla.errors import UserError
from nanomla.text import Sample, StopText, StreamDecoder, encode_prompt
from nanomla.tokenizer import Tokenizer
from tests.conftest import tiny_config

BYTES = Tokenizer({"kind": "byte"})


def cut(text, draw):
    """A text or bytes in pieces of random lengths."""
    pieces = []
    while text:
        length = draw.randint(1, 4)
        pieces.append(text[:length])
        text = text[length:]
    return pieces


def test_stop_strings_wherever_pieces_cut_them():
    """What is shown is the text before the stop string, and only what may become one waits."""
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("ab", k=draw.randint(0, 9)))
        stop = "".join(draw.choices("ab", k=draw.randint(1, 4)))
        until = StopText(stop)
        shown = ""
        for piece in cut(text, draw):
            shown += until.push(piece)
            assert until.done or stop.startswith(until.pending)
        shown += until.push("", last=True)
        assert shown == text.partition(stop)[0] and until.done == (stop in text)
    assert StopText(("y", "n")).push("any") == "a" and StopText(None).push("any") == "any"


def test_characters_wherever_tokens_cut_them():
    """A character of several bytes appears when its last byte does; other bytes become a mark."""
    decoder = StreamDecoder(BYTES)
    assert [decoder.push(b) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert decoder.push(0xE2) == "" and decoder.finish() == "\ufffd"


def test_a_sample_grows_up_to_its_stop_string():
    """Its text is what was shown; tokens after the stop string are not asked for."""
    tokens = iter("né, voilà: fin".encode())
    sample = Sample(BYTES, stop=":")
    assert "".join(sample.extend(tokens)) == sample.text == "né, voilà" and sample.done
    assert bytes(tokens) == b" fin" and bytes(sample.tokens) == "né, voilà:".encode()
    unfinished = Sample(BYTES)
    assert list(unfinished.extend("é".encode()[:1])) == ["", "\ufffd"] and unfinished.decoded == 1


def test_a_prompt_that_the_model_cannot_take():
    """One clear error each: with ids that the model lacks, empty."""
    config = tiny_config()  # 16 tokens, 23 ids
    letters = Tokenizer({"kind": "char", "chars": "abc"})
    assert encode_prompt("cab", letters, config) == [2, 0, 1]
    for text, tokenizer, words in (
        ("a", BYTES, "the prompt has the token id 97, the model knows 23 token ids"),
        ("", letters, "the prompt is empty"),
    ):
        with pytest.raises(UserError, match=words):
            encode_prompt(text, tokenizer, config)
