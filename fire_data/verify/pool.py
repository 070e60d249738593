"""Processes that grade responses, each killed and replaced when a response takes too long or takes the process with it.

A process is given a batch and answers response by response, so the one that is late is known and the others are not
lost. A process ends with its pipe, which also happens when this process is killed; a kill reaches its whole group.
Times are in seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fire_data
from fire_data.schemas.errors import ConfigError, EngineError
from fire_data.verify.answers import MEMORY, TIMEOUT, Graded

_START_S, _END_S = 120.0, 5.0
_START = "import sys; sys.path.append(sys.argv[1]); from fire_data.verify import worker; worker.main(sys.argv[2])"


class _Late(Exception):
    """A process did not answer in time."""


class _Gone(Exception):
    """A process ended without an answer."""


class _Process:
    """One process and its pipes."""

    def __init__(self, recipe: str) -> None:
        # Last on the path, so that nothing beside the package hides a module of Python's own.
        home = str(Path(fire_data.__file__).resolve().parent.parent)
        command = [sys.executable, "-P", "-c", _START, home, recipe]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self._buffer = b""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self._in, self._out = self.child.stdin, self.child.stdout
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)

    def send(self, tasks: Sequence[dict[str, Any]]) -> None:
        with contextlib.suppress(BrokenPipeError):  # found out by the one who reads
            self._in.write(json.dumps(tasks).encode() + b"\n")
            self._in.flush()

    def read(self, seconds: float) -> dict[str, Any]:
        """The next message. Raises _Late, _Gone."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise _Late
            data = os.read(self._out.fileno(), 1 << 16)
            if not data:
                raise _Gone
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def fate(self) -> str:
        """The verdict on the response at which it ended. Raises EngineError if nothing outside of it ended it."""
        ended = self._ended(_END_S)
        if ended is not None and ended.si_code == os.CLD_EXITED:
            text = f"a process that grades ended by itself (exit code {ended.si_status})"
            raise EngineError(text, fix="read what it wrote above")
        return MEMORY  # killed by a signal: what a lack of memory, or of stack, comes to where Python cannot say so

    def close(self, seconds: float = 0.0) -> None:
        """Close its pipe, give it time to end by itself, then kill what is left of its group."""
        if self.child.returncode is not None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        self._ended(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        self._out.close()

    def _ended(self, seconds: float) -> os.waitid_result | None:
        """How it ended, if it does in time. It is not reaped, so that its number still names its own group."""
        deadline = time.monotonic() + seconds
        while True:
            found = os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if found is not None or time.monotonic() >= deadline:
                return found
            time.sleep(0.001)


class Pool:
    """Up to `workers` processes for one recipe, started when they are needed. Threads may ask it at the same time."""

    def __init__(self, recipe: dict[str, Any], *, workers: int, seconds: float, batch: int) -> None:
        """`seconds`: for one response. `batch`: how many responses a process is given at a time."""
        self._recipe, self._workers, self._seconds, self._batch = json.dumps(recipe), workers, seconds, batch
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._lock = threading.Lock()
        self._room = threading.Semaphore(workers)
        self._stopped = False
        self.facts: dict[str, Any] = {}
        self._end = weakref.finalize(self, _close_all, self._all)

    def start(self) -> None:
        """Start one process. Raises ConfigError if it cannot grade, with what it says of the reason."""
        with self._room:
            self._give_back(self._take())

    def grade(self, tasks: Sequence[dict[str, Any]]) -> list[Graded]:
        """What the processes say of every task, in order. Raises ConfigError for an error in a user's function."""
        results: list[Graded | None] = [None] * len(tasks)
        starts = iter(range(0, len(tasks), self._batch))
        failures: list[BaseException] = []

        def work() -> None:
            while not failures:
                with self._lock:
                    start = next(starts, None)
                if start is None:
                    return
                try:
                    with self._room:
                        for i, graded in self._batch_graded(tasks, start, min(start + self._batch, len(tasks))):
                            results[i] = graded
                except BaseException as error:  # noqa: BLE001 - whatever it is, the calling thread raises it
                    failures.append(error)
                    if not isinstance(error, Exception):  # an interrupt waits for nobody
                        self._stopped = True
                        _close_all(self._all, 0.0)

        count = min(self._workers, -(-len(tasks) // self._batch))
        threads = [threading.Thread(target=work, daemon=True) for _ in range(count - 1)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return [r for r in results if r is not None]

    def close(self) -> None:
        """End all processes."""
        self._end()

    def _batch_graded(self, tasks: Sequence[dict[str, Any]], start: int, stop: int) -> Iterator[tuple[int, Graded]]:
        while start < stop:
            process = self._take()
            process.send(tasks[start:stop])
            alive = False
            try:
                for i in range(start, stop):
                    try:
                        message = process.read(self._seconds)
                    except _Late:
                        message = {"graded": (0.0, TIMEOUT), "last": True}
                    except _Gone:
                        message = {"graded": (0.0, process.fate()), "last": True}
                    if "error" in message:
                        raise ConfigError(**message["error"])
                    yield i, Graded(*message["graded"])
                    start, alive = i + 1, "last" not in message
                    if not alive:
                        break
            finally:
                if alive:
                    self._give_back(process)
                else:
                    self._forget(process)

    def _take(self) -> _Process:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            if self._stopped:
                raise EngineError("grading was interrupted", fix="the same command again")
            process = _Process(self._recipe)
            self._all.add(process)
        try:
            message = process.read(_START_S)
        except (_Late, _Gone):
            self._forget(process)
            raise EngineError("a process that grades did not start", fix="read what it wrote above") from None
        if "error" in message:
            self._forget(process)
            raise ConfigError(**message["error"])
        self.facts = message["ready"]
        return process

    def _give_back(self, process: _Process) -> None:
        with self._lock:
            self._idle.append(process)

    def _forget(self, process: _Process) -> None:
        process.close()
        with self._lock:
            self._all.discard(process)


def _close_all(processes: set[_Process], seconds: float = _END_S) -> None:
    for process in list(processes):
        process.close(seconds)
