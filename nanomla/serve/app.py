"""
The web application of tools.serve: its routes, and the checks that every request passes.

OpenAI's /v1/completions and /v1/models, /health, /metrics, the page's files, and what the page asks
for below /api/. No path of a request reaches the file system: a table of the page's files is made
at the start, models are looked up by name, and a log is that of a model that was opened.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import json
import math
import re
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
import torch
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanomla.checks import Natural, brief, check
from nanomla.errors import UserError
from nanomla.files import parse_json
from nanomla.runlog import read_log
from nanomla.serve.protocol import (
    ApiError,
    Params,
    Reply,
    check_names,
    encode,
    make_requests,
    read_params,
)
from nanomla.serve.stepper import Call, Served, Stepper

PAGE = Path(__file__).resolve().parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png",
    ".ico": "image/x-icon",
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
LONG_BODY = 2**16  # from here on a text is turned into tokens beside the loop
PATIENCE = 60.0  # seconds that a client may take to send a request, or read nothing of a response
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
    more = {"Retry-After": "1"} if error.status == 503 else {}
    if error.status == 401:
        more = {"WWW-Authenticate": "Bearer"}
    return as_json(error.body(), error.status, {**more, **(headers or {})})


# ---- what every request passes


class Guard:
    """
    The outermost layer: adds the headers of every response, and refuses requests that come from web
    pages elsewhere or without the token.

    public: paths that need no token. draining: the server is shutting down.
    """

    def __init__(self, app: ASGIApp, host: str, token: str | None, public: set[str]) -> None:
        self.app, self.public, self.draining = app, public, False
        own = re.escape(f"[{host}]" if ":" in host else host)
        known = rf"(localhost|127\.0\.0\.1|\[::1\]|{own})(:[0-9]{{1,5}})?"
        self.hosts = re.compile(known, re.IGNORECASE) if is_loopback(host) else None
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *RAW_HEADERS]
            await send(message)

        app = self.app
        try:
            self._check(Request(scope))
        except ApiError as error:
            app = as_error(error)
        await app(scope, receive, send_with_headers)

    def _check(self, request: Request) -> None:
        host, path = request.headers.get("host", ""), request.scope["path"]
        if not path.isprintable():  # routes would take a path that ends in a new line
            raise ApiError(404, NOTHING)
        if self.hosts is not None and not self.hosts.fullmatch(host):
            raise ApiError(403, f"the Host header {brief(host)} is not this server's")
        for origin in request.headers.getlist("origin"):
            if origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
                raise ApiError(403, f"requests of web pages of {brief(origin)} are refused")
        if self.token is not None and path not in self.public:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.token)
            if scheme.lower() != "bearer" or not right:
                raise ApiError(401, "give the server's token: Authorization: Bearer TOKEN")
        if self.draining and path != "/metrics":
            raise ApiError(503, "the server is shutting down", code="shutting_down")


class Connection(H11Protocol):
    """
    A connection whose client must not take forever: it is cut if no request has come for PATIENCE
    seconds, or if the client has read nothing of what waits for it for as long.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._last_seen, self._last_size = None, 0
        self._watch = self.loop.call_later(PATIENCE, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More waits for the client than it should."""
        super().pause_writing()
        self._look_again(self.transport.get_write_buffer_size())

    def _look(self) -> None:
        size = self.transport.get_write_buffer_size()
        stuck = size >= self._last_size > 0
        silent = size == 0 and self._answered() and self.cycle is self._last_seen
        if stuck or silent:
            self.transport.abort()
        else:
            self._look_again(size)

    def _look_again(self, size: int) -> None:
        self._watch.cancel()
        full = self.flow.write_paused or self._answered()  # nothing is added to what waits
        self._last_seen, self._last_size = self.cycle, size if full else 0
        self._watch = self.loop.call_later(PATIENCE, self._look)

    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Pass on what a client sends; what breaks the protocol ends the connection."""
        try:
            super().data_received(data)
        except Exception:  # noqa: BLE001  h11's own errors, after an answer that came early
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer is on its way."""
        if self.cycle is not None and self.cycle.response_started and not self._answered():
            self.transport.abort()
            return
        text = json.dumps(ApiError(400, msg).body()).encode()
        lines = [f"{name}: {value}" for name, value in HEADERS.items()]
        lines += [f"Content-Type: {JSON}", f"Content-Length: {len(text)}", "Connection: close"]
        head = "\r\n".join(["HTTP/1.1 400 Bad Request", *lines, "", ""])
        self.transport.write(head.encode() + text)
        self.transport.close()


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
    except asyncio.CancelledError:  # uvicorn ends what still arrives when the server does
        raise ApiError(503, "the server is shutting down", code="shutting_down") from None
    try:
        return parse_json(bytes(body), "the request")
    except UserError as error:
        raise ApiError(400, str(error)) from None


def read_fields(kind: type, body: dict[str, Any]) -> Any:
    """An instance of a dataclass from a JSON object. Raises ApiError."""
    check_names(body, kind)
    try:
        return kind(**body)
    except (TypeError, ValueError) as error:
        raise ApiError(400, str(error).removeprefix(f"{kind.__name__}.__init__() ")) from None


@dataclass
class TokenizeFields:
    """The fields of /api/tokenize."""

    text: str
    model: str | None = None

    def __post_init__(self) -> None:
        check(self)


@dataclass
class AttentionFields:
    """The fields of /api/attention."""

    tokens: list
    layer: Natural = 0
    model: str | None = None

    def __post_init__(self) -> None:
        check(self)


# ---- metrics


class Metrics:
    """What /metrics tells: counts of what has ended, and the batches as of their last steps."""

    def __init__(self, served: list[Served]) -> None:
        self.served, self.registry = served, prometheus.CollectorRegistry()
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
        self._steps = {one.name: self.steps.labels(one.name) for one in served}
        self.registry.register(self)
        prometheus.ProcessCollector(registry=self.registry)

    def step(self, served: Served, seconds: float) -> None:
        """Count a step."""
        self._steps[served.name].observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        for kind, name, text, value in (
            (CounterMetricFamily, "tokens", "Tokens generated", lambda s: s.stats.tokens),
            (CounterMetricFamily, "prompt_tokens", "Prompt tokens", lambda s: s.prompt_tokens),
            (GaugeMetricFamily, "tokens_per_second", "Of late", lambda s: s.rate()),
            (GaugeMetricFamily, "waiting_requests", "Queue", lambda s: s.stats.waiting),
            (GaugeMetricFamily, "active_rows", "Rows in use", lambda s: s.stats.active),
            (GaugeMetricFamily, "rows", "Rows", lambda s: s.batch.rows),
            (GaugeMetricFamily, "cache_used_bytes", "Cache", lambda s: s.stats.cache_bytes),
            (GaugeMetricFamily, "cache_bytes", "Allocated", lambda s: s.batch.cache.nbytes),
        ):
            family = kind(f"nanomla_{name}", text, labels=["model"])
            for one in self.served:
                family.add_metric([one.name], value(one))
            yield family

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return prometheus.generate_latest(self.registry)


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


@dataclass
class Site:
    """The routes and what they need."""

    stepper: Stepper
    max_tokens: int
    page: Path = PAGE
    logs: dict[Path, tuple[Any, list]] = field(default_factory=dict)  # read: stamp and entries
    drawing: bool = False  # a picture of attention

    def __post_init__(self) -> None:
        self.served = self.stepper.served
        self.metrics = Metrics([*self.served.values()])
        self.stepper.on_step = self.metrics.step
        names = {path.name: path for path in sorted(self.page.glob("*")) if path.suffix in TYPES}
        files = {name: (path.read_bytes(), TYPES[path.suffix]) for name, path in names.items()}
        self.files = {f"/{name}": file for name, file in files.items()}
        if "/index.html" in self.files:
            self.files["/"] = self.files["/index.html"]

    def app(self, host: str, token: str | None) -> Guard:
        """The application, with the checks of every request around it."""
        routes = [Route(path, self.file) for path in self.files]
        routes += [
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
            ApiError: self.api_error, HTTPException: self.http_error,
            ClientDisconnect: self.client_left, Exception: self.server_error,
        }  # fmt: skip
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return Guard(app, host, token, {"/", "/health", *self.files})

    async def api_error(self, request: Request, error: ApiError) -> Response:
        """Our own errors."""
        return as_error(error)

    async def client_left(self, request: Request, error: ClientDisconnect) -> Response:
        """A response that nobody reads."""
        return Response(status_code=LEFT)

    async def server_error(self, request: Request, error: Exception) -> Response:
        """A mistake of ours: it is printed, the request fails, and the server goes on."""
        traceback.print_exception(error, file=sys.stderr)
        return as_error(ApiError(500, "an error of the server, which it has printed"))

    async def http_error(self, request: Request, error: HTTPException) -> Response:
        """Starlette's 404 and 405 as OpenAI's errors."""
        words = {404: NOTHING, 405: "another method is needed here"}
        said = ApiError(error.status_code, words.get(error.status_code, error.detail))
        return as_error(said, dict(error.headers or {}))

    def find(self, name: str | None) -> Served:
        """The model of that name; None: the only one. Raises ApiError."""
        if name is None and len(self.served) == 1:
            return next(iter(self.served.values()))
        known = ", ".join(self.served)
        if name is None:
            raise ApiError(400, f"model is missing; the models here are {known}", "model")
        if name not in self.served:
            message = f"there is no model {brief(name)}; the models here are {known}"
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
        kind = prometheus.CONTENT_TYPE_LATEST
        return Response(self.metrics.text(), 200, {"Cache-Control": "no-store"}, kind)

    async def models(self, request: Request) -> Response:
        """OpenAI's list of models."""
        return as_json({"object": "list", "data": [*map(_model_object, self.served.values())]})

    async def one_model(self, request: Request) -> Response:
        """One of them."""
        return as_json(_model_object(self.find(request.path_params["name"])))

    async def completions(self, request: Request) -> Response:
        """OpenAI's completions."""
        model, status = "", LEFT
        try:
            params = read_params(await read_body(request), self.max_tokens)
            served = self.find(params.model)
            model = served.name
            call, reply = await self._open(request, served, params)
            status = None  # counted when it is closed
        except ApiError as error:
            status = error.status
            raise
        finally:
            if status is not None:
                self.metrics.requests.labels(model, str(status)).inc()
        if params.stream:
            return EventStream(self._events(call, reply), lambda: self._close(call))
        return await self._whole(request, call, reply)

    async def _open(self, request: Request, served: Served, params: Params) -> tuple[Call, Reply]:
        """Let the engine begin. Raises ApiError for what it cannot do."""

        def make() -> Any:
            return make_requests(params, served.tokenizer, served.most)

        long = int(request.headers.get("content-length", LARGEST_BODY)) > LONG_BODY
        requests, texts = await asyncio.to_thread(make) if long else make()
        for one in requests:
            try:
                served.batch.check(one)
            except UserError as error:
                text = str(error).replace("window=", "truncate_prompt_tokens=")
                named = text.partition("=")[0] if "=" in text else "prompt"
                raise ApiError(400, text, named) from None
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
                    self._count(call, piece.finish)
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
                    self._count(call, piece.finish)
                    if delta := reply.add(piece, rate):
                        events.append(_event(reply.chunk(delta)))
                if events:
                    yield b"".join(events)
            if reply.params.usage_chunk:
                yield _event(reply.last_chunk())
            call.status = 200
        except ApiError as error:
            call.status = error.status
            yield _event(error.body())
        yield b"data: [DONE]\n\n"

    def _count(self, call: Call, finish: str | None) -> None:
        if finish is not None:
            self.metrics.samples.labels(call.served.name, finish).inc()

    def _close(self, call: Call) -> None:
        """Count what has come of a call, and free its rows."""
        name = call.served.name
        self.metrics.requests.labels(name, str(call.status)).inc()
        if call.first_token:
            self.metrics.first_token.labels(name).observe(call.first_token)
        if call.left:
            finish = "error" if call.error else "cancelled"
            self.metrics.samples.labels(name, finish).inc(call.left)
        self.stepper.close(call)

    async def log(self, request: Request) -> Response:
        """A run's settings, and its log from an entry on."""
        served = self.find(request.query_params.get("model"))
        after = request.query_params.get("after", "0")
        if not re.fullmatch("[0-9]{1,12}", after):
            raise ApiError(400, f"after={brief(after)} must be a number of entries", "after")
        entries, start = await asyncio.to_thread(self._read_log, served), int(after)
        restarted = {"restarted": True} if start > len(entries) else {}
        start = 0 if restarted else start
        answer = {"settings": plain(served.settings), "entries": entries[start:]}
        count = {"next": len(entries), "total": len(entries)}
        return as_json({**answer, **count, **restarted})

    def _read_log(self, served: Served) -> list[dict[str, Any]]:
        """The entries of a log, read again if the file is another than at the last time."""
        path = served.log
        if path is None or not path.is_file():
            return []
        found = path.stat()
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        if self.logs.get(path, (None,))[0] != stamp:
            self.logs[path] = (stamp, [*plain_entries(read_log(path))])
        return self.logs[path][1]

    async def attention(self, request: Request) -> Response:
        """The attention weights of one layer over some tokens, while the model is not busy."""
        given = read_fields(AttentionFields, await read_body(request))
        served = self.find(given.model)
        config = served.model.config
        tokens = given.tokens[-min(config.block_size, LONGEST_PICTURE) :]
        if not tokens or not all(type(t) is int and 0 <= t < config.vocab_size for t in tokens):
            works = f"at least one token id from 0 to {config.vocab_size - 1}"
            raise ApiError(400, f"tokens must be {works}", "tokens")
        if given.layer >= config.n_layer:
            works = f"a layer from 0 to {config.n_layer - 1}"
            raise ApiError(400, f"layer={brief(given.layer)} must be {works}", "layer")

        def weights() -> list:
            if served.batch.busy:
                message = f"{served.name} is generating; ask again when it has finished"
                raise ApiError(409, message, code="busy")
            try:
                idx = torch.tensor([tokens], device=served.model.lm_head.weight.device)
                heads = served.model.attention_weights(idx, given.layer)[0]
            except (UserError, ValueError) as error:
                raise ApiError(400, str(error)) from None
            return heads.cpu().double().mul(1e4).round().div(1e4).tolist()

        if self.drawing:  # completions wait for a picture, so there is never more than one
            raise ApiError(503, "another picture is being computed; ask again", code="busy")
        self.drawing = True
        try:
            heads = await self.stepper.run_between_steps(weights)
        finally:
            self.drawing = False
        texts = [served.tokenizer.decode([token]) for token in tokens]
        body = await asyncio.to_thread(_picture, texts, heads)
        return Response(body, headers={"Cache-Control": "no-store"}, media_type=JSON)

    async def tokenize(self, request: Request) -> Response:
        """A text's tokens."""
        given = read_fields(TokenizeFields, await read_body(request))
        tokenizer = self.find(given.model).tokenizer

        def tokens() -> dict[str, list]:
            ids = encode(given.text, tokenizer, "text")
            return {"ids": ids, "tokens": [tokenizer.decode([token]) for token in ids]}

        long = len(given.text) > LONG_BODY
        return as_json(await asyncio.to_thread(tokens) if long else tokens())


def _model_object(served: Served) -> dict[str, Any]:
    """OpenAI's object of a model, with ours in it."""
    head = {"id": served.name, "object": "model", "created": served.created}
    return {**head, "owned_by": "nanomla", "nanomla": served.about}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % json.dumps(value, separators=(",", ":")).encode()


def _picture(texts: list[str], heads: list) -> bytes:
    """The JSON of an attention picture, row by row, so that other threads get a turn."""
    rows = (",".join(json.dumps(row, separators=(",", ":")) for row in head) for head in heads)
    inner = ",".join(f"[{head}]" for head in rows)
    return f'{{"tokens":{json.dumps(texts)},"heads":[{inner}]}}'.encode()


def plain_entries(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The entries of a log as JSON has them, without those that are nested too deeply."""
    for entry in entries:
        with contextlib.suppress(RecursionError):
            yield plain(entry)


def plain(value: Any) -> Any:
    """A value out of a file as JSON has it: null for numbers that it does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
