"""The process that holds a vLLM engine: its interpreter, environment, pipes and log, and how it ends.

It leads a process group of its own, so that an interrupt reaches the command alone, and whatever vLLM starts ends with
it. It is told to end by the closing of its pipe, which also happens when this process is killed. One thread reads its
answers and hands each to the call it belongs to; another waits for its end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fire_data.schemas.errors import ConfigError, EngineError
from fire_data.vllm_worker import fire_vllm

_CLOSE_SECONDS = 20.0  # until a process that was told to end is killed
_LINES, _LINE = 4, 400  # of the log, in a message, and characters of one
_HANDLED = re.compile(r"\b(?:DEBUG|INFO|WARNING) \d\d-\d\d ")
_RAISED = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b: .+")
_SMALLER = "read the log; if memory ran out, lower vllm.max_num_seqs or vllm.gpu_memory_utilization"
_NO_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"


class Process:
    """The worker and its pipes. A call is a queue that gets its answers, and None when the process is gone.

    Raises ConfigError if there is no such interpreter, or it has no vLLM.
    """

    def __init__(self, python: str, log: Path, threads: int | None, gpus: str | None = None) -> None:
        interpreter = _interpreter(python)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._calls: dict[int, queue.SimpleQueue[Any]] = {0: queue.SimpleQueue()}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # of `_calls`, `_gone`, `_closed`
        self._writing = threading.Lock()
        self._gone = False
        self._closed = False
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        command = [interpreter, fire_vllm.__file__, str(theirs_in), str(theirs_out)]
        with log.open("ab") as sink:
            self._log_start = sink.tell()
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, pass_fds=(theirs_in, theirs_out),
                env=_environment(threads, gpus), start_new_session=True,
            )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.pid = self._child.pid
        self._out = os.fdopen(ours_out, "wb")
        self._in = os.fdopen(ours_in, "rb")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reaper = threading.Thread(target=self._reap, daemon=True)
        self._reader.start()
        self._reaper.start()

    def send(self, header: dict[str, Any], arrays: dict[str, Any]) -> None:
        # That the other side is gone is found out by the thread that reads.
        with self._writing, contextlib.suppress(BrokenPipeError, ValueError):
            fire_vllm.write_message(self._out, header, arrays)

    def first(self, seconds: float) -> dict[str, Any]:
        """What the process says of itself when it is ready. Raises EngineError if it does not get there."""
        try:
            message = self._calls[0].get(timeout=seconds)
        except queue.Empty:
            text = f"vLLM was not ready after {seconds:g} seconds"
            raise EngineError(text, where=str(self.log), fix="raise vllm.start_timeout") from None
        if message is None:
            raise self._death("vLLM did not start", "read the log, then change vllm.* in fire.yaml")
        facts: dict[str, Any] = message[0]
        return facts

    def ask(self, header: dict[str, Any], arrays: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The arrays of every answer to a call as they come in. Raises EngineError when the process has died."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._lock:
            number = next(self._numbers)
            self._calls[number] = answers
            if self._gone or self._closed:
                answers.put(None)
        try:
            self.send(header | {"job": number}, arrays)
            while True:
                message = answers.get()
                if message is None:
                    raise self._death("vLLM is gone", _SMALLER)
                yield message[1]
                if message[0]["done"]:
                    return
        finally:
            with self._lock:
                del self._calls[number]

    def close(self, *, kill: bool = False) -> None:
        """Close the pipe, which ends the process; kill it at once, or if it does not end."""
        with self._lock:
            self._closed = True
        with self._writing, contextlib.suppress(BrokenPipeError):
            self._out.close()
        if not kill:
            self._reaper.join(_CLOSE_SECONDS)
        if self._reaper.is_alive():
            self._kill()
        self._reaper.join()
        self._reader.join()

    def _read(self) -> None:
        """Every message to the call it answers, until the process is gone."""
        with self._in:
            while (message := fire_vllm.read_message(self._in)) is not None:
                call = self._calls.get(message[0].get("job", 0))
                if call is not None:  # else nobody waits for it any more
                    call.put(message)
        with self._lock:
            self._gone = True
            for call in self._calls.values():
                call.put(None)

    def _reap(self) -> None:
        """Wait for the end of the process, then end its children, which might hold the GPU's memory and its pipe."""
        # Not reaped yet, so that its number still names its own group.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self._kill()
        self._child.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _death(self, what: str, fix: str) -> EngineError:
        if self._closed:
            return EngineError("the vLLM engine was closed", where=str(self.log), fix="start a new engine")
        self._reaper.join(_CLOSE_SECONDS)
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            said = "".join(f"\n    {line}" for line in last_words(log.read().decode(errors="replace")))
        text = f"{what} (exit code {self._child.returncode})" + (f"; its log ends with{said}" if said else "")
        return EngineError(text, where=str(self.log), fix=fix)


def last_words(log: str) -> list[str]:
    """The lines of a log that say why it ended: what was raised, first causes first, else the last lines there are.

    vLLM's processes each write a traceback, and warnings about errors that were handled.
    """
    lines = [line.strip()[:_LINE] for line in log.splitlines() if line.strip() and not _HANDLED.search(line)]
    raised = [(i, m[0]) for i, line in enumerate(lines) if (m := _RAISED.search(line))]
    if not raised:
        return lines[-_LINES:]
    return [*dict.fromkeys(text for _, text in raised[-_LINES:]), *lines[raised[-1][0] + 1 :][:_LINES]]


def _interpreter(python: str) -> str:
    """The interpreter's path. Raises ConfigError if there is none, or it has no vLLM."""
    fix = "pip install 'fire-opd[vllm]', or set vllm.python to the interpreter of an environment that has vllm"
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise ConfigError(f"there is no interpreter {python!r}", where="vllm.python", fix=fix)
    answer = subprocess.run([found, "-I", "-c", _NO_VLLM], env=_environment(None), capture_output=True, check=False)
    if answer.returncode:
        raise ConfigError("vLLM is not installed there", where=found, fix=fix)
    return found


def _environment(threads: int | None, gpus: str | None = None) -> dict[str, str]:
    """The parent's environment without its Python paths; nothing is asked of the network, nothing reported."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    limits |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    return {
        **kept, **limits,
        "PYTHONPATH": str(Path(fire_vllm.__file__).parent),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking whether there is a GPU must not occupy it
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the entropy is in the other one
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
