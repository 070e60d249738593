"""Reads the blocks of a Markdown page and runs them as a reader would, in a shell whose `fire` is answered here.

Blocks run in the order of the page, so a page is one session. What stands before a block as an HTML comment says how:

* ``<!-- not run: REASON -->``: it needs what tests do not have; its commands are parsed alone.
* ``<!-- exit: N -->``: the block ends with this code.
* ``<!-- output -->``: each line of the block is among what the block before it printed; `...` stands for anything.

A block with a title is that file; a YAML one is merged into the settings there. `fire` starts no process: the shell's
`fire` sends its arguments to the test, which calls the application. So a page costs what its commands cost.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fire_data.schemas.config import Config

_BLOCK = re.compile(
    r"(?P<marks>(?:^<!--[^\n]*-->\n)*)"
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<text>.*?)^(?P=indent)```$"
    r"|`(?P<inline>fire [a-z][^`]*)`(?P<after>(?:<!--[^\n>]*-->)?)",
    re.M | re.S,
)
_PLACEHOLDER = re.compile(r"(?<![\w=.:/-])[A-Z][A-Z_]*(?![\w.])|\.\.\.")  # RUN, NAME, ...


@dataclass(frozen=True)
class Block:
    """A block of a page, or a command inside its text: `language` is then "inline"."""

    page: str
    line: int
    language: str
    title: str
    text: str
    marks: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.page}, line {self.line}"

    def commands(self) -> list[list[str]]:
        """The words of every `fire` command in it."""
        lines = self.text.replace("\\\n", " ").splitlines() if self.language == "sh" else [self.text]
        return [shlex.split(line, comments=True) for line in lines if line.lstrip().startswith("fire ")]


def blocks(path: Path) -> list[Block]:
    """The blocks of a page in order. A command inside the text that names a run is one, others are mentions."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["inline"]:
            command = " ".join(match["inline"].split())
            if " runs/" in command and not _PLACEHOLDER.search(command):
                found.append(Block(path.name, line, "inline", "", command, _marks(match["after"])))
        else:
            lines = [x.removeprefix(match["indent"]) for x in match["text"].splitlines(keepends=True)]
            marks = _marks(match["marks"])
            found.append(Block(path.name, line, match["language"], match["title"] or "", "".join(lines), marks))
    return found


def _marks(text: str) -> dict[str, str]:
    return {m[1]: (m[2] or "").strip() for m in re.finditer(r"<!-- (not run|exit|output)(?:: (.*?))? -->", text)}


class Workspace:
    """A folder in which the names that pages use exist, and a shell whose `fire` is answered by `call`."""

    def __init__(self, root: Path, call: Callable[..., Any]) -> None:
        self.root, self.call = root, call
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""
        self.tools = root / ".tools"
        self.tools.mkdir()
        # A Python without site packages starts in a hundredth of a second.
        self._tool("fire", f'exec {shlex.quote(sys.executable)} -I -S "$0.py" "$@"\n')
        (self.tools / "fire.py").write_text(_CLIENT)
        self._tool("python", f'exec {shlex.quote(sys.executable)} "$@"\n')
        for installed in ("pip", "make"):  # what they would do is done: the tests' environment and the demo are there
            self._tool(installed, "")
        (root / ".venv" / "bin").mkdir(parents=True)
        (root / ".venv" / "bin" / "activate").touch()
        self._tool("editor", f'exec sed -i {" ".join(shlex.quote(x) for x in _SMALL)} "$@"\n')

    def _tool(self, name: str, text: str) -> None:
        (self.tools / name).write_text(f"#!/bin/bash\n{text}")
        (self.tools / name).chmod(0o755)

    def run(self, block: Block) -> None:
        """Do what a reader would do with a block. AssertionError, with what was printed, if it does not go well."""
        if block.title:
            self._file(block)
        elif block.language in ("sh", "inline"):
            code = self._shell(block.text)
            assert code == int(block.marks.get("exit", 0)), f"{block.where}: exit {code}\n{self.printed}"
        elif block.language == "python":
            self._python(block)
        elif block.language == "yaml":
            Config.model_validate({"student": {"model": "given"}, **yaml.safe_load(block.text)})
        elif "output" in block.marks:
            self._compare(block)

    def _file(self, block: Block) -> None:
        path = self.root / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        if block.language == "yaml" and path.exists():
            path.write_text(yaml.safe_dump(_merged(yaml.safe_load(path.read_text()), yaml.safe_load(block.text))))
        else:
            path.write_text(block.text)

    def _python(self, block: Block) -> None:
        out = io.StringIO()
        with contextlib.chdir(self.root), contextlib.redirect_stdout(out):
            exec(compile(block.text, block.where, "exec"), self.names)  # noqa: S102 - our own documentation
        self.printed = out.getvalue()

    def _compare(self, block: Block) -> None:
        there = re.sub(r"\s+", " ", self.printed)
        for line in block.text.splitlines():
            for piece in filter(None, (re.sub(r"\s+", " ", p).strip() for p in line.split("..."))):
                assert piece in there, f"{block.where}: {piece!r} was not printed, but\n{self.printed}"

    def _shell(self, text: str) -> int:
        """Run a script in bash; commands of ours come back through a socket and are answered in this thread."""
        address = self.root / ".tools" / "socket"
        env = {
            "PATH": f"{self.tools}:/usr/bin:/bin", "HOME": str(self.root), "LANG": "C.UTF-8", "EDITOR": "editor",
            "FIRE_SOCKET": str(address), "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        codes: list[int] = []
        printed: list[str] = []

        def shell() -> None:
            try:
                done = subprocess.run(
                    ["bash", "-eu", "-o", "pipefail", "-c", text],
                    cwd=self.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
                    check=False,
                )  # fmt: skip
                codes.append(done.returncode)
                printed.append(done.stdout)
            finally:
                with socket.socket(socket.AF_UNIX) as end:
                    end.connect(str(address))

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(address))
            server.listen()
            thread = threading.Thread(target=shell)
            thread.start()
            while self._answer(server):
                pass
            thread.join()
        address.unlink()
        self.printed = "".join(printed)
        return codes[0]

    def _answer(self, server: socket.socket) -> bool:
        """Answer one call; False when the shell has ended."""
        connection, _ = server.accept()
        with connection, connection.makefile("rw", encoding="utf-8") as stream:
            asked = stream.readline()
            if not asked:
                return False
            folder, *words = json.loads(asked)
            with contextlib.chdir(folder):
                answer = self.call(*words)
            json.dump([answer.code, answer.out, answer.err], stream)
        return True


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{k: _merged(old.get(k), v) for k, v in new.items()}}


_CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect(os.environ["FIRE_SOCKET"])
    stream = s.makefile("rw", encoding="utf-8")
    stream.write(json.dumps([os.getcwd(), *sys.argv[1:]]) + "\\n")
    stream.flush()
    code, out, err = json.load(stream)
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""

# What a reader with a small machine would set in a new fire.yaml.
_SMALL = [
    f"-es/^{line}:.*/{line}: {value}/"
    for line, value in {
        "threads": 1, "  n": 2, "  max_new_tokens": 8, "  prompts_per_shard": 4, "  batch_size": 4, "  lr": 1e-3,
    }.items()
]  # fmt: skip


def settings() -> dict[str, Any]:
    """The same as values for `init_run`."""
    return {
        "threads": 1,
        "rollout": {"n": 2, "max_new_tokens": 8, "prompts_per_shard": 4, "verifier": "exact"},
        "train": {"batch_size": 4, "lr": 1e-3},
        "eval": {"n": 2},
    }


def pages(root: Path) -> Iterator[Path]:
    """Every page that people read: the README and the pages of the site that are not generated."""
    yield root / "README.md"
    yield from sorted(p for p in (root / "docs").rglob("*.md") if p.parent.name != "reference")


def copied(template: Path, target: Path) -> Path:
    """A copy of the workspace that a page may change."""
    shutil.copytree(template, target, symlinks=True)
    return target
