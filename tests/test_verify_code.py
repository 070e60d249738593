"""Code of responses: what is run, what passes, and that nothing gets out of the sandbox or outlives it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fire_data.schemas.config import VerifyConfig
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.verify import Verifier, sandbox
from fire_data.verify.program import NoTestsError, code_in, read_tests
from fire_data.verify.sandbox import Isolation, Outcome

LINUX = sys.platform.startswith("linux")
pytestmark = pytest.mark.skipif(not LINUX, reason="the sandbox is made of what Linux has")
ASSERTS = json.dumps({"tests": ["assert f(2) == 4", "assert f(0) == 0"]})
PAIRS = json.dumps({"tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10"}]})
RIGHT = "```python\ndef f(x):\n    return 2 * x\n```"


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\n"


def graded(texts: list[str], extra: str, **settings: Any) -> list[tuple[float | None, str]]:
    settings = {"timeout_s": 5.0, "memory_mb": 512, "workers": 1} | settings
    with Verifier(VerifyConfig(kind="code", **settings), Path()) as verifier:
        return [g[:2] for g in verifier.grade(texts, [None] * len(texts), [extra] * len(texts))]


# --- which code, which tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "entry", "code"),
    [
        ("```python\na = 1\n```\nor\n```py\nb = 2\n```", None, "b = 2\n"),
        ("```\nplain = 1\n```", None, "plain = 1\n"),
        ("```python\ndef f(): pass\n```\nUse:\n```python\nprint(f())\n```", "f", "def f(): pass\n"),
        ("```bash\nls\n```", None, None),
        ("~~~python\nx = '```'\n~~~", None, "x = '```'\n"),
        ("def f(x):\n    return x\n", None, "def f(x):\n    return x\n"),
        ("I cannot do this.", None, None),
        ("```python\ncut off", None, None),
        ("", None, None),
    ],
)
def test_the_code_of_a_response(text: str, entry: str | None, code: str | None) -> None:
    assert code_in(text, entry) == code


def test_the_usual_forms_of_tests_are_read() -> None:
    assert read_tests(ASSERTS).checks == ("assert f(2) == 4", "assert f(0) == 0")
    assert read_tests('{"tests": "assert f(1)\\nassert f(2)"}').checks == ("assert f(1)\nassert f(2)",)
    mbpp = {"test_list": ["assert f(1)"], "test_setup_code": "import math"}
    assert (read_tests(json.dumps(mbpp)).setup, read_tests(json.dumps(mbpp)).checks) == (
        "import math",
        ("assert f(1)",),
    )
    apps = {"input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})}
    assert read_tests(json.dumps(apps)).pairs == (("1\n", "2\n"),)
    assert read_tests(PAIRS).pairs == (("1 2\n", "3\n"), ("5 5\n", "10"))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (None, "has no tests"),
        ({"tests": []}, "has no tests"),
        ({"tests": ["assert f(("]}, "not Python"),
        ({"tests": ["assert " + "(" * 500 + ")" * 500]}, "not Python"),
        ({"tests": ["assert " + "-" * 100_000 + "1"]}, "not Python"),
        ({"tests": ["assert f(1)"], "test_setup_code": ["import math"]}, "not Python"),
        ({"tests": [{"input": 1, "output": 2}]}, "neither Python nor pairs"),
        ({"tests": 3}, "neither Python nor pairs"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "equally many"),
        ({"input_output": "[" * 100_000}, "equally many"),
    ],
)
def test_tests_that_cannot_be_run_are_refused_before_anything_is_generated(extra: Any, words: str) -> None:
    given = None if extra is None else json.dumps(extra)
    with pytest.raises(NoTestsError, match=words):
        read_tests(given)
    row = {"prompt_id": "q7", "answer": None, "extra": given}
    with pytest.raises(DataError, match=f"prompt 'q7' .*{words}"):
        Verifier(VerifyConfig(kind="code"), Path()).check([row], "p.jsonl", "correct it")


# --- what passes -------------------------------------------------------------------------------------------------


def test_code_passes_if_all_checks_do() -> None:
    wrong = [
        "def f(x):\n    return x + 2",  # right for one of them
        "def f(x):\n    raise ValueError",
        "def g(x):\n    return 2 * x",
        "def f(x) return",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "def f(x):\n    import os\n    os._exit(0)",
        "def f(x):\n    raise SystemExit(0)",
    ]
    found = graded([RIGHT, *map(fenced, wrong), "I give up, sorry"], ASSERTS)
    assert found == [(1.0, "right"), *[(0.0, "wrong")] * len(wrong), (0.0, "no answer")]


def test_humaneval_checks_are_called_with_the_entry_point() -> None:
    test = "def check(candidate):\n    assert candidate(3) == 6\n"
    extra = json.dumps({"test": test, "entry_point": "f"})
    assert graded([RIGHT, fenced("def f(x):\n    return 7")], extra) == [(1.0, "right"), (0.0, "wrong")]


def test_programs_are_given_input_and_compared_word_by_word() -> None:
    add = "a, b = map(int, input().split())\nprint('', a + b)"
    wrong = ["print(3)", "print(input())", "a, b = map(int, input().split())\nprint(a + b)\nraise SystemExit(1)"]
    assert graded([fenced(add), *map(fenced, wrong)], PAIRS) == [(1.0, "right"), *[(0.0, "wrong")] * 3]


def test_a_program_that_is_imported_does_not_run_as_main() -> None:
    code = "def f(x):\n    return 2 * x\nif __name__ == '__main__':\n    raise SystemExit('read the input')"
    assert graded([fenced(code)], ASSERTS) == [(1.0, "right")]


def test_time_and_memory_have_verdicts_of_their_own_and_all_tests_share_the_time() -> None:
    slow = "import time\ntime.sleep(0.8)\nprint(sum(map(int, input().split())))"
    assert graded([fenced(slow)], PAIRS, timeout_s=1.2) == [(0.0, "timeout")]
    found = graded([fenced("while True: pass"), fenced("x = bytearray(10**10)"), RIGHT], ASSERTS, timeout_s=1.0)
    assert found == [(0.0, "timeout"), (0.0, "memory"), (1.0, "right")]


# --- what does not get out ----------------------------------------------------------------------------------------

# Runs in a process of its own, as graders do: `run` adopts and kills whatever its process has below it.
DRIVER = """
import json, sys
from fire_data.verify import sandbox
told = json.loads(sys.argv[1])
isolation = sandbox.Isolation(*told["isolation"])
limits = sandbox.Limits(told["seconds"], told["memory_mb"])
end = sandbox.run(told["source"], b"", limits, isolation, told["scratch"])
print(json.dumps([end.how, end.code, end.stdout.decode(errors="replace"), end.stderr.decode(errors="replace")]))
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Isolation:
    """What holds on this machine."""
    scratch = str(tmp_path_factory.mktemp("probe"))
    script = f"from fire_data.verify import sandbox; print(list(sandbox.probe({scratch!r})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return Isolation(*(word.strip(" []\n") == "True" for word in done.stdout.split(",")))


@pytest.fixture(params=["full", "filter", "none"])
def level(request: pytest.FixtureRequest, held: Isolation) -> Isolation:
    """Every isolation that a machine may allow, down to none, as far as this one does."""
    wanted = {"full": held, "filter": Isolation(filter=True), "none": Isolation()}[request.param]
    if request.param == "full" and not held.namespace:
        pytest.skip("namespaces are not allowed here")
    if request.param == "filter" and not held.filter:
        pytest.skip("there is no filter of system calls for this architecture")
    return wanted


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[str]:
    """A word by which everything a program leaves behind is found; whatever is found at the end is killed."""
    word = f"fire-test-{secrets.token_hex(8)}"
    yield word
    for pid in marked(word):
        os.kill(pid, signal.SIGKILL)


def marked(word: str) -> list[int]:
    """The processes whose command line or environment holds a word, other than this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                told = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue
            if word.encode() in told:
                found.append(int(folder.name))
    return found


def run(source: str, isolation: Isolation, tmp_path: Path, **limits: Any) -> Outcome:
    told = {
        "source": source,
        "isolation": isolation,
        "scratch": str(tmp_path),
        "seconds": 5,
        "memory_mb": 512,
        **limits,
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(told)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return Outcome(*json.loads(done.stdout), 0.0)


# Every process of the program has the marker in its command line.
SPAWN = (
    "import os, sys, time\n"
    "def spawn(code):\n    os.spawnv(os.P_NOWAIT, sys.executable, ['python', '-c', code, {word!r}])\n"
)
LEAVING = {
    "hanging": "spawn('while True: pass')\nwhile True: pass",
    "ignoring signals": (
        "spawn('import signal, time\\nfor i in range(1, 65):\\n  try: signal.signal(i, signal.SIG_IGN)\\n"
        "  except (OSError, ValueError): pass\\ntime.sleep(600)')\ntime.sleep(600)"
    ),
    "daemonised": (
        "spawn('import os, sys, time\\nif os.fork(): os._exit(0)\\nos.setsid()\\nif os.fork(): os._exit(0)\\n"
        "time.sleep(600)')\ntime.sleep(0.3)\nprint('gone')"
    ),
    "left behind": "spawn('import time; time.sleep(600)')\nprint('gone')",
}


@pytest.mark.parametrize("kind", LEAVING)
def test_nothing_is_left_running(kind: str, level: Isolation, marker: str, tmp_path: Path) -> None:
    end = run(SPAWN.format(word=marker) + LEAVING[kind], level, tmp_path, seconds=1.5)
    assert (end.how, end.stdout) == (("exited", "gone\n") if "gone" in LEAVING[kind] else ("timeout", ""))  # type: ignore[comparison-overlap]
    assert marked(marker) == []
    assert list(tmp_path.iterdir()) == []


def test_a_fork_bomb_is_stopped_by_counting(level: Isolation, tmp_path: Path) -> None:
    # 4096 processes if nobody stopped it, which end by themselves: no test may endanger who runs it.
    bomb = "import os, time\nfor i in range(12): os.fork()\ntime.sleep(10)"
    started = time.monotonic()
    end = run(bomb, level, tmp_path, seconds=20)
    assert end.how in ("processes", "exited")
    assert end.code != 0
    assert time.monotonic() - started < 8


def test_memory_is_limited_for_one_process_and_for_all_together(level: Isolation, tmp_path: Path) -> None:
    assert run("x = bytearray(1 << 30)", level, tmp_path).how == "memory"
    assert run("import mmap\nmmap.mmap(-1, 1 << 30)", level, tmp_path).code != 0  # also what is not touched yet
    several = (
        "import os, time\nfor i in range(8):\n    if os.fork() == 0:\n        x = bytearray(b'x') * (100 << 20)\n"
        "        time.sleep(60)\ntime.sleep(60)"
    )
    started = time.monotonic()
    assert run(several, level, tmp_path, seconds=20, memory_mb=300).how == "memory"
    assert time.monotonic() - started < 15


def test_output_and_files_are_limited(level: Isolation, tmp_path: Path) -> None:
    assert run("while True: print('x' * 10**6)", level, tmp_path).how == "output"
    end = run("f = open('big', 'wb')\nfor i in range(10**4): f.write(b'x' * 10**5)", level, tmp_path)
    assert end.how == "exited"
    assert end.code != 0
    assert list(tmp_path.iterdir()) == []


def test_the_network_cannot_be_reached(held: Isolation, tmp_path: Path) -> None:
    if not held.network:
        pytest.skip("neither namespaces nor filters are allowed here")
    levels = [i for i in (held, held._replace(filter=False), Isolation(filter=held.filter)) if i.network]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        source = (
            "import socket\ntry:\n    socket.create_connection(('127.0.0.1', PORT), 2)\n    print('reached')\n"
            "except OSError as error:\n    print('refused')"
        ).replace("PORT", str(server.getsockname()[1]))
        for isolation in levels:
            assert run(source, isolation, tmp_path).stdout == "refused\n"  # type: ignore[comparison-overlap]
            with pytest.raises(TimeoutError):
                server.accept()
        # The same program, not kept in, gets through: it is the sandbox that refuses.
        assert run(source, Isolation(), tmp_path).stdout == "reached\n"  # type: ignore[comparison-overlap]


def test_a_program_sees_an_empty_folder_and_few_variables(level: Isolation, tmp_path: Path) -> None:
    os.environ["FIRE_SECRET"] = "token"
    try:
        end = run("import os\nprint(os.listdir('.'))\nprint(sorted(os.environ))", level, tmp_path)
    finally:
        del os.environ["FIRE_SECRET"]
    files, variables = str(end.stdout).splitlines()
    assert files == "['main.py']"
    assert "FIRE_SECRET" not in variables
    assert "HOME" in variables


def test_files_and_processes_outside_are_out_of_reach(held: Isolation, tmp_path: Path) -> None:
    if not (held.files and held.processes):
        pytest.skip("namespaces are not allowed here")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    source = f"import os, signal\ntry:\n    os.unlink({str(precious)!r})\nexcept OSError as e:\n    print(e.errno)\n"
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        source += f"try:\n    os.kill({bystander.pid}, 9)\nexcept ProcessLookupError:\n    print('nobody')\n"
        end = run(source, held, scratch)
        assert str(end.stdout).splitlines() == ["30", "nobody"]  # EROFS
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert precious.read_text() == "mine"


LASTING = SPAWN + "spawn('import time; time.sleep(600)')\ntime.sleep(600)"


def test_when_the_command_is_killed_its_programs_end(marker: str, tmp_path: Path) -> None:
    grader = (
        "import sys\nfrom fire_data.verify.pool import Pool\n"
        "pool = Pool({'kind': 'code', 'scratch': sys.argv[1], 'timeout_s': 600, 'memory_mb': 512},"
        " workers=1, seconds=600, batch=1)\npool.grade([{'text': sys.stdin.read(), 'extra': sys.argv[2]}])"
    )
    command = [sys.executable, "-c", grader, str(tmp_path), ASSERTS]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    assert child.stdin is not None
    child.stdin.write(fenced(LASTING.format(word=marker)))
    child.stdin.close()
    try:
        wait_for(lambda: marked(marker) != [])
    finally:
        child.kill()
        child.wait()
    wait_for(lambda: marked(marker) == [])


# The first process of a namespace, delayed before it says with whom it dies: its parent may die before.
LATE = """
import os, time
from fire_data.verify import sandbox
call = sandbox._call
def late(name, *arguments):
    if os.getpid() == 1 and arguments[0] == sandbox._SET_PDEATHSIG:
        time.sleep(1)
    call(name, *arguments)
sandbox._call = late
"""


@pytest.mark.parametrize("late", ["", LATE])
def test_when_the_process_that_grades_is_killed_the_program_ends_with_its_namespace(
    held: Isolation, marker: str, tmp_path: Path, late: str
) -> None:
    if not held.namespace:
        pytest.skip("namespaces are not allowed here")
    told = {"source": LASTING.format(word=marker), "isolation": held, "scratch": str(tmp_path), "seconds": 600}
    child = subprocess.Popen([sys.executable, "-c", late + DRIVER, json.dumps(told | {"memory_mb": 512})])
    try:
        wait_for(lambda: len(marked(marker)) > 2)  # the driver, and what it forked, have it in their command line too
    finally:
        child.kill()
        child.wait()
    wait_for(lambda: marked(marker) == [])


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        threading.Event().wait(0.02)


# --- saying so ----------------------------------------------------------------------------------------------------


def test_weaker_isolation_is_said_and_none_is_refused_unless_it_is_allowed() -> None:
    verifier = Verifier(VerifyConfig(kind="code"), Path())
    assert verifier._weaknesses(Isolation(True, True, True, True)) == []
    weak = verifier._weaknesses(Isolation(filter=True))
    assert len(weak) == 2
    assert any("files" in text for text in weak)
    with pytest.raises(ConfigError, match="could reach the network") as refused:
        verifier._weaknesses(Isolation())
    assert "verify.allow_unsafe=true" in str(refused.value.fix)
    allowed = Verifier(VerifyConfig(kind="code", allow_unsafe=True), Path())
    assert any("reach the network" in text for text in allowed._weaknesses(Isolation()))


def test_what_was_kept_from_code_is_recorded(held: Isolation) -> None:
    with Verifier(VerifyConfig(kind="code", workers=1), Path()) as verifier:
        verifier.start()
        assert verifier.recorded["isolation"] == list(held)
        assert verifier.fields["processes"] == sandbox.PROCESSES
        scratch = verifier._scratch
    assert scratch is not None
    assert not Path(scratch.name).exists()
