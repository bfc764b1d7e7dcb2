"""
OpenAI's completions protocol without HTTP: a JSON object becomes requests to the engine, and what
the engine makes becomes JSON objects.

    params = read_params({"prompt": "ROMEO:", "max_tokens": 20}, limit=4096)
    requests, texts = make_requests(params, tokenizer, most=80)
    reply = Reply(params, requests, texts, "out-mla", tokenizer)
    for piece in pieces:                    # of nanomla.batch.Batch, until every sample has ended
        delta = reply.add(piece, rate=0.0)  # one choice of a chunk of a stream, or None
    reply.whole()                           # the response of a request that does not stream
"""

import contextlib
import difflib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import Field

from nanomla.batch import Piece, Request, Sampling, Token
from nanomla.checks import Count, Natural, NonNegative, Seed, UpToOne, brief, check
from nanomla.errors import UserError
from nanomla.files import one_line
from nanomla.tokenizer import Tokenizer, end_of_text, start_of_text

LEAST = -9999.0  # stands for log probabilities that JSON does not have: minus infinity, no number
OBFUSCATION = "include_obfuscation"  # OpenAI's, which adds noise to chunks; has no effect
MOST_STOPS, LONGEST_STOP = 4, 500  # stop texts, and characters of one
KINDS = {  # what OpenAI calls a status
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 500: "server_error", 503: "overloaded_error",
}  # fmt: skip


class ApiError(Exception):
    """An error for the client: the HTTP status that it has, and what OpenAI's error says."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, one_line(message), param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass
class Params:
    """
    The fields of a request: OpenAI's, then ours. A null in the JSON stands for the default.

    Raises ValueError naming the field.
    """

    model: str | None = None
    prompt: Any = ""  # text, token ids, or a list of such; make_requests looks at it
    max_tokens: Natural = 16
    temperature: Annotated[NonNegative, Field(le=100)] = 1.0
    top_p: UpToOne = 1.0
    n: Count = 1
    stream: bool = False
    stream_options: Any = None
    logprobs: Annotated[Natural, Field(le=20)] | None = None
    echo: bool = False
    stop: Any = ()  # a text or several
    seed: Seed | None = None
    user: str = ""  # has no effect
    best_of: int | None = None
    suffix: str = ""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Any = None

    top_k: Annotated[Natural, Field(le=10**9)] = 0
    ignore_eos: bool = False
    cache_prompt: bool = False
    truncate_prompt_tokens: Annotated[Count, Field(le=10**9)] | None = None
    return_token_ids: bool = False

    def __post_init__(self) -> None:
        check(self)
        self.stop = stops = [self.stop] if isinstance(self.stop, str) else self.stop
        fits = isinstance(stops, (list, tuple)) and len(stops) <= MOST_STOPS
        if not fits or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops):
            each = f"each of 1 to {LONGEST_STOP} characters"
            raise ValueError(f"stop must be at most {MOST_STOPS} texts, {each}")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported: leave it out, or make it equal to n")
        for name in ("suffix", "presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: leave it out")
        options = {} if self.stream_options is None else self.stream_options
        known = isinstance(options, dict) and options.keys() <= {"include_usage", OBFUSCATION}
        if not known or not all(isinstance(value, bool) for value in options.values()):
            raise ValueError('stream_options must be {"include_usage": true} or false')
        if options and not self.stream:
            raise ValueError("stream_options needs stream=true")
        self.stream_options = options

    @property
    def usage_chunk(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options.get("include_usage", False)


def read_params(body: dict[str, Any], limit: int) -> Params:
    """The checked fields of a request. limit: its largest max_tokens. Raises ApiError."""
    known = check_names(body, Params)
    given = {name: value for name, value in body.items() if value is not None}
    try:
        params = Params(**{"max_tokens": min(Params.max_tokens, limit), **given})
        if params.max_tokens > limit:
            asked = brief(params.max_tokens)
            raise ValueError(f"max_tokens={asked} is more than this server makes, {limit}")
    except (TypeError, ValueError) as error:
        named = [name for name in known if str(error).startswith(name)]
        raise ApiError(400, str(error), max(named, key=len, default=None)) from None
    return params


def check_names(body: dict[str, Any], kind: type) -> list[str]:
    """The fields of a dataclass. Raises ApiError for a name in a JSON object that is none."""
    known = [f.name for f in fields(kind)]
    for name in body:
        if name not in known:
            close = difflib.get_close_matches(name[:60], known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ApiError(400, f"there is no field {brief(name)}{hint}", name[:60])
    return known


# ---- prompts


def make_requests(
    params: Params, tokenizer: Tokenizer, most: int
) -> tuple[list[Request], list[str | None]]:
    """
    A request to the engine for every prompt, and its text where it was given as text.

    most: samples of one call. Every prompt of a call gets the samples that it gets alone.
    Raises ApiError for prompts that are none, and for too many.
    """
    several = params.prompt
    if not isinstance(several, list) or _is_ids(several):
        several = [several]
    if len(several) * params.n > most:
        count = f"{len(several)} prompts with n={brief(params.n)}"
        field = "prompt" if len(several) > most else "n"
        raise ApiError(400, f"{count} are more than {most} samples, the most of a request", field)
    prompts = _read_prompts(several, tokenizer)
    seed = secrets.randbits(62) if params.seed is None else params.seed
    end = None if params.ignore_eos else end_of_text(tokenizer.spec)
    sampling = Sampling(
        max_new_tokens=params.max_tokens, temperature=params.temperature, top_k=params.top_k,
        top_p=params.top_p, stop=tuple(params.stop) or None, end=end,
    )  # fmt: skip
    requests = [
        Request(
            ids, sampling, n=params.n, seed=seed, logprobs=params.logprobs,
            prompt_logprobs=params.echo and params.logprobs is not None,
            cache_prompt=params.cache_prompt, window=params.truncate_prompt_tokens,
        )
        for ids, _ in prompts
    ]  # fmt: skip
    return requests, [text for _, text in prompts]


def _read_prompts(prompts: list, tokenizer: Tokenizer) -> list[tuple[list[int], str | None]]:
    """The ids of every prompt, and its text if it was given as text."""
    found = []
    for one in prompts:
        if isinstance(one, str):
            found.append((encode(one, tokenizer) if one else _start(tokenizer), one))
        elif isinstance(one, list) and one and _is_ids(one):
            found.append((one, None))
        else:
            works = "text, token ids, or a list of several such prompts, none of them empty"
            raise ApiError(400, f"prompt must be {works}, not {brief(one)}", "prompt")
    if not found or len({text is None for _, text in found}) > 1:
        raise ApiError(400, "prompt must be one or more prompts of one kind", "prompt")
    return found


def _is_ids(value: list) -> bool:
    return bool(value) and all(type(token) is int for token in value)


def encode(text: str, tokenizer: Tokenizer, field: str = "prompt") -> list[int]:
    """A text's ids. Raises ApiError for one that the tokenizer cannot spell."""
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise ApiError(400, str(error), field) from None


def _start(tokenizer: Tokenizer) -> list[int]:
    """What an empty prompt stands for: the token that begins a text, or a new line."""
    start = start_of_text(tokenizer.spec)
    if start is not None:
        return [start]
    with contextlib.suppress(ApiError):
        if ids := encode("\n", tokenizer):
            return ids
    raise ApiError(400, "prompt is empty, and this model has no token to begin with", "prompt")


# ---- replies


def shown(raw: bytes) -> str:
    """A token's bytes as text; those that are no UTF-8 by themselves as bytes:\\xe2\\x80."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _number(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return round(logprob, 6) if logprob > LEAST else LEAST


class Choice:
    """One sample as its pieces come."""

    def __init__(self, index: int) -> None:
        self.index, self.began, self.made = index, False, 0
        self.deltas: list[dict[str, Any]] = []
        self.place = 0  # in the choice's text, of the next token

    def offset(self, token: Token) -> int:
        """Where in the text a token begins that follows the one before."""
        place = self.place
        self.place += token.chars
        broken = token.chars - len(token.text)  # U+FFFD for bytes before it that are no character
        return max(place + max(broken, 0), 0)


class Reply:
    """
    The answer to one call, from the pieces of its requests.

    texts: the prompts as they were given, None for one of ids. name: the model's.
    """

    def __init__(
        self, params: Params, requests: list[Request], texts: list[str | None], name: str,
        tokenizer: Tokenizer,
    ) -> None:  # fmt: skip
        self.params, self.requests, self.texts = params, requests, texts
        self.tokenizer = tokenizer
        self.first = {request: i * params.n for i, request in enumerate(requests)}
        self.choices = [Choice(i) for i in range(len(requests) * params.n)]
        self.names: dict[int, str] = {}  # of token ids
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
            "created": int(time.time()), "model": name,
        }  # fmt: skip

    def add(self, piece: Piece, rate: float) -> dict[str, Any] | None:
        """
        Take a piece in; returns what it adds to its choice, None while there is nothing to show.

        rate: tokens/s of this call's model so far.
        """
        params, choice = self.params, self.choices[self.first[piece.request] + piece.index]
        choice.made = piece.made
        if not (piece.text or piece.tokens or piece.finish):
            return None
        text, tokens = piece.text, piece.tokens
        first, choice.began = not choice.began, True
        if first and params.echo:
            prompt, before = self._prompt(piece.request)
            choice.place -= before
            text, tokens = prompt + text, (*piece.request.prompt_tokens, *tokens)
        delta = {"text": text, "index": choice.index, "logprobs": None}
        if params.logprobs is not None:
            delta["logprobs"] = self._logprobs(choice, tokens)
        delta["finish_reason"] = piece.finish
        if params.return_token_ids:
            delta["nanomla"] = self._details(piece, rate, first)
        if not params.stream:
            choice.deltas.append(delta)
        return delta

    def chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        """What a stream sends for a choice's delta."""
        usage = {"usage": None} if self.params.usage_chunk else {}
        return {**self.head, "choices": [delta], **usage}

    def last_chunk(self) -> dict[str, Any]:
        """The chunk of the usage."""
        return {**self.head, "choices": [], "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """The response of a call that does not stream."""
        choices = [_merged(choice.deltas) for choice in self.choices]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of all samples."""
        prompt = sum(len(used_prompt(request)) for request in self.requests)
        made = sum(choice.made for choice in self.choices)
        cached = sum(request.cached for request in self.requests)
        return {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def _prompt(self, request: Request) -> tuple[str, int]:
        """
        An echoed prompt's text, and how many characters its tokens spell before that: the token
        that a tokenizer puts before every text is no part of what was given.
        """
        used = used_prompt(request)
        spelled = self.tokenizer.decode(used)
        given = self.texts[self.requests.index(request)]
        if given is None or len(used) < len(request.prompt):
            return spelled, 0
        return given, max(len(spelled) - len(given), 0)

    def _logprobs(self, choice: Choice, tokens: Iterable[Token]) -> dict[str, list]:
        """OpenAI's lists for some tokens of a choice."""
        tokens = tuple(tokens)
        likeliest = []
        for token in tokens:
            if token.logprob is None:
                likeliest.append(None)  # nothing came before it
                continue
            top: dict[str, float | None] = {}
            for name, value in [*self._top(token), (shown(token.raw), token.logprob)]:
                top.setdefault(name, _number(value))  # the likelier of two with one spelling
            likeliest.append(top)
        return {
            "tokens": [shown(token.raw) for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": [choice.offset(token) for token in tokens],
        }

    def _top(self, token: Token) -> list[tuple[str, float]]:
        for i, _ in token.top:
            if i not in self.names:
                self.names[i] = shown(self.tokenizer.token_bytes(i))
        return [(self.names[i], value) for i, value in token.top]

    def _details(self, piece: Piece, rate: float, first: bool) -> dict[str, Any]:
        """Our own part of a choice: token ids with their alternatives, and the cache."""
        tokens = [
            {
                "id": token.id,
                "text": token.text,
                "logprob": _number(token.logprob),
                "top": [[i, self._text(i), _number(value)] for i, value in token.top],
            }
            for token in piece.tokens
        ]
        details = {"tokens": tokens, "cache": {"tokens": piece.held, "bytes": piece.nbytes}}
        if first:
            request = piece.request
            counts = {"cached": request.cached, "computed": request.computed}
            details["prompt"] = {"ids": used_prompt(request), **counts}
        return {**details, "tokens_per_s": round(rate, 1)}

    def _text(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")


def used_prompt(request: Request) -> list[int]:
    """The tokens of a prompt that the model saw, once it has seen them."""
    return request.prompt[-(request.cached + request.computed) :]


def _merged(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """A whole choice from its deltas, of which there is at least one."""
    whole = dict(deltas[-1])
    whole["text"] = "".join(delta["text"] for delta in deltas)
    if whole["logprobs"] is not None:
        parts = [delta["logprobs"] for delta in deltas]
        whole["logprobs"] = {key: [v for part in parts for v in part[key]] for key in parts[0]}
    if "nanomla" in whole:
        tokens = [token for delta in deltas for token in delta["nanomla"]["tokens"]]
        whole["nanomla"] |= {"tokens": tokens, "prompt": deltas[0]["nanomla"]["prompt"]}
    return whole
