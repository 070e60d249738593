"""`fire push --stage checkpoints`: a trained student as a model repository, in one commit with its card.

One repository is one student: a later round of the same run takes the place of an earlier one, whose commit stays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fire_data.hub.card import code, evaluations, front_matter, licence_text, number, read_licence, table, teachers_of
from fire_data.hub.client import Entry, Repository, Source, is_same
from fire_data.hub.layout import (
    CARD,
    CHECKPOINTS,
    INDEX,
    START,
    TAG,
    Stages,
    by_stage,
    files_of,
    local_stages,
    read_index,
    require_same_run,
    write_index,
)
from fire_data.hub.redact import called, require_no_folder, shared_manifest
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError, IncompleteError
from fire_data.schemas.manifest import ADAPTER, Manifest, Receipt
from fire_data.shards import read_manifest, sealed, verify_file
from fire_data.stages import Reporter

_LARGEST = 64 << 20  # bytes of an index or a card
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def push_checkpoint(
    run: Run,
    repo: str,
    rounds: Sequence[int] | None,
    private: bool,
    revision: str | None,
    licence: str | None,
    report: Reporter,
) -> dict[str, Any]:
    """The student after a round (default: the last that is trained) as a model. Arguments and errors as for `push`."""
    manifest = sealed(run.part(CHECKPOINTS, _round(run, rounds)))
    part = run.part(CHECKPOINTS, manifest.round)
    pickles = [r.shard for r in manifest.shards if r.shard.endswith(_PICKLES)]
    if pickles:
        raise ConfigError(f"{pickles[0]} is not safetensors", where=part.label, fix=f"{part.command} --redo")
    hub = Repository(repo, "model", revision)
    hub.require_token()
    head = hub.create(private)
    tree = hub.tree(head.commit)
    theirs, card = _there(hub, tree, head.commit)
    here = {k: m for k, m in local_stages(run).items() if m.sealed}
    _require_ours(hub, tree, here, theirs, card)
    texts = {
        CARD: model_card(run, manifest, repo, licence or read_licence(card)).encode(),
        INDEX: write_index([shared_manifest(manifest, run.root)]),
    }
    for path, data in texts.items():
        require_no_folder(data, run.root, path)
    changed: dict[str, Source] = {
        path: verify_file(part, part.folder / path, receipt)
        for path, receipt in files_of(manifest).items()
        if path not in tree or not _is_there(tree[path], part.folder / path, receipt)
    }
    changed |= {path: data for path, data in texts.items() if not is_same(tree.get(path), data)}
    left = sorted(p for m in theirs.values() for p in files_of(m) if p in tree and p not in files_of(manifest))
    sizes = [receipt.bytes for path, receipt in files_of(manifest).items() if path in changed]
    report.start("push", sum(sizes), "bytes")
    commit = head.commit
    if changed or left:
        commit = hub.commit(changed, f"Round {manifest.round}", commit, delete=left)
    report.advance(sum(sizes))
    return {
        "repository": hub.where, "commit": commit, "tables": [part.label], "files": len(changed), "bytes": sum(sizes),
        "private": head.private,
    }  # fmt: skip


def _is_there(entry: Entry, file: Path, receipt: Receipt) -> bool:
    return entry.sha256 == receipt.sha256 if entry.sha256 is not None else is_same(entry, file.read_bytes())


def _round(run: Run, rounds: Sequence[int] | None) -> int:
    if rounds is not None and len(rounds) != 1:
        raise ConfigError("one repository holds the student after one round", fix="--round N, once")
    last = run.current_round() - 1
    if rounds is None and last < 0:
        part = run.part(CHECKPOINTS, 0)
        raise IncompleteError("there is no trained student yet", where=str(run.root), fix=part.command)
    return rounds[0] if rounds is not None else last


def _there(hub: Repository, tree: dict[str, Entry], commit: str) -> tuple[Stages, str]:
    """The manifests and the card of a repository."""
    with tempfile.TemporaryDirectory() as folder:
        texts = {p: hub.read(p, tree[p], commit, Path(folder), _LARGEST) for p in (INDEX, CARD) if p in tree}
    theirs = read_index(texts[INDEX], f"{hub.where}/{INDEX}") if INDEX in texts else {}
    return theirs, texts.get(CARD, b"").decode("utf-8", "replace")


def _require_ours(hub: Repository, tree: dict[str, Entry], here: Stages, theirs: Stages, card: str) -> None:
    """Raise if the repository holds something that is not a student of this run."""
    fix = "push to another name"
    require_same_run(here, theirs, where=hub.where, fix=fix)
    foreign = sorted(tree.keys() - {".gitattributes", CARD})
    if not theirs and (foreign or (card and TAG not in card)):
        raise ConfigError(f"the repository holds something else: {(foreign or [CARD])[0]}", where=hub.where, fix=fix)


def model_card(run: Run, checkpoint: Manifest, repo: str, licence: str | None) -> str:
    """The text of README.md: where the student comes from, how it was trained, what came of it, how to load it."""
    name, number_ = run.config.student.model, checkpoint.round
    student = called(name, run.root)
    evals = [m for m in local_stages(run).values() if m.stage == "evals" and m.sealed and m.round in (START, number_)]
    rows = [("student before training", code(student)), ("round", str(number_)), *_signals(run, checkpoint)]
    rows += [("fingerprint", code(checkpoint.fingerprint))]
    front = {
        "license": licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": name if student == name and "/" in name else None,
        "tags": [TAG, "on-policy-distillation", "knowledge-distillation"],
    }
    settings = [(code(k), code(v)) for k, v in checkpoint.fields["train"].items() if v is not None]
    sections = [
        f"# {repo.partition('/')[2]}",
        "A student trained by on-policy distillation with the `fire` toolkit.",
        "## How to load",
        f'```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n```',
        *_adapter(checkpoint, repo),
        "## Where it comes from", table(("what", ""), rows),
        "## Training", table(("setting", "value"), settings),
        table(("number", "value"), [(code(k), number(v)) for k, v in checkpoint.stats.items() if number(v) != "-"]),
        "## Evaluations", evaluations(by_stage(evals)),
        "## Licence", licence_text(licence),
    ]  # fmt: skip
    return front_matter(front) + "\n\n".join(sections) + "\n"


def _adapter(checkpoint: Manifest, repo: str) -> list[str]:
    """How to load the adapter alone, if there is one."""
    if all(not r.shard.startswith(f"{ADAPTER}/") for r in checkpoint.shards):
        return []
    return [
        "These weights have the adapter merged in. It is here by itself, too, for the student before training:",
        f'```python\nfrom peft import PeftModel\n\n'
        f'model = PeftModel.from_pretrained(student, "{repo}", subfolder="{ADAPTER}")\n```',
    ]  # fmt: skip


def _signals(run: Run, checkpoint: Manifest) -> list[tuple[str, str]]:
    """What the student learnt from: teachers, the rule, and how much of the round it kept."""
    rows: list[tuple[str, str]] = []
    scores = read_manifest(run.part("scores", checkpoint.round))
    weights = read_manifest(run.part("weights", checkpoint.round, str(checkpoint.fields["weights"])))
    if scores is not None:
        rows += [(role, code(model)) for role, model in teachers_of(shared_manifest(scores, run.root))]
    if weights is not None:
        rows += [("rule", code(", ".join(f"{k}={v}" for k, v in weights.fields["rule"].items())))]
        shown = ("trajectories", "tokens", "kept_fraction")
        rows += [(name.replace("_", " "), number(weights.stats.get(name))) for name in shown]
    return rows
