"""Does many jobs, each of which may fail or die, some at the same time: a process per lane, started anew if lost.

With one lane jobs are done in this process. With more, each lane is a thread that hands its jobs one by one to a
process of its own (spawned: forking one that has used torch or Polars may hang) and takes back None or what went wrong.
A process that is killed costs its job alone. A worker whose parent dies ends at once, so nothing goes on computing
behind the back of the next attempt.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from typing import Any

from fire_data.schemas.errors import FireError

Job = tuple[Any, ...]
Work = Callable[..., None]
Told = Callable[[Job, str | None], None]


def work_through(work: Work, jobs: Sequence[Job], lanes: int, told: Told) -> None:
    """Call `work(*job)` for every job; `told(job, error)` after each, in some order, one at a time.

    `work` is a function of a module, and jobs can be pickled.
    """
    if lanes <= 1 or len(jobs) <= 1:
        for job in jobs:
            told(job, attempt(work, job))
        return
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    lock, stop = threading.Lock(), threading.Event()
    threads = [
        threading.Thread(target=_lane, args=(work, waiting, lock, told, stop), daemon=True)
        for _ in range(min(lanes, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()  # an interrupt: workers end with this process


def attempt(work: Work, job: Job) -> str | None:
    """None, or in words what went wrong."""
    try:
        work(*job)
    except FireError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever a cell dies of is its result, and must not stop the others
        return f"{type(error).__name__}: {error}"
    return None


def _lane(work: Work, waiting: queue.SimpleQueue[Job], lock: threading.Lock, told: Told, stop: threading.Event) -> None:
    process: SpawnProcess | None = None
    pipe: Any = None
    while not stop.is_set():
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            break
        if process is None:
            process, pipe = _started(work)
        try:
            pipe.send(job)
            error = pipe.recv()
        except (EOFError, OSError):
            process.join()
            error, process = f"its process ended with code {process.exitcode}", None
        with lock:
            told(job, error)
    if process is not None:
        pipe.close()  # the worker's end of its work
        process.join()


def _started(work: Work) -> tuple[SpawnProcess, Any]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, mine


def _serve(work: Work, pipe: Any) -> None:
    """A worker: jobs from the pipe until it is closed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(work, job))
        gc.collect()  # or what is left over of the job would be frozen too
        gc.freeze()  # what lives after a job are modules: looking through them again took a tenth of every next job


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
