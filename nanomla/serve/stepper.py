"""
The thread that owns the models of a server, and its ties with the event loop.

All of torch happens in the one thread of an executor, whose queue has the orders of the loop and
the next step, which comes behind them. What a step makes goes to the loop by call_soon_threadsafe.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import GPT
from nanomla.batch import Batch, Piece, Request
from nanomla.serve.protocol import ApiError
from nanomla.tokenizer import Tokenizer

CLIENTS = 16  # so many that wait for all they may make the server refuse others
LEFT = 499  # what metrics call the status of a request whose client left


@dataclass(eq=False)
class Served:
    """A model under its name, with what the server tells of it."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    batch: Batch  # only its numbers are read outside the thread
    about: dict[str, Any]  # the "nanomla" object of /v1/models
    settings: dict[str, Any]  # of the run
    log: Path  # its log.jsonl, which may be missing
    most: int  # samples of one client that run or wait at a time
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0  # of requests that have begun


class Call:
    """
    The requests of one client to one model, and what has come of them; it belongs to the loop.

    left: samples that have not ended. status: of the response, as it stands.
    """

    def __init__(self, served: Served, requests: list[Request], client: str) -> None:
        self.served = served
        self.requests = requests
        self.client = client
        self.left = sum(request.n for request in requests)
        self.status = LEFT
        self.error: ApiError | None = None
        self.arrived: list[Piece] = []  # and not yet taken
        self.news = asyncio.Event()  # there is something to take
        self.over = asyncio.Event()  # nothing more will arrive
        self.began = time.perf_counter()
        self.first_token = 0.0  # seconds until then
        self.tokens = 0  # that have arrived
        self.seconds_before = 0.0  # in steps of the batch, before the first of them
        self.rate = 0.0  # tokens/s since then

    def push(self, piece: Piece, before: float, after: float) -> None:
        """Take a piece of a step; before, after: the batch's seconds in steps around it."""
        if not self.first_token:
            self.first_token = time.perf_counter() - self.began
            self.seconds_before = before
        self.tokens += len(piece.tokens)
        self.rate = self.tokens / max(after - self.seconds_before, 1e-6)
        if piece.finish is not None:
            self.left -= 1
        if piece.error is not None:
            self.fail(ApiError(500, piece.error))
            return
        self.arrived.append(piece)
        self.news.set()
        if not self.left:
            self.over.set()

    def take(self) -> list[Piece]:
        """The pieces that have arrived since the last time."""
        pieces = self.arrived
        self.arrived = []
        self.news.clear()
        return pieces

    def fail(self, error: ApiError) -> None:
        """Let the client have an error after what has arrived, the first if there are several."""
        self.error = self.error or error
        self.status = self.error.status
        self.news.set()
        self.over.set()


class Stepper:
    """
    Steps every model that has something to do, one after the other.

    engine: an executor with one thread, in which the models were opened.
    failure: the exception that has ended the steps.
    on_step: is called in the loop's thread with the model, seconds and pieces of every step.
    """

    def __init__(self, served: list[Served], engine: ThreadPoolExecutor) -> None:
        self.served = {one.name: one for one in served}
        self.engine = engine
        self.loop = asyncio.get_running_loop()
        self.failure: Exception | None = None
        self.calls: dict[Request, Call] = {}  # that are open
        self.on_step: Callable[[Served, float, list[Piece]], None]
        self.ended = False
        self._step_is_queued = False  # belongs to the engine's thread

    # ---- in the loop's thread

    def open(self, call: Call) -> None:
        """Let a call's requests wait for their rows. Raises ApiError if too many do."""
        served = call.served
        calls = {other for other in self.calls.values() if other.served is served}
        of_client = sum(other.left for other in calls if other.client == call.client)
        of_all = sum(other.left for other in calls)
        for asked, most, who in (
            (of_client, served.most, "you"), (of_all, CLIENTS * served.most, "all clients"),
        ):
            if asked + call.left > most:
                message = f"{served.name} has {asked} samples to make for {who}, at most {most}"
                raise ApiError(503, f"{message}; try again in a moment", code="overloaded")
        for request in call.requests:
            self.calls[request] = call
            self.engine.submit(self._do, served.batch.submit, request)

    def close(self, call: Call) -> None:
        """Forget a call. What is left of it ends, and its rows are free before the next step."""
        served = call.served
        for request in call.requests:
            self.calls.pop(request, None)
            if call.left:
                self.engine.submit(self._do, served.batch.cancel, request)
            served.prompt_tokens += request.cached + request.computed
        call.left = 0

    def fail_all(self, error: ApiError) -> None:
        """End all calls with an error."""
        for call in set(self.calls.values()):
            call.fail(error)

    def _deliver(self, served: Served, pieces: list[Piece], before: float, after: float) -> None:
        pieces = [piece for piece in pieces if piece.request in self.calls]  # others are closed
        try:
            for piece in pieces:
                self.calls[piece.request].push(piece, before, after)
            self.on_step(served, after - before, pieces)
        except Exception as error:  # noqa: BLE001  the loop would only log it, and the calls wait
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.fail_all(ApiError(500, f"the engine has failed ({type(error).__name__}: {error})"))

    # ---- in the engine's thread

    def _do(self, order: Callable[..., None], *arguments: Request) -> None:
        """Carry out an order or a step, and let a step follow if there is anything to do."""
        if self.ended:
            return
        try:
            order(*arguments)
            busy = any(served.batch.busy for served in self.served.values())
            if busy and not self._step_is_queued:
                self._step_is_queued = True
                self.engine.submit(self._do, self._step)
        except Exception as error:  # noqa: BLE001  the loop tells of it
            self.ended = True
            self.loop.call_soon_threadsafe(self._fail, error)

    def _step(self) -> None:
        self._step_is_queued = False
        for served in self.served.values():
            if served.batch.busy:
                before = served.batch.seconds
                pieces = served.batch.step()
                after = served.batch.seconds
                self.loop.call_soon_threadsafe(self._deliver, served, pieces, before, after)
