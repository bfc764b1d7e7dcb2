"""
The thread that owns the models of a server, and its ties with the event loop.

All of torch happens in the thread. The loop gives it orders, which it takes between two steps, and
gets what every step has made by call_soon_threadsafe. The thread sleeps while there is nothing to
do.
"""

import asyncio
import concurrent.futures
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model import GPT
from nanomla.batch import Batch, Piece, Request
from nanomla.serve.protocol import ApiError
from nanomla.tokenizer import Tokenizer

GATHER = 0.02  # seconds between two writes to a client, as each costs more than a token's JSON


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
    most: int  # samples that run or wait at a time
    created: int = field(default_factory=lambda: int(time.time()))
    asked: int = 0  # samples that run or wait
    prompt_tokens: int = 0  # of requests that have begun


class Call:
    """
    The requests of one client to one model, and what has come of them; it belongs to the loop.

    paced: take() returns from time to time rather than only at the end.
    left: samples that have not ended. status: of the response, as it stands; 499: the client left.
    """

    def __init__(self, served: Served, requests: list[Request], paced: bool) -> None:
        self.served = served
        self.requests = requests
        self.paced = paced
        self.left = sum(request.n for request in requests)
        self.status = 499
        self.gone = False  # the client
        self.error: ApiError | None = None
        self.arrived: list[tuple[Piece, float]] = []  # and not yet taken
        self.news = asyncio.Event()  # there is something to take
        self.timer: asyncio.TimerHandle | None = None  # sets news
        self.taken = 0.0  # when the last pieces were, in the loop's time
        self.began = time.perf_counter()
        self.first_token = 0.0  # seconds until then
        self.tokens = 0  # that have arrived
        self.seconds_before = 0.0  # in steps of the batch, before the first of them

    def push(self, piece: Piece, before: float, after: float) -> None:
        """Take a piece of a step; before, after: the batch's seconds in steps around it."""
        if not self.first_token:
            self.first_token = time.perf_counter() - self.began
            self.seconds_before = before
        self.tokens += len(piece.tokens)
        if piece.finish is not None:
            self.left -= 1
        if piece.error is not None:
            self.fail(ApiError(500, piece.error))
            return
        rate = self.tokens / max(after - self.seconds_before, 1e-6)
        self.arrived.append((piece, rate))
        if not self.left:
            self.news.set()
        elif self.paced and self.timer is None:
            loop = asyncio.get_running_loop()
            self.timer = loop.call_at(self.taken + GATHER, self.news.set)

    def fail(self, error: ApiError) -> None:
        """Let the client have an error after what has arrived."""
        self.error = self.error or error
        self.news.set()

    def leave(self) -> None:
        """The client is gone: take() returns nothing more."""
        self.gone = True
        self.news.set()

    async def take(self) -> list[tuple[Piece, float]]:
        """
        The pieces that have arrived since the last time, each with the call's tokens/s; waits for
        some. [] when all has come or the client is gone. Raises ApiError for what failed.
        """
        await self.news.wait()
        if self.left and not self.error and not self.gone:
            self.news.clear()  # more will come
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.taken = asyncio.get_running_loop().time()
        pieces = self.arrived
        self.arrived = []
        if self.gone:
            return []
        if self.error and not pieces:
            raise self.error
        return pieces


class Stepper:
    """
    Steps every model that has something to do, one after the other.

    The methods without underscore are for the loop's thread, but for run(), which is the thread's.
    failure: a future that gets the exception that ended the thread.
    """

    def __init__(self, served: list[Served], loop: asyncio.AbstractEventLoop) -> None:
        self.served = {one.name: one for one in served}
        self.loop = loop
        self.failure: asyncio.Future[BaseException] = loop.create_future()
        self.calls: dict[Request, Call] = {}  # that are open
        self.on_step: Callable[[Served, float], None] = lambda served, seconds: None
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    # ---- in the loop's thread

    def open(self, call: Call) -> None:
        """Let a call's requests wait for their rows. Raises ApiError if too many do."""
        served = call.served
        self._check_running()
        if served.asked + call.left > served.most:
            message = f"{served.name} has {served.asked} samples to make, at most {served.most}"
            raise ApiError(503, f"{message}; try again in a moment", code="overloaded")
        served.asked += call.left
        for request in call.requests:
            self.calls[request] = call
            self._orders.put(lambda request=request: served.batch.submit(request))

    def close(self, call: Call) -> None:
        """Forget a call. What is left of it ends, and its rows are free before the next step."""
        served = call.served
        for request in call.requests:
            self.calls.pop(request, None)
            if call.left:
                self._orders.put(lambda request=request: served.batch.cancel(request))
            served.prompt_tokens += request.cached + request.computed
        served.asked -= call.left
        call.left = 0

    async def run_between_steps(self, function: Callable[[], Any]) -> Any:
        """What a function returns or raises that runs in the thread."""
        self._check_running()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def order() -> None:
            if future.set_running_or_notify_cancel():  # else its client is gone
                try:
                    future.set_result(function())
                except Exception as error:  # noqa: BLE001  it is the client's
                    future.set_exception(error)

        self._orders.put(order)
        return await asyncio.wrap_future(future)

    def fail_all(self, error: ApiError) -> None:
        """End all calls with an error."""
        for call in set(self.calls.values()):
            call.fail(error)

    def end(self) -> None:
        """End the thread after its present step."""
        self._orders.put(None)

    def _check_running(self) -> None:
        if self.failure.done():
            raise ApiError(500, "the engine has failed")

    def _deliver(self, served: Served, pieces: list[Piece], before: float, after: float) -> None:
        self.on_step(served, after - before)
        for piece in pieces:
            call = self.calls.get(piece.request)
            if call is not None:  # else it has been closed
                call.push(piece, before, after)
                if piece.finish is not None:
                    served.asked -= 1

    def _fail(self, error: BaseException) -> None:
        self.failure.set_result(error)
        kind = type(error).__name__
        self.fail_all(ApiError(500, f"the engine has failed ({kind}: {error})"))

    # ---- in the thread itself

    def run(self) -> None:
        """Step until end() is called. An exception ends the thread and gets into failure."""
        try:
            while self._take_orders():
                for served in self.served.values():
                    if served.batch.busy:
                        before = served.batch.seconds
                        pieces = served.batch.step()
                        arguments = (served, pieces, before, served.batch.seconds)
                        self.loop.call_soon_threadsafe(self._deliver, *arguments)
        except BaseException as error:  # noqa: BLE001  the loop tells of it
            self.loop.call_soon_threadsafe(self._fail, error)

    def _take_orders(self) -> bool:
        """Carry out all orders; sleeps for one while there is nothing to do. False at the end."""
        wait = not any(served.batch.busy for served in self.served.values())
        while wait or not self._orders.empty():
            order = self._orders.get()
            if order is None:
                return False
            order()
            wait = False
        return True
