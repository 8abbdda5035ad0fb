"""Load that goes on whatever happens to it: exchanges whose content is compared, and long talks."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from typing import Final, NoReturn

from bench.load import ERRORS, READY, STOP, STREAMS, UNITS, Board, Way, become_a_load_process
from support.exact import FIRST_LONG, Job, Load, Target, long_jobs, short_jobs

#: A slot of the board: operations that took longer than the load's patience. There must be none.
STUCK: Final = STREAMS
#: What one long exchange moves, each way, and how many short ones come before it.
LONG: Final = 1 << 20
SHORT: Final = 20
TRIPS: Final = 200
#: Before what has failed is dialled anew.
PAUSE: Final = 0.01


def exchanges(way: Way, board: Board, count: int) -> None:
    """Do `count` exchanges at a time (support.exact). Raises OSError that says what was damaged, at the end.

    UNITS are whole exchanges, ERRORS those that were refused or reset.
    """
    load = Load(_jobs(way), count)
    board.slots[READY] = 1
    while not board[STOP] and not load.outcome.faults:
        load.turn()
        board.slots[UNITS] = load.outcome.whole
        if len(load.outcome.cut) > board[ERRORS]:
            board.slots[ERRORS] = len(load.outcome.cut)
            time.sleep(PAUSE)
    load.stop()
    if load.outcome.faults:
        raise OSError(f"{len(load.outcome.faults)} damaged streams: {load.outcome.faults[:5]}")


def _jobs(way: Way) -> itertools.chain[Job]:
    # Loads beside each other must not have the same numbers: then their content would be the same.
    short, long = short_jobs([way], os.getpid() % FIRST_LONG), long_jobs([way], FIRST_LONG, 1 << 30, LONG)
    rounds = ((*itertools.islice(short, SHORT), next(long)) for _ in itertools.count())
    return itertools.chain.from_iterable(rounds)


def run_exact_target(listener: socket.socket, board: Board, may_be_killed: bool) -> NoReturn:
    """A target's process: ERRORS are damaged uploads, told on standard error."""
    become_a_load_process()

    def report(why: str) -> None:
        print(why, file=sys.stderr, flush=True)
        board.slots[ERRORS] += 1

    Target(listener, report, may_be_killed=may_be_killed).run()


def talks(way: Way, board: Board, count: int) -> None:
    """Hold `count` conversations of single bytes at a time; what breaks is dialled anew.

    UNITS are answers.
    """
    lock = threading.Lock()
    threads = [threading.Thread(target=_repeat, args=(way, board, lock)) for _ in range(count)]
    for thread in threads:
        thread.start()
    board.slots[READY] = 1
    for thread in threads:
        thread.join()


def _repeat(way: Way, board: Board, lock: threading.Lock) -> None:
    while not board[STOP]:
        try:
            with way.connect(b"E") as sock:
                _talk(sock, board, lock)
            continue
        except (BlockingIOError, TimeoutError):
            slot = STUCK  # SO_RCVTIMEO, SO_SNDTIMEO
        except OSError:
            slot = ERRORS
            time.sleep(PAUSE)
        with lock:
            board.slots[slot] += 1


def _talk(sock: socket.socket, board: Board, lock: threading.Lock) -> None:
    _receive(sock, 1)
    for _ in range(TRIPS):
        sock.sendall(b"x")
        _receive(sock, 1)
        with lock:
            board.slots[UNITS] += 1
        if board[STOP]:
            return


def _receive(sock: socket.socket, size: int) -> None:
    if not sock.recv(size):
        raise ConnectionResetError("the stream ended")
