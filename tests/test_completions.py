"""OpenAI's completions protocol without HTTP. Run: python -m pytest tests/test_completions.py"""

import json
import math
from types import SimpleNamespace

import pytest

from nanomla.batch import Piece, Token
from nanomla.serve.protocol import ApiError, Reply, make_requests, read_params, shown
from nanomla.text import StreamDecoder
from nanomla.tokenizer import Tokenizer

BYTES = Tokenizer({"kind": "byte"})
CHARS = Tokenizer({"kind": "char", "chars": "abc"})


def requests_of(tokenizer=BYTES, most=80, **body):
    """Parameters, requests and texts of a JSON body."""
    params = read_params(body, limit=100)
    return params, *make_requests(params, tokenizer, most)


def tokens_of(raw, logprob=-0.5, top=()):
    """The tokens of some bytes, one each."""
    decoder = StreamDecoder(BYTES)
    chars = [len(decoder.push(byte)) for byte in raw]
    each = zip(raw, chars, strict=True)
    return tuple(Token(byte, bytes([byte]), n, logprob, top) for byte, n in each)


def piece(request, raw, text, index=0, finish=None, made=0, **more):
    tokens = tokens_of(raw, **more)
    return Piece(request, index, text, tokens, made, held=9, nbytes=90, finish=finish)


def test_fields_reach_the_engine():
    """Every field that means something does, and null stands for the default."""
    _, (plain,), texts = requests_of(prompt="hi", temperature=None, stop=None, n=None)
    s = plain.sampling
    assert (s.max_new_tokens, s.temperature, s.top_p, s.stop, plain.n) == (16, 1.0, 1.0, None, 1)
    assert plain.prompt == [104, 105] and texts == ["hi"] and not s.top_k and s.end is None
    assert not plain.prompt_logprobs and plain.logprobs is None and not plain.cache_prompt
    _, (one,), _ = requests_of(
        prompt=[1, 2], max_tokens=0, temperature=0, top_p=0.5, top_k=7, n=3, seed=4,
        stop=["a", "b"], logprobs=0, echo=True, cache_prompt=True, truncate_prompt_tokens=5,
        best_of=3, user="me", suffix="", presence_penalty=0, logit_bias={},
    )  # fmt: skip
    s = one.sampling
    assert (s.max_new_tokens, s.temperature, s.top_p, s.top_k) == (0, 0.0, 0.5, 7)
    assert (one.n, one.seed, one.logprobs, one.window, s.stop) == (3, 4, 0, 5, ("a", "b"))
    assert one.prompt_logprobs and one.cache_prompt and one.prompt == [1, 2]
    seeds = {requests_of(prompt="a")[1][0].seed for _ in range(5)}
    assert len(seeds) == 5  # without a seed every call draws its own


def test_the_default_length_is_one_that_the_server_makes():
    """max_tokens left out is 16, or the most that this server makes."""
    assert read_params({"prompt": "a"}, limit=8).max_tokens == 8
    assert read_params({"prompt": "a", "max_tokens": None}, limit=100).max_tokens == 16


def test_ends_and_starts_of_texts():
    """GPT-2's end of text ends a sample and begins an empty prompt; a char model begins a line."""
    gpt2 = SimpleNamespace(spec={"kind": "tiktoken", "name": "gpt2"})
    _, (one,), _ = requests_of(gpt2)
    assert one.prompt == [50256] and one.sampling.end == 50256
    assert requests_of(gpt2, ignore_eos=True)[1][0].sampling.end is None
    assert requests_of(prompt="")[1][0].prompt == [10]
    with pytest.raises(ApiError, match="no token to begin with"):
        requests_of(CHARS, prompt="")


def test_several_prompts():
    """Texts or lists of ids, each a request with the same seed."""
    _, several, texts = requests_of(prompt=["a", "bc"])
    assert [r.prompt for r in several] == [[97], [98, 99]] and texts == ["a", "bc"]
    assert several[0].seed == several[1].seed
    _, several, texts = requests_of(prompt=[[5], [6, 7]])
    assert [r.prompt for r in several] == [[5], [6, 7]] and texts == [None, None]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens", "did you mean max_tokens?"),
        ({"\ud800": 5}, "\ud800", "there is no field"),
        ({"max_tokens": 101}, "max_tokens", "more than this server makes, 100"),
        ({"max_tokens": -1}, "max_tokens", "of at least 0"),
        ({"max_tokens": 1.5}, "max_tokens", "a whole number"),
        ({"max_tokens": True}, "max_tokens", "a whole number"),
        ({"temperature": math.nan}, "temperature", "a finite number of at least 0"),
        ({"temperature": math.inf}, "temperature", "at most 100"),
        ({"temperature": 10**4000}, "temperature", "a finite number"),
        ({"temperature": "1"}, "temperature", "a finite number"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": -1}, "top_k", "of at least 0"),
        ({"n": 0}, "n", "of at least 1"),
        ({"n": 81}, "n", "more than 80 samples"),
        ({"prompt": ["a"] * 41, "n": 2}, "n", "41 prompts with n=2"),
        ({"seed": 2**63}, "seed", "below 9223372036854775808"),
        ({"stream": 1}, "stream", "True or False"),
        ({"stream_options": {}, "stream": 5}, "stream", "True or False"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"stream_options": [], "stream": True}, "stream_options", "include_usage"),
        ({"stream_options": {"usage": True}, "stream": True}, "stream_options", "include_usage"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"stop": ""}, "stop", "1 to 500 characters"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ["a", 5]}, "stop", "at most 4 texts"),
        ({"stop": "a" * 501}, "stop", "1 to 500"),
        ({"best_of": 2}, "best_of", "equal to n"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"frequency_penalty": math.nan}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"prompt": 5}, "prompt", "must be text"),
        ({"prompt": []}, "prompt", "one or more prompts"),
        ({"prompt": [[]]}, "prompt", "none of them empty"),
        ({"prompt": [1, "a"]}, "prompt", "must be text"),
        ({"prompt": [[1], "a"]}, "prompt", "of one kind"),
        ({"prompt": [True]}, "prompt", "must be text"),
        ({"prompt": [[1.0]]}, "prompt", "must be text"),
        ({"prompt": {"text": "a"}}, "prompt", "must be text"),
        ({"prompt": "\udc80"}, "prompt", "not UTF-8"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "of at least 1"),
        ({"model": 5}, "model", "must be"),
    ],
)  # fmt: skip
def test_what_is_refused(body, param, words):
    """One line that names the field."""
    with pytest.raises(ApiError) as caught:
        requests_of(**body)
    error = caught.value
    assert (error.status, error.param) == (400, param) and words in error.message
    assert "\n" not in error.message and len(error.message) <= 300
    assert json.loads(json.dumps(error.body()))["error"]["type"] == "invalid_request_error"


def test_streamed_and_whole_replies_agree():
    """The chunks of every choice, joined, are the whole response."""
    body = {"prompt": ["a", "b"], "n": 2, "logprobs": 1, "seed": 1, "return_token_ids": True}
    replies = {}
    for stream in (False, True):
        params, requests, texts = requests_of(**body, stream=stream)
        reply = Reply(params, requests, texts, "m", BYTES)
        deltas = []
        for request in requests:
            request.computed = 1
        for text in ("x", "y"):
            for request in reversed(requests):  # in any order
                for index in (1, 0):
                    finish = "length" if text == "y" else None
                    one = piece(request, text.encode(), text, index, finish, "xy".index(text) + 1)
                    deltas.append(reply.add(one, 5.0))
        replies[stream] = (reply, deltas)
    whole = replies[False][0].whole()
    assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    for choice in whole["choices"]:
        mine = [d for d in replies[True][1] if d["index"] == choice["index"]]
        assert "".join(d["text"] for d in mine) == choice["text"] == "xy"
        assert [d["logprobs"]["tokens"] for d in mine] == [["x"], ["y"]]
        assert [d["logprobs"]["text_offset"] for d in mine] == [[0], [1]]
        assert [d["finish_reason"] for d in mine] == [None, "length"]
        assert choice["finish_reason"] == "length"
        ids = [token["id"] for token in choice["nanomla"]["tokens"]]
        assert ids == [120, 121] and choice["logprobs"]["text_offset"] == [0, 1]
        prompt = {"ids": [97 if choice["index"] < 2 else 98], "cached": 0, "computed": 1}
        assert choice["nanomla"]["prompt"] == mine[0]["nanomla"]["prompt"] == prompt
        assert "prompt" not in mine[1]["nanomla"]
        assert choice["nanomla"]["cache"] == {"tokens": 9, "bytes": 90}
    usage = {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}
    assert whole["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert replies[True][0].usage() == whole["usage"]
    assert whole["object"] == "text_completion" and whole["model"] == "m"


def test_characters_of_several_tokens():
    """Tokens that are no UTF-8 alone are named by their bytes; offsets count characters."""
    params, (request,), texts = requests_of(prompt="a", logprobs=2)
    reply = Reply(params, [request], texts, "m", BYTES)
    assert reply.add(piece(request, b"", ""), 0.0) is None  # nothing to show, but a token
    top = ((0xC3, -0.1), (120, -math.inf))
    reply.add(piece(request, "é!".encode(), "é!", finish="stop", top=top), 0.0)
    choice = reply.whole()["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"] and choice["text"] == "é!"
    assert logprobs["text_offset"] == [0, 0, 1]
    assert logprobs["top_logprobs"][0] == {"bytes:\\xc3": -0.1, "x": -9999.0}
    assert logprobs["top_logprobs"][2] == {"bytes:\\xc3": -0.1, "x": -9999.0, "!": -0.5}
    assert logprobs["token_logprobs"] == [-0.5] * 3 and shown(b"\xe2\x80") == "bytes:\\xe2\\x80"
    json.dumps(choice, allow_nan=False)


def test_echo():
    """The prompt comes first, with its tokens; nothing came before its first one."""
    params, (request,), texts = requests_of(prompt="hé", echo=True, logprobs=0, stream=True)
    reply = Reply(params, [request], texts, "m", BYTES)
    raw = "hé".encode()
    request.computed = 3
    prompt = tokens_of(raw, -1.0)
    request.prompt_tokens = [prompt[0]._replace(logprob=None), *prompt[1:]]
    first = reply.add(piece(request, b"x", "x"), 0.0)
    second = reply.add(piece(request, b"y", "y", finish="length", made=2), 0.0)
    assert first["text"] == "héx" and second["text"] == "y"
    logprobs = first["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "x"]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0, -0.5]
    assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][3] == {"x": -0.5}
    assert logprobs["text_offset"] == [0, 1, 1, 2] and second["logprobs"]["text_offset"] == [3]
    assert reply.usage()["prompt_tokens"] == 3 and reply.usage()["completion_tokens"] == 2


def test_echo_without_the_token_that_begins_a_text():
    """A tokenizer's own first token takes no room; a cut prompt is echoed as it was read."""
    names = {1: b"<s>", 2: b"to", 3: b" be"}
    tokenizer = SimpleNamespace(
        spec={"kind": "hf"}, encode=lambda text: [1, 2, 3], token_bytes=names.get,
        decode=lambda ids: b"".join(map(names.get, ids)).decode(),
    )  # fmt: skip
    params, (request,), texts = requests_of(tokenizer, prompt="to be", echo=True, logprobs=0)
    request.prompt_tokens = [Token(i, names[i], len(names[i]), -1.0) for i in (1, 2, 3)]
    request.computed = 3
    reply = Reply(params, [request], texts, "m", tokenizer)
    choice = reply.add(piece(request, b"", "", finish="length"), 0.0)
    assert choice["text"] == "to be" and choice["logprobs"]["text_offset"] == [0, 0, 2]
    request.computed, reply = 2, Reply(params, [request], texts, "m", tokenizer)
    assert reply.add(piece(request, b"", "", finish="length"), 0.0)["text"] == "to be"
    request.computed, reply = 1, Reply(params, [request], texts, "m", tokenizer)
    assert reply.add(piece(request, b"", "", finish="length"), 0.0)["text"] == " be"


def test_nothing_to_make():
    """max_tokens 0 makes no token, and the finish alone is shown."""
    params, (request,), texts = requests_of(prompt="ab", max_tokens=0, echo=True)
    reply = Reply(params, [request], texts, "m", BYTES)
    request.cached, request.computed = 1, 1
    assert reply.add(piece(request, b"", "", finish="length"), 0.0)["text"] == "ab"
    details = reply.usage().pop("prompt_tokens_details")
    assert reply.usage()["completion_tokens"] == 0 and details == {"cached_tokens": 1}
