"""Continuous batching, beside the generator and the model. Run: pytest tests/test_batch.py"""

import math

import numpy as np
import pytest
import torch

from nanomla.batch import Batch, Request, Sampling
from nanomla.errors import UserError
from nanomla.generate import stream_tokens
from nanomla.tokenizer import Tokenizer
from tests.conftest import KINDS, TINY_MLA, make

CHARS = "abcdefghijklmnopqrstuvw"  # 23, as TINY's vocabulary
SLOTS = KINDS["latent tokens"]


def batch(settings=TINY_MLA, rows=3, **options):
    torch.manual_seed(0)
    return Batch(make(settings), Tokenizer({"kind": "char", "chars": CHARS}), rows, **options)


def requests(count):
    """Requests of every length, sampler and number of samples."""
    draw = np.random.default_rng(1)
    made = []
    for i in range(count):
        temperature, top_k, top_p = [(1.0, None, None), (0.0, None, None), (1.3, 5, 0.9)][i % 3]
        sampling = Sampling(int(draw.integers(1, 40)), temperature, top_k, top_p, stop="ab")
        prompt = draw.integers(23, size=draw.integers(1, 17)).tolist()
        made.append(Request(prompt, sampling, n=1 + i % 2, seed=i))
    return made


def serve(batch, requests, together=True):
    """(text, ids, finish, tokens) of every sample; requests come by threes, or each alone."""
    texts, tokens, ends = {}, {}, {}
    todo = list(requests)
    while todo or batch.busy:
        if together or not batch.busy:
            for _ in range(min(3 if together else 1, len(todo))):
                batch.submit(todo.pop(0))
        for _ in range(2):
            for piece in batch.step():
                key = (piece.request, piece.index)
                texts[key] = texts.get(key, "") + piece.text
                tokens[key] = tokens.get(key, ()) + piece.tokens
                ends[key] = piece.finish
    assert batch.active == 0 and batch.cache_bytes == 0
    samples = []
    for request in requests:
        for key in [(request, i) for i in range(request.n)]:
            ids = [token.id for token in tokens[key]]
            samples.append((texts[key], ids, ends[key], tokens[key]))
    return samples


@pytest.mark.parametrize(
    ("settings", "chunk"),
    [({}, 3), ({**TINY_MLA, "mla_groups": 2}, 256), (SLOTS, 3)],
)
def test_a_request_does_not_depend_on_the_others(settings, chunk):
    """Samples that join and leave: each is what its request gets alone, and from the generator."""
    some = requests(8)
    together = serve(batch(settings, prefill_chunk=chunk), some)
    alone = serve(batch(settings, prefill_chunk=chunk), requests(8), together=False)
    model = batch(settings).model
    samples = iter(zip(together, alone, strict=True))
    for request in some:
        for i in range(request.n):
            (text, ids, finish, _), other = next(samples)
            assert (text, ids, finish) == other[:3]
            sampler = request.sampling.sampler(request.seed + i)
            idx = torch.tensor([request.prompt])
            whole = stream_tokens(model, idx, request.sampling.max_new_tokens, sampler)
            letters = "".join(CHARS[int(token)] for token in whole)
            assert text == letters.partition("ab")[0]
            assert finish == ("stop" if "ab" in letters else "length")
            assert text.startswith("".join(CHARS[token] for token in ids))


@torch.no_grad()
def test_short_prompts_are_read_in_one_pass():
    """Prompts that arrive together cost one pass."""
    served = batch({}, rows=4)
    passes = []
    served.model.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape)))
    for n in (5, 9, 3, 5):
        served.submit(Request(list(range(n)), Sampling(20, 0)))
    served.step()
    assert passes == [(4, 8), (4, 1)] and served.active == 4


def test_log_probabilities():
    """Of the prompt and of what is drawn: those of the model on the whole text, best first."""
    served = batch(prefill_chunk=3)
    prompt = [3, 1, 4, 1, 5, 9]
    request = Request(prompt, Sampling(9, 0.5, 3), n=2, logprobs=4, prompt_logprobs=True)
    only_prompt = Request([7], Sampling(0), logprobs=4, prompt_logprobs=True)
    first, second, ended = serve(served, [request, only_prompt])
    assert ended[:3] == ("", [], "length") and only_prompt.prompt_tokens[0].logprob is None
    for sample in (first, second):
        text = [*request.prompt_tokens, *sample[3]]
        ids = [token.id for token in text]
        assert ids[:6] == prompt and len(ids) == 15
        with torch.no_grad():
            want = served.model(torch.tensor([ids]), all_logits=True)[0][0].log_softmax(dim=-1)
        assert text[0].logprob is None and text[0].top == ()
        for i, token in enumerate(text[1:]):
            assert token.logprob == pytest.approx(float(want[i, token.id]), abs=1e-4)
            best = want[i].topk(4)
            assert [one for one, _ in token.top] == best.indices.tolist()
            assert [lp for _, lp in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("settings", [TINY_MLA, SLOTS])
def test_going_on_from_what_is_cached(settings):
    """A prompt that repeats an earlier text computes only what is new, and its text is the same."""
    served = batch(settings)
    grows = served.cache.grows
    first = Request([3, 1, 4], Sampling(8, 0), cache_prompt=True)
    text = [3, 1, 4, *serve(served, [first])[0][1]]
    assert (first.cached, first.computed) == (0, 3)
    further = [*text, 5]  # 10 of its tokens are held, also by a state
    other = [*text[:7], (text[7] + 1) % 23]  # a choice other than the model's
    for prompt, cached in ((further, 10), (other, 7 * grows), ([9, 9], 0), (text, 7 * grows)):
        again = Request(prompt, Sampling(4, 0), cache_prompt=True)
        got = serve(served, [again])[0]
        assert (again.cached, again.computed) == (cached, len(prompt) - cached), prompt
        assert got[0] == serve(batch(settings), [Request(prompt, Sampling(4, 0))])[0][0]
    private = Request(text, Sampling(6, 0))
    serve(served, [private])
    assert private.cached == 0


def test_going_on_past_the_context():
    """A text that outgrew its row is gone on with from the window that the row holds."""
    served = batch({}, rows=2)  # 16 tokens of context
    first = Request([3, 1, 4], Sampling(30, 0), cache_prompt=True)
    text = [3, 1, 4, *serve(served, [first])[0][1]]
    longer = Request(text[:-1] + [5], Sampling(4, 0), cache_prompt=True, window=8)
    serve(served, [longer])
    assert longer.cached > 0 and longer.computed == 1
    fits = Request(text[:14], Sampling(2, 0), cache_prompt=True)  # not what is left in a window
    assert serve(served, [fits])[0][1] == serve(served, [Request(text[:14], Sampling(2, 0))])[0][1]
    assert (fits.cached, fits.computed) == (0, 14)
    cut = Request([*text, 6, 6, 6], Sampling(4, 0), window=8)
    got = serve(served, [cut])[0]
    assert (cut.cached, cut.computed) == (0, 8)
    assert got[0] == serve(served, [Request([*text, 6, 6, 6][-8:], Sampling(4, 0))])[0][0]


def test_cancelled_requests():
    """Waiting, joining or drawing: a cancelled request's rows are free at once, others go on."""
    served = batch(prefill_chunk=4)
    some = requests(9)
    for request in some:
        served.submit(request)
    texts = {}
    cancelled = {some[1]: 0, some[4]: 3, some[8]: 1, some[0]: 5}  # at which step
    step = 0
    while served.busy:
        for request, when in cancelled.items():
            if when == step:
                served.cancel(request)
                served.cancel(request)
        for piece in served.step():
            assert cancelled.get(piece.request, 1000) > step
            key = (piece.request, piece.index)
            texts[key] = texts.get(key, "") + piece.text
        step += 1
    assert served.active == 0 and served.cache_bytes == 0
    want = iter(serve(batch(), requests(9)))
    for request in some:
        for i in range(request.n):
            text = next(want)[0]
            if request not in cancelled:
                assert texts.get((request, i), "") == text


@pytest.mark.parametrize(("cache_dtype", "number"), [(None, math.inf), (torch.int8, 1e30)])
def test_an_error_ends_one_request(cache_dtype, number):
    """A token that the model cannot take ends the request that has it, and no other."""

    def make_batch():
        served = batch({"tie_weights": False}, cache_dtype=cache_dtype)
        served.model.transformer.wte.weight.data[22, 3] = number
        if number == 1e30:  # over what a scale reaches, which raises for all rows at once
            served.model.transformer.h[0].ln_1 = torch.nn.Identity()
        return served

    scored = Request([1, 22, 3], Sampling(0), prompt_logprobs=True)
    assert serve(make_batch(), [scored])[0][2] == "error"
    prompts = [[1, 2, 3], [4, 22, 5], [6, 7], [22], [8, 9]]
    made = lambda: [Request(prompt, Sampling(5, 0)) for prompt in prompts]
    together = serve(make_batch(), made())
    alone = serve(make_batch(), made(), together=False)
    for prompt, got, want in zip(prompts, together, alone, strict=True):
        assert got[:3] == want[:3] and (got[2] == "error") == (22 in prompt)


def test_refused_requests():
    """What no row can serve is a UserError before anything is computed."""
    served = batch({})
    ok = Sampling(5)
    for wrong in (
        Request([23], ok), Request([1] * 17, ok), Request([1], ok, n=4),
        Request([1] * 17, ok, window=17), Request([1], Sampling(5, float("nan"))),
    ):
        with pytest.raises(UserError):
            served.submit(wrong)
    assert not served.busy


def test_the_end_of_a_text_is_no_part_of_it():
    """A drawn end token stops its sample; it is counted, and neither shown nor gone on from."""
    served = batch({})
    text, ids, *_ = serve(served, [Request([3], Sampling(12, 0))])[0]
    first = ids.index(ids[5])
    ended = serve(served, [Request([3], Sampling(12, 0, ends=(22, ids[5])))])[0]
    assert ended[:3] == (text[:first], ids[:first], "stop")


def test_a_long_prompt_is_cut_alike_beside_others():
    """In int8, where the later part of a prompt reads rounded rows of the earlier one."""
    samples = []
    for others in (0, 2):
        settings = {**TINY_MLA, "block_size": 64}
        served = batch(settings, prefill_chunk=8, cache_dtype=torch.int8)
        some = [Request([i, 5, 6, 7], Sampling(9, 0)) for i in range(others)]
        long = Request([n % 23 for n in range(1, 50)], Sampling(9, 0), logprobs=0)
        samples.append(serve(served, [*some, long])[-1])
    assert samples[0][1] == samples[1][1]
    alone, beside = ([token.logprob for token in sample[3]] for sample in samples)
    assert beside == pytest.approx(alone, abs=1e-5)
