"""
The thread that owns the models of a server, and its ties with the event loop.

All of torch happens in the thread. The loop gives it orders, which it takes between two steps; what
steps have made comes back in one call_soon_threadsafe, unless the loop has yet to take an earlier
one up. The thread sleeps while there is nothing to do.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from model import GPT
from nanomla.batch import Batch, Piece, Request
from nanomla.serve.protocol import ApiError
from nanomla.tokenizer import Tokenizer

RATE_SECONDS = 5.0  # that the rate of /metrics looks back
GATHER = 0.02  # seconds between two writes to a client, as each costs more than a token's JSON


class Stats(NamedTuple):
    """What a model's batch looked like after a step."""

    active: int = 0  # rows in use
    waiting: int = 0  # requests
    cache_bytes: int = 0
    tokens: int = 0  # made so far
    steps: int = 0
    seconds: float = 0.0  # in steps


@dataclass(eq=False)
class Served:
    """A model under its name, with what the server tells of it."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    batch: Batch
    about: dict[str, Any]  # the "nanomla" object of /v1/models
    settings: dict[str, Any]  # of the run
    log: Path | None  # its log.jsonl
    most: int  # samples that run or wait at a time
    created: int = field(default_factory=lambda: int(time.time()))
    stats: Stats = field(default_factory=Stats)
    asked: int = 0  # samples that run or wait
    prompt_tokens: int = 0  # of requests that have begun
    history: deque[tuple[float, int]] = field(default_factory=deque)  # (time, tokens made)

    def note(self, stats: Stats) -> None:
        """Keep what a step has left."""
        self.stats, now = stats, time.monotonic()
        if not self.history or now - self.history[-1][0] > 0.1:
            self.history.append((now, stats.tokens))
        while len(self.history) > 2 and now - self.history[1][0] > RATE_SECONDS:
            self.history.popleft()

    def rate(self) -> float:
        """Tokens per second of the last seconds."""
        now = time.monotonic()
        recent = [(then, made) for then, made in self.history if now - then < RATE_SECONDS]
        if not recent:
            return 0.0
        then, made = recent[0]
        return (self.stats.tokens - made) / max(now - then, 0.1)


class Call:
    """
    The requests of one client to one model, and what has come of them; it belongs to the loop.

    paced: take() returns from time to time rather than only at the end.
    left: samples that have not ended. status: of the response, as it stands; 499: the client left.
    """

    def __init__(self, served: Served, requests: list[Request], paced: bool) -> None:
        self.served, self.requests, self.left = served, requests, sum(r.n for r in requests)
        self.paced, self.taken = paced, 0.0  # taken: when
        self.arrived: list[tuple[Piece, float]] = []
        self.news, self.timer = asyncio.Event(), None  # the timer is to set news
        self.error: ApiError | None = None
        self.gone, self.status = False, 499
        self.began, self.first_token = time.perf_counter(), 0.0
        self.seconds_before, self.made = 0.0, 0
        self.shown: dict[tuple[Request, int], int] = {}  # tokens made at a sample's last piece

    def push(self, piece: Piece, before: float, after: float) -> None:
        """Take a piece of a step; before, after: the batch's seconds in steps around it."""
        if not self.first_token:
            self.first_token, self.seconds_before = time.perf_counter() - self.began, before
        sample = piece.request, piece.index
        self.made += piece.made - self.shown.get(sample, piece.made - bool(piece.made))
        self.shown[sample] = piece.made
        self.left -= piece.finish is not None
        if piece.error is not None:
            self.error = ApiError(500, piece.error)
        else:
            self.arrived.append((piece, self.made / max(after - self.seconds_before, 1e-6)))
        if self.error or not self.left:
            self.news.set()
        elif self.paced and self.timer is None:
            wait = self.taken + GATHER - time.perf_counter()
            self.timer = asyncio.get_running_loop().call_later(max(wait, 0), self.news.set)

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
        while self.left and not (self.error or self.gone):
            await self.news.wait()
            self.news.clear()
            if self.arrived:
                break
        if self.timer is not None:
            self.timer.cancel()
        self.timer, self.taken = None, time.perf_counter()
        pieces, self.arrived = self.arrived, []
        if self.error and not pieces:
            raise self.error
        return [] if self.gone else pieces


class Stepper:
    """
    Steps every model that has something to do, one after the other.

    The methods without underscore are for the loop's thread. failure: a future that gets the
    exception that ended the thread.
    """

    def __init__(self, served: list[Served], loop: asyncio.AbstractEventLoop) -> None:
        self.served, self.loop = {one.name: one for one in served}, loop
        self.failure: asyncio.Future[BaseException] = loop.create_future()
        self.calls: dict[Request, Call] = {}  # that are open
        self.on_step: Callable[[Served, float], None] = lambda served, seconds: None
        self._orders: deque[Callable[[], None]] = deque()
        self._made: deque[tuple] = deque()  # arguments of _deliver
        self._awake, self._ended = threading.Condition(), False

    # ---- in the loop's thread

    def open(self, call: Call) -> None:
        """Let a call's requests wait for their rows. Raises ApiError if too many do."""
        served, samples = call.served, call.left
        if self.failure.done():
            raise ApiError(500, "the engine has failed")
        if served.asked + samples > served.most:
            message = f"{served.name} has {served.asked} samples to make, at most {served.most}"
            raise ApiError(503, f"{message}; try again in a moment", code="overloaded")
        served.asked += samples
        self.calls |= dict.fromkeys(call.requests, call)
        for request in call.requests:
            self._order(lambda request=request: served.batch.submit(request))

    def close(self, call: Call) -> None:
        """Forget a call. What is left of it ends, and its rows are free before the next step."""
        for request in call.requests:
            self.calls.pop(request, None)
            if call.left:
                self._order(lambda request=request: call.served.batch.cancel(request))
            call.served.prompt_tokens += request.cached + request.computed
        call.served.asked -= call.left
        call.left = 0

    async def run_between_steps(self, function: Callable[[], Any]) -> Any:
        """What a function returns or raises that runs in the thread."""
        future = self.loop.create_future()

        def settle(set_it: Callable[[Any], None], value: Any) -> None:
            if not future.done():  # its client may be gone
                set_it(value)

        def order() -> None:
            try:
                result = (future.set_result, function())
            except Exception as error:  # noqa: BLE001  it is the client's
                result = (future.set_exception, error)
            self.loop.call_soon_threadsafe(settle, *result)

        if self.failure.done():
            raise ApiError(500, "the engine has failed")
        self._order(order)
        return await future

    def fail_all(self, error: ApiError) -> None:
        """End all calls with an error."""
        for call in set(self.calls.values()):
            call.fail(error)

    def end(self) -> None:
        """End the thread after its present step."""
        with self._awake:
            self._ended = True
            self._awake.notify()

    def _order(self, order: Callable[[], None]) -> None:
        with self._awake:
            self._orders.append(order)
            self._awake.notify()

    def _take_made(self) -> None:
        while self._made:
            try:
                self._deliver(*self._made[0])
            finally:
                self._made.popleft()  # only now, so that the thread need not tell of more

    def _deliver(self, served: Served, pieces: list[Piece], before: float, stats: Stats) -> None:
        served.note(stats)
        if stats.seconds > before:
            self.on_step(served, stats.seconds - before)
        for piece in pieces:
            call = self.calls.get(piece.request)
            if call is not None:  # else it has been closed
                call.push(piece, before, stats.seconds)
                served.asked -= piece.finish is not None

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
                        self._step(served)
        except BaseException as error:  # noqa: BLE001  the loop tells of it
            self.loop.call_soon_threadsafe(self._fail, error)

    def _take_orders(self) -> bool:
        """Sleep until there is something to do, and carry out orders. False at the end."""
        with self._awake:
            while not (self._orders or self._ended or self._busy()):
                self._awake.wait()
            orders = [*self._orders]
            self._orders.clear()
        for order in orders:
            order()
        if orders:  # a cancelled row counts no longer
            for served in self.served.values():
                if not served.batch.busy:
                    self._post(served, [], served.batch.seconds)
        return not self._ended

    def _busy(self) -> bool:
        return any(served.batch.busy for served in self.served.values())

    def _step(self, served: Served) -> None:
        before = served.batch.seconds
        self._post(served, served.batch.step(), before)

    def _post(self, served: Served, pieces: list[Piece], before: float) -> None:
        self._made.append((served, pieces, before, _stats(served.batch)))
        if len(self._made) == 1:  # else the loop has been told
            self.loop.call_soon_threadsafe(self._take_made)


def _stats(batch: Batch) -> Stats:
    rows, totals = (batch.active, len(batch.waiting), batch.cache_bytes), (batch.tokens_made,)
    return Stats(*rows, *totals, batch.steps, batch.seconds)
