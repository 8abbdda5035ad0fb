"""Calls between the planes: trio calls the relay's thread, and the relay posts to trio.

They cost a wake-up of a thread, so they are not made per stream.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar, TypeVarTuple, Unpack

import trio

from rtunnel.errors import RegistryUnavailable
from rtunnel.histogram import Histograms
from rtunnel.relay.relay import Relay

_T = TypeVar("_T")
_A = TypeVarTuple("_A")

#: Registry calls of one process at once, so that many calls do not start as many threads.
REGISTRY_THREADS = 8
#: Seconds to wait for the relay's thread. Its turns take milliseconds, on a very busy machine
#: seconds; a thread that is silent for longer is taken for dead.
RELAY_PATIENCE = 30.0
#: Seconds between two checks whether the relay's thread has ended.
RELAY_LOOK = 0.1


class Called(Generic[*_A, _T]):
    """One registry call: its name, result and seconds, without the wait for a thread.

    `result` is "ok", "unavailable", or "refused" for every other exception; empty until it has
    ended.
    """

    __slots__ = ("_call", "name", "result", "seconds")

    def __init__(self, call: Callable[[Unpack[_A]], _T]) -> None:
        self._call = call
        self.name = getattr(call, "__name__", "other").strip("_")
        self.result = ""
        self.seconds = 0.0

    def __call__(self, *args: *_A) -> _T:
        """Make the call, on a worker thread."""
        began, result = time.perf_counter(), "refused"
        try:
            answer = self._call(*args)
            result = "ok"
            return answer
        except RegistryUnavailable:
            result = "unavailable"
            raise
        finally:
            self.seconds, self.result = time.perf_counter() - began, result


class Bridge:
    """Carries calls between trio's thread and the relay's.

    The owner of the relay makes it and enters `running`.
    """

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        # The trio run that has called `run` or `running`.
        self._token: trio.lowlevel.TrioToken | None = None
        self._limiter = trio.CapacityLimiter(REGISTRY_THREADS)
        self._nursery: trio.Nursery | None = None
        # Seconds of registry calls, by call and result (`Called`); written by trio's thread.
        self.registry_calls: Histograms[tuple[str, str]] = Histograms()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the relay's thread for the block.

        The thread has ended when the block is left or cancelled.
        """
        self._token = trio.lowlevel.current_trio_token()
        self.relay.start()
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.relay.stop)

    @asynccontextmanager
    async def open_nursery(self) -> AsyncIterator[trio.Nursery]:
        """Provide the nursery for `spawn`, whose calls are dropped after the block."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield nursery
            finally:
                self._nursery = None

    async def run(self, call: Callable[[], _T]) -> _T:
        """Run a function in the relay's thread. Return its result or raise its exception.

        The call takes microseconds, and cannot be cancelled after it was sent.
        """
        self._token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        box: list[tuple[_T | None, Exception | None]] = []

        def there() -> None:
            try:
                box.append((call(), None))
            except Exception as error:
                box.append((None, error))
            self.post(done.set)

        self.relay.call(there)
        with trio.move_on_after(RELAY_PATIENCE, shield=True):
            while not done.is_set() and self.relay.running:
                with trio.move_on_after(RELAY_LOOK):
                    await done.wait()
        if not box:
            # The relay was stopped by the code that cancels this task.
            await trio.lowlevel.checkpoint_if_cancelled()
            raise RuntimeError("the relay's thread does not answer")
        result, error = box[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only when _T is None

    async def answered(self) -> None:
        """Return after the relay's thread has run a call made now.

        Cancellable; never returns if it hangs.
        """
        self._token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        self.relay.call(lambda: self.post(done.set))
        await done.wait()

    def post(self, call: Callable[[Unpack[_A]], object], *args: *_A) -> None:
        """Run a function in trio's thread, soon; for any thread.

        It is dropped after the end of trio's run. `run` or `running` must have been called before.
        """
        assert self._token is not None
        try:
            self._token.run_sync_soon(call, *args)
        except trio.RunFinishedError:
            pass

    def spawn(self, job: Callable[[Unpack[_A]], Awaitable[object]], *args: *_A) -> None:
        """Start a task in trio's thread, soon; for any thread."""
        self.post(self._start, job, args)

    def _start(self, job: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(job, *args)

    async def registry(self, call: Callable[[Unpack[_A]], _T], *args: *_A) -> _T:
        """Run a registry call on a worker thread, and return its result.

        Raises RegistryUnavailable.
        """
        called = Called(call)
        try:
            return await trio.to_thread.run_sync(called, *args, limiter=self._limiter)
        finally:
            if called.result:
                self.registry_calls.observe((called.name, called.result), called.seconds)

    async def registry_tries(self, call: Callable[[Unpack[_A]], _T], *args: *_A) -> _T | None:
        """Run a registry call.

        Return None when the registry is unreachable: the next heartbeat repairs it.
        """
        try:
            return await self.registry(call, *args)
        except RegistryUnavailable:
            return None
