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


@pytest.mark.parametrize("settings", [{}, SLOTS])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_that_was_cut_goes_on_as_if_it_had_not_been(settings, temperature):
    """Anywhere, past the context too, with the row that has the text or without it."""
    sampling = Sampling(40, temperature, top_k=5)
    whole = Request([3, 1, 4], sampling, seed=7)
    served = batch(settings)
    held = {}
    served.submit(whole)
    while served.busy:
        for piece in served.step():
            held[piece.made] = piece.held
    ids = whole.samples[0].tokens
    for cut in (1, 9, 13, 14, 21, 22, 39):
        window = held[cut] + 1 if held[cut] < 16 else 8
        text = [3, 1, 4, *ids[:cut]]
        rest = Sampling(40 - cut, temperature, top_k=5)
        for asked in (window, None):
            again = Request(text, rest, seed=7, tokens_drawn=cut, window=asked)
            assert serve(served, [again])[0][1] == ids[cut:], cut
    with_row = Request([3, 1, 4], Sampling(21, temperature, top_k=5), seed=7, cache_prompt=True)
    serve(served, [with_row])
    rest = Sampling(19, temperature, top_k=5)
    again = Request([3, 1, 4, *ids[:21]], rest, seed=7, tokens_drawn=21, cache_prompt=True)
    assert serve(served, [again])[0][1] == ids[21:] and again.cached > 0


def test_numbers_of_a_text_that_was_cut_are_drawn_beside_other_texts(monkeypatch):
    """Others go on and begin meanwhile, and several take turns; a cancelled one is forgotten."""
    monkeypatch.setattr("nanomla.batch.DRAWING_AGAIN", 0.0)  # a token of one of them in a step
    served = batch()
    slow = [Request([3], Sampling(2), tokens_drawn=20) for _ in range(3)]
    for request in slow:
        served.submit(request)
    served.cancel(slow[2])
    ends = {}
    for step in range(60):
        if step == 5:
            served.submit(Request([1, 2], Sampling(3)))
        for piece in served.step():
            if piece.finish:
                ends[piece.request] = step
    assert not served.busy and slow[2] not in ends
    first, second, third = sorted(ends.values())
    assert first == 7 and 30 < second <= third


def test_more_samples_than_rows():
    """Any number: each begins when a row is free, and is what its seed gives. The prompt is read
    once as long as one of them has it."""
    served = batch(rows=2)
    lengths = []
    served.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    many = Request([3, 1, 4], Sampling(9), n=7, seed=5, logprobs=0, prompt_logprobs=True)
    samples = serve(served, [Request([1], Sampling(4)), many])[1:]
    assert lengths.count(2) == 1
    seeds = range(5, 12)
    alone = [serve(served, [Request([3, 1, 4], Sampling(9), seed=seed)])[0] for seed in seeds]
    assert [sample[:3] for sample in samples] == [sample[:3] for sample in alone]
    assert (many.cached, many.computed, len(many.prompt_tokens)) == (0, 3, 3)


def began(served, some):
    """The steps in which requests have drawn their first tokens."""
    steps = {}
    while not all(request in steps for request in some):
        for piece in served.step():
            steps.setdefault(piece.request, served.steps)
    return [steps[request] for request in some]


def test_clients_take_turns():
    """A long list keeps no other client waiting: one without a row gets the row beyond, a second
    one the next that is free; and no other call of its own client, which comes in turn."""
    served = batch(rows=3)
    long = [Request([i], Sampling(40), client="a", call="1") for i in range(9)]
    for request in long:
        served.submit(request)
    served.step()
    short = [Request([1], Sampling(5), client=client) for client in ("b", "c")]
    call = Request([5], Sampling(5), client="a", call="2")
    for request in (*short, call):
        served.submit(request)
    assert began(served, [*short, *long[3:5], call]) == [2, 7, 41, 41, 41]
    assert began(served, long[5:7]) == [46, 81]


def test_prompts_are_read_in_turn():
    """Short ones together, a request of each client and call; what is not read comes next."""
    served = batch({}, rows=6, prefill_chunk=8)
    some = [Request([1] * 5, Sampling(3), client=client, call=call) for client, call in
            (("a", "1"), ("a", "1"), ("a", "2"), ("b", "3"), ("b", "3"))]
    for request in some:
        served.submit(request)
    assert began(served, some) == [1, 2, 1, 1, 2]


@pytest.mark.parametrize("end", [[0xC3], [0xE2, 0x82], [0xA9], [0x41], [0xF0, 0x9F]])
def test_a_character_that_a_prompt_leaves_unfinished_is_the_samples_first(end):
    """Its text is that of all tokens, without that of the prompt's whole characters."""
    torch.manual_seed(0)
    tokenizer = Tokenizer({"kind": "byte"})
    served = Batch(make(TINY_MLA, vocab_size=256, block_size=64), tokenizer, rows=8)
    request = Request([65, 66, *end], Sampling(12, 1.5), n=24)
    before = bytes(request.prompt).decode("utf-8", "ignore")
    if end == [0xA9]:
        before += "\ufffd"  # it begins no character
    for text, ids, _, tokens in serve(served, [request]):
        assert before + text == bytes([65, 66, *end, *ids]).decode("utf-8", "replace")
        unfinished = text.endswith("\ufffd")
        assert len(text) - unfinished <= sum(token.chars for token in tokens) <= len(text)
    nothing = serve(served, [Request([65, *end], Sampling(0))])[0]
    assert "A" + nothing[0] == bytes([65, *end]).decode("utf-8", "replace") or not nothing[0]


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
    edited = text[:-1] + [5]
    start = max(served.slots, key=lambda slot: len(slot.tokens)).start
    for window in (len(edited) - start, 8):  # what the row holds, or less, which is read anew
        longer = Request(edited, Sampling(4, 0), cache_prompt=True, window=window)
        got = serve(served, [longer])[0][1]
        assert (longer.computed == 1) == (window > 8) and longer.cached == window - longer.computed
        alone = Request(edited, Sampling(4, 0), window=window)
        assert serve(served, [alone])[0][1] == got
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
        Request([23], ok), Request([1] * 17, ok), Request([1], ok, n=0),
        Request([1] * 17, ok, window=17), Request([1], Sampling(5, float("nan"))),
    ):
        with pytest.raises(UserError):
            served.submit(wrong)
    assert not served.busy


def test_the_end_of_a_text_is_no_part_of_it():
    """A drawn end token stops its sample. It comes with its score, but is no part of the text."""
    served = batch({})
    text, ids, *_ = serve(served, [Request([3], Sampling(12, 0))])[0]
    first = ids.index(ids[5])
    ended = serve(served, [Request([3], Sampling(12, 0, ends=(22, ids[5])))])[0]
    assert ended[:3] == (text[:first], [*ids[:first], ids[5]], "stop")


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
