"""
The web application of tools.serve: its routes, and the checks that every request passes.

OpenAI's /v1/completions and /v1/models, /health, /metrics, the page's files, and what the page asks
for below /api/. No path of a request reaches the file system: a route is made of each of the page's
files at the start, models are looked up by name, and a log is that of a model that was opened.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import h11
import prometheus_client as prometheus
import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanomla.batch import Piece
from nanomla.checks import Natural, brief
from nanomla.errors import UserError, say_unexpected
from nanomla.files import json_text, parse_json
from nanomla.runlog import read_log
from nanomla.serve.listener import PATIENCE, Listener
from nanomla.serve.protocol import ApiError, Completion, Fields, encode, read_params
from nanomla.serve.stepper import LEFT, Call, Served, Stepper

PAGE = Path(__file__).resolve().parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
}
HEADERS = [  # of every response
    (b"content-security-policy", b"default-src 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
ERRORS = {404: "there is nothing here", 405: "another method is needed here"}
JSON = "application/json"
NOT_STORED = {"Cache-Control": "no-store"}
LARGEST_BODY = 2**20  # bytes
GATHER = 0.02  # seconds between two writes to a client, as each costs more than a token's JSON
LONGEST_PICTURE = 256  # tokens of /api/attention
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)  # as a socket of IPv6 sees 127.0.0.1
    return (mapped or address).is_loopback


def without_port(host: str) -> str:
    """The name in a Host header."""
    return re.sub(":[0-9]{1,5}$", "", host)


def as_json(value: Any, status: int = 200) -> Response:
    """A response of the API."""
    return Response(compact(value), status, NOT_STORED, JSON)


def compact(value: Any) -> str:
    """A value as JSON without blanks; settings of a run that JSON has no type for become text."""
    return json_text(value, separators=(",", ":"), default=str)


async def as_error(request: Request, error: Exception) -> Response:
    """The response that an error is. A mistake of ours is printed, and the server goes on."""
    headers = {}
    if isinstance(error, HTTPException):  # of Starlette's routes
        headers = error.headers or {}
        error = ApiError(error.status_code, ERRORS.get(error.status_code, error.detail))
    if not isinstance(error, ApiError):
        name = f"request {request.scope['request_id']}"
        say_unexpected(f"{name}: not expected, please report it", error)
        error = ApiError(500, f"an error of the server, which it has printed as that of {name}")
    response = as_json(error.body(), error.status)
    response.headers.update(headers)
    if error.status == 503:
        response.headers["Retry-After"] = "1"
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


# ---- what every request passes


class Guard:
    """
    The outermost layer: adds the headers of every response, and refuses requests that come from web
    pages elsewhere or without the token. A client that does not read its response is cut off.

    public_host: the name that browsers use if the server is behind a proxy on this machine.
    public: paths that need no token. draining: the server is shutting down.
    In the scope of a request, "at_end" is an ExitStack that is closed when it has ended, in
    whatever way, "caller" the address that it came from, by which clients take turns, and
    "request_id" what its response and an error of it are called.
    """

    def __init__(
        self, app: ASGIApp, listener: Listener, host: str, public_host: str | None,
        token: str | None, public: set[str],
    ) -> None:
        self.app = app
        self.listener = listener
        self.public_host = public_host
        self.token = token
        self.public = public
        self.draining = False
        self.hosts = None  # that a request may name; None: any
        if is_loopback(host):
            self.hosts = ["localhost", "127.0.0.1", "[::1]", host, f"[{host}]"]
            if public_host is not None:
                self.hosts.append(public_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope["client"]
        loop = asyncio.get_running_loop()
        request = Request(scope)
        scope["caller"] = self._caller(request)
        scope["request_id"] = request.headers.get("x-request-id", "")
        if not re.fullmatch("[!-~]{1,128}", scope["request_id"]):
            scope["request_id"] = secrets.token_hex(16)
        headers = [*HEADERS, (b"x-request-id", scope["request_id"].encode())]

        async def send_in_time(message: Message) -> None:
            """uvicorn waits here while too much of what was sent before has not been read."""
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            timer = loop.call_later(PATIENCE, self.listener.hang_up, client)
            try:
                await send(message)
            except h11.LocalProtocolError:
                pass  # uvicorn has refused the rest of the request itself
            finally:
                timer.cancel()

        app = self.app
        try:
            self._check(request)
        except ApiError as error:
            app = await as_error(request, error)
        with self.listener.answering(client), contextlib.ExitStack() as at_end:
            scope["at_end"] = at_end
            await app(scope, receive, send_in_time)

    def _caller(self, request: Request) -> str:
        """
        The address of the client that a request comes from. A proxy on this machine adds it behind
        those that the client itself may have made up.
        """
        address = ""  # of a client that has left already
        if request.scope["client"] is not None:
            address = request.scope["client"][0]
        if self.public_host is not None and is_loopback(address):
            forwarded = ",".join(request.headers.getlist("x-forwarded-for"))
            return forwarded.rpartition(",")[2].strip() or address
        return address

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "").lower()
        path = request.scope["path"]
        if self.hosts is not None and without_port(host) not in self.hosts:
            raise ApiError(403, f"the Host header {brief(host)} is not this server's")
        for origin in request.headers.getlist("origin"):
            scheme, _, site = origin.lower().partition("://")
            own = site == host or without_port(site) == self.public_host
            if scheme not in ("http", "https") or not own:
                raise ApiError(403, f"requests of web pages of {brief(origin)} are refused")
        if self.token is not None and path not in self.public:
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(token.strip().encode("latin-1"), self.token.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(401, "give the server's token: Authorization: Bearer TOKEN")
        if self.draining and path != "/metrics":
            raise ApiError(503, "the server is shutting down", code="shutting_down")


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises ApiError if it is none, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON or "content-encoding" in request.headers:
        raise ApiError(415, f"send plain JSON, with the header Content-Type: {JSON}")
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise ApiError(413, f"the request has more than {LARGEST_BODY:,} bytes")
        return parse_json(bytes(body), "the request")
    except TimeoutError:
        raise ApiError(408, "the request took too long to arrive") from None
    except ClientDisconnect:
        raise ApiError(LEFT, "the client has left") from None
    except UserError as error:
        raise ApiError(400, str(error)) from None


# ---- metrics


class Metrics:
    """What /metrics tells: counts of what has ended, and the state of the batches."""

    def __init__(self, served: list[Served]) -> None:
        self.served = served
        self.registry = prometheus.CollectorRegistry()
        where = {"registry": self.registry, "namespace": "nanomla"}
        self.requests = prometheus.Counter(
            "requests", "Completion requests by HTTP status; 499: the client left",
            ["model", "status"], **where,
        )
        self.samples = prometheus.Counter(
            "samples", "Samples by how they ended", ["model", "finish"], **where
        )
        self.first_token = prometheus.Histogram(
            "time_to_first_token_seconds", "From a request to its first token", ["model"],
            buckets=SECONDS, **where,
        )
        self.steps = prometheus.Histogram(
            "step_seconds", "One step of a model's batch", ["model"], buckets=SECONDS, **where
        )
        for one in served:
            self.steps.labels(one.name)  # is shown before its first step too
        self.registry.register(self)
        prometheus.ProcessCollector(registry=self.registry)

    def step(self, served: Served, seconds: float, pieces: list[Piece]) -> None:
        """Count a step, and the samples that end with it."""
        self.steps.labels(served.name).observe(seconds)
        for piece in pieces:
            if piece.finish is not None:
                self.samples.labels(served.name, piece.finish).inc()

    def end(self, call: Call) -> None:
        """Count what has come of a call."""
        name = call.served.name
        self.requests.labels(name, call.status).inc()
        if call.first_token:
            self.first_token.labels(name).observe(call.first_token)
        if call.left:
            finish = "cancelled" if call.status == LEFT else "error"
            self.samples.labels(name, finish).inc(call.left)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        for kind, name, text, value in (
            (CounterMetricFamily, "tokens", "Tokens generated", lambda s: s.batch.tokens_made),
            (CounterMetricFamily, "prompt_tokens", "Prompt tokens", lambda s: s.prompt_tokens),
            (GaugeMetricFamily, "waiting_requests", "Queue", lambda s: len(s.batch.waiting)),
            (GaugeMetricFamily, "active_rows", "Rows in use", lambda s: s.batch.active),
            (GaugeMetricFamily, "rows", "Rows", lambda s: s.batch.rows),
            (GaugeMetricFamily, "cache_used_bytes", "Cache", lambda s: s.batch.cache_bytes),
            (GaugeMetricFamily, "cache_bytes", "Allocated", lambda s: s.batch.cache.nbytes),
        ):
            family = kind(f"nanomla_{name}", text, labels=["model"])
            for one in self.served:
                family.add_metric([one.name], value(one))
            yield family


# ---- routes


class TokenizeFields(Fields):
    """The fields of /api/tokenize."""

    text: str
    model: str | None = None


class AttentionFields(Fields):
    """The fields of /api/attention."""

    tokens: list
    layer: Natural = 0
    model: str | None = None


class Site:
    """The routes and what they need."""

    def __init__(self, stepper: Stepper, max_tokens: int) -> None:
        self.stepper = stepper
        self.served = stepper.served
        self.max_tokens = max_tokens
        self.metrics = Metrics(list(self.served.values()))
        stepper.on_step = self.metrics.step

    def app(
        self, listener: Listener, host: str, public_host: str | None, token: str | None
    ) -> Guard:
        """The application, with the checks of every request around it."""
        files = {}  # of the page, as responses
        for suffix, kind in TYPES.items():
            for file in PAGE.glob(f"*{suffix}"):
                headers = {"Cache-Control": "no-cache"}
                files[f"/{file.name}"] = Response(file.read_bytes(), 200, headers, kind)
        files["/"] = files["/index.html"]
        routes = [
            *(Route(path, response, methods=["GET"]) for path, response in files.items()),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/api/log", self.log),
            Route("/api/attention", self.attention, methods=["POST"]),
            Route("/api/tokenize", self.tokenize, methods=["POST"]),
        ]
        handlers = dict.fromkeys((ApiError, HTTPException, Exception), as_error)
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        public = {"/health", *files}
        return Guard(app, listener, host, public_host, token, public)

    def find(self, name: str | None) -> Served:
        """The model of that name; None: the only one. Raises ApiError."""
        if name is None and len(self.served) == 1:
            return next(iter(self.served.values()))
        names = ", ".join(self.served)
        if name is None:
            raise ApiError(400, f"model is missing; the models here are {names}", "model")
        if name not in self.served:
            message = f"there is no model {brief(name)}; the models here are {names}"
            raise ApiError(404, message, "model", "model_not_found")
        return self.served[name]

    async def health(self, request: Request) -> Response:
        """That requests are taken; the guard answers while they are not."""
        return as_json({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus's text."""
        text = prometheus.generate_latest(self.metrics.registry)
        return Response(text, 200, NOT_STORED, prometheus.CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """OpenAI's list of models, or the one that is named."""
        if "name" in request.path_params:
            return as_json(_model_object(self.find(request.path_params["name"])))
        data = [_model_object(served) for served in self.served.values()]
        return as_json({"object": "list", "data": data})

    # ---- completions

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions."""
        name = ""
        try:
            params = read_params(await read_body(request), self.max_tokens)
            served = self.find(params.model)
            name = served.name
            if params.truncate_prompt_tokens == -1:  # the longest that fits, as in vLLM
                params.truncate_prompt_tokens = served.batch.max_len
            # Beside the loop, because a long text takes long to turn into tokens.
            client = request.scope["caller"]
            arguments = (params, name, served.tokenizer, served.most, client)
            completion = await asyncio.to_thread(Completion, *arguments)
            _check(served, completion)
            call = Call(served, completion.requests, client)
            self.stepper.open(call)
        except ApiError as error:
            self.metrics.requests.labels(name, error.status).inc()
            raise
        # Whether the client stays or leaves, this is done at the end, the last first.
        request.scope["at_end"].callback(self.stepper.close, call)
        request.scope["at_end"].callback(self.metrics.end, call)
        if params.stream:
            headers = {**NOT_STORED, "X-Accel-Buffering": "no"}
            events = self._events(call, completion)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        return await self._whole(request, call, completion)

    async def _whole(self, request: Request, call: Call, completion: Completion) -> Response:
        """The response of a call that does not stream."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            call.fail(ApiError(LEFT, "the client has left"))

        watcher = asyncio.create_task(watch())
        try:
            await call.over.wait()
            if call.error:
                raise call.error
            call.status = 200
            return as_json(completion.whole(call.take(), call.rate))
        finally:
            watcher.cancel()

    async def _events(self, call: Call, completion: Completion) -> AsyncIterator[bytes]:
        """A call's chunks as events; those that come within GATHER are sent together."""
        over = False
        while not over:
            await call.news.wait()
            over = call.over.is_set()
            chunks = [completion.chunk(piece, call.rate) for piece in call.take()]
            yield b"".join(map(_event, chunks))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GATHER):
                    await call.over.wait()
        if call.error:
            yield _event(call.error.body())
        else:
            if completion.params.stream_options.include_usage:
                yield _event(completion.last_chunk())
            call.status = 200
        yield b"data: [DONE]\n\n"

    # ---- what the page asks for

    async def log(self, request: Request) -> Response:
        """A run's settings, and its log from an entry on."""
        served = self.find(request.query_params.get("model"))
        after = request.query_params.get("after", "0")
        if not re.fullmatch("[0-9]{1,12}", after):
            raise ApiError(400, f"after={brief(after)} must be a number of entries", "after")
        start = int(after)
        entries = []
        if served.log.is_file():
            entries = await asyncio.to_thread(read_log, served.log)
        answer = {
            "settings": served.settings,
            "entries": entries[start:],
            "next": len(entries),
            "total": len(entries),
        }
        if start > len(entries):
            answer |= {"entries": entries, "restarted": True}
        return as_json(answer)

    async def attention(self, request: Request) -> Response:
        """The attention weights of one layer over some tokens, while the model is not busy."""
        fields = AttentionFields.read(await read_body(request))
        served = self.find(fields.model)
        config = served.model.config
        tokens = fields.tokens[-min(config.block_size, LONGEST_PICTURE) :]
        if not tokens or not all(type(t) is int and 0 <= t < config.vocab_size for t in tokens):
            works = f"at least one token id from 0 to {config.vocab_size - 1}"
            raise ApiError(400, f"tokens must be {works}", "tokens")
        if fields.layer >= config.n_layer:
            works = f"a layer from 0 to {config.n_layer - 1}"
            raise ApiError(400, f"layer={brief(fields.layer)} must be {works}", "layer")

        def weights() -> list:
            if served.batch.busy:
                message = f"{served.name} is generating; ask again when it has finished"
                raise ApiError(409, message, code="busy")
            idx = torch.tensor([tokens], device=served.model.lm_head.weight.device)
            heads = served.model.attention_weights(idx, fields.layer)[0]
            return heads.cpu().double().mul(1e4).round().div(1e4).tolist()

        loop = asyncio.get_running_loop()
        heads = await loop.run_in_executor(self.stepper.engine, weights)
        texts = [served.tokenizer.decode([token]) for token in tokens]
        return as_json({"tokens": texts, "heads": heads})

    async def tokenize(self, request: Request) -> Response:
        """A text's tokens."""
        fields = TokenizeFields.read(await read_body(request))
        tokenizer = self.find(fields.model).tokenizer

        def tokens() -> dict[str, list]:
            ids = encode(fields.text, tokenizer, "text")
            return {"ids": ids, "tokens": [tokenizer.decode([token]) for token in ids]}

        return as_json(await asyncio.to_thread(tokens))


def _check(served: Served, completion: Completion) -> None:
    """Raise ApiError for what a model's batch cannot do, in the words of the protocol."""
    try:
        for request in completion.requests:
            served.batch.check(request)
    except UserError as error:
        message = str(error).replace("window=", "truncate_prompt_tokens=")
        name, equals, _ = message.partition("=")
        raise ApiError(400, message, name if equals else "prompt") from None


def _model_object(served: Served) -> dict[str, Any]:
    """OpenAI's object of a model, with ours in it."""
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "nanomla",
        "nanomla": served.about,
    }


def _event(value: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % compact(value).encode()
