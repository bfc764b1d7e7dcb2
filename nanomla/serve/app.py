"""
The web application of tools.serve: its routes, and the checks that every request passes.

OpenAI's /v1/completions and /v1/models, /health, /metrics, the page's files, and what the page asks
for below /api/. No path of a request reaches the file system: a table of the page's files is made
at the start, models are looked up by name, and a log is that of a model that was opened.
"""

import asyncio
import hmac
import ipaddress
import json
import re
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
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

from nanomla.checks import Natural, brief
from nanomla.errors import UserError
from nanomla.files import parse_json
from nanomla.runlog import read_log
from nanomla.serve.listener import PATIENCE, Listener
from nanomla.serve.protocol import (
    ApiError,
    Fields,
    Params,
    Reply,
    encode,
    make_requests,
    read_fields,
    read_params,
)
from nanomla.serve.stepper import Call, Served, Stepper

PAGE = Path(__file__).resolve().parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
}  # fmt: skip
HEADERS = {  # of every response
    "Content-Security-Policy": "default-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
NOTHING = "there is nothing here"
JSON = "application/json"
LARGEST_BODY = 2**20  # bytes
PART = 2**16  # bytes of a response that uvicorn gets at a time
LEFT = 499  # what metrics call the status of a request whose client left
LONGEST_PICTURE = 256  # tokens of /api/attention
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host's address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response of the API. Numbers that JSON does not have must have been replaced before."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Response(text, status, {"Cache-Control": "no-store", **(headers or {})}, JSON)


def as_error(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    """The response that an error is."""
    headers = dict(headers or {})
    if error.status == 503:
        headers["Retry-After"] = "1"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return as_json(error.body(), error.status, headers)


# ---- what every request passes


class Guard:
    """
    The outermost layer: adds the headers of every response, and refuses requests that come from web
    pages elsewhere or without the token. A client that does not read its response is cut off.

    public: paths that need no token. draining: the server is shutting down.
    """

    def __init__(
        self, app: ASGIApp, listener: Listener, host: str, token: str | None, public: set[str]
    ) -> None:
        self.app = app
        self.listener = listener
        self.token = token
        self.public = public
        self.draining = False
        self.hosts = None  # that a request may name; None: any
        if is_loopback(host):
            own = re.escape(f"[{host}]" if ":" in host else host)
            pattern = rf"(localhost|127\.0\.0\.1|\[::1\]|{own})(:[0-9]{{1,5}})?"
            self.hosts = re.compile(pattern, re.IGNORECASE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope["client"]
        loop = asyncio.get_running_loop()

        async def send_in_time(message: Message) -> None:
            """uvicorn waits here while too much of what was sent before has not been read."""
            timer = loop.call_later(PATIENCE, self.listener.hang_up, client)
            try:
                await send(message)
            except h11.LocalProtocolError:
                pass  # uvicorn has refused the rest of the request itself
            finally:
                timer.cancel()

        async def send_in_parts(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *RAW_HEADERS]
            body = message.get("body", b"")
            starts = range(0, len(body), PART)
            for start in starts[:-1]:
                part = body[start : start + PART]
                await send_in_time({**message, "body": part, "more_body": True})
            if starts:
                message["body"] = body[starts[-1] :]
            await send_in_time(message)

        app = self.app
        try:
            self._check(Request(scope))
        except ApiError as error:
            app = as_error(error)
        with self.listener.answering(client):
            await app(scope, receive, send_in_parts)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        path = request.scope["path"]
        if not path.isprintable():  # routes would take a path that ends in a new line
            raise ApiError(404, NOTHING)
        if self.hosts is not None and not self.hosts.fullmatch(host):
            raise ApiError(403, f"the Host header {brief(host)} is not this server's")
        for origin in request.headers.getlist("origin"):
            if origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
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
    too_large = ApiError(413, f"the request has more than {LARGEST_BODY:,} bytes")
    if int(request.headers.get("content-length", "0")) > LARGEST_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                body += part
                if len(body) > LARGEST_BODY:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, "the request took too long to arrive") from None
    except ClientDisconnect:
        raise ApiError(LEFT, "the client has left") from None
    try:
        return parse_json(bytes(body), "the request")
    except UserError as error:
        raise ApiError(400, str(error)) from None


class TokenizeFields(Fields):
    """The fields of /api/tokenize."""

    text: str
    model: str | None = None


class AttentionFields(Fields):
    """The fields of /api/attention."""

    tokens: list
    layer: Natural = 0
    model: str | None = None


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
        )  # fmt: skip
        self.samples = prometheus.Counter(
            "samples", "Samples by how they ended", ["model", "finish"], **where
        )
        self.first_token = prometheus.Histogram(
            "time_to_first_token_seconds", "From a request to its first token", ["model"],
            buckets=SECONDS, **where,
        )  # fmt: skip
        self.steps = prometheus.Histogram(
            "step_seconds", "One step of a model's batch", ["model"], buckets=SECONDS, **where
        )
        for one in served:
            self.steps.labels(one.name)  # is shown before its first step too
        self.registry.register(self)
        prometheus.ProcessCollector(registry=self.registry)

    def step(self, served: Served, seconds: float) -> None:
        """Count a step."""
        self.steps.labels(served.name).observe(seconds)

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


class EventStream(StreamingResponse):
    """Server-sent events. `close` is called at the end, whether the client stays or leaves."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, 200, headers, "text/event-stream")
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


class Site:
    """The routes and what they need."""

    def __init__(self, stepper: Stepper, max_tokens: int) -> None:
        self.stepper = stepper
        self.served = stepper.served
        self.max_tokens = max_tokens
        self.metrics = Metrics(list(self.served.values()))
        stepper.on_step = self.metrics.step
        self.logs: dict[Path, tuple[Any, list]] = {}  # that were read: their state and entries
        self.drawing = asyncio.Lock()  # while attention is computed
        self.files = {}  # of the page: content and type, by path
        for file in sorted(PAGE.glob("*")):
            if file.suffix in TYPES:
                self.files[f"/{file.name}"] = (file.read_bytes(), TYPES[file.suffix])
        self.files["/"] = self.files["/index.html"]

    def app(self, listener: Listener, host: str, token: str | None) -> Guard:
        """The application, with the checks of every request around it."""
        routes = [
            *(Route(path, self.file) for path in self.files),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/api/log", self.log),
            Route("/api/attention", self.attention, methods=["POST"]),
            Route("/api/tokenize", self.tokenize, methods=["POST"]),
        ]
        handlers = {
            ApiError: self.api_error,
            HTTPException: self.http_error,
            Exception: self.server_error,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Guard(app, listener, host, token, public={"/", "/health", *self.files})

    async def api_error(self, request: Request, error: ApiError) -> Response:
        """Our own errors."""
        return as_error(error)

    async def server_error(self, request: Request, error: Exception) -> Response:
        """A mistake of ours: it is printed, the request fails, and the server goes on."""
        traceback.print_exception(error, file=sys.stderr)
        return as_error(ApiError(500, "an error of the server, which it has printed"))

    async def http_error(self, request: Request, error: HTTPException) -> Response:
        """Starlette's 404 and 405 as OpenAI's errors."""
        words = {404: NOTHING, 405: "another method is needed here"}
        message = words.get(error.status_code, error.detail)
        return as_error(ApiError(error.status_code, message), error.headers)

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

    async def file(self, request: Request) -> Response:
        """A file of the page."""
        content, kind = self.files[request.scope["path"]]  # a route is made of every one of them
        return Response(content, headers={"Cache-Control": "no-cache"}, media_type=kind)

    async def health(self, request: Request) -> Response:
        """Whether requests are taken; the guard answers while they are not."""
        if self.stepper.failure.done():
            raise ApiError(503, "the engine has failed")
        return as_json({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus's text."""
        text = prometheus.generate_latest(self.metrics.registry)
        headers = {"Cache-Control": "no-store"}
        return Response(text, 200, headers, prometheus.CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """OpenAI's list of models."""
        data = [_model_object(served) for served in self.served.values()]
        return as_json({"object": "list", "data": data})

    async def one_model(self, request: Request) -> Response:
        """One of them."""
        return as_json(_model_object(self.find(request.path_params["name"])))

    # ---- completions

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions."""
        name = ""
        try:
            body = await read_body(request)
            params = read_params(body, self.max_tokens)
            served = self.find(params.model)
            name = served.name
            call, reply = await self._open(served, params)
        except ApiError as error:
            self._count_request(name, error.status)
            raise
        if params.stream:
            return EventStream(self._events(call, reply), close=lambda: self._close(call))
        return await self._whole(request, call, reply)

    async def _open(self, served: Served, params: Params) -> tuple[Call, Reply]:
        """Let the engine begin. Raises ApiError for what it cannot do."""
        # Beside the loop, because a long text takes long to turn into tokens.
        arguments = (params, served.tokenizer, served.most)
        requests, texts = await asyncio.to_thread(make_requests, *arguments)
        for one in requests:
            try:
                served.batch.check(one)
            except UserError as error:
                message = str(error).replace("window=", "truncate_prompt_tokens=")
                name, equals, _ = message.partition("=")
                raise ApiError(400, message, name if equals else "prompt") from None
        call = Call(served, requests, paced=params.stream)
        self.stepper.open(call)
        return call, Reply(params, requests, texts, served.name, served.tokenizer)

    async def _whole(self, request: Request, call: Call, reply: Reply) -> Response:
        """The response of a call that does not stream."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            call.leave()

        watcher = asyncio.create_task(watch())
        try:
            while pieces := await call.take():
                for piece, rate in pieces:
                    reply.add(piece, rate)
                    self._count_sample(call, piece.finish)
            if call.gone:
                return Response(status_code=LEFT)
            call.status = 200
            return as_json(reply.whole())
        except ApiError as error:
            call.status = error.status
            raise
        finally:
            watcher.cancel()
            self._close(call)

    async def _events(self, call: Call, reply: Reply) -> AsyncIterator[bytes]:
        """A call's chunks as events; those that wait for a slow client are sent together."""
        try:
            while pieces := await call.take():
                events = []
                for piece, rate in pieces:
                    self._count_sample(call, piece.finish)
                    delta = reply.add(piece, rate)
                    if delta is not None:
                        events.append(_event(reply.chunk(delta)))
                if events:
                    yield b"".join(events)
            if reply.params.stream_options.include_usage:
                yield _event(reply.last_chunk())
            call.status = 200
        except ApiError as error:
            call.status = error.status
            yield _event(error.body())
        yield b"data: [DONE]\n\n"

    def _count_request(self, model: str, status: int) -> None:
        self.metrics.requests.labels(model, str(status)).inc()

    def _count_sample(self, call: Call, finish: str | None) -> None:
        if finish is not None:
            self.metrics.samples.labels(call.served.name, finish).inc()

    def _close(self, call: Call) -> None:
        """Count what has come of a call, and free its rows."""
        name = call.served.name
        self._count_request(name, call.status)
        if call.first_token:
            self.metrics.first_token.labels(name).observe(call.first_token)
        if call.left:
            finish = "error" if call.error else "cancelled"
            self.metrics.samples.labels(name, finish).inc(call.left)
        self.stepper.close(call)

    # ---- what the page asks for

    async def log(self, request: Request) -> Response:
        """A run's settings, and its log from an entry on."""
        served = self.find(request.query_params.get("model"))
        after = request.query_params.get("after", "0")
        if not re.fullmatch("[0-9]{1,12}", after):
            raise ApiError(400, f"after={brief(after)} must be a number of entries", "after")
        entries = await asyncio.to_thread(self._read_log, served)
        start = int(after)
        restarted = start > len(entries)
        if restarted:
            start = 0
        answer = {
            "settings": as_json_has_it(served.settings),
            "entries": entries[start:],
            "next": len(entries),
            "total": len(entries),
        }
        if restarted:
            answer["restarted"] = True
        return as_json(answer)

    def _read_log(self, served: Served) -> list[dict[str, Any]]:
        """The entries of a log, read again if the file has changed since the last time."""
        path = served.log
        if not path.is_file():
            return []
        file = path.stat()
        state = (file.st_mtime_ns, file.st_size, file.st_ino)
        if path not in self.logs or self.logs[path][0] != state:
            self.logs[path] = (state, as_json_has_it(read_log(path)))
        return self.logs[path][1]

    async def attention(self, request: Request) -> Response:
        """The attention weights of one layer over some tokens, while the model is not busy."""
        fields = read_fields(AttentionFields, await read_body(request))
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
            try:
                idx = torch.tensor([tokens], device=served.model.lm_head.weight.device)
                heads = served.model.attention_weights(idx, fields.layer)[0]
            except (UserError, ValueError) as error:
                raise ApiError(400, str(error)) from None
            return heads.cpu().double().mul(1e4).round().div(1e4).tolist()

        async with self.drawing:  # completions wait for a picture, so one at a time
            heads = await self.stepper.run_between_steps(weights)
        texts = [served.tokenizer.decode([token]) for token in tokens]
        return as_json({"tokens": texts, "heads": heads})

    async def tokenize(self, request: Request) -> Response:
        """A text's tokens."""
        fields = read_fields(TokenizeFields, await read_body(request))
        tokenizer = self.find(fields.model).tokenizer

        def tokens() -> dict[str, list]:
            ids = encode(fields.text, tokenizer, "text")
            return {"ids": ids, "tokens": [tokenizer.decode([token]) for token in ids]}

        return as_json(await asyncio.to_thread(tokens))


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
    return b"data: %s\n\n" % json.dumps(value, separators=(",", ":")).encode()


def as_json_has_it(value: Any) -> Any:
    """A value out of a file as JSON has it: null for numbers that it does not have."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
