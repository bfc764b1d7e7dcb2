"""OpenAI's completions protocol without HTTP. Run: python -m pytest tests/test_completions.py"""

import math
from types import SimpleNamespace

import pytest
import torch

from nanomla.batch import Batch, Piece, Token
from nanomla.serve.protocol import ApiError, Completion, read_params
from nanomla.text import StreamDecoder
from nanomla.tokenizer import Tokenizer
from tests.conftest import TINY_MLA, make

BYTES = Tokenizer({"kind": "byte"})
CHARS = Tokenizer({"kind": "char", "chars": "abc"})


def complete(tokenizer=BYTES, most=80, **body):
    """The completion that a JSON body asks for."""
    return Completion(read_params(body, limit=100), "m", tokenizer, most)


def tokens_of(raw, logprob=-0.5, top=()):
    """The tokens of some bytes, one each."""
    decoder = StreamDecoder(BYTES)
    chars = [len(decoder.push(byte)) for byte in raw]
    return tuple(Token(b, bytes([b]), n, logprob, top) for b, n in zip(raw, chars, strict=True))


def piece(request, raw, text, finish=None, made=0, **more):
    tokens = tokens_of(raw, **more)
    return Piece(request, 0, text, tokens, made, held=9, nbytes=90, finish=finish)


def test_fields_reach_the_engine():
    """Every field that means something does, and null stands for the default."""
    (request,) = complete(prompt="hi", temperature=None, stop=None, n=None).requests
    s = request.sampling
    assert (s.max_new_tokens, s.temperature, s.top_p, s.stop, request.n) == (16, 1.0, 1.0, None, 1)
    assert request.prompt == [104, 105] and not s.top_k and s.ends == ()
    assert not request.prompt_logprobs and request.logprobs is None and not request.cache_prompt
    (request,) = complete(
        prompt=[1, 2], max_tokens=5.0, temperature=0, top_p=0.5, top_k=7, n=3, seed=4,
        stop=["a", "b"], logprobs=0, echo=True, cache_prompt=True, truncate_prompt_tokens=5,
        best_of=3, user="me", suffix="", presence_penalty=0, logit_bias={},
    ).requests
    s = request.sampling
    assert (s.max_new_tokens, s.temperature, s.top_p, s.top_k) == (5, 0.0, 0.5, 7)
    assert (request.n, request.seed, request.logprobs, request.window) == (3, 4, 0, 5)
    assert request.prompt_logprobs and request.cache_prompt and s.stop == ("a", "b")
    assert read_params({"prompt": "a"}, limit=8).max_tokens == 8
    seeds = {complete(prompt="a").requests[0].seed for _ in range(5)}
    assert len(seeds) == 5  # without a seed every call draws its own
    seeds = {complete(prompt="a", seed=-1).requests[0].seed for _ in range(5)}
    assert len(seeds) == 5 and -1 not in seeds
    (request,) = complete(prompt="a", top_k=-1, n=128, seed=3, tokens_drawn=9, most=128).requests
    assert (request.sampling.top_k, request.n, request.tokens_drawn) == (0, 128, 9)
    assert complete(stop=[str(i) for i in range(16)]).requests[0].sampling.stop[15] == "15"


def test_prompts():
    """Texts or lists of ids, one or several; GPT-2's end of text begins an empty one."""
    requests = complete(prompt=["a", "bc"]).requests
    assert [r.prompt for r in requests] == [[97], [98, 99]]
    assert requests[0].seed != requests[1].seed  # each draws its own numbers
    for seed in (4, 0, -2, 2**63 - 1):  # equal prompts give equal texts
        assert [r.seed for r in complete(prompt=["a", "b"], seed=seed).requests] == [seed, seed]
    assert [r.prompt for r in complete(prompt=[[5], [6, 7]]).requests] == [[5], [6, 7]]
    gpt2 = SimpleNamespace(spec={"kind": "tiktoken", "name": "gpt2"})
    (request,) = complete(gpt2).requests
    assert request.prompt == [50256] and request.sampling.ends == (50256,)
    assert complete(gpt2, ignore_eos=True).requests[0].sampling.ends == ()
    several = SimpleNamespace(spec={"kind": "tiktoken", "name": "gpt2", "end": [50256, 198]})
    assert complete(several).requests[0].sampling.ends == (50256, 198)
    assert complete(prompt="").requests[0].prompt == [10]
    with pytest.raises(ApiError, match="no token to begin with"):
        complete(CHARS, prompt="")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"max_new_tokens": None}, "max_new_tokens", "did you mean max_tokens?"),
        ({"\ud800": 5}, "\ud800", "there is no field"),
        ({"max_tokens": 101}, "max_tokens", "more than this server makes, 100"),
        ({"temperature": math.inf}, "temperature", "a finite number of at least 0 and at most 100"),
        ({"n": True}, "n", "a whole number of at least 1"),
        ({"n": 129}, "n", "at most 128"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"seed": 2**63}, "seed", "below 9223372036854775808"),
        ({"tokens_drawn": 3}, "tokens_drawn", "needs the seed"),
        ({"tokens_drawn": 3, "seed": -1}, "tokens_drawn", "needs the seed"),
        ({"min_p": 0.1}, "min_p", "min_p=0.1 is not supported: leave it out, or send 0"),
        ({"stop_token_ids": [5]}, "stop_token_ids", "leave it out, or send []"),
        ({"guided_json": {}}, "guided_json", "leave it out, or send null"),
        ({"prompt": ["a"] * 41, "n": 2}, "n", "41 prompts with n=2"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"stream_options": {"usage": True}, "stream": True}, "stream_options", "include_usage"),
        ({"stop": ["a", 5]}, "stop", "at most 16 texts, each of 1 to 500 characters"),
        ({"best_of": 2}, "best_of", "equal to n"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"prompt": [[]]}, "prompt", "none of them empty"),
        ({"prompt": [[1], "a"]}, "prompt", "of one kind"),
        ({"prompt": "\udc80"}, "prompt", "not UTF-8"),
    ],
)
def test_what_is_refused(body, param, words):
    """One line that names the field."""
    with pytest.raises(ApiError) as caught:
        complete(**body)
    error = caught.value
    assert (error.status, error.param) == (400, param) and words in error.message
    assert "\n" not in error.message and len(error.message) <= 300
    assert error.body()["error"]["type"] == "invalid_request_error"


def test_fields_that_change_nothing():
    """What the clients of other servers always send gives the request without them."""
    vllm = {
        "use_beam_search": False, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
        "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False,
        "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True,
        "spaces_between_special_tokens": True, "early_stopping": False, "bad_words": [],
        "presence_penalty": 0.0, "frequency_penalty": 0, "allowed_token_ids": None,
        "prompt_logprobs": None, "response_format": {"type": "text"}, "logit_bias": None,
    }
    others = {
        "user": "me", "metadata": {"run": "1"}, "store": False, "typical_p": 1, "logit_bias": {},
        "mirostat": 0, "repeat_penalty": 1.0, "grammar": "", "watermark": False,
        "skip_special_tokens": False, "suffix": None, "prompt_cache_key": "a", "cache_salt": None,
        "kv_transfer_params": None, "truncation_side": None, "stream_options": None,
    }
    options = {"include_usage": None, "continuous_usage_stats": False}
    assert not complete(stream=True, stream_options=options).params.stream_options.include_usage
    for extra in (vllm, others, dict.fromkeys([*vllm, *others])):
        (request,) = complete(prompt="hi", seed=1, **extra).requests
        (plain,) = complete(prompt="hi", seed=1).requests
        request.call = plain.call
        assert vars(request) == vars(plain)


def test_the_score_of_an_end():
    """
    lm_eval takes token_logprobs[len(context):-1] of a request for one token: where that is an end,
    it has its place there, but none in the text or in our own list of what was written.
    """
    torch.manual_seed(0)
    served = Batch(make("MLA"), CHARS, rows=2)
    prompt = [0, 1, 2]
    with torch.no_grad():
        likely = served.model(torch.tensor([prompt]))[0][0, -1].log_softmax(-1)
    end = int(likely.argmax())
    asked = complete(
        CHARS, prompt=prompt, max_tokens=1, temperature=0, logprobs=1, echo=True,
        return_token_ids=True,
    )
    (request,) = asked.requests
    request.sampling.ends = (end,)
    served.tokenizer = Tokenizer({"kind": "char", "chars": "abcdefghijklmnopqrstuvw"})
    asked.tokenizer = served.tokenizer
    served.submit(request)
    pieces = []
    while served.busy:
        pieces += served.step()
    whole = asked.whole(pieces, 0.0)
    choice = whole["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "stop")
    assert whole["usage"]["completion_tokens"] == 1
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 4
    assert logprobs["token_logprobs"][-1] == pytest.approx(float(likely[end]), abs=1e-4)
    assert logprobs["text_offset"] == [0, 1, 2, 3] and not choice["nanomla"]["tokens"]


def test_characters_that_a_prompt_leaves_unfinished():
    """Echoed whole; without echo it is the first of the text. Offsets count from the prompt."""
    torch.manual_seed(0)
    served = Batch(make(TINY_MLA, vocab_size=256, block_size=64), BYTES, rows=8)
    for prompt in ([65, 0xC3], [65, 0xE2, 0x82], "é", [0xA9]):
        body = {"prompt": prompt, "n": 24, "max_tokens": 6, "seed": 1, "logprobs": 0}
        for echo in (True, False):
            completion = complete(**body, echo=echo, temperature=1.5)
            (request,) = completion.requests
            served.submit(request)
            pieces = []
            while served.busy:
                pieces += served.step()
            for choice in completion.whole(pieces, 0.0)["choices"]:
                ids = [*request.prompt, *request.samples[choice["index"]].tokens]
                whole = bytes(ids).decode("utf-8", "replace")
                offsets = choice["logprobs"]["text_offset"]
                names = choice["logprobs"]["tokens"]
                if not echo:
                    assert len(offsets) == 6 and whole.endswith(choice["text"])
                else:
                    assert choice["text"] == whole and len(offsets) == len(ids)
                for offset, name in zip(offsets, names, strict=True):
                    at = whole[offset : offset + 1]
                    assert at == name or name.startswith("bytes:") and not at.isascii() or not at


def test_characters_of_several_tokens():
    """Tokens that are no UTF-8 alone are named by their bytes; offsets count characters."""
    completion = complete(prompt="a", logprobs=2)
    (request,) = completion.requests
    top = ((0xC3, -0.1), (120, -math.inf))
    ended = piece(request, "é!".encode(), "é!", finish="stop", top=top)
    choice = completion.whole([ended], 0.0)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"] and choice["text"] == "é!"
    assert logprobs["text_offset"] == [1, 1, 2]  # from the prompt's start, as OpenAI's
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["top_logprobs"][0] == {"bytes:\\xc3": -0.1, "x": -9999.0}
    assert logprobs["top_logprobs"][2] == {"bytes:\\xc3": -0.1, "x": -9999.0, "!": -0.5}


def test_echo():
    """The prompt comes first, with its tokens; nothing came before its first one."""
    completion = complete(prompt="hé", echo=True, logprobs=0, stream=True)
    (request,) = completion.requests
    request.computed = 3
    prompt = tokens_of("hé".encode(), -1.0)
    request.prompt_tokens = [prompt[0]._replace(logprob=None), *prompt[1:]]
    first = completion.chunk(piece(request, b"x", "x"), 0.0)["choices"][0]
    last = completion.chunk(piece(request, b"y", "y", finish="length", made=2), 0.0)["choices"][0]
    assert first["text"] == "héx" and last["text"] == "y"
    logprobs = first["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "x"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -0.5]
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][3] == {"x": -0.5}
    assert logprobs["text_offset"] == [0, 1, 1, 2] and last["logprobs"]["text_offset"] == [3]
    usage = completion.last_chunk()["usage"]
    assert usage["prompt_tokens"] == 3 and usage["completion_tokens"] == 2


def test_echo_without_the_token_that_begins_a_text():
    """A tokenizer's own first token takes no room; a cut prompt is echoed as it was read."""
    names = {1: b"<s>", 2: b"to", 3: b" be"}
    tokenizer = SimpleNamespace(
        spec={"kind": "hf"}, encode=lambda text: [1, 2, 3], token_bytes=names.get,
        decode=lambda ids: b"".join(map(names.get, ids)).decode(),
    )
    for computed, text in ((3, "to be"), (2, "to be"), (1, " be")):
        completion = complete(tokenizer, prompt="to be", echo=True, logprobs=0)
        (request,) = completion.requests
        request.prompt_tokens = [Token(i, names[i], len(names[i]), -1.0) for i in (1, 2, 3)]
        request.computed = computed
        ended = piece(request, b"", "", finish="length")
        choice = completion.whole([ended], 0.0)["choices"][0]
        assert choice["text"] == text
        assert computed < 3 or choice["logprobs"]["text_offset"] == [0, 0, 2]
