"""A run goes to the Hub and comes back byte by byte, privately; its card and its tables are what libraries expect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from huggingface_hub import DatasetCard, ModelCard

from fire_data.hub.layout import read_index
from fire_data.overview import check, parts
from fire_data.run import Run, open_run
from fire_data.session import Session
from fire_data.shards import read_manifest
from fire_data.steps.refresh import refresh
from fire_data.steps.score import score
from fire_data.steps.weigh import weigh
from tests.conftest import edit_record, flip
from tests.hub_server import TOKEN, Caller, Hub, Repo

DATA = ("datasets", "me/data")


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rounds with real models, three shards each, an addon, and weights of a second rule in the first round."""
    made = make_run(tmp_path_factory.mktemp("hub") / "run", weigh={"params": {"percentile": 30}})
    with Session(made) as session:
        refresh(session, 2)
        score(session, 0, add=["topk"])
    weigh(open_run(made.root, ("weigh.rule=uniform", "weigh.params={}", "train.weights=fire")), 0)
    return made


def done(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a command that worked."""
    assert answer["code"] == 0, answer
    return answer


def tables(root: Path) -> dict[str, bytes]:
    """Every Parquet file that belongs to a sealed stage, by its path in the run."""
    found: dict[str, bytes] = {}
    for part in parts(open_run(root)):
        manifest = read_manifest(part)
        if manifest is not None and manifest.sealed and part.stage != "checkpoints":
            files = [part.file(receipt.shard) for receipt in manifest.shards]
            found |= {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    return found


def test_a_run_comes_back_byte_by_byte_and_is_an_ordinary_run(
    run: Run, hub: Hub, caller: Caller, fire: Callable[..., Any], tmp_path: Path
) -> None:
    pushed = json.loads(done(caller.fire("push", run.root, "me/data", "--json"))["out"])
    tree = hub.repos[DATA].tree
    assert {p: data for p, data in tree.items() if p.endswith(".parquet")} == tables(run.root)
    assert pushed["files"] == len(tree)
    assert not [p for p in tree if "checkpoint" in p or "train" in p.split("/")]

    pulled = tmp_path / "pulled"
    done(caller.fire("pull", "me/data", pulled))
    assert tables(pulled) == tables(run.root)
    assert check(open_run(pulled)) == []
    assert fire("check", pulled).code == 0
    assert "sealed" in fire("status", pulled).out
    assert fire("weigh", pulled, "--rule", "reopold").code == 0
    assert fire("diagnose", pulled, "--round", "1").code == 0
    # What was pulled can be pushed in turn, and is the same.
    done(caller.fire("push", pulled, "me/again", "--stage", "rollouts", "--stage", "scores"))
    again = hub.repos["datasets", "me/again"].tree
    assert again["scores/round-001/00002.parquet"] == tree["scores/round-001/00002.parquet"]
    assert again["fire.yaml"] == tree["fire.yaml"]


def test_a_push_and_a_pull_that_are_repeated_move_nothing(run: Run, hub: Hub, caller: Caller, tmp_path: Path) -> None:
    done(caller.fire("push", run.root, "me/data"))
    commits = len(hub.repos[DATA].branches["main"])
    again = json.loads(done(caller.fire("push", run.root, "me/data", "--json"))["out"])
    assert (again["files"], again["bytes"], len(hub.repos[DATA].branches["main"])) == (0, 0, commits)
    done(caller.fire("pull", "me/data", tmp_path / "pulled"))
    hub.mend()
    assert json.loads(done(caller.fire("pull", "me/data", tmp_path / "pulled", "--json"))["out"])["files"] == 0
    assert not [call for call in hub.calls if ".parquet" in call]


def test_a_later_push_adds_rounds_and_rules_and_keeps_what_is_there(run: Run, hub: Hub, caller: Caller) -> None:
    done(caller.fire("push", run.root, "me/data", "--round", 0, "--stage", "rollouts", "--licence", "cc-by-4.0"))
    first = hub.repos[DATA].tree
    assert {p for p in first if p.endswith(".parquet")} == {f"rollouts/round-000/0000{i}.parquet" for i in range(3)}
    done(caller.fire("push", run.root, "me/data", "--stage", "weights/fire"))
    done(caller.fire("push", run.root, "me/data"))
    last = hub.repos[DATA].tree
    assert {p: last[p] for p in first if p.endswith(".parquet")} == {
        p: data for p, data in first.items() if p.endswith(".parquet")
    }
    card = DatasetCard(last["README.md"].decode())
    assert {"rollouts", "scores", "weights-fire", "weights-uniform", "addons-topk", "evals"} == {
        c["config_name"] for c in card.data.to_dict()["configs"]
    }
    assert card.data.license == "cc-by-4.0", "a licence that was given stays"


def test_rounds_and_stages_can_be_pulled_one_by_one(run: Run, hub: Hub, caller: Caller, tmp_path: Path) -> None:
    done(caller.fire("push", run.root, "me/data"))
    done(caller.fire("pull", "me/data", tmp_path / "part", "--round", 1, "--stage", "scores"))
    assert [p.label for p in parts(open_run(tmp_path / "part"))] == ["scores round-001"]
    done(caller.fire("pull", "me/data", tmp_path / "part", "--stage", "weights/uniform"))
    assert {p.label for p in parts(open_run(tmp_path / "part"))} == {"scores round-001", "weights/uniform round-000"}
    unknown = caller.fire("pull", "me/data", tmp_path / "part", "--round", 7)
    assert unknown["code"] == 2
    assert "of round 7" in unknown["err"]


def test_a_damaged_file_of_a_pulled_run_is_mended_by_pulling_again(
    run: Run, hub: Hub, caller: Caller, tmp_path: Path
) -> None:
    done(caller.fire("push", run.root, "me/data", "--round", 0))
    done(caller.fire("pull", "me/data", tmp_path / "pulled"))
    shard = tmp_path / "pulled/scores/round-000/00001.parquet"
    shard.unlink()
    shard.write_bytes(b"x")
    records = [
        tmp_path / "pulled/.fire" / name
        for name in ("manifests/rollouts/round-000.json", "receipts/scores/round-000/00000.json")
    ]
    before = [path.read_bytes() for path in records]
    for path in records:
        flip(path, 30)
    done(caller.fire("pull", "me/data", tmp_path / "pulled"))
    assert shard.read_bytes() == (run.root / "scores/round-000/00001.parquet").read_bytes()
    assert [path.read_bytes() for path in records] == before
    assert check(open_run(tmp_path / "pulled")) == []


def test_a_repository_is_private_unless_told_otherwise(run: Run, hub: Hub, caller: Caller) -> None:
    done(caller.fire("push", run.root, "me/data", "--stage", "evals"))
    assert hub.repos[DATA].private
    done(caller.fire("push", run.root, "me/open", "--stage", "evals", "--public"))
    assert not hub.repos["datasets", "me/open"].private
    refused = caller.fire("push", run.root, "me/open", "--stage", "scores")
    assert refused["code"] == 2
    assert "--public" in refused["err"]
    assert not [p for p in hub.repos["datasets", "me/open"].tree if p.startswith("scores")]


def test_every_configuration_of_the_card_loads_with_its_rows(run: Run, hub: Hub, caller: Caller) -> None:
    pytest.importorskip("datasets")
    done(caller.fire("push", run.root, "me/data", "--flat"))
    wanted = {
        "rollouts": run.rollouts(), "scores": run.scores(), "weights-fire": run.weights("fire"),
        "weights-uniform": run.weights("uniform"), "addons-topk": run.scores(0, add="topk"), "flat-fire": run.weights(),
    }  # fmt: skip
    card = DatasetCard(hub.repos[DATA].tree["README.md"].decode())
    names = [c["config_name"] for c in card.data.to_dict()["configs"]]
    assert {*wanted, "evals", "flat-uniform"} == {*names}
    loaded = caller.run(f"""
import contextlib, io
from datasets import load_dataset
result = {{}}
for name in {names!r} + [None]:
    rows = load_dataset("me/data", *([name] if name else []), split="train")
    key = "prompt_id" if name == "evals" else "trajectory_id"
    result[name or "default"] = [rows.column_names, rows[key][:]]
""")
    for name, frame in wanted.items():
        columns, ids = loaded[name]
        assert ids == frame.select("trajectory_id").collect()["trajectory_id"].to_list(), name
        assert {*columns} <= {*frame.collect_schema().names()}
    assert loaded["default"] == loaded["scores"]
    assert loaded["flat-fire"][0] == run.weights().collect_schema().names()
    assert len(loaded["evals"][1]) == run.evals().collect().height


def test_the_polars_glob_gives_the_table(run: Run, hub: Hub, caller: Caller, tmp_path: Path) -> None:
    done(caller.fire("push", run.root, "me/data", "--flat"))
    for path, data in hub.repos[DATA].tree.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    scores = pl.scan_parquet(f"{tmp_path}/scores/**/*.parquet").collect()
    assert scores.equals(run.scores().collect())
    flat = pl.scan_parquet(f"{tmp_path}/flat/fire/**/*.parquet").collect()
    assert flat.equals(run.weights("fire").collect())


def test_the_card_says_how_the_data_was_made(run: Run, hub: Hub, caller: Caller) -> None:
    done(caller.fire("push", run.root, "me/data"))
    text = hub.repos[DATA].tree["README.md"].decode()
    card = DatasetCard(text)
    assert "fire-opd" in card.data.tags
    assert card.data.license is None
    assert "ask the author" in text
    scores, weights = read_manifest(run.part("scores", 0)), read_manifest(run.part("weights", 0, "fire"))
    assert scores is not None
    assert weights is not None
    told = [
        *(f["weights"] for f in (scores.fields["student"], scores.fields["teachers"]["teacher"])),
        "temperature `1.0`", "exact, over the full vocabulary", f"{weights.stats['kept_fraction']:.4g}", "`30.0`",
        f"{weights.stats['effective_sample_share']:.4g}", "fire pull me/data RUN", 'load_dataset("me/data", "scores"',
        'pl.scan_parquet("hf://datasets/me/data/scores/**/*.parquet")', "nats",
    ]  # fmt: skip
    assert [t for t in told if t not in text] == []
    responses = run.rollouts().select("response").collect()["response"].to_list()
    assert not [r for r in responses if len(r) > 8 and r in text], "no response is in the card"


def test_a_name_cannot_break_out_of_the_card() -> None:
    from fire_data.hub.card import code, table

    hostile = "`</code><script>alert(1)</script>|\n---\nlicense: mit\n# owned\x1b[31m"
    shown = table(("a",), [[code(hostile)]])
    assert shown.count("\n") == 2
    assert shown.count("`") == 2
    assert "\x1b" not in shown
    assert "\\|" in shown


def test_a_checkpoint_becomes_a_model_that_loads(run: Run, hub: Hub, caller: Caller, tmp_path: Path) -> None:
    done(caller.fire("push", run.root, "me/model", "--stage", "checkpoints", "--round", 0))
    repo = hub.repos["models", "me/model"]
    assert repo.private
    folder = run.part("checkpoints", 0).folder
    assert {p: repo.tree[p] for p in repo.tree if p not in ("README.md", "fire/manifest.json")} == {
        p.name: p.read_bytes() for p in folder.iterdir()
    }
    card = ModelCard(repo.tree["README.md"].decode())
    assert card.data.pipeline_tag == "text-generation"
    assert "percentile=30.0" in card.text
    assert "`greedy`" in card.text
    # A later round takes its place; an earlier one does not come unasked with a dataset.
    done(caller.fire("push", run.root, "me/model", "--stage", "checkpoints"))
    assert repo.tree["model.safetensors"] == (run.part("checkpoints", 1).folder / "model.safetensors").read_bytes()
    assert [m.round for m in read_index(repo.tree["fire/manifest.json"], "").values()] == [1]
    loaded = caller.run("""
from transformers import AutoModelForCausalLM
result = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained("me/model").parameters())
""")
    assert loaded > 1000
    commits = len(repo.branches["main"])
    done(caller.fire("push", run.root, "me/model", "--stage", "checkpoints"))
    assert len(repo.branches["main"]) == commits, "the same again is no commit"
    assert caller.fire("push", run.root, "me/model", "--stage", "checkpoints", "--stage", "scores")["code"] == 2


def test_a_student_is_trained_on_a_shared_dataset(
    run: Run, hub: Hub, caller: Caller, tiny_world: Any, tmp_path: Path
) -> None:
    done(caller.fire("push", run.root, "me/data"))
    command = ["train", tmp_path / "mine", "--from", "hf://datasets/me/data"]
    nobody = caller.fire(*command)
    assert nobody["code"] == 2
    assert "--student" in nobody["err"].partition("fix:")[2]
    other = caller.fire(*command, "--student", tiny_world.teacher)
    assert other["code"] == 2
    assert "is not the student that wrote the rollouts" in other["err"]
    assert not (tmp_path / "mine").exists()
    trained = done(caller.fire(*command, "--student", tiny_world.student, "--json"))
    assert json.loads(trained["out"])["loss_first"] == pytest.approx(
        read_manifest(run.part("checkpoints", 0)).stats["loss_first"], rel=1e-4
    )
    done(caller.fire(*command, "--student", tiny_world.student))
    assert open_run(tmp_path / "mine").current_round() == 1
    assert caller.fire(*command, "--student", tiny_world.teacher)["code"] == 2


def test_a_student_on_the_hub_is_found_at_the_commit_that_wrote(
    hub: Hub, caller: Caller, tiny_world: Any, tmp_path: Path
) -> None:
    """Nothing but an address is given: the dataset names its student, pinned, though its repository has moved on."""
    models = hub.repos["models", "me/small"] = Repo(private=True)
    models.tree = {p.name: p.read_bytes() for p in tiny_world.student.iterdir()}
    first = models.resolve("main")
    names = ["--student", "me/small", "--teacher", tiny_world.teacher, "--prompts", tiny_world.prompts]
    done(caller.fire("init", tmp_path / "run", *names))
    few = ["--set", "rollout.prompts_per_round=4", "--set", "rollout.n=2", "--set", "rollout.max_new_tokens=8"]
    done(caller.fire("rollout", tmp_path / "run", *few))
    done(caller.fire("score", tmp_path / "run", *few))
    done(caller.fire("weigh", tmp_path / "run", *few))
    done(caller.fire("push", tmp_path / "run", "me/data"))
    assert f"revision: {first}" in hub.repos[DATA].tree["fire.yaml"].decode()
    assert "fire train RUN --from hf://datasets/me/data    #" in hub.repos[DATA].tree["README.md"].decode()
    models.tree = {**models.tree, "config.json": b"{}"}
    done(caller.fire("train", tmp_path / "mine", "--from", "hf://datasets/me/data", *few))
    assert open_run(tmp_path / "mine").current_round() == 1


def test_the_token_is_seen_by_nobody(run: Run, hub: Hub, caller: Caller, tmp_path: Path) -> None:
    answers = [
        caller.fire("push", run.root, "me/data"),
        caller.fire("pull", "me/data", tmp_path / "pulled"),
        caller.fire("push", run.root, "me/model", "--stage", "checkpoints"),
        caller.fire("env"),
    ]
    for status in (400, 403, 500):
        hub.status = status, f"what {TOKEN} asks for is refused"
        answers.append(caller.fire("push", run.root, "me/other"))
        answers.append(caller.fire("pull", "me/data", tmp_path / "other"))
    assert {a["code"] for a in answers[4:]} <= {1, 2, 4}
    told = [a["out"] + a["err"] for a in answers] + [caller.log.read_text()]
    assert [t for t in told if TOKEN in t] == []
    assert [s for s in hub.seen if TOKEN.encode() in s] == []
    files = [p for root in (run.root, tmp_path, caller.log.parent) for p in root.rglob("*") if p.is_file()]
    assert [p for p in files if TOKEN.encode() in p.read_bytes()] == []
    assert not [data for repo in hub.repos.values() for data in repo.tree.values() if TOKEN.encode() in data]


@pytest.mark.parametrize(
    ("status", "code", "fix"),
    [
        (401, 2, "hf auth login"),
        (403, 2, "hf auth login"),
        (409, 4, "continues"),
        (429, 4, "later"),
        (503, 4, "continues"),
    ],
)
def test_what_the_hub_refuses_is_told_with_a_fix(
    run: Run, hub: Hub, caller: Caller, tmp_path: Path, status: int, code: int, fix: str
) -> None:
    hub.status = status, "no"
    answer = caller.fire("pull", "me/data", tmp_path / "pulled")
    assert answer["code"] == code
    assert fix in answer["err"].partition("fix:")[2]
    assert "hf://datasets/me/data" in answer["err"]


def test_without_a_network_a_token_or_a_repository_it_is_said(
    run: Run, hub: Hub, caller: Caller, fire: Callable[..., Any], tmp_path: Path
) -> None:
    missing = caller.fire("pull", "me/nothing", tmp_path / "pulled")
    assert missing["code"] == 2
    assert "there is no such dataset" in missing["err"]
    revision = caller.fire("pull", "me/data", tmp_path / "pulled", "--revision", "v9")
    assert revision["code"] == 2
    assert "user/name" in caller.fire("pull", "nothing", tmp_path / "pulled")["err"]
    offline = fire("pull", "me/data", tmp_path / "pulled")  # this process is
    assert offline.code == 2
    assert "HF_HUB_OFFLINE=1" in offline.err
    assert caller.run("""
import os
token = os.environ.pop("HF_TOKEN")
from fire_data.hub.client import Repository
from fire_data.schemas.errors import FireError
try:
    Repository("me/data").require_token()
except FireError as error:
    result = [error.exit_code, error.fix]
os.environ["HF_TOKEN"] = token
""") == [2, "hf auth login (or set HF_TOKEN)"]
    assert not (tmp_path / "pulled").exists()


def test_a_branch_is_made_and_read(run: Run, hub: Hub, caller: Caller, tmp_path: Path) -> None:
    done(caller.fire("push", run.root, "me/data", "--revision", "small", "--stage", "rollouts"))
    repo = hub.repos[DATA]
    assert repo.tree == {}
    done(caller.fire("pull", "me/data", tmp_path / "pulled", "--revision", "small"))
    assert (tmp_path / "pulled/rollouts/round-001/00000.parquet").exists()


def test_another_run_is_refused_in_both_directions(
    run: Run, hub: Hub, caller: Caller, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    done(caller.fire("push", run.root, "me/data", "--round", 0))
    before = hub.repos[DATA].tree
    other = make_run(tmp_path / "other", seed=1, rollout={"engine": "fake"}, score={"engine": "fake"})
    with Session(other) as session:
        from fire_data.steps.rollout import rollout

        rollout(session, 0)
    pushed = caller.fire("push", other.root, "me/data")
    assert pushed["code"] == 2
    assert "seed: 0 -> 1" in pushed["err"]
    assert hub.repos[DATA].tree == before
    done(caller.fire("push", run.root, "me/few", "--stage", "evals"))
    assert "no stage in common" in caller.fire("push", other.root, "me/few")["err"]
    pulled = caller.fire("pull", "me/data", other.root)
    assert pulled["code"] == 2
    assert "ANOTHER_FOLDER" in pulled["err"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert caller.fire("pull", "me/data", tmp_path / "full")["code"] == 2
    # The same settings and other rows are another run as well.
    twin = tmp_path / "twin"
    shutil.copytree(run.root, twin)
    manifest = twin / ".fire/manifests/scores/round-000.json"
    edit_record(manifest, read_manifest(run.part("scores", 0)).shards[0].sha256, "0" * 64)
    assert "other rows" in caller.fire("push", twin, "me/data")["err"]


def test_somebody_elses_repository_is_left_alone(run: Run, hub: Hub, caller: Caller) -> None:
    done(caller.fire("push", run.root, "me/data", "--stage", "evals"))
    repo = hub.repos[DATA]
    for tree in ({"data.csv": b"1"}, {"README.md": b"# my own"}, {"scores/round-009/00000.parquet": b"x"}):
        repo.tree = tree
        refused = caller.fire("push", run.root, "me/data", "--stage", "evals")
        assert refused["code"] == 2, tree
        assert repo.tree == tree
    repo.tree = {"rollouts/round-000/00000.parquet": b"of an unfinished push of other rows"}
    refused = caller.fire("push", run.root, "me/data")
    assert refused["code"] == 2
    assert "another file there" in refused["err"]


def test_what_is_not_sealed_or_not_there_is_not_pushed(run: Run, hub: Hub, caller: Caller, tmp_path: Path) -> None:
    refused = caller.fire("push", run.root, "me/data", "--stage", "weights/nothing")
    assert refused["code"] == 2
    assert "weights/uniform round 0" in refused["err"]
    damaged = tmp_path / "damaged"
    shutil.copytree(run.root, damaged)
    (damaged / "scores/round-000/00001.parquet").write_bytes(b"x")
    assert caller.fire("push", damaged, "me/data")["code"] == 3
    assert hub.repos[DATA].tree == {}
    assert caller.fire("push", run.root, "me/data", "--licence", "MIT license!")["code"] == 2
    manifest = damaged / ".fire/manifests/checkpoints/round-001.json"
    edit_record(manifest, "model.safetensors", "pytorch_model.bin")
    pickled = caller.fire("push", damaged, "me/model", "--stage", "checkpoints")
    assert pickled["code"] == 2
    assert "is not safetensors" in pickled["err"]
