"""Runs coroutines for any number of threads in one event loop: bounded together, and each call can be interrupted.

The loop has a thread of its own. Whoever calls waits for the outcome; leaving the wait, by Ctrl-C at any moment,
cancels what was asked for. Two things make that less simple than it sounds. Polars, once imported, has the system
resume interrupted waits, so nothing waits longer than a tick. And an interrupt may arrive before there is anything to
cancel, or between two rounds of a loop, where Python 3.11 may miss the `finally` around it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fire_data.schemas.errors import EngineError

T = TypeVar("T")

_TICK = 0.1  # seconds


class _Call:
    """A call from another thread, which can be ended at any moment, also before it has begun."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._task: asyncio.Task[Any] | None = None
        self._over = False

    def begins(self) -> bool:
        self._task = asyncio.current_task()
        return not self._over

    def end(self) -> None:
        self._over = True
        with contextlib.suppress(RuntimeError):  # of a loop that is closed
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())


class Calls:
    """`concurrency`: jobs of `each` that run at the same time. `closed`: what is said of calls that `close` ended."""

    def __init__(self, name: str, concurrency: int, closed: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(concurrency)
        self._closed = closed
        self._lock = threading.Lock()
        self._is_closed = False
        self._ends: set[asyncio.Future[EngineError]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`."""
        call = _Call(self.loop)
        try:
            return self._outcome(self._submit(work, call))
        finally:
            call.end()

    def each(
        self, count: int, job: Callable[[int], Coroutine[Any, Any, T]], finished: Callable[[int, T], None]
    ) -> None:
        """Run `job(0)` to `job(count - 1)`; `finished(i, result)` is called in this thread, in the order of finishing.

        At most `concurrency` jobs run at a time, those of other threads counted. Raises the first error after all
        that finished before it was handed over; the rest is cancelled.
        """
        results: queue.SimpleQueue[tuple[int, T] | None] = queue.SimpleQueue()

        async def one(i: int) -> None:
            async with self._slots:
                results.put((i, await job(i)))

        async def everything() -> None:
            tasks = [asyncio.ensure_future(one(i)) for i in range(count)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        call = _Call(self.loop)
        try:
            future = self._submit(everything(), call)
            future.add_done_callback(lambda _: results.put(None))
            while (item := _next(results)) is not None:
                finished(*item)
            self._outcome(future)
        finally:
            call.end()

    def end_all(self, error: EngineError) -> None:
        """Let all calls there are raise `error`. In the loop's thread."""
        for end in self._ends:
            end.set_result(error)
        self._ends.clear()

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """End all calls, then `last()`, then the thread. More than once does no harm."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await last()
            await self.loop.shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def _submit(self, work: Coroutine[Any, Any, T], call: _Call) -> concurrent.futures.Future[T]:
        with self._lock:
            if self._is_closed:
                work.close()
                raise EngineError(self._closed)
            return asyncio.run_coroutine_threadsafe(self._watched(work, call), self.loop)

    def _outcome(self, future: concurrent.futures.Future[T]) -> T:
        while not concurrent.futures.wait([future], timeout=_TICK).done:
            pass
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineError(self._closed) from None

    async def _watched(self, work: Coroutine[Any, Any, T], call: _Call) -> T:
        """`work`, unless `end_all` comes first."""
        if not call.begins():
            work.close()
            raise asyncio.CancelledError
        task = asyncio.ensure_future(work)
        end: asyncio.Future[EngineError] = self.loop.create_future()
        self._ends.add(end)
        either: set[asyncio.Future[Any]] = {task, end}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise end.result()
            return task.result()
        finally:
            self._ends.discard(end)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})


def _next(results: queue.SimpleQueue[T]) -> T:
    while True:
        try:
            return results.get(timeout=_TICK)
        except queue.Empty:
            continue
