"""The command line is kind: help with examples that work, --json everywhere, hints to follow, completion, env."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from fire_data import environment
from fire_data.cli import completion
from fire_data.cli.app import COMMANDS, PANELS, app
from fire_data.cli.examples import EXAMPLES, epilog
from fire_data.cli.options import carried
from fire_data.rules import make_rule, rule_names
from fire_data.run import Run, open_run
from fire_data.schemas.config import ADDED
from fire_data.session import Session
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.weigh import weigh
from tests.conftest import Answer

MakeRun = Callable[..., Run]
Fire = Callable[..., Answer]
GROUP: Any = typer.main.get_command(app)
HEAVY = {"torch", "polars", "pyarrow", "numpy", "transformers", "huggingface_hub", "rich"}


def parsed(words: list[str]) -> dict[str, Any]:
    """What a command would be called with; a usage error is an exception."""
    with GROUP.commands[words[0]].make_context(words[0], words[1:]) as context:
        found: dict[str, Any] = context.params
    return found


def examples() -> list[tuple[str, str]]:
    return [(name, line) for name in COMMANDS for line, _ in EXAMPLES[name]]


def test_every_command_has_its_place_and_two_to_four_examples() -> None:
    assert sorted(name for names in PANELS.values() for name in names) == sorted(COMMANDS)
    assert sorted(EXAMPLES) == sorted(["", *COMMANDS])
    assert {name: len(found) for name, found in EXAMPLES.items() if not 2 <= len(found) <= 4} == {}


@pytest.mark.parametrize(("name", "line"), examples())
def test_every_example_is_a_command_that_could_be_given(name: str, line: str, tmp_path: Path) -> None:
    words = shlex.split(line)
    assert words[:2] == ["fire", name]
    given = parsed(words[1:])
    (tmp_path / "fire.yaml").write_text("student: {model: m}\n")
    assert open_run(tmp_path, tuple(given.get("overrides") or ())), "its settings exist"
    params = {key: float(value) for key, value in (p.split("=") for p in given.get("param") or [])}
    for rule in (given.get("rules") or given.get("rule") or "fire").split(","):
        assert make_rule(rule, params), "its rules and their parameters too"


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_shows_its_examples_unbroken_in_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    pages = [CliRunner(env={"COLUMNS": "80"}).invoke(app, [*filter(None, [name]), o]).stdout for o in ("-h", "--help")]
    assert pages[0] == pages[1]
    lines = [line.strip() for line in pages[0].splitlines()]
    assert [line for line in epilog(name).splitlines() if line not in lines] == []
    about = (inspect.getdoc(COMMANDS[name]) or "").splitlines() if name else []
    assert " ".join(" ".join(about).split()) in " ".join(pages[0].split()), "all that it says of the command"
    assert all(len(line) <= 66 for line in about[:1]), "one line in the list of commands"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json(name: str) -> None:
    options = {word for parameter in GROUP.commands[name].params for word in parameter.opts}
    assert "--json" in options


def test_json_is_all_there_is_on_stdout(tmp_path: Path, tiny_world: Any, make_run: MakeRun, fire: Fire) -> None:
    new = tmp_path / "new"
    made = fire("init", new, "--student", tiny_world.student, "--json")
    assert made.json == {
        "run": str(new), "config": str(new / "fire.yaml"),
        "missing": [f"prompts.path: there is no {new / 'prompts.jsonl'} yet"],
    }  # fmt: skip
    run = make_run(tmp_path / "run")
    called = {
        "rollout": dict, "score": dict, "weigh": dict, "train": dict, "run": list, "eval": dict, "status": list,
        "check": list, "inspect": dict, "diagnose": dict, "compare": dict,
    }  # fmt: skip
    for name, kind in called.items():
        answer = fire(name, run.root, "--json", *(["--rules", "uniform,fire"] if name == "compare" else []))
        assert answer.code == 0, answer.err
        assert isinstance(answer.json, kind), name
    assert isinstance(fire("rules", "--json").json, list)
    assert fire("rules", "fire", "--json").json["name"] == "fire"


def test_hints_carry_what_was_given_so_that_following_them_works(tmp_path: Path, make_run: MakeRun, fire: Fire) -> None:
    root = make_run(tmp_path / "a run").root
    settings = ["--set", "rollout.n=4", "--set", "seed=5", "--set", "train.batch_size=8"]
    words = ["rollout", str(root), *settings]
    for verb in ("score", "weigh", "train", "run"):
        answer = fire(*words)
        assert answer.code == 0, answer.err
        last = answer.err.splitlines()[-1]
        words = shlex.split(last.removeprefix("next: "))[1:]
        assert words[:2] == [verb, str(root)]
        assert words[-6:] == settings, last


def test_the_hint_of_weigh_names_what_training_would_miss(tmp_path: Path, make_run: MakeRun, fire: Fire) -> None:
    root = make_run(tmp_path / "run").root
    fire("rollout", root)
    fire("score", root)
    answer = fire("weigh", root, "-p", "percentile=30", "--scope", "round")
    words = shlex.split(answer.err.splitlines()[-1].removeprefix("next: "))[1:]
    assert fire("train", root).code == 2, "fire.yaml says otherwise"
    assert words[:2] == ["train", str(root)]
    assert fire(*words).code == 0


def test_a_hint_has_the_round_only_where_it_is_not_the_current_one(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(tmp_path / "run")
    assert carried(run, None, round=0) == []
    assert carried(run, None, round=3) == ["--round", "3"]
    assert carried(run, ["a=b c"], ray=True) == ["--ray", "--set", "a=b c"]
    assert carried(run, [], ray=True, address="h:1") == ["--ray-address", "h:1"]


def test_looking_hints_at_what_explains_or_uses_it(tmp_path: Path, make_run: MakeRun, fire: Fire) -> None:
    run = make_run(tmp_path / "run")
    session = Session(run)
    rollout(session, 0)
    assert "next:" not in fire("inspect", run.root).err, "there is nothing to explain yet"
    score(session, 0)
    weigh(run, 0)
    last = fire("inspect", run.root, 2).err.splitlines()[-1]
    assert last == f"next: fire explain {run.root} 2 --round 0"
    assert fire(*shlex.split(last)[2:]).code == 0
    given = ("--rules", "uniform,fire", "--set", "weigh.truncated=drop")
    last = fire("compare", run.root, *given).err.splitlines()[-1]
    assert last == f"next: fire weigh {run.root} --round 0 --rule fire --set weigh.truncated=drop"
    assert fire("check", run.root).err.splitlines()[-1] == f"next: fire train {run.root}"


@pytest.mark.parametrize(
    ("words", "offered", "not_offered"),
    [
        ("ro", {"rollout"}, {"score"}),
        ("status ", {"runs/mine", "runs/deep/er"}, {"runs", "runs/mine/rollouts", "other"}),
        ("status runs/m", {"runs/mine"}, {"runs/deep/er"}),
        ("weigh runs/mine --rule fire-p", {"fire-paper"}, {"fire"}),
        ("weigh runs/mine --rule fire+len", {"fire+length-guard"}, {"length-guard"}),
        ("compare runs/mine --rules fire,ti", {"fire,tip"}, set()),
        ("inspect runs/mine --round ", {"0", "1"}, {"2"}),
        ("weigh runs/mine --set a=b --name ", {"p30", "fire"}, set()),
        ("score runs/mine --teachers ", {"all", "math", "code"}, set()),
        ("score runs/mine --add ", {"topk", "teacher.math"}, {"reward"}),
        ("weigh runs/mine --teacher ", {"average", "math"}, {"all"}),
        ("weigh runs/mine --scope ", {"trajectory", "round"}, set()),
        ("weigh runs/mine --denominator ", {"tokens"}, set()),
        ("rollout runs/mine --set rollout.n", {"rollout.n="}, {"rollout.engine="}),
        ("push runs/mine user/name --stage w", {"weights"}, {"scores"}),
        ("inspect runs/broken --round ", set(), {"0"}),
        ("score runs/broken --teachers ", {"all"}, set()),
    ],
)
def test_completion_offers_what_is_there_and_loads_nothing_heavy(
    tmp_path: Path, words: str, offered: set[str], not_offered: set[str]
) -> None:
    for name in ("runs/mine", "runs/deep/er", "runs/broken", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/mine/rollouts").mkdir()
    (tmp_path / "runs/mine/fire.yaml").write_text("teachers: {math: {model: a}, code: {model: b}}\n")
    (tmp_path / "runs/deep/er/fire.yaml").write_text("")
    (tmp_path / "runs/broken/fire.yaml").write_text("{{{")
    for name in ("rollouts/round-000", "rollouts/round-001", "weights/p30/round-000", "weights/fire/round-000"):
        (tmp_path / "runs/mine/.fire/manifests" / name).with_suffix(".json").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/mine/.fire/manifests" / name).with_suffix(".json").write_text("{}")
    script = (
        "import sys; sys.argv = ['fire']\nfrom fire_data.cli import main\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        f"print(code, sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    )
    variables = {
        "_FIRE_COMPLETE": "complete_bash", "COMP_WORDS": f"fire {words}", "COMP_CWORD": str(len(words.split(" "))),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr.strip() == "0 []"
    found = set(done.stdout.splitlines())
    assert offered <= found
    assert not not_offered & found


def test_completion_knows_every_rule_and_every_column_that_can_be_added() -> None:
    offered = dict(completion.rules(""))
    assert set(offered) == set(rule_names())
    assert all(offered.values()), "with a few words each"
    assert set(ADDED) <= set(completion.added(typer.Context(GROUP.commands["score"])))
    known = dict(completion.settings())
    assert known["rollout.n="] == "samples per prompt"
    assert {"seed=", "student.model=", "teacher.model=", "weigh.params="} <= set(known)


def test_completion_can_be_installed(fire: Fire) -> None:
    page = fire("--help").out
    assert "--install-completion" in page
    assert "--show-completion" in page


SECRET = {
    "HF_TOKEN": "hf_abcdefghijklmnop", "FIRE_TEACHER_KEY": "sk-1234567890abcdef", "FIRE_OTHER": "plain-but-secret",
    "https_proxy": "http://bob:hunter2@proxy.example", "RAY_ADDRESS": "ray://node7.example:10001",
    "HF_ENDPOINT": "https://bob:hunter2@mirror.example/hub?key=hunter3", "HF_HOME": "/home/bob/.cache/hf",
    "HF_HUB_CACHE": "/scratch/bob/hub", "OMP_NUM_THREADS": "4", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
}  # fmt: skip


def test_env_tells_no_secret_no_user_and_no_machine(monkeypatch: pytest.MonkeyPatch, fire: Fire) -> None:
    for name, value in SECRET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOGNAME", "bob")
    monkeypatch.setenv("HOME", "/home/bob")
    for answer in (fire("env"), fire("env", "--json")):
        assert answer.code == 0
        lost = ["abcdefgh", "12345678", "plain-but", "hunter", "proxy.example", "node7", "bob", "wJalr"]
        assert [word for word in lost if word in answer.out] == []
    found = fire("env", "--json").json
    assert found["variables"] | {
        "HF_TOKEN": "set", "FIRE_TEACHER_KEY": "set", "FIRE_OTHER": "set", "https_proxy": "set", "RAY_ADDRESS": "set",
        "HF_ENDPOINT": "https://mirror.example/hub", "HF_HOME": "~/.cache/hf", "HF_HUB_CACHE": "/scratch/USER/hub",
        "OMP_NUM_THREADS": "4",
    } == found["variables"]  # fmt: skip
    assert "AWS_SECRET_ACCESS_KEY" not in found["variables"]
    assert found["hub_token"] == "set"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/x:/home/bob/y", "/home/USER/x:~/y"),
        ("/home/bobby/x", "/home/USER/x"),
        ("/data/bob-cache", "/data/USER-cache"),
        ("/data/bobcat", "/data/bobcat"),
        ("https://x.example/a#b", "https://x.example/a"),
        ("https://hf_abcDEF123@x.example", "https://x.example"),
        ("0,1", "0,1"),
    ],
)
def test_redaction(text: str, shown: str) -> None:
    assert environment.redacted(text, home="/home/bob", user="bob") == shown


def test_env_knows_the_machine_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, fire: Fire) -> None:
    found = environment.environment({})
    assert found["packages"]["polars"]
    assert found["memory_bytes"] > 2**28
    assert found["disk_free_bytes"] > 0
    assert 0 < found["cpus_usable"] <= found["cpus"]
    assert found["hub_token"] in (None, "set")
    assert found["variables"] == {}
    monkeypatch.setitem(sys.modules, "torch", None)
    without = environment.environment({})
    assert without["devices"] == []
    assert "pip install" in without["torch"]
    monkeypatch.setattr(environment, "PACKAGES", ("polars", "no-such-package"))
    told = fire("env").out
    assert [line.split() for line in told.splitlines() if "no-such" in line] == [
        ["not", "installed", "no-such-package"]
    ]
    assert "pip install" in told


def test_env_lists_gpus_with_memory_and_driver(monkeypatch: pytest.MonkeyPatch, fire: Fire) -> None:
    torch = pytest.importorskip("torch")
    about = type("P", (), {"name": "NVIDIA H200", "total_memory": 150 * 10**9, "major": 9, "minor": 0})()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build"
    read = environment._read
    monkeypatch.setattr(environment, "_read", lambda p: text if "nvidia" in p else read(p))
    found = environment.environment({})
    assert [d["memory_bytes"] for d in found["devices"]] == [150 * 10**9] * 2
    assert found["driver"] == "570.124.06"
    assert "NVIDIA H200, 150 GB, 9.0" in fire("env").out


def test_slips_are_answered_with_what_was_probably_meant(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_fake_run(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    for words, told in {
        ("wiegh", "runs/mine"): "Did you mean 'weigh'?",
        ("rollout",): "Missing argument 'RUN'",
        ("rollout", "runs/mine", "--roun", "1"): "--round",
        ("status", "runs/mien"): "did you mean runs/mine?",
        ("status", run.root / "rollouts"): f"did you mean {run.root}?",
        ("status", "runs/mine/fire.yaml"): "did you mean runs/mine?",
        ("status", "elsewhere"): "fire init elsewhere",
        ("init", "runs/mine", "--student", "m"): "there is a fire.yaml already",
    }.items():
        answer = fire(*words)
        assert answer.code == 2
        assert told in " ".join(answer.err.split()), words
        assert answer.out == ""


def test_init_reads_what_it_wrote(tmp_path: Path, fire: Fire) -> None:
    made = json.loads(fire("init", tmp_path / "run", "--student", "some/model", "--json").out)
    assert open_run(made["run"]).config.student.model == "some/model"
