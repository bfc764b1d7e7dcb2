"""From prompts to text, beside model.generate. Run: python -m pytest tests/test_engine.py"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanomla.batch import Batch, Engine, Request, Sampling, StopText
from nanomla.cache import Cache
from nanomla.errors import UserError
from nanomla.generate import (
    Sampler,
    draw_each,
    next_logits,
    prefill_shared,
    stop_ids,
    stream_tokens,
)
from nanomla.tokenizer import Tokenizer
from tests.conftest import KINDS, TINY_MLA, make
from tools.bench.timing import peak_bytes

CHARS = "abcdefghijklmnopqrstuvw"  # 23, as TINY's vocabulary
LATENT_TOKENS = KINDS["latent tokens"]
CACHES = [{}, TINY_MLA, {**TINY_MLA, "mla_groups": 2}, LATENT_TOKENS]


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


@pytest.mark.parametrize("settings", CACHES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_streamed_tokens_are_those_of_generate(settings, use_cache):
    """One at a time, past the context, whatever the rows hold: the tokens of one whole call."""
    model, idx = make(settings), torch.randint(23, (3, 5))
    sampler = Sampler(1.5, generator=torch.Generator().manual_seed(4))
    streamed = torch.cat(list(stream_tokens(model, idx, 40, sampler, use_cache)), 1)
    generator = torch.Generator().manual_seed(4)
    at_once = model.generate(idx, 40, 1.5, use_cache=use_cache, generator=generator)
    assert torch.equal(streamed, at_once[:, 5:])


@pytest.mark.parametrize("settings", CACHES)
def test_a_prompt_in_chunks_gives_equal_logits(settings):
    """Prompts of unequal and of equal rows, whatever a pass reads, and beside no cache."""
    model, seen = make(settings).double(), []

    class Seen(Sampler):
        def __call__(self, logits):
            seen.append(logits.clone())
            return super().__call__(logits)

    for idx in (torch.randint(23, (2, 13)), torch.randint(23, (1, 13)).expand(3, -1)):
        seen.clear()
        for chunk in (None, 1, 3, 6, 12, 13, 50):
            list(stream_tokens(model, idx, 6, Seen(0), prefill_chunk=chunk))
            torch.testing.assert_close(seen[-6:], seen[:6], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(seen[0], model(idx)[0][:, -1], atol=1e-10, rtol=1e-10)
    list(stream_tokens(model, idx, 1, Sampler(0), prefill_chunk=10**30))
    for wrong in (0, -1, 2.5, "3"):
        with pytest.raises(ValueError, match="prefill_chunk"):
            list(stream_tokens(model, idx, 6, Sampler(0), prefill_chunk=wrong))
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="prefill_chunk"):
            engine(prefill_chunk=wrong).complete(["ab", "c"])


@pytest.mark.parametrize("settings", [{}, TINY_MLA, {**TINY_MLA, "mla_rope": "latent",
    "mla_latent_dim": 8}, LATENT_TOKENS], ids=str)  # fmt: skip
def test_the_memory_of_a_long_prompt(settings):
    """In chunks of a sixteenth, a prompt takes less than a quarter of the memory of all at once."""
    model = make(settings | {"block_size": 4096, "n_embd": 64})
    idx, peaks = torch.randint(23, (1, 4096)), []
    for chunk in (None, 256):
        cache = model.make_cache(1, 4096)
        run = lambda c=chunk, cache=cache: next_logits(model, idx, cache, c, None)
        peaks.append(peak_bytes(run, "cpu"))
    assert peaks[1] < peaks[0] / 4, peaks


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


@pytest.mark.parametrize(
    "settings", [{"temperature": 1e-300}, {"temperature": 1e-38}, {"top_p": 1e-300}]
)
def test_tiny_temperature_and_top_p_are_greedy(settings):
    """What overflows or rounds to 0 in float32 is taken to its limit."""
    logits = torch.randn(50, 23) * 1e4
    best = logits.argmax(dim=-1, keepdim=True)
    assert torch.equal(Sampler(**settings)(logits), best)
    assert torch.equal(Sampler(**settings, top_k=5)(logits), best)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": float("nan")}, "temperature=nan .* 0 .greedy. or more"),
        ({"temperature": float("inf")}, "temperature=inf .* finite"),
        ({"temperature": "hot"}, "temperature='hot' .* 0 .greedy. or more"),
        ({"top_p": float("nan")}, "top_p=nan .* above 0 and at most 1"),
        ({"top_k": 2.5}, "top_k=2.5 .* a whole number"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 .* a whole number from 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 .* a whole number from 0"),
        ({"stop": "end"}, "stop='end' .* None, a token id or several"),
        ({"stop": 1.5}, "stop=1.5 .* None, a token id or several"),
        ({"stop": [1, None]}, "stop=.1, None. .* None, a token id or several"),
    ],
)
def test_settings_that_do_not_work_are_named(settings, words):
    """ValueError with the field, its value and what works, before anything is computed."""
    with pytest.raises(ValueError, match=words):
        make({}).generate(torch.zeros(1, 1, dtype=torch.long), **{"max_new_tokens": 2, **settings})


def test_stop_takes_integers_of_every_type():
    """numpy's, tensors without dimensions, and whatever can be iterated over them."""
    model, idx = make({}), torch.tensor([[3, 1]])
    out = model.generate(idx, 9, temperature=0)
    stop = out[0, 4].item()
    want = model.generate(idx, 9, temperature=0, stop=stop)
    assert want.size(1) < out.size(1)
    one, several = [np.int64(stop), torch.tensor(stop), np.array(stop)], [{stop: 1}, iter([stop])]
    for given in (*one, *several, [torch.tensor(stop)], torch.tensor([stop]), np.array([stop])):
        assert torch.equal(model.generate(idx, 9, temperature=0, stop=given), want)
    for pair in (torch.tensor([stop, stop]), np.array([stop, stop])):
        assert torch.equal(model.generate(idx, 9, temperature=0, stop=pair), want)
    assert stop_ids(torch.tensor([0])) == [0] and stop_ids(np.array([], dtype=int)) == []


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_without_dropout_and_restores_the_mode(use_cache):
    """A model in training mode draws what it draws in evaluation mode; an exception changes its
    mode no more than an end does."""
    model, idx = make({**TINY_MLA, "dropout": 0.5}), torch.tensor([[3, 1]])
    want = model.generate(idx, 9, temperature=0, use_cache=use_cache)
    model.train().transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(model.generate(idx, 9, temperature=0, use_cache=use_cache), want)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        model.generate(idx + 23, 9, use_cache=use_cache)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("settings", [{}, TINY_MLA, LATENT_TOKENS])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_cache_shorter_than_the_prompt(settings, length):
    """The newest tokens that it can hold are the context of the first token; also where it held the
    beginning of a prompt that outgrew it."""
    model, idx = make(settings), torch.randint(23, (2, 12))
    with torch.no_grad():
        first = model(idx[:, -length:])[0][:, -1].argmax(-1)
    for held in range(length + 1):
        cache = model.make_cache(2, length)
        with torch.no_grad():
            if held:
                model(idx[:, :held], cache=cache)
        out = model.generate(idx, 20, temperature=0, cache=cache)
        assert out.shape == (2, 32) and torch.equal(out[:, 12], first)
        kept = out[:, 31 - cache.pos : 31]  # what the cache holds: all but the last
        with torch.no_grad():
            again = model.make_cache(2, length)
            model(kept, cache=again)
        for a, b in zip(again.tensors, cache.tensors, strict=True):
            end = cache.pos if cache.grows else None
            torch.testing.assert_close(a[..., :end, :], b[..., :end, :], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="holds 5 tokens, idx 4: it must begin with those"):
        cache = model.make_cache(1, 16)
        with torch.no_grad():
            model(idx[:1, :5], cache=cache)
        model.generate(idx[:1, :4], 2, cache=cache)


def test_a_cache_longer_than_the_context():
    """Made of the layers' own caches, it is used as far as block_size."""
    model, idx = make(TINY_MLA), torch.randint(23, (1, 5))
    layers = [block.attn.new_cache(1, 40) for block in model.transformer.h]
    cache = Cache(layers, made_for=model.config)
    out = model.generate(idx, 40, temperature=0, cache=cache)
    assert torch.equal(out, model.generate(idx, 40, temperature=0))


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_one_line(temperature, value):
    """Weights that overflow draw no token, neither the likeliest nor any other."""
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(UserError, match="logits are not finite; try --dtype=float32"):
        Sampler(temperature)(logits)


def batch(settings=TINY_MLA, rows=3, **options):
    torch.manual_seed(0)
    return Batch(make(settings), Tokenizer({"kind": "char", "chars": CHARS}), rows, **options)


def requests(count, **options):
    """Requests of every length, sampler and number of samples."""
    draw = np.random.default_rng(1)
    made = []
    for i in range(count):
        temperature, top_k, top_p = [(1.0, None, None), (0.0, None, None), (1.3, 5, 0.9)][i % 3]
        sampling = Sampling(int(draw.integers(1, 40)), temperature, top_k, top_p, stop="ab")
        prompt = draw.integers(23, size=draw.integers(1, 17)).tolist()
        made.append(Request(prompt, sampling, n=1 + i % 2, seed=i, **options))
    return made


def serve(batch, requests, together=True):
    """The text, tokens and finish of every sample; requests come by threes, or each alone."""
    got = {}
    todo = list(requests)
    for step in range(10_000):
        if todo and (step % 2 == 0 if together else not batch.busy):
            for _ in range(min(3, len(todo)) if together else 1):
                batch.submit(todo.pop(0))
        for piece in batch.step():
            text, tokens, _ = got.get((id(piece.request), piece.index), ("", (), None))
            key = (id(piece.request), piece.index)
            got[key] = text + piece.text, tokens + piece.tokens, piece.finish
        if not todo and not batch.busy:
            break
    assert batch.active == 0 and not batch.busy
    return [[got[id(r), i] for i in range(r.n)] for r in requests]


@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize("settings", CACHES)
def test_a_request_does_not_depend_on_the_others(settings, chunk):
    """Rows that join and leave: every text is that of the request alone, and of the generator."""
    some = requests(12)
    together = serve(batch(settings, prefill_chunk=chunk), some)
    alone = serve(batch(settings, prefill_chunk=chunk), requests(12), together=False)
    model = batch(settings).model
    for request, got, want in zip(some, together, alone, strict=True):
        for i, ((text, tokens, finish), other) in enumerate(zip(got, want, strict=True)):
            ids = [token.id for token in tokens]
            assert (text, ids, finish) == (other[0], [t.id for t in other[1]], other[2])
            s, generator = request.sampling, torch.Generator().manual_seed(request.seed + i)
            sampler = Sampler(s.temperature, s.top_k, s.top_p, generator)
            idx = torch.tensor([request.prompt])
            whole = torch.cat(list(stream_tokens(model, idx, s.max_new_tokens, sampler)), 1)[0]
            letters = "".join(CHARS[token] for token in whole.tolist())
            assert text == letters.partition("ab")[0]
            assert finish == ("stop" if "ab" in letters else "length")
            assert text.startswith("".join(CHARS[token] for token in ids))


@torch.no_grad()
def test_short_prompts_are_read_in_one_pass():
    """Prompts that arrive together cost one pass, and so do texts that outgrow their rows."""
    served, passes = batch({}, rows=4), []
    served.model.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape)))
    some = [Request(list(range(n)), Sampling(20, 0)) for n in (5, 9, 3, 5)]
    for request in some:
        served.submit(request)
    served.step()
    assert passes == [(4, 8), (4, 1)] and served.active == 4
    while served.busy:
        served.step()
    assert (2, 7) in passes  # the two prompts of 5 tokens outgrow 16 at the same time
    assert sum(shape[1] > 1 for shape in passes) == 5  # the prompt of 9 does so twice, that of 3


def test_rows_drawn_together_and_alone():
    """draw_each takes what each row's own Sampler takes, whatever the settings beside it."""
    logits = torch.randn(40, 23) * 3
    settings = [(1.0, None, None), (0.7, 5, None), (1.5, None, 0.8), (0.0, None, None), (2, 9, 0.5)]

    def samplers():
        made = [(*settings[i % 5], torch.Generator().manual_seed(i)) for i in range(40)]
        return [Sampler(*one) for one in made]

    ones, all_of_them = samplers(), samplers()
    for _ in range(3):
        alone = torch.cat([s(logits[i : i + 1]) for i, s in enumerate(ones)])
        assert torch.equal(draw_each(logits, all_of_them), alone)


@pytest.mark.parametrize("chunk", [256, 3])
@pytest.mark.parametrize("settings", CACHES)
def test_log_probabilities(settings, chunk):
    """Of the prompt and of what is drawn: those of the model on the whole text, best first."""
    served = batch(settings, prefill_chunk=chunk)
    prompt = [3, 1, 4, 1, 5, 9]
    how = {"logprobs": 4, "prompt_logprobs": True}
    request = Request(prompt, Sampling(9, 0.5, 3), n=2, **how)
    alone = Request([7], Sampling(0), **how)  # which asks for its prompt only
    samples = serve(served, [request, alone])
    assert samples[1] == [("", (), "length")] and alone.prompt_tokens[0].logprob is None
    for _, tokens, _ in samples[0]:
        text = [*request.prompt_tokens, *tokens]
        ids = [token.id for token in text]
        assert ids[:6] == prompt and len(ids) == 15
        idx = torch.tensor([ids])
        with torch.no_grad():
            want = served.model(idx, all_logits=True)[0][0].log_softmax(dim=-1)
        assert text[0].logprob is None and text[0].top == ()
        for i, token in enumerate(text[1:]):
            assert token.logprob == pytest.approx(float(want[i, token.id]), abs=1e-4)
            best = want[i].topk(4)
            assert [one for one, _ in token.top] == best.indices.tolist()
            assert [lp for _, lp in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("settings", CACHES)
def test_going_on_from_what_is_cached(settings):
    """A prompt that repeats an earlier text computes only what is new, and its text is the same."""
    served, fresh = batch(settings), batch(settings)
    grows = served.cache.grows
    first = Request([3, 1, 4], Sampling(8, 0), cache_prompt=True)
    ((_, tokens, _),) = serve(served, [first])[0]
    text = [3, 1, 4, *(token.id for token in tokens)]
    assert first.cached == 0 and first.computed == 3
    further = [*text, 5]  # 10 of its tokens are held, also by a state
    other = [*text[:7], (text[7] + 1) % 23]  # a choice other than the model's
    for prompt, cached in ((further, 10), (other, 7 * grows), ([9, 9], 0), (text, 7 * grows)):
        again = Request(prompt, Sampling(4, 0), cache_prompt=True)
        got = serve(served, [again])[0]
        assert (again.cached, again.computed) == (cached, len(prompt) - cached), prompt
        assert got[0][0] == serve(fresh, [Request(prompt, Sampling(4, 0))])[0][0][0]
    private = Request(text, Sampling(6, 0))
    serve(served, [private])
    assert private.cached == 0


def test_going_on_past_the_context():
    """A text that outgrew its row is gone on with from the window that the row holds."""
    served = batch({}, rows=2)  # 16 tokens of context
    first = Request([3, 1, 4], Sampling(30, 0), cache_prompt=True)
    ((_, tokens, _),) = serve(served, [first])[0]
    text = [3, 1, 4, *(token.id for token in tokens)]
    longer = Request(text[:-1] + [5], Sampling(4, 0), cache_prompt=True, window=8)
    serve(served, [longer])
    assert longer.cached > 0 and longer.computed == 1
    serve(served, [Request(text, Sampling(1, 0), cache_prompt=True, window=8)])
    fits = Request(text[:14], Sampling(2, 0), cache_prompt=True, logprobs=2)
    whole = Request(text[:14], Sampling(2, 0), logprobs=2)  # not what is left of it in a window
    again = [serve(served, [request])[0][0] for request in (fits, whole)]
    assert (fits.cached, fits.computed) == (0, 14)
    for a, b in zip(again[0][1], again[1][1], strict=True):
        assert a.id == b.id and a.logprob == pytest.approx(b.logprob, abs=1e-5)
    cut = Request([*text, 6, 6, 6], Sampling(4, 0), window=8)
    got = serve(served, [cut])[0]
    assert (cut.cached, cut.computed) == (0, 8)
    want = serve(served, [Request([*text, 6, 6, 6][-8:], Sampling(4, 0))])[0]
    assert got[0][0] == want[0][0]


@pytest.mark.parametrize("settings", [{}, LATENT_TOKENS])
def test_cancelled_requests(settings):
    """Waiting, joining or drawn: a cancelled request's rows are free at once, others go on."""
    served, some = batch(settings, prefill_chunk=4), requests(9)
    want = serve(batch(settings), requests(9))
    for request in some:
        served.submit(request)
    texts, gone = {}, {some[1]: 0, some[4]: 3, some[8]: 1, some[0]: 5}
    for step in range(1000):
        for request, when in gone.items():
            if when == step:
                served.cancel(request)
                served.cancel(request)
        for piece in served.step():
            assert gone.get(piece.request, 1000) > step
            key = piece.request, piece.index
            texts[key] = texts.get(key, "") + piece.text
        if not served.busy:
            break
    assert served.active == 0 and not served.busy and served.cache_bytes == 0
    for request, samples in zip(some, want, strict=True):
        for i, sample in enumerate(samples):
            if request not in gone:
                assert texts.get((request, i), "") == sample[0]


@pytest.mark.parametrize(
    ("cache_dtype", "number"), [(None, math.inf), (torch.int8, math.nan), (torch.int8, 1e30)]
)
def test_an_error_ends_one_request(cache_dtype, number):
    """A token that the model cannot take ends the request that has it, and no other."""

    def make_batch():
        served = batch({"tie_weights": False}, cache_dtype=cache_dtype)
        served.model.transformer.wte.weight.data[22, 3] = number
        if number == 1e30:  # over what a scale reaches, which raises for all rows at once
            served.model.transformer.h[0].ln_1 = torch.nn.Identity()
        return served

    scored = Request([1, 22, 3], Sampling(0), prompt_logprobs=True)
    assert serve(make_batch(), [scored])[0][0][2] == "error"
    prompts = [[1, 2, 3], [4, 22, 5], [6, 7], [22], [8, 9]]
    made = lambda: [Request(prompt, Sampling(5, 0)) for prompt in prompts]
    together = serve(make_batch(), made())
    for i, (got, want) in enumerate(zip(together, serve(make_batch(), made(), False), strict=True)):
        assert got[0][0] == want[0][0] and got[0][2] == want[0][2]
        assert (got[0][2] == "error") == (22 in prompts[i])


def test_refused_requests():
    """What no row can serve is a UserError before anything is computed."""
    served, ok = batch({}), Sampling(5)
    for wrong in (
        Request([], ok), Request([23], ok), Request([-1], ok), Request([1] * 17, ok),
        Request([1], ok, n=4), Request([1], ok, n=0), Request([1] * 17, ok, window=17),
        Request([1] * 17, ok, window=0), Request([1], Sampling(5, float("nan"))),
        Request([1], Sampling(5, 1.0, -3)), Request([1], Sampling(5, 1.0, None, 2.0)),
    ):  # fmt: skip
        with pytest.raises(UserError):
            served.submit(wrong)
    assert not served.busy


def test_the_end_of_a_text_is_no_part_of_it():
    """A drawn end token stops its sample; it is counted, and neither shown nor gone on from."""
    served = batch({})
    free = serve(served, [Request([3], Sampling(12, 0))])[0][0]
    end = free[1][5].id
    first = [token.id for token in free[1]].index(end)
    text, tokens, finish = serve(served, [Request([3], Sampling(12, 0, end=end))])[0][0]
    assert finish == "stop" and [t.id for t in tokens] == [t.id for t in free[1][:first]]
    assert text == free[0][:first]


@pytest.mark.parametrize("settings", [{}, TINY_MLA])
def test_a_long_prompt_is_cut_alike_beside_others(settings):
    """In int8, where the later part of a prompt reads rounded rows of the earlier one."""
    settings = {**settings, "block_size": 64}
    texts = []
    for others in (0, 1, 2):
        served = batch(settings, rows=3, prefill_chunk=8, cache_dtype=torch.int8)
        some = [Request([i, 5, 6, 7], Sampling(9, 0)) for i in range(others)]
        long = Request([n % 23 for n in range(1, 50)], Sampling(9, 0), logprobs=0)
        for request in (*some, long):
            served.submit(request)
        pieces = []
        while served.busy:
            pieces += [piece for piece in served.step() if piece.request is long]
        texts.append([token for piece in pieces for token in piece.tokens])
    for text in texts[1:]:
        assert [token.id for token in text] == [token.id for token in texts[0]]
        want = [token.logprob for token in texts[0]]
        assert [token.logprob for token in text] == pytest.approx(want, abs=1e-5)
