"""The one place where signals are handled: SIGINT, SIGTERM and, where there is one, SIGHUP."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class Stopped(BaseException):
    """A signal that ends the process, once what is open is closed; SIGINT is KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def raise_stopped(number: int, _frame: FrameType | None = None) -> None:
    """A signal handler: KeyboardInterrupt for SIGINT, Stopped for any other."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)


@contextlib.contextmanager
def handled(handler: Handler, *names: str) -> Iterator[None]:
    """
    Inside, the signals of these names call the handler; afterwards what handled them before.

    A signal that the process was started to ignore, as nohup does with SIGHUP, stays ignored, and
    one that this system does not have is left out. Only the main thread can set handlers.
    """
    before = {}
    for name in names:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
