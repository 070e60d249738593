"""Targets that stand on disk or come from the Hub: manifests, receipts, the index of a repository, shared settings."""

from __future__ import annotations

import json
import zlib
from functools import cache
from typing import Any

import yaml
from hypothesis import strategies as st

from fire_data import files, overview
from fire_data.create import init_run
from fire_data.hub.card import dataset_card, read_licence
from fire_data.hub.client import Repository, address
from fire_data.hub.layout import files_of, ordered, part_of, read_index, require_same_run, select, write_index
from fire_data.hub.pull import _settings
from fire_data.hub.redact import called, shared_manifest
from fire_data.run import Run
from fire_data.schemas.config import Config, parse_config, render_config
from fire_data.schemas.errors import FireError
from fire_data.schemas.manifest import Manifest, Receipt, Shard, digest
from fire_data.shards import read_receipt, read_shard, sealed
from fire_data.standing import standings
from tests.fuzz.target import Target, same, scratch
from tests.fuzz.values import as_json, bent, sources, torn


def manifest(stage: str, name: str | None = None, *, round: int = 0, **more: Any) -> dict[str, Any]:
    """A sealed manifest of one shard, as JSON."""
    fields: dict[str, Any] = {
        "format": 1,
        "scores": "x",
        "rule": {"name": "fire"},
        "weights": "fire",
        "train": {"lr": 1.0},
    }
    fields |= {"student": {"weights": "hub:a/b@c", "dtype": "float32"}, "rollouts": "d"}
    receipt = Receipt(shard="00000", sha256="a" * 64, bytes=10, rows=1, tokens=1, fingerprint=digest(fields))
    made = Manifest(
        stage=stage, name=name, round=round, state="sealed", fingerprint=digest(fields), fields=fields,
        plan=(Shard(name="00000", start=0, stop=1),), shards=(receipt,),
        stats={"routes": [[None, 1]], "kept_fraction": 0.5, "steps": [{"step": 0}], "student_entropy": 1.0},
        recorded={"student": "a/b", "teachers": {"teacher": "./t"}, "entropy_kind": {"student": "exact"}},
    )  # fmt: skip
    return made.model_copy(update=more).model_dump(mode="json")


_STAGES = [
    manifest("rollouts"), manifest("scores"), manifest("weights", "fire"), manifest("evals", round=-1),
    manifest("addons", "topk"), manifest("evals", "gsm"),
]  # fmt: skip
_OPEN = {**manifest("scores"), "state": "open", "shards": []}
_RECEIPT = manifest("scores")["shards"][0]


@cache
def _run() -> Run:
    """A run whose stages have manifests and no files: whoever opens one is told so."""
    return init_run(scratch() / "run", {"student": {"model": "m"}, "teacher": {"model": "t"}})


def _look(data: bytes) -> None:
    """What commands do with a manifest, an open or a sealed one, or with a receipt, when it is other bytes."""
    run = _run()
    places = [
        run.part("rollouts", 0),
        run.part("scores", 0),
        run.part("weights", 0, "fire"),
        run.part("evals", "start"),
    ]
    for part in places:
        files.remove(part.manifest_path)
        files.remove(part.receipt_path("00000"))
    at = zlib.crc32(data) % (len(places) + 1)  # the input alone decides which one it is
    part = places[min(at, len(places) - 1)]
    path = part.manifest_path
    if at == len(places):
        part.manifest_path.parent.mkdir(parents=True, exist_ok=True)
        part.manifest_path.write_bytes(as_json({**_OPEN, "stage": part.stage}))
        path = part.receipt_path("00000")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    for ask in (
        lambda: read_receipt(part, "00000"),
        lambda: [read_shard(part, r) for r in sealed(part).shards],
        lambda: overview.status(run),
        lambda: overview.check(run),
        lambda: overview.next_command(run),
        lambda: standings(run, 0),
        lambda: run.scores(0),
        lambda: run.weights("fire"),
        lambda: run.evals(),
    ):
        try:
            ask()
        except FireError:
            continue


_INDEX = {"format": 1, "stages": _STAGES}


def _index(data: bytes) -> None:
    """An index from the Hub. What is accepted leads to no file outside of the run, and into a card that is but text."""
    stages = read_index(data, "here")
    root = scratch() / "pulled"
    for found in stages.values():
        part = part_of(root, found)
        paths = [part.manifest_path, *(part.file(r.shard) for r in found.shards), *map(root.joinpath, files_of(found))]
        for path in (*paths, *(part.receipt_path(r.shard) for r in found.shards)):
            inside = path.relative_to(root)  # not by resolving it: that would need the folders
            assert ".." not in inside.parts
            assert "\\" not in str(inside)
            assert ":" not in str(inside)
        shared_manifest(found, root)
    same(read_index(write_index(stages.values()), "again"), stages, "the index written again")
    require_same_run(stages, stages, where="here", fix="")
    card = dataset_card("a/b", ordered(m for m in stages.values() if m.stage in _CARDS), None)
    assert "<script>" not in card.replace("`<script>`", "")
    read_licence(card)
    select(stages, None, None, "here")


_CARDS = ("rollouts", "scores", "addons", "weights", "evals")
_WHOLE = json.loads(Config(student={"model": "a/b"}, teacher={"model": "t"}).model_dump_json())  # type: ignore[arg-type]
_SHARED = [{"student": {"model": "a/b"}, name: values} for name, values in _WHOLE.items()]
_EVIL = {
    "student": {"model": "a/b", "trust_remote_code": True, "url": "http://evil", "api_key_env": "HF_TOKEN"},
    "vllm": {"python": "/tmp/evil", "args": {"trust_remote_code": True}}, "verify": {"kind": "/tmp/evil.py:f"},
    "weigh": {"rule": "/tmp/evil.py:Rule"}, "prompts": {"path": "/etc/passwd"},
    "eval": {"prompts": {"x": "/etc/passwd"}},
}  # fmt: skip


def _settings_of(data: bytes) -> None:
    """`fire.yaml` from the Hub: what is taken over runs no code, calls no server, and names no place or variable."""
    values = _settings(data.decode("utf-8", "replace"), scratch(), {}, Repository("a/b"))
    config = parse_config(values, "")
    models = [m for m in (config.student, config.teacher, config.base, *config.teachers.values()) if m is not None]
    for model in models:
        assert (model.trust_remote_code, model.url, model.api_key_env) == (False, None, None)
        assert _is_harmless(model.model), model.model
        assert model.chat_template is None or _is_harmless(model.chat_template), model.chat_template
    assert (config.vllm.python, config.vllm.args, config.verify.allow_unsafe) == (None, {}, False)
    assert ".py" not in config.verify.kind or _is_harmless(config.verify.kind), config.verify.kind
    held_out = config.eval.prompts
    for place in [config.prompts.path, *(held_out.values() if isinstance(held_out, dict) else [held_out])]:
        assert place is None or _is_harmless(place), place
    assert Config.model_validate(yaml.safe_load(render_config(values))) == config


def _is_harmless(name: str) -> bool:
    """A name on the Hub or one in the run folder: no other folder of this machine."""
    if name.startswith("hf://"):
        return True
    inner = name.removeprefix("./")
    return (
        ".." not in inner.split("/") and not inner.startswith(("/", "~")) and "\\" not in inner and inner.count("/") < 2
    )


def _names(data: bytes) -> None:
    """Names of repositories, addresses and models, as others write them."""
    for name in data.decode("utf-8", "replace").split("\n")[:4]:
        assert "/" not in called(name, scratch()) or called(name, scratch()) == name
        for ask in (Repository, address):
            try:
                ask(name)
            except FireError:
                continue


RECORDS: dict[str, Target] = {
    "manifests": Target(
        _look,
        lambda: [as_json(d) for d in (*_STAGES, _OPEN, _RECEIPT)],
        lambda: sources([*_STAGES, _OPEN, _RECEIPT]),
    ),
    "hub-index": Target(_index, lambda: [as_json(_INDEX)], lambda: sources([_INDEX])),
    "hub-settings": Target(
        _settings_of,
        lambda: [yaml.safe_dump(v).encode() for v in (*_SHARED, _EVIL)],
        lambda: bent([*_SHARED, _EVIL]).map(lambda v: yaml.safe_dump(v).encode("utf-8", "replace")),
    ),
    "hub-names": Target(
        _names,
        lambda: [b"a/b\nhf://datasets/a/b@main\n../x\nC:\\x"],
        lambda: (
            st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace")) | torn(b"hf://datasets/user/name@main")
        ),
    ),
}
