"""Bytes on disk: write beside, fsync, publish without overwriting: nothing torn is ever seen.

Every writer goes through this module, so there is one place to inject faults and one place that turns an
operating-system error into words.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic_core import from_json, to_json

from fire_data.schemas.errors import DataError, StorageError

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_HOST = socket.gethostname().replace(".", "-")  # a dot ends it in the names of temporary files


@contextlib.contextmanager
def storage_errors(where: Path | str) -> Iterator[None]:
    """Turn OSError into StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, fix = "the disk is full", "free some space, then the same command again continues"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what, fix = (
                f"no permission: {error.strerror}",
                "make the run folder writable, then the same command again",
            )
        else:
            what, fix = f"the file system failed: {error.strerror or error}", "the same command again continues"
        raise StorageError(what, where=str(error.filename or where), fix=fix) from error


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes. Raises StorageError."""
    with storage_errors(path), path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make names created in, or removed from, a folder durable, where the file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create a folder with its parents, each durable in the one above it."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_folder(path.parent)


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary(folder: Path, name: str) -> Path:
    """A fresh name in a temporary folder, marked with host and process so that leftovers of the dead can be told."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{_HOST}.{os.getpid()}.{secrets.token_hex(4)}.{name}"


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of processes of this host that no longer run."""
    if not folder.is_dir():
        return
    with storage_errors(folder):
        found = list(folder.iterdir())
    for path in found:
        host, _, rest = path.name.partition(".")
        pid = rest.partition(".")[0]
        if host == _HOST and pid.isdecimal() and not _alive(int(pid)):
            remove(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    """Delete a file or folder if it is there. What cannot be deleted stays: this is for leftovers, whose failure must
    not take the place of the one that is being told."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write and fsync a new file (no atomicity: for temporary names)."""
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def replace_json(path: Path, value: Any, tmp: Path) -> None:
    """Atomically create or replace a JSON file."""
    replace_bytes(path, json_bytes(value), tmp)


def replace_bytes(path: Path, data: bytes, tmp: Path) -> None:
    """Atomically create or replace a file."""
    with storage_errors(path):
        make_folder(path.parent)
        scratch = temporary(tmp, path.name)
        try:
            write_bytes(scratch, data)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
        fsync_folder(path.parent)


def create_json(path: Path, value: Any, tmp: Path) -> bool:
    """Atomically create a JSON file; False if one is already there, which is then left alone."""
    return create_bytes(path, json_bytes(value), tmp)


def create_bytes(path: Path, data: bytes, tmp: Path) -> bool:
    """Atomically create a file; False if one is already there, which is then left alone."""
    with storage_errors(path):
        scratch = temporary(tmp, path.name)
        try:
            write_bytes(scratch, data)
            return publish(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """A value as JSON, a key to a line."""
    json.dumps(value, allow_nan=False)  # raises for what is no JSON; Python's own indenting takes twenty times as long
    return to_json(value, indent=1) + b"\n"


def read_json(path: Path, what: str, fix: str | None = None) -> Any:
    """The value of a JSON file, None if there is none. Raises DataError for what is not JSON, or is null."""
    with storage_errors(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
    try:
        value = from_json(data, allow_inf_nan=False)  # stricter than Python's: no NaN, and text is Unicode
    except ValueError as error:
        raise DataError(f"{what} is not readable: {error}", where=str(path), fix=fix) from None
    if value is None:  # a file that holds nothing is not one that is not there
        raise DataError(f"{what} is null", where=str(path), fix=fix)
    return value


def publish(scratch: Path, final: Path) -> bool:
    """Give a complete, fsynced file its final name without overwriting; False if the name is taken."""
    make_folder(final.parent)
    try:
        os.link(scratch, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        with locked(scratch.parent / "rename.lock"):
            if final.exists():
                return False
            os.rename(scratch, final)
    fsync_folder(final.parent)
    return True


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock that the kernel releases when the process ends, however it ends.

    `waiting` is called once if another process holds it.
    """
    with contextlib.ExitStack() as stack:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            f = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    waiting()
                fcntl.flock(f, fcntl.LOCK_EX)
        yield


def set_aside(paths: list[Path], orphans: Path) -> None:
    """Move files or folders of a run out of sight, never delete, in the order given.

    Each keeps its place within the run under a fresh folder of `orphans` (`RUN/.fire/orphans`): it can be put back.
    """
    present = [p for p in paths if p.exists()]
    if not present:
        return
    root = orphans.parent.parent
    with storage_errors(orphans):
        target = orphans / secrets.token_hex(4)
        for path in present:
            place = target / os.path.relpath(path, root)
            make_folder(place.parent)
            os.rename(path, place)
            fsync_folder(place.parent)
            fsync_folder(path.parent)


def publish_folder(scratch: Path, final: Path) -> None:
    """Give a complete, synced folder its final name; the name must be free."""
    with storage_errors(final):
        make_folder(final.parent)
        os.rename(scratch, final)
        fsync_folder(final.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link under a new name; a synced copy where the file systems differ."""
    make_folder(target.parent)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in {*_NO_HARD_LINKS, errno.EXDEV}:
            raise
        shutil.copyfile(source, target)
        fsync_file(target)
    fsync_folder(target.parent)
