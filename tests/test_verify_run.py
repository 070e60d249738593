"""`fire verify`: rewards beside stored rollouts, made once, continued after a kill, read by whatever asks for them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from fire_data.run import Run, open_run
from fire_data.schemas.errors import DataError, FingerprintError
from fire_data.schemas.tables import REWARD
from fire_data.session import Session
from fire_data.shards import read_manifest, sealed
from fire_data.stages import Silent
from fire_data.steps.compare import compare
from fire_data.steps.diagnose import diagnose_round
from fire_data.steps.refresh import refresh
from fire_data.steps.rollout import rollout
from fire_data.steps.rounds import round_table
from fire_data.steps.score import score
from fire_data.steps.verify import verify
from fire_data.steps.weigh import weigh
from fire_data.tokenview import trajectory

from .conftest import Answer, shard_files

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]
# Half of the rewards are 1, whatever the responses are.
BY_NAME = "def grade(response, answer, extra):\n    return len(response) % 2\n"
OUTCOME_RULES = ("verified-only", "ra-opd", "rg-opd")


@pytest.fixture
def grader(tmp_path: Path) -> str:
    (tmp_path / "grader.py").write_text(BY_NAME)
    return f"{tmp_path / 'grader.py'}:grade"


@pytest.fixture
def scored(tmp_path: Path, make_fake_run: MakeRun, grader: str) -> Run:
    """A run of the fake engine with rollouts and scores, 3 shards, without rewards."""
    run = make_fake_run(tmp_path / "run", verify={"kind": grader, "workers": 1})
    rollout(Session(run), 0)
    score(Session(run), 0)
    return run


class Told(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_rewards_lie_beside_the_rollouts_row_by_row(scored: Run) -> None:
    assert scored.rollouts(0).collect()["reward"].null_count() == 12
    manifest = verify(scored, 0)
    frame = scored.scores(0, add="reward").collect()
    expected = [len(text) % 2 for text in frame["response"]]
    assert frame["reward"].to_list() == expected
    assert 0 < sum(expected) < 12
    assert frame.columns.count("reward") == 1
    assert frame["verdict"].to_list() == ["right" if x else "wrong" for x in expected]
    assert manifest.stats == {
        "trajectories": 12, "mean_reward": sum(expected) / 12,
        "verdicts": {"right": sum(expected), "wrong": 12 - sum(expected)},
    }  # fmt: skip
    assert scored.addons(0) == (REWARD,)
    assert scored.rollouts(0).collect()["reward"].null_count() == 12  # sealed tables stay as they are


def test_the_same_command_again_does_nothing_and_other_settings_are_refused(scored: Run, fire: Fire) -> None:
    verify(scored, 0)
    part = scored.part("addons", 0, REWARD)
    before = [(p, p.stat().st_mtime_ns) for p in shard_files(part)]
    verify(scored, 0)
    assert [(p, p.stat().st_mtime_ns) for p in shard_files(part)] == before
    with pytest.raises(FingerprintError, match=r"verify\.kind"):
        verify(open_run(scored.root, ("verify.kind=choice",)), 0)
    assert fire("verify", scored.root, "--kind", "exact", "--redo").code == 0
    assert sealed(part).stats["verdicts"]["wrong"] == 12


def test_the_command_shows_what_was_found_and_what_is_next(scored: Run, fire: Fire) -> None:
    answer = fire("verify", scored.root, "--json")
    assert answer.code == 0
    assert answer.json["round"] == 0
    assert answer.json["verdicts"].keys() == {"right", "wrong"}
    assert f"next: fire weigh {scored.root}" in answer.err


def test_no_model_is_loaded_or_needed(scored: Run) -> None:
    text = (scored.root / "fire.yaml").read_text()
    model = scored.config.student.model
    (scored.root / "fire.yaml").write_text(text.replace(model, "/no/such/model"))
    script = (
        "import sys\nfrom fire_data.cli import main\n"
        f"sys.argv = ['fire', 'verify', {str(scored.root)!r}]\n"
        "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
        "print('LOADED', sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.rpartition("LOADED ")[2].strip() == "[]", done.stderr


def test_killed_in_the_middle_it_continues_with_the_same_rewards(scored: Run, tmp_path: Path) -> None:
    part = scored.part("addons", 0, REWARD)
    verify(scored, 0)
    whole = scored.scores(0, add="reward").collect()
    verify(open_run(scored.root, ("verify.kind=exact",)), 0, redo=True)
    last = scored.rollouts(0).collect()["response"][-1]
    # The grader kills the command at the last response, once.
    flag = tmp_path / "killed"
    (tmp_path / "grader.py").write_text(
        BY_NAME.replace(
            "    return",
            f"    import os\n    if response == {last!r} and not os.path.exists({str(flag)!r}):\n"
            f"        open({str(flag)!r}, 'w').close()\n        os.kill(os.getppid(), 9)\n    return",
        )
    )
    command = [sys.executable, "-m", "fire_data.cli", "verify", str(scored.root), "--redo"]
    command[1:3] = ["-c", "import sys; from fire_data.cli import main; main()"]
    killed = subprocess.run(command, capture_output=True, check=False)
    assert killed.returncode == -9
    manifest = read_manifest(part)
    assert manifest is not None
    assert not manifest.sealed
    done = {p: p.stat().st_mtime_ns for p in shard_files(part)}
    assert 0 < len(done) < 3
    verify(scored, 0)
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert scored.scores(0, add="reward").collect().equals(whole)


@pytest.mark.parametrize("rule", OUTCOME_RULES)
def test_rules_about_outcomes_name_the_command_that_unlocks_them(rule: str, scored: Run, fire: Fire) -> None:
    refused = fire("weigh", scored.root, "--rule", rule)
    assert refused.code in (3, 4)
    assert "reward" in refused.err
    command = shlex.split(refused.fix.partition(",")[0])
    assert command[:3] == ["fire", "verify", str(scored.root)]
    assert fire(*command[1:]).code == 0
    assert fire("weigh", scored.root, "--rule", rule).code == 0
    made = sealed(scored.part("weights", 0, rule))
    assert made.fields["addons"].keys() == {REWARD}
    weights = scored.weights(rule, 0, add="reward").collect()
    if rule == "verified-only":
        assert weights["keep"].to_list() == (weights["reward"] == 1).to_list()


def test_rewards_of_verify_take_the_place_of_the_rollouts_own(
    tmp_path: Path, make_fake_run: MakeRun, grader: str
) -> None:
    run = make_fake_run(tmp_path / "run", rollout={"verifier": "exact"}, verify={"kind": grader})
    rollout(Session(run), 0)
    score(Session(run), 0)
    ruled = open_run(run.root, ("weigh.rule=verified-only",))
    assert run.rollouts(0).collect()["reward"].sum() == 0  # plain comparison, whatever verify.kind says
    weigh(ruled, 0)
    assert not any(run.weights("verified-only", 0).collect()["keep"])
    verify(run, 0)
    with pytest.raises(FingerprintError, match=r"addons\.reward|addons"):
        weigh(ruled, 0)
    weigh(ruled, 0, redo=True)
    weights = run.weights("verified-only", 0, add="reward").collect()
    assert weights["keep"].to_list() == [bool(len(t) % 2) for t in weights["response"]]
    assert weights["reward"].to_list() == [len(t) % 2 for t in weights["response"]]
    # A rule that does not ask for rewards does not depend on them.
    weigh(run, 0)
    assert "addons" not in sealed(run.part("weights", 0)).fields


def test_rewards_that_were_begun_have_to_be_finished_before_a_rule_reads_any(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    run = make_fake_run(tmp_path / "run", rollout={"verifier": "exact"})
    assert fire("rollout", run.root).code == fire("score", run.root).code == 0
    assert fire("weigh", run.root, "--rule", "verified-only").code == 0
    (tmp_path / "grader.py").write_text("def boom(response, answer, extra):\n    raise ValueError('no')\n")
    assert fire("verify", run.root, "--kind", f"{tmp_path / 'grader.py'}:boom").code != 0
    answer = fire("weigh", run.root, "--rule", "verified-only", "--name", "other")
    assert answer.code == 4
    assert answer.fix == f"fire verify {run.root} --round 0"
    assert fire("weigh", run.root, "--rule", "uniform").code == 0, "no other rule cares"


def test_making_rewards_anew_sets_aside_what_was_made_from_them_and_nothing_else(scored: Run) -> None:
    verify(scored, 0)
    weigh(open_run(scored.root, ("weigh.rule=verified-only",)), 0)
    weigh(scored, 0)
    verify(scored, 0, redo=True)
    assert read_manifest(scored.part("weights", 0, "verified-only")) is None
    assert sealed(scored.part("weights", 0)).sealed
    assert sealed(scored.part("scores", 0)).sealed


def test_refresh_rounds_grade_by_themselves_what_the_rule_reads(tmp_path: Path, make_run: MakeRun, grader: str) -> None:
    run = make_run(
        tmp_path / "run", verify={"kind": grader, "workers": 1}, eval={"prompts": None},
        weigh={"rule": "verified-only"}, rollout={"max_new_tokens": 8},
    )  # fmt: skip
    assert run.needed_addons() == (REWARD,)
    refresh(Session(run), 1)
    assert run.addons(0) == (REWARD,)
    (_, row) = round_table(run)
    assert row["reward"] == sealed(run.part("addons", 0, REWARD)).stats["mean_reward"]
    graded = open_run(run.root, ("rollout.verifier=exact",))
    assert graded.needed_addons() == ()  # the rollouts have rewards of their own


def test_a_loop_that_could_not_grade_ends_before_it_samples(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    given = prompts(tmp_path, {"prompt": "1", "answer": "1"}, {"prompt_id": "q", "prompt": "2"})
    run = make_fake_run(tmp_path / "run", prompts=given, eval={"prompts": None}, weigh={"rule": "verified-only"})
    answer = fire("run", run.root)
    assert answer.code == 3
    assert "prompt 'q' has no answer" in answer.err
    assert not (run.root / "rollouts").exists()


def test_the_next_command_is_verify_where_the_rule_asks_for_rewards(scored: Run, fire: Fire) -> None:
    from fire_data.overview import next_command

    ruled = open_run(scored.root, ("weigh.rule=verified-only",))
    assert next_command(ruled) == f"fire verify {scored.root}"
    verify(ruled, 0)
    assert next_command(ruled).startswith("fire weigh")
    refused = fire("score", scored.root, "--add", "reward")
    assert refused.code == 2
    assert refused.fix.startswith(f"fire verify {scored.root}")


def prompts(folder: Path, *rows: dict[str, Any]) -> dict[str, str]:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(folder / "prompts.jsonl")}


def test_prompts_without_an_answer_get_no_reward_and_a_rule_says_which_row_lacks_one(
    tmp_path: Path, make_fake_run: MakeRun
) -> None:
    given = prompts(tmp_path, {"prompt": "1", "answer": "1"}, {"prompt": "2"})
    run = make_fake_run(tmp_path / "run", prompts=given, rollout={"prompts_per_round": 2})
    rollout(Session(run), 0)
    score(Session(run), 0)
    told = Told()
    manifest = verify(run, 0, told)
    assert manifest.stats["verdicts"]["ungraded"] == 2
    assert any("2 of 4 responses have no reward" in text for text in told.warnings)
    assert run.scores(0, add="reward").collect()["reward"].null_count() == 2
    with pytest.raises(DataError, match="column 'reward' has no value") as caught:
        weigh(open_run(run.root, ("weigh.rule=verified-only",)), 0)
    assert "for prompts that have an answer each" in str(caught.value.fix)


def test_rollouts_that_cannot_be_graded_at_all_are_refused_before_a_stage_is_begun(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    run = make_fake_run(tmp_path / "run", prompts=prompts(tmp_path, {"prompt_id": "q", "prompt": "1"}))
    assert fire("verify", run.root).code == 4
    assert fire("rollout", run.root).code == 0
    answer = fire("verify", run.root)
    assert answer.code == 3
    assert "prompt 'q' has no answer to compare with" in answer.err
    answer = fire("verify", run.root, "--kind", "code")
    assert answer.code == 3
    assert "prompt 'q' has no tests" in answer.err
    assert not (run.root / "addons").exists()


def test_tests_in_the_prompts_grade_code(tmp_path: Path, make_fake_run: MakeRun, monkeypatch: Any) -> None:
    given = prompts(tmp_path, {"prompt": "1", "tests": ["assert f(1) == 2"]})
    run = make_fake_run(tmp_path / "run", prompts=given, verify={"kind": "code", "workers": 1, "timeout_s": 5.0})
    session = Session(run)
    answers = iter(["```python\ndef f(x):\n    return 2 * x\n```", "```python\ndef f(x):\n    return x\n```"] * 9)
    monkeypatch.setattr(session.tokenizer, "batch_decode", lambda ids, **_: [next(answers) for _ in ids])
    rollout(session, 0)
    manifest = verify(run, 0)
    assert manifest.stats["verdicts"] == {"right": 6, "wrong": 6}
    assert "isolation" in manifest.recorded["verify"]


def test_who_looks_at_rewards_sees_those_of_verify(scored: Run) -> None:
    before = {f.name: f for f in diagnose_round(scored, 0)}
    assert "no trajectory has a reward" in before["premise"].measured
    assert f"fire verify {scored.root} --round 0" in before["premise"].do
    assert compare(scored, 0, "uniform")["right"] is None
    verify(scored, 0)
    rewards = scored.scores(0, add="reward").collect()["reward"]
    after = {f.name: f for f in diagnose_round(scored, 0)}
    assert after["premise"].numbers["right"] == rewards.sum()
    assert compare(scored, 0, "uniform")["right"] == pytest.approx(rewards.mean())
    assert [trajectory(scored, 0, str(i), None)["reward"] for i in range(3)] == rewards.to_list()[:3]


def test_a_grader_named_on_the_command_line_is_found_from_there(
    scored: Run, fire: Fire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.py").write_text("def all_right(response, answer, extra):\n    return 1.0\n")
    monkeypatch.chdir(here)
    run = os.path.relpath(scored.root)
    assert fire("verify", run, "--kind", "mine.py:all_right", "--json").json["mean_reward"] == 1.0
    refused = fire("verify", run, "--kind", "mine.py:gone", "--redo")
    assert refused.code == 2
    assert "there is no function gone" in refused.err
    # What was there stays: the mistake is found before anything is set aside.
    assert scored.scores(0, add="reward").collect()["reward"].mean() == 1.0


def test_an_arm_of_another_run_shares_its_rewards_and_finds_its_grader(scored: Run, fire: Fire, tmp_path: Path) -> None:
    verify(scored, 0)
    arm = tmp_path / "deeper" / "arm"
    assert fire("init", arm, "--from", scored.root, "--rule", "verified-only").code == 0
    other = open_run(arm)
    assert other.addons(0) == (REWARD,)
    verify(other, 0)  # the same fingerprint: nothing to do, and the file is found
    assert fire("weigh", arm).code == 0


def test_any_frame_with_rewards_is_weighed_by_them(scored: Run) -> None:
    import fire_data

    verify(scored, 0)
    frame = scored.scores(0, add="reward").collect()
    made = fire_data.weigh(frame, "verified-only").collect()
    assert made["keep"].to_list() == (frame["reward"] == 1).to_list()
    with pytest.raises(Exception, match="'reward', which is not stored yet") as caught:
        fire_data.weigh(frame.drop("reward"), "verified-only").collect()
    assert getattr(caught.value, "fix", None) == "fire verify RUN"
    assert isinstance(made, pl.DataFrame)
