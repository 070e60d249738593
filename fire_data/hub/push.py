"""`fire push`: a run's sealed tables to a dataset on the Hub, shards first, then the card, then the index.

Nothing that is there is overwritten but the card, the settings and the index, and only by the run they are of. So a
push that was interrupted anywhere is continued by the same command, and what a reader finds through the index is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fire_data import files
from fire_data.hub import checkpoint
from fire_data.hub.card import dataset_card, read_licence, require_licence
from fire_data.hub.client import Repository, Source, is_same
from fire_data.hub.flat import flat_fields, write_flat
from fire_data.hub.layout import (
    CARD,
    CHECKPOINTS,
    CONFIG,
    FLAT,
    INDEX,
    TABLES,
    TAG,
    Stages,
    files_of,
    key_of,
    local_stages,
    ordered,
    part_of,
    read_index,
    require_same_run,
    select,
    write_index,
)
from fire_data.hub.redact import require_no_folder, shared_config, shared_manifest
from fire_data.run import Run
from fire_data.schemas.config import render_config
from fire_data.schemas.errors import ConfigError, FingerprintError
from fire_data.schemas.manifest import Manifest, Receipt
from fire_data.shards import sealed, verify_shard
from fire_data.stages import Reporter, Silent

LARGEST_INDEX = 256 << 20  # bytes
_LARGEST_CARD = 4 << 20
_FILES_PER_COMMIT = 50
_IGNORED = (".gitattributes",)


def push(
    run: Run,
    repo: str,
    *,
    rounds: Sequence[int] | None = None,
    stages: Sequence[str] | None = None,
    flat: bool = False,
    private: bool = True,
    revision: str | None = None,
    licence: str | None = None,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Make a run's sealed tables, or a checkpoint, a repository on the Hub; continue or confirm what is there.

    Args:
        repo: user/name.
        rounds: None: all that are sealed; of checkpoints the last.
        stages: rollouts, scores, addons, weights, evals, or one table, `weights/fire`; None: all of these. Alone:
            checkpoints, which makes a model repository.
        flat: also the weights joined with their scores.
        private: False: everybody may see it.
        licence: an identifier of the Hub; None: as it is there, or unknown.

    Returns:
        What was pushed: `repository`, `commit`, `private`, `tables`, `files` uploaded and their `bytes`.

    Raises:
        ConfigError: nothing to push, no token, or a repository that is another's or is public.
        FingerprintError: the repository holds another run.
        IncompleteError: the network failed; the same call continues.
    """
    require_licence(licence)
    report = report or Silent()
    if stages and CHECKPOINTS in {name.partition("/")[0] for name in stages}:
        if list(stages) != [CHECKPOINTS] or flat:
            raise ConfigError("a checkpoint is pushed alone, into a repository of its own", fix="--stage checkpoints")
        return checkpoint.push_checkpoint(run, repo, rounds, private, revision, licence, report)
    here = local_stages(run)
    chosen = select(here, rounds, stages, str(run.root))
    hub = Repository(repo, "dataset", revision)
    hub.require_token()
    head = hub.create(private)
    tmp = run.root / ".fire" / "tmp"
    files.remove_leftovers(tmp)
    with files.storage_errors(tmp):
        scratch = files.temporary(tmp, "push")
    try:
        done = _Push(run, hub, head.commit, scratch, report).finish(here, chosen, flat, licence)
    finally:
        files.remove(scratch)
    return done | {"private": head.private}


class _Push:
    """One push: what is there, what is missing, and the commits that add it."""

    def __init__(self, run: Run, hub: Repository, commit: str, scratch: Path, report: Reporter) -> None:
        self.run, self.hub, self.commit, self.scratch, self.report = run, hub, commit, scratch, report
        self.tree = hub.tree(commit)
        self.sent: list[int] = []

    def finish(self, here: Stages, chosen: list[Manifest], flat: bool, licence: str | None) -> dict[str, Any]:
        """Upload what is missing, then the card, then the settings and the index together."""
        theirs = self._index()
        fix = "push to another name"
        require_same_run({k: m for k, m in here.items() if m.sealed}, theirs, where=self.hub.where, fix=fix)
        card = self._read(CARD, _LARGEST_CARD).decode("utf-8", "replace") if CARD in self.tree else ""
        wanted = [shared_manifest(m, self.run.root) for m in chosen]
        sources = {path: (part_of(self.run.root, m), r) for m in chosen for path, r in files_of(m).items()}
        made: dict[str, Path] = {}
        for weights in [m for m in chosen if m.stage == "weights"] if flat else []:
            if not self._has_flat(theirs, weights):
                manifest, written = write_flat(self.run, weights, self.scratch)
                wanted.append(manifest)
                made |= written
        plan = {path: receipt for m in wanted for path, receipt in files_of(m).items()}
        self._require_ours(theirs, plan, card)
        missing = {
            path: made[path] if path in made else verify_shard(*sources[path]) for path in plan if path not in self.tree
        }
        stages = (theirs | {key_of(m): m for m in wanted}).values()
        text = dataset_card(self.hub.id, stages, licence or read_licence(card)).encode()
        settings = render_config(shared_config(self.run.config, self.run.root, stages)).encode()
        index = write_index(stages)
        for path, data in ((CARD, text), (CONFIG, settings), (INDEX, index)):
            require_no_folder(data, self.run.root, path)
        self._shards(missing, plan)
        self._small({CARD: text}, "card")
        self._small({CONFIG: settings, INDEX: index}, "index")
        return {
            "repository": self.hub.where,
            "commit": self.commit,
            "tables": [part_of(Path(), m).label for m in ordered(wanted)],
            "files": len(self.sent),
            "bytes": sum(self.sent),
        }

    def _index(self) -> Stages:
        return read_index(self._read(INDEX, LARGEST_INDEX), f"{self.hub.where}/{INDEX}") if INDEX in self.tree else {}

    def _read(self, path: str, limit: int) -> bytes:
        return self.hub.read(path, self.tree[path], self.commit, self.scratch / "read", limit)

    def _has_flat(self, theirs: Stages, weights: Manifest) -> bool:
        there = theirs.get((weights.round, FLAT, weights.name or ""))
        return there is not None and there.fields == flat_fields(
            sealed(self.run.part("scores", weights.round)), weights
        )

    def _require_ours(self, theirs: Stages, plan: Mapping[str, Receipt], card: str) -> None:
        """Raise if the repository holds what is not of this run: others' files, or an unfinished push of other rows."""
        known = {path for m in theirs.values() for path in files_of(m)} | {INDEX, CONFIG, CARD, *_IGNORED}
        strange = sorted(self.tree.keys() - known - plan.keys())
        foreign = [p for p in strange if p.partition("/")[0] not in (*TABLES, FLAT)]
        if not theirs and (foreign or (card and TAG not in card)):
            text = f"the repository holds something else: {(foreign or [CARD])[0]}"
            raise ConfigError(text, where=self.hub.where, fix="push to another name")
        loose = [p for p in strange if p not in foreign]
        if loose:
            text = f"an unfinished push left {len(loose)} more files, the first is {loose[0]}"
            fix = "the same push with all its rounds and stages, or push to another name"
            raise ConfigError(text, where=self.hub.where, fix=fix)
        for path, receipt in plan.items():
            if path in self.tree and not self.tree[path].holds(receipt.bytes, receipt.sha256):
                text = f"{path} is another file there than here"
                raise FingerprintError(text, where=self.hub.where, fix="push to another name")

    def _shards(self, missing: Mapping[str, Path], plan: Mapping[str, Receipt]) -> None:
        self.report.start("push", sum(plan[path].bytes for path in missing), "bytes")
        paths = list(missing)
        for start in range(0, len(paths), _FILES_PER_COMMIT):
            names = paths[start : start + _FILES_PER_COMMIT]
            self.commit = self.hub.commit({p: missing[p] for p in names}, "Add tables", self.commit)
            sizes = [plan[path].bytes for path in names]
            self.sent += sizes
            self.report.advance(sum(sizes))

    def _small(self, texts: Mapping[str, bytes], what: str) -> None:
        """Commit small files together, unless all are there already."""
        changed: dict[str, Source] = {p: data for p, data in texts.items() if not is_same(self.tree.get(p), data)}
        if changed:
            self.commit = self.hub.commit(changed, f"Update the {what}", self.commit)
            self.sent += [len(texts[p]) for p in changed]
