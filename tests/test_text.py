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


def test_several_stop_strings_wherever_pieces_cut_the_text():
    """The one that is complete first counts, and of two that end together the longer."""
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("abc", k=draw.randint(0, 12)))
        stops = tuple("".join(draw.choices("abc", k=draw.randint(1, 4))) for _ in range(3))
        matches = [
            (begin + len(stop), begin)
            for stop in stops
            for begin in range(len(text))
            if text.startswith(stop, begin)
        ]
        expected = text[: min(matches)[1]] if matches else text
        for pieces in (cut(text, draw), list(text), [text]):
            until = StopText(stops)
            shown = "".join(until.push(piece) for piece in pieces) + until.push("", last=True)
            assert (shown, until.done) == (expected, bool(matches))


def test_a_stop_string_that_began_before_a_cut():
    """What was shown before the cut is not shown again, whether the stop string is completed."""
    for text, drawn, rest, expected, done in (
        ("after I", 3, " go", "", True), ("after I", 3, " o", " o", False),
        ("after I", 0, " go", " go", False),  # of the prompt, which is no part of the sample
        ("x I go", 6, " I", " I", False),  # one before the cut did not end it
        ("aé", 1, " I go", "", True),
    ):
        ids = list(text.encode())
        sample = Sample(BYTES, stop=(" I go", "\xa9 I"), prompt=ids, drawn=drawn)
        shown = "".join(map(sample.push, rest.encode())) + sample.finish()
        assert (shown, sample.done) == (expected, done), text


def test_characters_wherever_tokens_cut_them():
    """A character of several bytes appears when its last byte does; other bytes become a mark."""
    decoder = StreamDecoder(BYTES)
    assert [decoder.push(b) for b in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert decoder.push(0xE2) == "" and decoder.finish() == "\ufffd"


def test_a_character_that_tokens_before_begin():
    """It goes on; bytes that can begin none do not, and neither does one that is whole."""
    for before, token, text in (
        ([65, 0xC3], 0xA9, "é"), ([0xE2, 0x82], 0xAC, "€"), ([0xF0, 0x9F, 0x98], 0x80, "😀"),
        ([0xC3], 65, "\ufffdA"), ([0xC3, 0xA9], 65, "A"), ([0xA9], 65, "A"), ([], 0xA9, "\ufffd"),
        ([0xE2, 0x82, 65], 0xAC, "\ufffd"),
    ):
        assert StreamDecoder(BYTES, before).push(token) == text
    cut = Sample(BYTES, stop="é", prompt=[65, 0xC3])
    assert list(cut.extend([0xA9, 66])) == ["", ""] and cut.done and cut.text == ""


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
