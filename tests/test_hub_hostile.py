"""What comes from the Hub is not trusted, and what goes there says nothing about the machine it comes from."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fire_data.hub.client import Entry, Repository, address
from fire_data.hub.layout import files_of, read_index, write_index
from fire_data.hub.redact import called, require_no_folder, shared_config, shared_manifest
from fire_data.overview import parts
from fire_data.run import Run, open_run
from fire_data.schemas.config import Config, Section
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.manifest import Manifest, Receipt, Shard, digest
from fire_data.session import Session
from fire_data.shards import read_manifest
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.weigh import weigh
from tests.hub_server import Caller, Hub, Repo

DATA = ("datasets", "me/data")
SCORES, INDEX = "scores/round-000/00000.parquet", "fire/manifest.json"


def made(**changes: Any) -> Manifest:
    """A sealed manifest as `fire push` writes them, with changes."""
    fields = {"format": 1}
    receipt = Receipt(
        shard="00000", sha256="a" * 64, bytes=10, rows=1, tokens=1, fingerprint=digest(changes.get("fields", fields))
    )
    given = {
        "stage": "scores", "round": 0, "state": "sealed", "fingerprint": receipt.fingerprint, "fields": fields,
        "plan": (Shard(name="00000", start=0, stop=1),), "shards": (receipt,),
    }  # fmt: skip
    return Manifest.model_validate({**given, **changes})


def renamed(shard: str) -> dict[str, Any]:
    receipt = made().shards[0].model_copy(update={"shard": shard})
    return {"plan": (Shard(name=shard, start=0, stop=1),), "shards": (receipt,)}


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "weights", "name": "../../../evil"},
        {"stage": "weights", "name": "a/b"},
        {"stage": "weights", "name": "..\\..\\evil"},
        {"stage": "weights", "name": "C:evil"},
        {"stage": "weights", "name": ".hidden"},
        {"stage": "weights", "name": ""},
        {"stage": "weights"},
        {"stage": "scores", "name": "fire"},
        {"stage": "addons", "name": "anything"},
        {"stage": "addons", "name": "teacher./etc"},
        {"stage": "evals", "name": "round-000"},
        {"stage": "../train"},
        {"stage": "/etc"},
        {"round": -1},
        {"round": 10**9},
        {"state": "open"},
        {"fields": {"format": 2}, "fingerprint": digest({"format": 1})},
        {"shards": ()},
        renamed("../../00000"),
        renamed("/etc/passwd"),
        renamed("00000.parquet"),
        renamed("..\\0"),
        {"shards": (made().shards[0].model_copy(update={"sha256": "../x"}),)},
        {"shards": (made().shards[0].model_copy(update={"bytes": -1}),)},
        {"shards": (made().shards[0].model_copy(update={"fingerprint": "other"}),)},
    ],
)
def test_an_index_with_names_that_are_none_is_refused(changes: dict[str, Any]) -> None:
    assert [*files_of(made())] == [SCORES]
    assert len(read_index(write_index([made()]), "here")) == 1
    with pytest.raises(DataError, match="index"):
        read_index(write_index([made(**changes)]) if "/" not in changes.get("stage", "") else _raw(changes), "here")


def _raw(changes: dict[str, Any]) -> bytes:
    """An index of a stage that has no place in the order."""
    return json.dumps({"format": 1, "stages": [made(**changes).model_dump(mode="json")]}).encode()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"stages": 3}', '{"stages": [3]}', '{"stages": [{"stage": []}]}', "[" * 100_000,
     '{"format": 99, "stages": []}', '{"stages": [{"round": NaN}]}'],
)  # fmt: skip
def test_something_else_than_an_index_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        read_index(text.encode(), "here")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"\\ud800"'])
@pytest.mark.parametrize("where", ["fields", "stats", "recorded", "seconds"])
def test_an_index_that_could_not_be_written_again_is_refused(where: str, value: str) -> None:
    """Else pulling would end in the middle: its manifests are written here as they are read there."""
    stage = json.loads(made().model_dump_json())
    holder = stage["shards"][0] if where == "seconds" else stage
    holder[where] = "HERE" if where == "seconds" else {"x": "HERE"}
    text = json.dumps({"format": 1, "stages": [stage]}).replace('"HERE"', value)
    with pytest.raises(DataError, match="index"):
        read_index(text.encode(), "here")


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [("recorded", {"teachers": ["t"]}, "recorded: teachers"), ("fields", {"teachers": {"t": 3}}, "fields: teachers.t"),
     ("recorded", {"entropy_kind": {"student": ["exact"]}}, "entropy_kind"), ("stats", {"steps": 3}, "stats.steps"),
     ("fields", {"student": "a/b"}, "fields: student"), ("fields", {"rule": [1]}, "fields: rule")],
)  # fmt: skip
def test_what_is_read_from_a_manifest_has_the_shape_that_is_read(where: str, value: Any, told: str) -> None:
    """Found by fuzzing: a card was begun that no code could end."""
    stage = json.loads(made().model_dump_json())
    with pytest.raises(DataError, match=f"no manifest: .*{re.escape(told)}"):
        read_index(json.dumps({"format": 1, "stages": [stage | {where: value}]}).encode(), "here")
    assert read_index(json.dumps({"format": 1, "stages": [stage]}).encode(), "here")


def test_a_stage_is_named_once() -> None:
    with pytest.raises(DataError, match="twice"):
        read_index(write_index([made(), made()]), "here")


def test_a_huge_text_is_not_downloaded() -> None:
    with pytest.raises(DataError, match="at most"):
        Repository("me/data").read("fire.yaml", Entry(10**9, None, ""), "main", Path("nowhere"), 1 << 20)


@pytest.mark.parametrize("name", ["me", "me/data/more", "../etc/passwd", "/me/data", "me/da ta", "", "me/data\n"])
def test_only_a_name_is_a_repository(name: str) -> None:
    with pytest.raises(ConfigError):
        Repository(name)


def test_an_address_names_a_dataset_and_perhaps_a_revision() -> None:
    assert address("hf://datasets/me/data") == ("me/data", None)
    assert address("hf://datasets/me/data@v1") == ("me/data", "v1")
    for text in ("me/data", "hf://me/data", "hf://datasets/me", "hf://datasets/me/data/scores"):
        with pytest.raises(ConfigError):
            address(text)


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One round of two shards, from the fake engine, with as many private settings as there can be."""
    made = make_run(
        tmp_path_factory.mktemp("hostile") / "run",
        rollout={"engine": "fake", "prompts_per_round": 4, "prompts_per_shard": 2},
        score={"engine": "fake"},
        vllm={"python": "/opt/secret/bin/python", "args": {"download_dir": "/opt/secret"}},
        ray={"address": "10.0.0.1:6379"},
        student={"url": "http://10.0.0.1:8000/v1", "served_name": "mine", "api_key_env": "SECRET_KEY"},
        verify={"kind": "/opt/secret/grade.py:right"},
    )
    with Session(made) as session:
        rollout(session, 0)
        score(session, 0)
    weigh(made, 0)
    return made


@pytest.fixture
def repo(run: Run, hub: Hub, caller: Caller) -> Repo:
    """The run, freshly pushed."""
    assert caller.fire("push", run.root, "me/data")["code"] == 0
    return hub.repos[DATA]


def refused(caller: Caller, root: Path, code: int, *words: str) -> None:
    """Pulling fails with this exit code and these words, and leaves no stage behind."""
    answer = caller.fire("pull", "me/data", root)
    assert answer["code"] == code, answer
    assert [w for w in words if w not in answer["err"]] == []
    assert "fix:" in answer["err"]
    assert not (root / "fire.yaml").exists() or not [p for p in parts(open_run(root)) if p.stage == "scores"]


def test_nothing_about_the_machine_leaves_it(run: Run, repo: Repo, tiny_world: Any) -> None:
    for path, data in repo.tree.items():
        for secret in (
            str(run.root),
            str(Path.home()),
            str(tiny_world.student),
            "/opt/secret",
            "10.0.0.1",
            "SECRET_KEY",
        ):
            assert secret.encode() not in data, (path, secret)
    shared = yaml.safe_load(repo.tree["fire.yaml"])
    assert shared["student"]["model"] == f"./{tiny_world.student.name}"
    assert shared["prompts"]["path"] == f"./{tiny_world.prompts.name}"
    assert shared["verify"]["kind"] == "./grade.py:right"
    assert (shared["student"]["api_key_env"], shared["student"]["url"], shared["vllm"]["python"]) == (None, None, None)
    Config.model_validate(shared)


def test_shared_settings_and_manifests_are_shared_once_more_unchanged(run: Run) -> None:
    stages = [m for p in parts(run) if (m := read_manifest(p)) is not None]
    once = [shared_manifest(m, run.root) for m in stages]
    assert [shared_manifest(m, Path("elsewhere")) for m in once] == once
    assert [(m.fingerprint, m.fields, m.shards, m.stats) for m in once] == [
        (m.fingerprint, m.fields, m.shards, m.stats) for m in stages
    ]
    values = shared_config(run.config, run.root, once)
    assert shared_config(Config.model_validate(values), Path("elsewhere"), once) == values


def test_of_what_manifests_record_only_what_counts_is_shared() -> None:
    recorded = {
        "student": "/opt/models/small", "teachers": {"teacher": "../big", "code": "Qwen/Qwen3-4B"},
        "prompts": "~/p.jsonl",
        "sampling": {"top_k": 0}, "threads": 8, "vllm": {"python": "/opt/python"}, "rollout": {"rows_in_flight": 64},
    }  # fmt: skip
    assert shared_manifest(made(recorded=recorded), Path("nowhere")).recorded == {
        "student": "small", "teachers": {"teacher": "big", "code": "Qwen/Qwen3-4B"}, "prompts": "p.jsonl",
        "sampling": {"top_k": 0},
    }  # fmt: skip


def test_every_text_in_the_settings_was_thought_of() -> None:
    """A new text that changes results may be a path, a url or code: then `shared_config` has to know of it."""

    def texts(section: type[Section], prefix: str = "") -> Iterator[str]:
        hints = {name: str(field.annotation) for name, field in section.model_fields.items()}
        for name, field in section.model_fields.items():
            inner = [c for c in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(c, type)]
            below = next((c for c in inner if issubclass(c, Section)), None)
            extra = field.json_schema_extra
            if below is not None:
                yield from texts(below, f"{prefix}{name}.")
            elif ("str" in hints[name] or "dict" in hints[name]) and not (
                isinstance(extra, dict) and extra.get("perf")
            ):
                yield f"{prefix}{name}"

    models = [f"{who}.{name}" for who in ("student", "teacher", "teachers", "base") for name in (
        "model", "revision", "chat_template", "chat_template_kwargs", "system",
    )]  # fmt: skip
    others = ["verify.kind", "verify.pattern", "score.add", "weigh.rule", "weigh.name", "weigh.params", "weigh.teacher"]
    assert sorted(texts(Config)) == sorted([*models, *others, "train.weights", "train.lora.targets"])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), ("gpt2", "gpt2"), ("hf://datasets/a/b/c.jsonl", "hf://datasets/a/b/c.jsonl"),
        ("/home/me/models/small", "small"), ("../models/small/", "small"), ("~/small", "small"), ("a/b/c", "c"),
        ("C:\\Users\\me\\small", "small"), ("./.secret", "secret"), ("/", "unnamed"), ("..", "unnamed"),
    ],
)  # fmt: skip
def test_models_are_called_by_their_last_name(name: str, shown: str) -> None:
    assert called(name, Path("nowhere")) == shown


def test_a_folder_below_the_run_is_no_model_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "models/small").mkdir(parents=True)
    assert called("models/small", tmp_path) == "small"


def test_a_home_folder_is_found_wherever_it_hides(tmp_path: Path) -> None:
    require_no_folder(b'{"match": "fire"}', tmp_path, "the index")
    with pytest.raises(ConfigError, match="folder of this machine"):
        require_no_folder(f'{{"match": "{tmp_path}/rule.py"}}'.encode(), tmp_path, "the index")
    with pytest.raises(ConfigError, match="folder of this machine"):
        require_no_folder(f'{{"match": "{Path.home()}/rule.py"}}'.encode(), tmp_path, "the index")


@pytest.mark.parametrize("rule", ["mine.py:Sharp", "fire+./mine.py", "not-a-rule", {"match": "/x/mine.py"}])
def test_code_of_a_user_is_not_named_in_shared_settings(run: Run, rule: Any) -> None:
    weigh = {"rule": "random", "params": rule} if isinstance(rule, dict) else {"rule": rule}
    config = Config.model_validate({**run.config.model_dump(), "weigh": weigh})
    shared = Config.model_validate(shared_config(config, run.root, []))
    assert shared.weigh.rule == "uniform"
    assert shared.weigh.params == {}
    assert shared.trained_weights == config.trained_weights
    assert shared.weights_name != config.trained_weights, "the weights are trained as they are"


def test_a_model_on_the_hub_is_pinned_to_the_commit_it_was(run: Run) -> None:
    student = run.config.student.model_copy(update={"model": "Qwen/Qwen3-0.6B", "trust_remote_code": True})
    config = run.config.model_copy(update={"student": student})
    fields = {"student": {"weights": "hub:Qwen/Qwen3-0.6B@c1899de2", "dtype": "float32"}}
    shared = shared_config(config, run.root, [made(fields=fields, fingerprint=digest(fields))])
    assert (shared["student"]["model"], shared["student"]["revision"]) == ("Qwen/Qwen3-0.6B", "c1899de2")
    assert shared["student"]["trust_remote_code"] is False


def test_settings_from_the_hub_name_no_code_and_no_server(caller: Caller, repo: Repo, tmp_path: Path) -> None:
    values = yaml.safe_load(repo.tree["fire.yaml"])
    values["student"] |= {"trust_remote_code": True, "url": "http://evil", "api_key_env": "AWS_SECRET_ACCESS_KEY"}
    values["vllm"] |= {"python": "/tmp/evil", "args": {"trust_remote_code": True}}
    values["weigh"] |= {"rule": "/tmp/evil.py:Rule"}
    values["verify"] |= {"kind": "/tmp/evil.py:f", "allow_unsafe": True}
    values["prompts"] |= {"path": "/etc/passwd"}
    repo.tree = {**repo.tree, "fire.yaml": yaml.safe_dump(values).encode()}
    assert caller.fire("pull", "me/data", tmp_path / "pulled")["code"] == 0
    config = open_run(tmp_path / "pulled").config
    assert (config.student.trust_remote_code, config.student.url, config.student.api_key_env) == (False, None, None)
    assert (config.vllm.python, config.vllm.args, config.verify.allow_unsafe) == (None, {}, False)
    assert (config.weigh.rule, config.verify.kind, config.prompts.path) == ("uniform", "./evil.py:f", "./passwd")


@pytest.mark.parametrize("text", [b"- 1", b"a: [", b"student: {model: x, surprise: 1}", b"\xff\xfe"])
def test_settings_that_are_none_are_refused(caller: Caller, repo: Repo, tmp_path: Path, text: bytes) -> None:
    repo.tree = {**repo.tree, "fire.yaml": text}
    refused(caller, tmp_path / "pulled", 3, "fire.yaml")
    assert not (tmp_path / "pulled").exists()


def test_a_half_push_is_refused_with_what_finishes_it(caller: Caller, repo: Repo, tmp_path: Path) -> None:
    whole = repo.tree
    for missing in (INDEX, "fire.yaml", SCORES):
        repo.tree = {p: data for p, data in whole.items() if p != missing}
        refused(caller, tmp_path / "pulled", 4, missing, "fire push RUN me/data")
    assert not (tmp_path / "pulled").exists()


def test_other_bytes_than_the_receipts_say_are_refused(caller: Caller, repo: Repo, tmp_path: Path) -> None:
    whole, second = repo.tree, "scores/round-000/00001.parquet"
    for changed in (
        {SCORES: whole[second], second: whole[SCORES]},
        {SCORES: whole[SCORES][:-1] + b"x"},
        {SCORES: whole[SCORES] + b"x"},
        {SCORES: b"../../../../etc/passwd"},  # what a symbolic link is in a repository
    ):
        repo.tree = {**whole, **changed}
        refused(caller, tmp_path / "pulled", 3, "is not the file that the index names")
    assert not (tmp_path / "pulled").exists()


def test_bytes_that_are_swapped_on_the_way_are_refused(caller: Caller, repo: Repo, hub: Hub, tmp_path: Path) -> None:
    """The tree tells of the right file, the download gives another of the same size."""
    whole = repo.tree[SCORES]

    def swap() -> None:
        for tree in repo.trees.values():
            if SCORES in tree:
                tree[SCORES] = whole[:-1] + b"x"

    hub.mend()
    hub.at_call = 8, swap
    answer = caller.fire("pull", "me/data", tmp_path / "pulled", "--stage", "scores")
    assert answer["code"] == 3, answer
    assert "is not the file that the index names" in answer["err"]
    assert not list((tmp_path / "pulled").rglob("scores/**/*.parquet"))
    for tree in repo.trees.values():
        tree[SCORES] = whole
    hub.mend()
    assert caller.fire("pull", "me/data", tmp_path / "pulled", "--stage", "scores")["code"] == 0


@pytest.mark.parametrize("what", ["types", "rows", "a name that is no UTF-8", "garbage", "rollouts"])
def test_a_table_that_is_none_of_its_stage_is_refused(caller: Caller, repo: Repo, tmp_path: Path, what: str) -> None:
    """The index and the file agree with each other, and not with what a table of scores is."""
    table = pq.read_table(io.BytesIO(repo.tree[SCORES]))
    if what == "types":
        table = table.set_column(
            table.column_names.index("student_logprob"), "student_logprob", pa.array(["x"] * len(table))
        )
    sink = io.BytesIO()
    pq.write_table(table if what != "rows" else table.slice(1), sink)
    others = {
        "garbage": b"PAR1 nothing",
        "rollouts": repo.tree["rollouts/round-000/00000.parquet"],
        "a name that is no UTF-8": sink.getvalue().replace(b"student_logprob", b"\xbb\xbbudent_logprob"),
    }
    data = others.get(what, sink.getvalue())
    stages = read_index(repo.tree[INDEX], "")
    scores = stages[0, "scores", ""]
    first = scores.shards[0].model_copy(update={"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    stages[0, "scores", ""] = scores.model_copy(update={"shards": (first, *scores.shards[1:])})
    repo.tree = {**repo.tree, SCORES: data, INDEX: write_index(stages.values())}
    refused(caller, tmp_path / "pulled", 3, f"{SCORES} is no table of scores")
    assert not list((tmp_path / "pulled").rglob("scores/round-000/*.parquet"))
