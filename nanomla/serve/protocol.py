"""
OpenAI's completions protocol without HTTP: a JSON object becomes requests to the engine, and what
the engine makes becomes JSON objects.

    params = read_params({"prompt": "ROMEO:", "max_tokens": 20}, limit=4096)
    completion = Completion(params, "out-mla", tokenizer, most=80)
    for request in completion.requests:
        batch.submit(request)                  # a nanomla.batch.Batch, which makes the pieces
    completion.chunk(pieces[0], rate=0.0)      # what a stream sends for a piece
    completion.whole(pieces, rate=0.0)         # the response of a request that does not stream
"""

import dataclasses
import difflib
import json
import secrets
import time
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nanomla.batch import Piece, Request, Sampling, Token
from nanomla.checks import Count, Natural, NonNegative, UpToOne, brief, in_words
from nanomla.errors import UserError
from nanomla.files import one_line
from nanomla.text import StreamDecoder
from nanomla.tokenizer import Tokenizer, ends_of_text, start_of_text

MOST_SAMPLES = 128  # of a prompt
LEAST = -9999.0  # stands for log probabilities that JSON does not have: minus infinity, no number
KINDS = {  # what OpenAI calls a status
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 500: "server_error", 503: "overloaded_error",
}
# Fields of other servers that their clients send with every request. These change no text here:
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "priority",
    "skip_special_tokens", "spaces_between_special_tokens", "prompt_cache_key",
}
# These are accepted if they have the value that changes nothing; null is one too.
NEUTRAL = {
    "suffix": "", "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {},
    "min_p": 0, "typical_p": 1, "repetition_penalty": 1, "repeat_penalty": 1,
    "length_penalty": 1, "early_stopping": False, "use_beam_search": False, "min_tokens": 0,
    "stop_token_ids": [], "bad_words": [], "allowed_token_ids": None, "logits_processors": None,
    "include_stop_str_in_output": False, "prompt_logprobs": None, "add_special_tokens": True,
    "return_tokens_as_token_ids": False, "response_format": {"type": "text"},
    "structured_outputs": None, "guided_json": None, "guided_regex": None, "guided_choice": None,
    "guided_grammar": None, "grammar": "", "json_schema": None, "mirostat": 0, "tfs_z": 1,
    "guided_decoding_backend": None, "guided_whitespace_pattern": None, "cache_salt": None,
    "kv_transfer_params": None, "vllm_xargs": None, "prompt_embeds": None, "truncation_side": None,
    "mm_processor_kwargs": None, "dynatemp_range": 0, "xtc_probability": 0, "dry_multiplier": 0,
    "watermark": False,
}


class ApiError(Exception):
    """An error for the client: the HTTP status that it has, and what OpenAI's error says."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = one_line(message)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


# ---- fields


class Fields(BaseModel):
    """The fields of a JSON object. A null stands for the default, and 5.0 is a whole number."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _from_json(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields = {}
        for name, value in body.items():
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if value is not None:
                fields[name] = value
        return fields

    @classmethod
    def read(cls, body: dict[str, Any]) -> Self:
        """The checked fields of a JSON object. Raises ApiError for the first that is wrong."""
        for name in body:
            if name not in cls.model_fields:
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ApiError(400, f"there is no field {brief(name)}{hint}", name)
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        name = first["loc"][0]
        if first["type"] == "value_error":  # of a validator below
            raise ApiError(400, str(first["ctx"]["error"]), name)
        if first["type"] == "missing":
            raise ApiError(400, f"{name} is missing", name)
        works = cls.model_fields[name].description
        if works is None:
            works = in_words(typing.get_type_hints(cls, include_extras=True)[name])
        message = f"{name}={brief(body[name])} does not work: {name} must be {works}"
        raise ApiError(400, message, name)


class StreamOptions(Fields):
    """What a stream has beside its choices."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's, which adds noise to chunks; has no effect
    continuous_usage_stats: Literal[False] = False  # vLLM's


Stop = Annotated[str, Field(min_length=1, max_length=500)]
Stops = Annotated[list[Stop], Field(max_length=16)]


class Params(Fields):
    """The fields of a request for a completion: OpenAI's, then ours."""

    model: str | None = None
    prompt: Any = ""  # text, token ids, or a list of such; Completion looks at it
    max_tokens: Natural = 16
    temperature: Annotated[NonNegative, Field(le=100)] = 1.0
    top_p: UpToOne = 1.0
    n: Annotated[Count, Field(le=MOST_SAMPLES)] = 1
    stream: bool = False
    stream_options: StreamOptions = Field(
        StreamOptions(), description='{"include_usage": true} or false'
    )
    logprobs: Annotated[Natural, Field(le=20)] | None = None
    echo: bool = False
    stop: Stop | Stops = Field(
        [], description="a text or at most 16 texts, each of 1 to 500 characters"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    best_of: int | None = None

    tokens_drawn: Annotated[Natural, Field(le=10**9)] = 0
    top_k: Annotated[int, Field(ge=-1, le=10**9)] = 0
    ignore_eos: bool = False
    cache_prompt: bool = False
    truncate_prompt_tokens: Annotated[Count, Field(le=10**9)] | Literal[-1] | None = None
    return_token_ids: bool = False

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if options.model_fields_set and not info.data.get("stream"):
            raise ValueError("stream_options needs stream=true")
        return options

    @field_validator("best_of")
    @classmethod
    def _equal_to_n(cls, best_of: int, info: ValidationInfo) -> int:
        if best_of != info.data.get("n"):
            raise ValueError("best_of is not supported: leave it out, or make it equal to n")
        return best_of

    @field_validator("seed")
    @classmethod
    def _minus_one_is_none(cls, seed: int) -> int | None:
        if seed == -1:
            return None
        return seed

    @field_validator("tokens_drawn")
    @classmethod
    def _with_a_seed(cls, count: int, info: ValidationInfo) -> int:
        if count and info.data.get("seed") is None:
            raise ValueError("tokens_drawn needs the seed that the tokens were drawn with")
        return count

    @field_validator("top_k")
    @classmethod
    def _minus_one_is_all(cls, top_k: int) -> int:
        return max(top_k, 0)


def read_params(body: dict[str, Any], limit: int) -> Params:
    """The checked fields of a request. limit: its largest max_tokens. Raises ApiError."""
    fields = {}
    for name, value in body.items():
        if name not in NEUTRAL and name not in IGNORED:
            fields[name] = value
        elif name in NEUTRAL and value not in (NEUTRAL[name], None):
            neutral = json.dumps(NEUTRAL[name])
            message = f"{name}={brief(value)} is not supported: leave it out, or send {neutral}"
            raise ApiError(400, message, name)
    params = Params.read(fields)
    if "max_tokens" not in params.model_fields_set:
        params.max_tokens = min(params.max_tokens, limit)
    if params.max_tokens > limit:
        message = f"max_tokens={brief(params.max_tokens)} is more than this server makes, {limit}"
        raise ApiError(400, message, "max_tokens")
    return params


# ---- one call


def encode(text: str, tokenizer: Tokenizer, field: str = "prompt") -> list[int]:
    """A text's ids. Raises ApiError for one that the tokenizer cannot spell."""
    try:
        return tokenizer.encode(text)
    except UserError as error:
        raise ApiError(400, str(error), field) from None


def _is_ids(prompt: Any) -> bool:
    is_list = isinstance(prompt, list) and bool(prompt)
    return is_list and all(type(token) is int for token in prompt)  # True is no token


def _prompt_ids(prompt: Any, tokenizer: Tokenizer) -> list[int]:
    """The ids of one prompt. An empty text stands for the token that begins one, or a new line."""
    if _is_ids(prompt):
        return prompt
    if not isinstance(prompt, str):
        works = "text, token ids, or a list of several such prompts, none of them empty"
        raise ApiError(400, f"prompt must be {works}, not {brief(prompt)}", "prompt")
    if prompt:
        return encode(prompt, tokenizer)
    start = start_of_text(tokenizer.spec)
    if start is not None:
        return [start]
    try:
        return encode("\n", tokenizer)
    except ApiError:
        message = "prompt is empty, and this model has no token to begin with"
        raise ApiError(400, message, "prompt") from None


def used_prompt(request: Request) -> list[int]:
    """The tokens of a prompt that the model saw, once it has seen them."""
    return request.prompt[-(request.cached + request.computed) :]


def shown(raw: bytes) -> str:
    """A token's bytes as text; those that are no UTF-8 by themselves as bytes:\\xe2\\x80."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _number(logprob: float | None) -> float | None:
    """A logarithm as JSON has it."""
    if logprob is None:
        return None
    if logprob > LEAST:
        return round(logprob, 6)
    return LEAST


class Completion:
    """
    One call: a request to the engine for every prompt, and JSON from the pieces that come of them.

    name: the model's. most: samples of one call. client: who asks.
    Raises ApiError for prompts that are none, and for too many.
    """

    def __init__(
        self, params: Params, name: str, tokenizer: Tokenizer, most: int, client: str = ""
    ) -> None:
        self.params = params
        self.tokenizer = tokenizer
        prompts = params.prompt
        if not isinstance(prompts, list) or _is_ids(prompts):
            prompts = [prompts]
        if len(prompts) * params.n > most:
            count = f"{len(prompts)} prompts with n={brief(params.n)}"
            message = f"{count} are more than {most} samples, the most of a request"
            raise ApiError(400, message, "prompt" if len(prompts) > most else "n")
        # The texts, where they were given; None for ids.
        self.texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        encoded = [_prompt_ids(prompt, tokenizer) for prompt in prompts]
        if not prompts or 0 < self.texts.count(None) < len(prompts):
            raise ApiError(400, "prompt must be one or more prompts of one kind", "prompt")
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        ends = ()
        if not params.ignore_eos:
            ends = ends_of_text(tokenizer.spec)
        stops = params.stop
        if isinstance(stops, str):
            stops = [stops]
        sampling = Sampling(
            max_new_tokens=params.max_tokens, temperature=params.temperature, top_k=params.top_k,
            top_p=params.top_p, stop=tuple(stops) or None, ends=ends,
        )
        self.requests = []
        for ids in encoded:
            seed = params.seed
            if seed is None:
                seed = secrets.randbits(62)
            self.requests.append(Request(
                ids, sampling, n=params.n, seed=seed, tokens_drawn=params.tokens_drawn,
                logprobs=params.logprobs,
                prompt_logprobs=params.echo and params.logprobs is not None,
                cache_prompt=params.cache_prompt, window=params.truncate_prompt_tokens,
                client=client, call=self.head["id"],
            ))
        self.made: dict[int, int] = {}  # tokens by choice
        self.places: dict[int, int] = {}  # of each choice's next token, from the prompt's start on

    def chunk(self, piece: Piece, rate: float) -> dict[str, Any]:
        """What a stream sends for a piece. rate: tokens/s of this call so far."""
        chunk = {**self.head, "choices": [self._choice(piece, rate)]}
        if self.params.stream_options.include_usage:
            chunk["usage"] = None  # it comes last
        return chunk

    def last_chunk(self) -> dict[str, Any]:
        """The chunk of the usage."""
        return {**self.head, "choices": [], "usage": self._usage()}

    def whole(self, pieces: list[Piece], rate: float) -> dict[str, Any]:
        """The response of a call that does not stream, from all of its pieces."""
        samples: dict[int, list[Piece]] = {}
        for piece in pieces:
            samples.setdefault(self._index(piece), []).append(piece)
        choices = []
        for _, parts in sorted(samples.items()):
            text = "".join(part.text for part in parts)
            tokens = tuple(token for part in parts for token in part.tokens)
            piece = dataclasses.replace(parts[-1], text=text, tokens=tokens)
            choices.append(self._choice(piece, rate))
        return {**self.head, "choices": choices, "usage": self._usage()}

    def _index(self, piece: Piece) -> int:
        return self.requests.index(piece.request) * self.params.n + piece.index

    def _choice(self, piece: Piece, rate: float) -> dict[str, Any]:
        """What a piece adds to its choice."""
        index = self._index(piece)
        first = index not in self.made
        self.made[index] = piece.made
        text = piece.text
        tokens = piece.tokens
        if first and (self.params.echo or self.params.logprobs is not None):
            prompt, before = self._prompt_text(piece.request)
            self.places[index] = len(prompt)
            if self.params.echo:
                self.places[index] = -before
                text = prompt + text
                tokens = (*piece.request.prompt_tokens, *tokens)
        choice = {"text": text, "index": index, "logprobs": None}
        if self.params.logprobs is not None:
            choice["logprobs"] = {
                "tokens": [shown(token.raw) for token in tokens],
                "token_logprobs": [_number(token.logprob) for token in tokens],
                "top_logprobs": [self._top_logprobs(token) for token in tokens],
                "text_offset": [self._offset(index, token) for token in tokens],
            }
        choice["finish_reason"] = piece.finish
        if self.params.return_token_ids:
            choice["nanomla"] = self._details(piece, rate, first)
        return choice

    def _usage(self) -> dict[str, Any]:
        """Tokens of the prompts, each counted once, and of all samples."""
        prompt = sum(len(used_prompt(request)) for request in self.requests)
        made = sum(self.made.values())
        cached = sum(request.cached for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _spell(self, tokens: list[int], before: Sequence[int] = ()) -> str:
        """The text of tokens that follow others, without a last character that is not finished."""
        decoder = StreamDecoder(self.tokenizer, before)
        return "".join(decoder.push(token) for token in tokens)

    def _prompt_text(self, request: Request) -> tuple[str, int]:
        """
        A prompt's text, and how many characters its tokens spell before that: the token that a
        tokenizer puts before every text is no part of what was given. A last character that is
        not finished is the first of the sample's text.
        """
        text = self.texts[self.requests.index(request)]
        used = used_prompt(request)
        spelled = self._spell(used, request.prompt[: -len(used)])
        if text is None or len(used) < len(request.prompt):
            return spelled, 0
        return text, max(len(spelled) - len(text), 0)

    def _offset(self, index: int, token: Token) -> int:
        """Where a token begins, which follows the one before."""
        place = self.places[index]
        self.places[index] += token.chars
        broken = token.chars - len(token.text)  # U+FFFD for bytes before it that are no character
        return max(place + max(broken, 0), 0)

    def _top_logprobs(self, token: Token) -> dict[str, float | None] | None:
        """The likeliest tokens by their spelling, and the token itself."""
        if token.logprob is None:
            return None  # nothing came before it
        top: dict[str, float | None] = {}
        for id, logprob in token.top:
            # Of two with one spelling, the likelier comes first.
            top.setdefault(shown(self.tokenizer.token_bytes(id)), _number(logprob))
        top.setdefault(shown(token.raw), _number(token.logprob))
        return top

    def _details(self, piece: Piece, rate: float, first: bool) -> dict[str, Any]:
        """Our own part of a choice: token ids with their alternatives, and the cache."""
        details: dict[str, Any] = {
            "tokens": [self._token(token) for token in piece.tokens if not token.is_end],
            "cache": {"tokens": piece.held, "bytes": piece.nbytes},
        }
        if first:
            request = piece.request
            details["prompt"] = {
                "ids": used_prompt(request),
                "text": self._spell(request.prompt),
                "cached": request.cached,
                "computed": request.computed,
            }
        details["tokens_per_s"] = round(rate, 1)
        return details

    def _token(self, token: Token) -> dict[str, Any]:
        top = []
        for id, logprob in token.top:
            text = self.tokenizer.token_bytes(id).decode("utf-8", "replace")
            top.append([id, text, _number(logprob)])
        logprob = _number(token.logprob)
        return {"id": token.id, "text": token.text, "logprob": logprob, "top": top}
