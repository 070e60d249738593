"""Starts `fire` as several processes of one group on this machine, by torch's own launcher, and ends with them.

The launcher watches: when one process fails or is killed, it ends the others. A failing process says itself why; for
one that was killed, this module does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

from fire_data.distributed import LAUNCHED, LOST, SAME_COMMAND, check_devices
from fire_data.schemas.errors import ConfigError, IncompleteError

_ADDRESS = "127.0.0.1"
_SIGNALS = ("SIGTERM", "SIGHUP", "SIGQUIT")  # an interrupt raises KeyboardInterrupt here, and the others are terminated


def launch(arguments: Sequence[object], processes: int, device: str, *, quiet: bool = False) -> int:
    """Run `fire ARGUMENTS` as `processes` processes, to the end of all. The exit code of the one that failed, or 0.

    Args:
        device: what each of them computes on; they need a GPU each, or share the CPU.
        quiet: the result and the next command are not shown.

    Raises:
        ConfigError: there are fewer GPUs than processes, or this is already one of several processes.
        IncompleteError: one was killed from outside; the others were ended.
    """
    if "RANK" in os.environ:
        raise ConfigError("--launch inside of a launcher: this is already one of several processes", fix="one of both")
    check_devices(device, processes)
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="fire-launch-") as logs, _surroundings(processes, quiet):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=secrets.token_hex(8),
            rdzv_backend="c10d",
            rdzv_endpoint=f"{_ADDRESS}:0",
            max_restarts=0,
            local_addr=_ADDRESS,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle=",".join(_SIGNALS),
        )
        command = ["-m", "fire_data.cli", *map(str, arguments)]
        try:
            elastic_launch(config, sys.executable)(*command)
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            return _code({place: failure.exitcode for place, failure in error.failures.items()})
    return 0


def _code(codes: dict[int, int]) -> int:
    """The exit code of the process that said what failed; an IncompleteError where all that failed were killed."""
    said = [code for code in codes.values() if code > 0 and code != LOST]
    if said:
        return said[0]
    killed = [
        f"process {place} was killed by {signal.Signals(-code).name}" for place, code in codes.items() if code < 0
    ]
    text = killed[0] if killed else "a process ended without a word"
    raise IncompleteError(text, where="training on several processes", fix=SAME_COMMAND)


@contextlib.contextmanager
def _surroundings(processes: int, quiet: bool) -> Iterator[None]:
    """The environment that the processes start in; afterwards this process's own, handlers of signals included."""
    given = {
        LAUNCHED: "quiet" if quiet else "yes",
        # Threads of all together: the cores. `threads` in fire.yaml is per process and wins.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform.startswith("linux") else {}),
    }
    before, disabled = dict(os.environ), logging.root.manager.disable
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in _SIGNALS}
    os.environ |= given | {name: before[name] for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME") if name in before}
    logging.disable(logging.CRITICAL)  # the launcher's own words: a table of exit codes and where they might be
    try:
        yield
    finally:
        logging.disable(disabled)
        os.environ.clear()
        os.environ.update(before)
        for name, handler in handlers.items() if threading.current_thread() is threading.main_thread() else ():
            signal.signal(getattr(signal, name), handler)
