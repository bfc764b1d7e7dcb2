"""
The server's listening socket, which hangs up on connections that nothing comes from.

Every connection is an open file, of which a process may have so many. At that limit asyncio logs
thousands of errors a second, and nobody gets in. uvicorn has no remedy: it closes a connection that
is silent after a response, but waits for a first request without end, and its limit_concurrency
refuses the requests of everybody while silent connections stay.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None

PATIENCE = 60.0  # seconds that a client may take to send a request, or to read a part of a response
MOST = 4096  # connections
OTHER_FILES = 64  # that the process may have open beside them

Address = tuple[str, int]  # of a client, as uvicorn's scope["client"]


def most_connections() -> int:
    """How many connections leave room for the other files of the process."""
    if resource is None:
        return MOST
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MOST
    return min(MOST, max(limit - OTHER_FILES, limit // 2))


class Listener(socket.socket):
    """
    A listening socket that knows the connections it has accepted.

    A connection is silent while no request of it is being answered. Where there are too many, the
    one that has been silent for longest makes room. It is shutdown() that hangs up: asyncio then
    sees the end of the client and closes it.
    """

    def __init__(self, family: int, kind: int, protocol: int) -> None:
        super().__init__(family, kind, protocol)
        self.most = most_connections()
        self.open: dict[Address, socket.socket] = {}
        self.silent: dict[Address, float] = {}  # since when; the longest is the first

    def accept(self) -> tuple[socket.socket, tuple]:
        """What asyncio calls. BlockingIOError lets it close what was hung up on, and ask again."""
        if len(self.open) >= self.most:
            self._forget_closed()
        if len(self.open) >= self.most and self.silent:
            self.hang_up(next(iter(self.silent)))
            raise BlockingIOError
        connection, address = super().accept()
        client = address[:2]
        self.open[client] = connection
        self.silent[client] = time.monotonic()
        return connection, address

    @contextlib.contextmanager
    def answering(self, client: Address | None) -> Iterator[None]:
        """Inside, the client's connection is not silent."""
        self.silent.pop(client, None)
        try:
            yield
        finally:
            if client in self.open:
                self.silent[client] = time.monotonic()

    def hang_up(self, client: Address | None) -> None:
        """End a client's connection, whatever waits to be sent."""
        self.silent.pop(client, None)
        connection = self.open.get(client)
        if connection is not None:
            with contextlib.suppress(OSError):  # it is closed, or the client has left
                connection.shutdown(socket.SHUT_RDWR)

    async def watch(self) -> None:
        """Hang up on connections that stay silent, until cancelled."""
        while True:
            await asyncio.sleep(PATIENCE / 60)
            self._forget_closed()
            for client, since in list(self.silent.items()):
                if time.monotonic() - since > PATIENCE:
                    self.hang_up(client)

    def _forget_closed(self) -> None:
        self.open = {client: one for client, one in self.open.items() if one.fileno() >= 0}
        for client in self.silent.keys() - self.open.keys():
            del self.silent[client]
