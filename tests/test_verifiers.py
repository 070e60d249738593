"""What all verifiers have in common: processes that can be killed, limits, fingerprints, and functions of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fire_data.schemas.config import VerifyConfig, load_config
from fire_data.schemas.errors import ConfigError, DataError, EngineError
from fire_data.verify import Graded, Verifier
from fire_data.verify.pool import Pool

CATASTROPHIC = r"(a+)+$"
HOSTILE = "a" * 40 + "b"


def function(folder: Path, body: str, name: str = "grade") -> str:
    """A file with a function; its kind."""
    (folder / "mine.py").write_text(f"import os, sys, time\ndef {name}(response, answer, extra):\n    {body}\n")
    return f"mine.py:{name}"


def grade(cfg: VerifyConfig, root: Path, texts: list[str], extras: list[str | None] | None = None) -> list[Graded]:
    with Verifier(cfg, root) as verifier:
        return verifier.grade(texts, ["1"] * len(texts), extras or [None] * len(texts))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        threading.Event().wait(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- exact --------------------------------------------------------------------------------------------------------


def test_exact_compares_the_last_match_and_without_a_pattern_the_whole_text() -> None:
    found = grade(VerifyConfig(pattern="# (.*)"), Path(), ["# 2\n# 1", "# 1\n# 2", "none"])
    assert found == [(1.0, "right", "1", "1"), (0.0, "wrong", "2", "2"), (0.0, "no answer", None, None)]
    assert [g.reward for g in grade(VerifyConfig(), Path(), [" 1\n", "the answer is 1"])] == [1.0, 0.0]


def test_a_pattern_that_never_ends_costs_one_reward_and_not_the_command() -> None:
    started = time.monotonic()
    found = grade(VerifyConfig(pattern=CATASTROPHIC, timeout_s=1.0), Path(), ["aaa", HOSTILE, "aa"])
    assert [g.verdict for g in found] == ["wrong", "timeout", "wrong"]
    assert time.monotonic() - started < 10


def test_exact_without_a_pattern_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert grade(VerifyConfig(), Path(), ["1"])[0].reward == 1.0
    assert grade(VerifyConfig(kind="choice"), Path(), ["B"])[0].reward is None


def test_a_prompt_without_an_answer_is_not_graded_and_named_when_it_matters() -> None:
    verifier = Verifier(VerifyConfig(), Path())
    assert verifier.grade(["1", "1"], ["1", None], [None, None]) == [
        (1.0, "right", "1", "1"),
        (None, "ungraded", None, None),
    ]
    rows = [{"prompt_id": "a", "answer": "1", "extra": None}, {"prompt_id": "b", "answer": None, "extra": None}]
    with pytest.raises(DataError, match="prompt 'b' has no answer"):
        verifier.check(rows, "p.jsonl", "correct it")


# --- functions of one's own ---------------------------------------------------------------------------------------


def test_an_own_function_is_given_response_answer_and_the_other_fields(tmp_path: Path) -> None:
    kind = function(tmp_path, "return extra['share'] if response == 'x' + answer else 0")
    found = grade(VerifyConfig(kind=kind), tmp_path, ["x1", "x2"], ['{"share": 0.75}', '{"share": 1}'])
    assert found == [(0.75, "right", None, None), (0.0, "wrong", None, None)]


def test_what_an_own_function_prints_is_no_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind = function(tmp_path, "print('{}'); os.write(1, b'{}'); return 1")
    assert [g.reward for g in grade(VerifyConfig(kind=kind), tmp_path, ["a", "b"])] == [1.0, 1.0]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1 / 0", "fails at line 3: ZeroDivisionError"),
        ("sys.exit(0)", "fails at line 3: SystemExit"),
        ("return 'yes'", "grade gave 'yes', which is no number from 0 to 1"),
        ("return 2", "grade gave 2"),
        ("return float('nan')", "grade gave nan"),
        ("pass", "grade gave None"),
    ],
)
def test_a_mistake_in_an_own_function_is_told_with_its_line_and_is_no_reward(
    tmp_path: Path, body: str, words: str
) -> None:
    kind = function(tmp_path, body)
    with pytest.raises(ConfigError, match=words) as caught:
        grade(VerifyConfig(kind=kind), tmp_path, ["a", "b"])
    assert caught.value.where == str(tmp_path / "mine.py")


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("gone.py:f", "", "cannot be read"),
        ("mine.py:other", "def grade(*a): return 1", "there is no function other"),
        ("mine.py:grade", "def grade(:", "SyntaxError"),
        ("mine.py:grade", "import no_such_module", "ModuleNotFoundError"),
    ],
)
def test_a_function_that_is_not_there_is_told_before_anything_is_graded(
    tmp_path: Path, kind: str, text: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=words), Verifier(VerifyConfig(kind=kind), tmp_path) as verifier:
        verifier.start()


def test_a_hanging_a_hungry_and_a_dying_function_cost_their_own_reward_only(tmp_path: Path) -> None:
    body = (
        "if response == 'hang': time.sleep(600)\n"
        "    if response == 'eat': return float(len(bytearray(10**10)) < 0)\n"
        "    if response == 'die': os.kill(os.getpid(), 11)\n"
        "    return 1"
    )
    cfg = VerifyConfig(kind=function(tmp_path, body), timeout_s=1.0, memory_mb=256, workers=2)
    found = grade(cfg, tmp_path, ["a", "hang", "b", "eat", "c", "die", "d", "hang", "e"])
    assert [g.verdict for g in found] == [
        "right", "timeout", "right", "memory", "right", "memory", "right", "timeout", "right",
    ]  # fmt: skip
    assert [g.reward for g in found] == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_a_function_that_ends_its_process_is_an_error_and_not_a_reward(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"ended by itself \(exit code 7\)"):
        grade(VerifyConfig(kind=function(tmp_path, "os._exit(7)")), tmp_path, ["a"])


def test_what_a_function_starts_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    body = (
        "import subprocess\n"
        f"    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"    open({str(note)!r}, 'a').write(f'{{os.getpid()}} {{child.pid}} ')\n"
        "    time.sleep(600)"
    )
    found = grade(VerifyConfig(kind=function(tmp_path, body), timeout_s=2.0), tmp_path, ["a"])
    assert found[0].verdict == "timeout"
    pids = [int(word) for word in note.read_text().split()]
    assert len(pids) == 2
    wait_for(lambda: not any(map(alive, pids)))


def test_what_a_function_leaves_behind_ends_with_the_verifier(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    body = (
        "import subprocess\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"    open({str(note)!r}, 'w').write(str(child.pid))\n"
        "    return 1"
    )
    assert grade(VerifyConfig(kind=function(tmp_path, body)), tmp_path, ["a"])[0].reward == 1
    wait_for(lambda: not alive(int(note.read_text())))


# --- processes ----------------------------------------------------------------------------------------------------


def test_processes_end_with_the_verifier_and_with_the_command(tmp_path: Path) -> None:
    kind = function(tmp_path, "return 1")
    with Verifier(VerifyConfig(kind=kind, workers=1), tmp_path) as verifier:
        verifier.start()
        assert verifier._pool is not None
        pids = [p.child.pid for p in verifier._pool._all]
        assert [alive(p) for p in pids] == [True]
    assert not any(map(alive, pids))
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom fire_data.schemas.config import VerifyConfig\n"
        "from fire_data.verify import Verifier\n"
        f"v = Verifier(VerifyConfig(kind={kind!r}, workers=1), Path({str(tmp_path)!r}))\nv.start()\n"
        "print(*(p.child.pid for p in v._pool._all), flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    (pid,) = map(int, done.stdout.split())
    wait_for(lambda: not alive(pid))


def test_processes_are_kept_from_batch_to_batch(tmp_path: Path) -> None:
    kind = function(tmp_path, "return float(os.getpid() % 1000) / 1000")
    with Verifier(VerifyConfig(kind=kind, workers=1), tmp_path) as verifier:
        told = {g.reward for _ in range(3) for g in verifier.grade(["a"] * 40, ["1"] * 40, [None] * 40)}
    assert len(told) == 1


def test_several_threads_may_ask_at_the_same_time_and_answers_keep_their_order(tmp_path: Path) -> None:
    kind = function(tmp_path, "return int(response) / 1000")
    results: dict[int, list[float | None]] = {}
    with Verifier(VerifyConfig(kind=kind, workers=2), tmp_path) as verifier:
        verifier.start()

        def ask(i: int) -> None:
            texts = [str(i * 100 + j) for j in range(60)]
            results[i] = [g.reward for g in verifier.grade(texts, [None] * 60, [None] * 60)]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert verifier._pool is not None
        assert len(verifier._pool._all) <= 2
    assert results == {i: [(i * 100 + j) / 1000 for j in range(60)] for i in range(4)}


def test_long_responses_and_odd_characters_reach_the_verifier(tmp_path: Path) -> None:
    kind = function(tmp_path, "return float(len(response) == extra['n'] and response[:2] == extra['start'])")
    text = "\u2028\x00" + "é" * 3_000_000
    found = grade(VerifyConfig(kind=kind), tmp_path, [text], ['{"n": 3000002, "start": "\\u2028\\u0000"}'])
    assert found[0].reward == 1.0


def test_a_module_beside_the_command_does_not_replace_one_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert grade(VerifyConfig(pattern="(.)"), Path(), ["1"])[0].reward == 1.0


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="did not start"):
        Pool({"kind": "exact"}, workers=1, seconds=1, batch=1).start()


# --- settings and fingerprints ------------------------------------------------------------------------------------


def fields(root: Path, **settings: Any) -> dict[str, Any]:
    return Verifier(VerifyConfig(**settings), root).fields


def test_the_fingerprint_of_exact_is_what_it_was_before_there_were_other_kinds() -> None:
    assert fields(Path(), pattern="x") == {"pattern": "x"}
    assert fields(Path()) == {"pattern": None}
    assert fields(Path(), pattern="x", memory_mb=64, workers=3) == {"pattern": "x"}


@pytest.mark.parametrize(
    ("kind", "changes", "keeps"),
    [
        ("exact", {"pattern": "y", "timeout_s": 3.0}, {"memory_mb": 99, "workers": 2}),
        ("choice", {"pattern": "y", "timeout_s": 3.0}, {"memory_mb": 99, "workers": 2}),
        ("math", {"pattern": "y", "timeout_s": 3.0, "memory_mb": 99}, {"workers": 2}),
        ("code", {"timeout_s": 3.0, "memory_mb": 99}, {"pattern": "y", "workers": 2, "allow_unsafe": True}),
        ("mine.py:grade", {"timeout_s": 3.0, "memory_mb": 99}, {"pattern": "y", "workers": 2}),
    ],
)
def test_what_changes_rewards_changes_the_fingerprint(
    tmp_path: Path, kind: str, changes: dict[str, Any], keeps: dict[str, Any]
) -> None:
    function(tmp_path, "return 1")
    start = fields(tmp_path, kind=kind)
    for name, value in changes.items():
        assert fields(tmp_path, kind=kind, **{name: value}) != start, name
    assert fields(tmp_path, kind=kind, **keeps) == start
    others = [fields(tmp_path, kind=k) for k in ("exact", "choice", "math", "code", "mine.py:grade") if k != kind]
    assert start not in others


def test_another_function_or_another_source_is_another_fingerprint(tmp_path: Path) -> None:
    kind = function(tmp_path, "return 1")
    start = fields(tmp_path, kind=kind)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    function(elsewhere, "return 1")
    assert fields(elsewhere, kind=kind) == start  # a path is no result
    function(elsewhere, "return 0")
    assert fields(elsewhere, kind=kind) != start


def test_a_verifier_that_does_not_exist_is_refused_with_the_config(tmp_path: Path) -> None:
    (tmp_path / "fire.yaml").write_text("student: {model: m}\nverify: {kind: maths}\n")
    with pytest.raises(ConfigError, match=r"'verify.kind'.*there is no verifier 'maths'.*math, choice"):
        load_config(tmp_path / "fire.yaml")
    for kind in ("math", "code", "../graders/mine.py:grade"):
        assert load_config(tmp_path / "fire.yaml", (f"verify.kind={kind}",)).verify.kind == kind


def test_math_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('no module')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with (
        pytest.raises(ConfigError, match="needs math-verify") as caught,
        Verifier(VerifyConfig(kind="math"), Path()) as v,
    ):
        v.start()
    assert "fire-opd[verify]" in str(caught.value.fix)
