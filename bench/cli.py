"""Start-up of the command line, against an interpreter that does nothing, `import typer` and the smallest typer app.

`python` is the limit for any command, the help of an app with one command without options for any that is made with
typer. Seconds of the whole process; the peak of its memory is not measured (0).
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from pathlib import Path

import measure

COMMANDS = ("fire --help", "fire rollout --help", "fire rules")
PEERS = {
    "python": ["pass"],
    "import typer": ["import typer"],
    "typer app --help": ["import typer; typer.run(lambda: None)", "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall time of a command from start to exit."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """All commands and what they are compared with in turn."""
    options = measure.parse(__doc__ or "", {})
    peers = {name: [sys.executable, "-c", *code] for name, code in PEERS.items()}
    ours = {text: [str(Path(sys.executable).with_name("fire")), *text.split()[1:]] for text in COMMANDS}
    actions = {name: functools.partial(seconds, command) for name, command in {**ours, **peers}.items()}
    measure.alternate(actions, 1)  # files enter the system's cache, bytecode is written
    found = measure.alternate(actions, options.repeat)
    groups = {
        text: measure.summarise({name: {"seconds": found[name], "peak_mib": 0.0} for name in (text, *peers)})
        for text in ours
    }
    measure.report(options, {}, groups)


if __name__ == "__main__":
    main()
