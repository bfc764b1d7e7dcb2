"""A conversation, beside generate on all that was said. Run: pytest tests/test_chat.py"""

import pytest
import torch

from nanomla.batch import Sampling
from nanomla.chat import Chat
from nanomla.errors import UserError
from nanomla.generate import Sampler
from nanomla.tokenizer import Tokenizer
from tests.conftest import KINDS, TINY_MLA, make

TOKENIZER = Tokenizer({"kind": "char", "chars": "abcdefghijklmnopqrstuv\n"})


def chat(settings=TINY_MLA, new=3, **options):
    torch.manual_seed(0)
    return Chat(make(settings), TOKENIZER, Sampling(new, temperature=0), **options)


def generated(model, context, new=3):
    """The greedy continuation of a context, without a cache."""
    out = model.generate(torch.tensor([context]), new, temperature=0, use_cache=False)
    return out[0, len(context) :].tolist()


@pytest.mark.parametrize("settings", [TINY_MLA, KINDS["latent tokens"]])
def test_every_answer_follows_all_that_was_said(settings):
    """Also past the context, of which the newer half stays, and after a line that is refused."""
    talk = chat(settings)
    context = []
    for line in ("ab", "c", "Z", "ef", "g", "hi"):
        if line == "Z":
            with pytest.raises(UserError):
                list(talk.reply(line))
            continue
        context += TOKENIZER.encode(line + "\n")
        if len(context) > 16:
            context = context[-8:]
        new = generated(talk.model, context)
        context += new
        assert "".join(talk.reply(line)) == TOKENIZER.decode(new)
    assert talk.tokens_made == 15
    talk.reset()
    new = generated(talk.model, TOKENIZER.encode("ab\n"))
    assert "".join(talk.reply("ab")) == TOKENIZER.decode(new)


@pytest.mark.parametrize("begin", [[], [5]], ids=["", "with a beginning"])
def test_a_long_line_is_not_cut_to_half(capsys, monkeypatch, begin):
    """All of it stays that fits the context; a line on stderr counts what does not."""
    encode = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: begin + encode(text))
    talk = chat(new=1)
    for line in ("abc", "defabcdefabcd", "bcd", "abcdefghijklmnopqrstuv", "ab"):
        new = TOKENIZER.encode(line + "\n")
        context = talk.context + new[len(begin) :]
        if len(context) + len(begin) > 16:
            context = begin + context[-max(8, len(new)) + len(begin) :]
        answer = "".join(talk.reply(line))
        assert answer == TOKENIZER.decode(generated(talk.model, context[-16:], 1))
    counts = f"has {23 + len(begin)} tokens, the model's context 16; the first {7 + len(begin)} are"
    assert capsys.readouterr().err == f"the prompt {counts} left out\n"


@pytest.mark.parametrize("count", [0, 3, 11])
def test_an_end_is_no_part_of_the_conversation(count):
    """A line after an answer that ended goes on from the answer, also where the cache was cut."""
    torch.manual_seed(0)
    model = make(TINY_MLA)
    full = Chat(model, TOKENIZER, Sampling(12, temperature=1.0), seed=0)
    text = TOKENIZER.encode("".join(full.reply("abcdefg")))
    assert len(set(text)) == 12 and len(full.context) < 20
    talk = Chat(model, TOKENIZER, Sampling(12, temperature=1.0, ends=(22, text[count])), seed=0)
    assert TOKENIZER.encode("".join(talk.reply("abcdefg"))) == text[:count]
    everything = TOKENIZER.encode("abcdefg\n") + text[:count]
    assert talk.context == everything[-len(talk.context) :] and talk.tokens_made == count
    talk.sampling = Sampling(1)
    talk.sampler = Sampler(temperature=0)
    context = [*talk.context, *TOKENIZER.encode("a\n")]
    assert "".join(talk.reply("a")) == TOKENIZER.decode(generated(model, context, 1))


@pytest.mark.parametrize("listened", [1, 4])
def test_an_answer_that_is_cut_short(listened):
    """The context is what the cache holds and the last token, also when the caller stops."""
    talk = chat(new=6)
    answer = talk.reply("ab")
    pieces = []
    for piece in answer:
        pieces.append(piece)
        if len(pieces) == listened:
            break
    answer.close()
    assert len(talk.context) == talk.cache.pos + 1
    context = [*talk.context, *TOKENIZER.encode("c\n")]
    text = "".join(talk.reply("c"))
    assert text == TOKENIZER.decode(generated(talk.model, context, 6))


def test_a_line_that_is_said_again_draws_other_numbers():
    """Also after the conversation was forgotten."""
    torch.manual_seed(0)
    talk = Chat(make(TINY_MLA), TOKENIZER, Sampling(12, temperature=1.5))
    answers = []
    for _ in range(4):
        answers.append("".join(talk.reply("ab")))
        talk.reset()
    assert len(set(answers)) == 4
