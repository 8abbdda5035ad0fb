"""Between the planes: trio asks the relay's thread, the relay posts to trio. Nothing here is done per stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar, TypeVarTuple, Unpack

import trio

from rtunnel.errors import RegistryUnavailable
from rtunnel.relay.relay import Relay

_T = TypeVar("_T")
_A = TypeVarTuple("_A")

#: Registry calls in flight per process: a storm of them must not become a storm of threads.
REGISTRY_THREADS = 8
#: The relay's turns take milliseconds, seconds on a machine that is far too busy; a thread silent for longer is gone.
RELAY_PATIENCE = 30.0
#: How soon a thread that has ended is noticed.
RELAY_LOOK = 0.1


class Bridge:
    """Calls between trio's thread and the relay's. The role that owns the relay makes it and enters `running`."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self._token: trio.lowlevel.TrioToken | None = None  # of the run that calls `run` or `running`
        self._limiter = trio.CapacityLimiter(REGISTRY_THREADS)
        self._nursery: trio.Nursery | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the relay's thread meanwhile. When this is left that thread has ended, cancelled or not."""
        self._token = trio.lowlevel.current_trio_token()
        self.relay.start()
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.relay.stop)

    @asynccontextmanager
    async def open_nursery(self) -> AsyncIterator[trio.Nursery]:
        """The nursery that `spawn` uses; what is spawned after its body has ended is dropped."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield nursery
            finally:
                self._nursery = None

    async def run(self, call: Callable[[], _T]) -> _T:
        """Run in the relay's thread; its result or exception. Not cancellable once it is on its way (microseconds)."""
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
            await trio.lowlevel.checkpoint_if_cancelled()  # then it was stopped by whoever cancels us
            raise RuntimeError("the relay's thread does not answer")
        result, error = box[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only when _T is None

    async def answered(self) -> None:
        """Return when the relay's thread has run a call that was made now; cancellable, and never while it hangs."""
        self._token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        self.relay.call(lambda: self.post(done.set))
        await done.wait()

    def post(self, call: Callable[[Unpack[_A]], object], *args: *_A) -> None:
        """Run in trio's thread, soon. From the relay's thread (or any); dropped when trio's run is over.

        Only after `run` or `running` was called.
        """
        assert self._token is not None
        try:
            self._token.run_sync_soon(call, *args)
        except trio.RunFinishedError:
            pass

    def spawn(self, job: Callable[[Unpack[_A]], Awaitable[object]], *args: *_A) -> None:
        """Start a task in trio's thread, soon. From the relay's thread (or any)."""
        self.post(self._start, job, args)

    def _start(self, job: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(job, *args)

    async def registry(self, call: Callable[[Unpack[_A]], _T], *args: *_A) -> _T:
        """A registry call on a worker thread. Raises RegistryUnavailable."""
        return await trio.to_thread.run_sync(call, *args, limiter=self._limiter)

    async def registry_tries(self, call: Callable[[Unpack[_A]], _T], *args: *_A) -> _T | None:
        """The same, with None for a registry that can't be reached: the next heartbeat puts things right."""
        try:
            return await self.registry(call, *args)
        except RegistryUnavailable:
            return None
