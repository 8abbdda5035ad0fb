"""Load that goes on whatever happens to it: short streams, bulk both ways, long talks; what breaks is dialled anew."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from bench.load import ERRORS, READY, STOP, STREAMS, UNITS, Board, Way

#: A slot of the board: operations that took longer than the load's patience. There must be none.
STUCK: Final = STREAMS
#: What one bulk stream moves before it closes.
BULK: Final = 4 << 20
TRIPS: Final = 200
#: Before what has failed is dialled anew.
PAUSE: Final = 0.01


def restless(way: Way, board: Board, count: int) -> None:
    """`count` threads of one kind after the other."""
    kinds = (_short, _down, _up, _talk)
    lock = threading.Lock()
    threads = [
        threading.Thread(target=_repeat, args=(way, board, kinds[number % len(kinds)], lock)) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    board.slots[READY] = 1
    for thread in threads:
        thread.join()


def _repeat(way: Way, board: Board, work: Callable[[socket.socket, Board], None], lock: threading.Lock) -> None:
    while not board[STOP]:
        slot = UNITS
        try:
            with way.connect(b"D" if work is _down else b"U" if work is _up else b"E") as sock:
                work(sock, board)
        except (BlockingIOError, TimeoutError):
            slot = STUCK  # SO_RCVTIMEO, SO_SNDTIMEO
        except OSError:
            slot = ERRORS
            time.sleep(PAUSE)
        with lock:
            board.slots[slot] += 1


def _receive(sock: socket.socket, size: int) -> int:
    got = len(sock.recv(size))
    if not got:
        raise ConnectionResetError("the stream ended")
    return got


def _short(sock: socket.socket, board: Board) -> None:
    _receive(sock, 1)


def _down(sock: socket.socket, board: Board) -> None:
    left = BULK
    while left > 0 and not board[STOP]:
        left -= _receive(sock, 1 << 16)


def _up(sock: socket.socket, board: Board) -> None:
    piece = bytes(1 << 16)
    for _ in range(BULK // len(piece)):
        sock.sendall(piece)
        if board[STOP]:
            return
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(1):  # the target closes when it has everything
        pass


def _talk(sock: socket.socket, board: Board) -> None:
    _receive(sock, 1)
    for _ in range(TRIPS):
        sock.sendall(b"x")
        _receive(sock, 1)
        if board[STOP]:
            return
