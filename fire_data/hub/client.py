"""One repository on the Hub: list, read, download, commit; every failure of the network in words, never with a token.

Everything goes through the client `huggingface_hub`, which finds the token (`hf auth login`, HF_TOKEN), retries and
chooses the transfer. Nothing here reads a token but to know that there is one, and to keep it out of messages.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fire_data.schemas.errors import ConfigError, DataError, FireError, IncompleteError, StorageError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Kind = Literal["dataset", "model"]
Source = Path | bytes

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_XET = re.compile(r"xet-(read|write)-token|xethub")  # the addresses of what moves large files
_LOGIN = "hf auth login (or set HF_TOKEN)"
_AGAIN = "the same command again continues"


@dataclass(frozen=True)
class Entry:
    """One file in a repository: its bytes, and their sha256 if it is a large file, else the git hash of its blob."""

    size: int
    sha256: str | None
    blob: str

    def holds(self, size: int, sha256: str) -> bool:
        """True if the file may be the one with this sha256: of small files only the size is known."""
        return self.size == size and self.sha256 in (None, sha256)


@dataclass(frozen=True)
class Head:
    """The newest commit of a branch, and whether only its owners see the repository."""

    commit: str
    private: bool


@dataclass(frozen=True)
class Repository:
    """A dataset or a model on the Hub, at a branch, tag or commit (None: main)."""

    id: str
    kind: Kind = "dataset"
    revision: str | None = None

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            text = f"{self.id!r} is not the name of a repository on the Hub"
            raise ConfigError(text, fix="user/name, letters, digits, dots, - and _")

    @property
    def where(self) -> str:
        """How messages name it."""
        at = f"@{self.revision}" if self.revision else ""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.id}{at}"

    def require_token(self) -> None:
        """Raise ConfigError if there is no token to write with."""
        from huggingface_hub import get_token

        if get_token() is None:
            raise ConfigError("there is no token for the Hub", where=self.where, fix=_LOGIN)

    def exists(self) -> bool:
        """Whether there is such a repository that this user may see."""
        with self._told() as api:
            return bool(api.repo_exists(self.id, repo_type=self.kind))

    def create(self, private: bool) -> Head:
        """The repository, new or as it is, with its branch. Raises ConfigError if it is public against the wish."""
        with self._told(writes=True) as api:
            api.create_repo(self.id, repo_type=self.kind, private=private, exist_ok=True)
            if self.revision not in (None, "main"):
                api.create_branch(self.id, repo_type=self.kind, branch=str(self.revision), exist_ok=True)
        head = self.head()
        if private and not head.private:
            fix = "--public if everybody may see it; else make it private on the Hub, or choose another name"
            raise ConfigError("the repository is there already, and it is public", where=self.where, fix=fix)
        return head

    def head(self) -> Head:
        """The newest commit. Raises ConfigError if there is no such repository or revision for this user."""
        with self._told() as api:
            expand: Any = ["sha", "private"]
            info = api.repo_info(self.id, repo_type=self.kind, revision=self.revision, expand=expand)
        return Head(str(info.sha), bool(info.private))

    def tree(self, commit: str) -> dict[str, Entry]:
        """Every file at a commit."""
        with self._told() as api:
            found = list(api.list_repo_tree(self.id, recursive=True, revision=commit, repo_type=self.kind))
        return _entries(found)

    def entries(self, paths: Sequence[str], commit: str) -> dict[str, Entry]:
        """Those of these files that are there at a commit."""
        found: list[Any] = []
        with self._told() as api:
            for start in range(0, len(paths), 500):  # the Hub takes no more at a time
                part = list(paths[start : start + 500])
                found += api.get_paths_info(self.id, part, revision=commit, repo_type=self.kind)
        return {path: entry for path, entry in _entries(found).items() if path in {*paths}}

    def read(self, path: str, entry: Entry, commit: str, scratch: Path, limit: int) -> bytes:
        """The bytes of a small file. Raises DataError if it is larger than `limit`."""
        if entry.size > limit:
            text = f"{path} has {entry.size:,} bytes; what `fire push` writes has at most {limit:,}"
            raise DataError(text, where=self.where, fix="ask its author to push the run again")
        return self.download(path, commit, scratch).read_bytes()

    def download(self, path: str, commit: str, folder: Path) -> Path:
        """A file below `folder`, under its path in the repository; a broken download continues. `path` is trusted."""
        with self._told() as api, _quiet():
            return Path(api.hf_hub_download(self.id, path, repo_type=self.kind, revision=commit, local_dir=folder))

    def commit(self, files: Mapping[str, Source], message: str, parent: str, *, delete: Sequence[str] = ()) -> str:
        """Upload files and make them visible together on top of `parent`; the new commit.

        Raises IncompleteError if somebody else was faster, or if it is not known whether the commit was made.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._told(writes=True) as api, _quiet():
            operations: list[Any] = [CommitOperationAdd(path, source) for path, source in files.items()]
            operations += [CommitOperationDelete(path) for path in delete]
            info = api.create_commit(
                self.id, operations, commit_message=message, repo_type=self.kind, revision=self.revision,
                parent_commit=parent,
            )  # fmt: skip
        return str(info.oid)

    @contextmanager
    def _told(self, *, writes: bool = False) -> Iterator[HfApi]:
        """The client; what it raises, as a FireError. `writes`: the token needs the right to."""
        from huggingface_hub import HfApi, errors

        http_error: type[Exception] = vars(errors)["HTTPError"]  # that of whichever HTTP library it uses
        try:
            yield HfApi(library_name="fire-opd")
        except (http_error, OSError, RuntimeError, ValueError, errors.EntryNotFoundError) as error:
            # An upload in a thread, and a file without an answer, are wrapped once more; what matters is behind it.
            wrapped = isinstance(error, RuntimeError | errors.LocalEntryNotFoundError)
            raise self._explained((error.__cause__ if wrapped else None) or error, writes) from None

    def _explained(self, error: BaseException, writes: bool) -> FireError:
        from huggingface_hub import errors

        where, line = self.where, line_of(error)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return ConfigError("HF_HUB_OFFLINE=1 forbids to ask the Hub", where=where, fix="HF_HUB_OFFLINE=0 fire ...")
        if isinstance(error, errors.RevisionNotFoundError):
            return ConfigError("there is no such revision", where=where, fix="--revision BRANCH_OR_COMMIT")
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, errors.GatedRepoError):
            return ConfigError("access has to be asked for", where=where, fix=f"ask on its page, then {_LOGIN}")
        if (isinstance(error, errors.RepositoryNotFoundError) or status == 401) and writes:
            text = f"the token has no right to write here, or there is no such {self.kind}"
            return ConfigError(text, where=where, fix=f"check the name; {_LOGIN} with a token that may write")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            text = f"there is no such {self.kind}, or it is private and the token does not open it"
            return ConfigError(text, where=where, fix=f"check the name; {_LOGIN}")
        if status == 403:
            text = f"the token may not do this: {line}"
            return ConfigError(text, where=where, fix="hf auth login with one that may write")
        if _XET.search(str(error)):
            text = f"xet, how the Hub moves large files, failed: {line}"
            return IncompleteError(text, where=where, fix=f"{_AGAIN}; with HF_HUB_DISABLE_XET=1 it goes without xet")
        if status in (409, 412):
            return IncompleteError(f"somebody else changed it meanwhile: {line}", where=where, fix=_AGAIN)
        if status == 429:
            return IncompleteError("the Hub asks to wait: too many requests", where=where, fix=f"later, {_AGAIN}")
        refused = isinstance(error, ValueError) and not isinstance(error, OSError)
        if refused or (status is not None and status < 500):
            return FireError(f"the Hub refused: {line}", where=where, fix=f"see the message, then {_AGAIN}")
        if isinstance(error, OSError) and status is None and error.errno is not None and not _is_network(error):
            return StorageError(f"the file system failed: {error.strerror}", where=where, fix=_AGAIN)
        return IncompleteError(f"the Hub did not answer: {line}", where=where, fix=_AGAIN)


def is_same(entry: Entry | None, data: bytes) -> bool:
    """True if a file in a repository holds these bytes."""
    if entry is None:
        return False
    if entry.sha256 is not None:
        return entry.sha256 == hashlib.sha256(data).hexdigest()
    return entry.blob == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def address(text: str) -> tuple[str, str | None]:
    """Repository and revision of `hf://datasets/user/name` or `hf://datasets/user/name@revision`."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@(.+))?", text)
    if match is None:
        raise ConfigError(f"{text!r} is no dataset on the Hub", where="--from", fix="--from hf://datasets/user/name")
    return match[1], match[2]


def free_space(folder: Path, needed: int) -> None:
    """Raise StorageError if the file system of a folder has no room for so many bytes."""
    there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        text = f"{needed:,} bytes are needed and {free:,} are free"
        raise StorageError(text, where=str(folder), fix="free some space, or take fewer rounds or stages")


def _is_network(error: OSError) -> bool:
    return isinstance(error, ConnectionError | TimeoutError)


def _entries(found: Sequence[Any]) -> dict[str, Entry]:
    from huggingface_hub.hf_api import RepoFile

    return {f.path: Entry(f.size, f.lfs.sha256 if f.lfs else None, f.blob_id) for f in found if isinstance(f, RepoFile)}


def line_of(error: BaseException) -> str:
    """The first line of an error that says something, without addresses' signatures and without the token."""
    from huggingface_hub import get_token

    text = re.sub(r"\?\S+", "", first_line(error))[:300]
    token = get_token()
    return text.replace(token, "***") if token else text


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the client: stderr has one already."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    was = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was:
            enable_progress_bars()
