"""From prompts to text, beside model.generate. Run: python -m pytest tests/test_engine.py"""

import pytest
import torch
import torch.nn.functional as F

from model import GPT
from nanomla.engine import (
    Engine,
    Sampler,
    Sampling,
    StopText,
    prefill_shared,
    stream_tokens,
)
from nanomla.settings import UserError
from nanomla.tokenizer import Tokenizer
from tests.conftest import TINY_MLA, randomise, tiny_config

CHARS = "abcdefghijklmnopqrstuvw"  # 23, as TINY's vocabulary


def make(settings):
    return randomise(GPT(tiny_config(**settings)))


def engine(settings=TINY_MLA, **sampling):
    torch.manual_seed(0)
    tokenizer = Tokenizer({"kind": "char", "chars": CHARS})
    return Engine(make(settings), tokenizer, Sampling(**{"max_new_tokens": 12, **sampling}))


def test_rows_of_a_shared_prompt_differ():
    """A prompt shared by all rows is prefilled once; then every row draws its own tokens."""
    model, idx = make(TINY_MLA), torch.tensor([[1, 2, 3]]).expand(64, -1)
    cache = model.make_cache(64, 16)
    prefill_shared(model, idx, cache)
    assert cache.pos == 2
    with torch.no_grad():
        got = model(idx[:, 2:], cache=cache)[0]
        torch.testing.assert_close(got, model(idx)[0], atol=1e-5, rtol=1e-4)
    out = torch.cat(list(stream_tokens(model, idx, 6, Sampler(2.0))), 1)
    assert len(set(out[:, 0].tolist())) > 3 and len({tuple(r) for r in out.tolist()}) > 60
    greedy = torch.cat(list(stream_tokens(model, idx, 6, Sampler(0))), 1)
    assert torch.equal(greedy, greedy[:1].expand(64, -1))
    assert torch.equal(greedy[:1], model.generate(idx[:1], 6, temperature=0)[:, 3:])


LATENT_TOKENS = {"use_latent_tokens": True, "n_latent_tokens": 5}


@pytest.mark.parametrize("settings", [{}, TINY_MLA, {**TINY_MLA, "mla_groups": 2}, LATENT_TOKENS])
@pytest.mark.parametrize("use_cache", [True, False])
def test_streamed_tokens_are_those_of_generate(settings, use_cache):
    """One at a time, past the context, whatever the rows hold: the tokens of one whole call."""
    model, idx = make(settings), torch.randint(23, (3, 5))
    sampler = Sampler(1.5, generator=torch.Generator().manual_seed(4))
    streamed = torch.cat(list(stream_tokens(model, idx, 40, sampler, use_cache)), 1)
    generator = torch.Generator().manual_seed(4)
    at_once = model.generate(idx, 40, 1.5, use_cache=use_cache, generator=generator)
    assert torch.equal(streamed, at_once[:, 5:])


@pytest.mark.parametrize("max_len", [5, 9, 16])
def test_a_cache_shorter_than_the_context(max_len):
    """A full cache goes on with half of what it holds, and is not filled again at every token."""
    model, lengths = make(TINY_MLA), []
    model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    cache = model.make_cache(1, max_len)
    out = model.generate(torch.randint(23, (1, 4)), 30, temperature=0, cache=cache)
    assert out.size(1) == 34 and cache.pos <= max_len
    assert sum(n > 1 for n in lengths) <= 1 + 30 / (max_len - max_len // 2)


def test_stream_complete_and_chat_agree():
    """Greedy text is the same streamed, in a batch of several lengths, and as a chat's first
    turn."""
    prompts = ["abc", "defgh", "q", "bca"]
    streamed = ["".join(engine(temperature=0).stream(p)) for p in prompts]
    made = engine(temperature=0)
    samples = made.complete(prompts, num_samples=2)
    assert [[s.text for s in row] for row in samples] == [[text] * 2 for text in streamed]
    assert made.tokens_made == 2 * 4 * 12 and all(len(s.tokens) == 12 for r in samples for s in r)
    assert all(sample.seconds > 0 for row in samples for sample in row)
    assert made.complete([]) == []


def test_a_chat_goes_on_after_an_answer_that_was_cut_short():
    """Its context is what its cache holds and the last token, also when the caller stops
    listening."""
    for stop_after in (1, 4, 99):
        talk = engine(temperature=0, max_new_tokens=6)
        talk.tokenizer = Tokenizer({"kind": "char", "chars": CHARS[:-1] + "\n"})
        chat = talk.chat()
        pieces = chat.reply("ab")
        for _ in range(stop_after):
            if next(pieces, None) is None:
                break
        pieces.close()
        assert len(chat.context) == chat.cache.pos + 1
        idx = torch.tensor([chat.context + talk.encode("c\n")])
        want = talk.model.generate(idx, 6, temperature=0)[0, idx.size(1) :].tolist()
        text = "".join(chat.reply("c"))
        assert text == talk.tokenizer.decode(want)


def test_stop_strings_wherever_pieces_cut_them():
    """Text that may become the stop string is kept back until that is decided."""
    until = StopText("abc")
    assert [until.push(t) for t in ("xa", "b", "ab", "c", "d")] == ["x", "", "ab", "", ""]
    assert until.done and StopText("abc").push("zab", last=True) == "zab"
    full = "".join(engine(temperature=0).stream("abc"))
    cut = "".join(engine(temperature=0, stop=full[5:7]).stream("abc"))
    assert cut == full[: full.index(full[5:7])]


def test_a_prompt_that_is_too_long_or_cannot_be_spelled():
    """One clear error each, before anything is computed."""
    with pytest.raises(UserError, match="the prompt has 17 tokens, the model's context 16"):
        list(engine().stream("a" * 17))
    with pytest.raises(UserError, match="character 'Z'"):
        engine().complete(["Z"])


def test_sampling_filters():
    """top_k and top_p bound what can be drawn; 0, None and 1 are off; temperature 0 is argmax."""
    model, idx = make({}), torch.zeros(400, 1, dtype=torch.long)
    with torch.no_grad():
        probs = F.softmax(model(idx[:1])[0][0, -1] / 3, -1)
    order = probs.argsort(descending=True)
    draw = {}
    for key, value in (
        ("top_k", 2),
        ("top_k", 0),
        ("top_k", 99),
        ("top_p", 0.5),
        ("top_p", 1.0),
        ("top_p", 1e-9),
    ):
        draw[key, value] = set(
            model.generate(idx, 1, temperature=3.0, **{key: value})[:, 1].tolist()
        )
    nucleus = order[: int((probs[order].cumsum(0) < 0.5).sum()) + 1]
    assert draw["top_k", 2] == set(order[:2].tolist()) and draw["top_p", 0.5] == set(
        nucleus.tolist()
    )
    assert draw["top_p", 1e-9] == {int(order[0])}
    assert min(len(draw[k]) for k in (("top_k", 0), ("top_k", 99), ("top_p", 1.0))) > len(nucleus)
    assert set(model.generate(idx, 1, temperature=0)[:, 1].tolist()) == {int(order[0])}
