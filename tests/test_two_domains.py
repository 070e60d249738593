"""The world of two tasks: the list programs are what they say, each model saw its own texts, routes name the tasks."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# After the skips, because the modules need both libraries.
from fire_data import verify  # noqa: E402
from fire_data.schemas.errors import ConfigError  # noqa: E402
from fire_data.worlds import arithmetic as tasks  # noqa: E402
from fire_data.worlds import lists, two_domains, world  # noqa: E402

TINY = two_domains.TwoSizes(
    hidden=16, heads=2, intermediate=16, batch=4, teacher_steps=2, both_steps=2, student_steps=2, tuned_steps=2
)
MODELS = ("alone-math", "alone-code", "both", "student", "tuned-math", "tuned-code")
EXAMPLE = Path(__file__).parents[1] / "examples" / "two_teachers.py"


def build(folder: Path, seed: int = 0) -> two_domains.TwoDomains:
    return two_domains.build_two_domains(folder, seed=seed, prompts=24, held_out=8, sizes=TINY)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> two_domains.TwoDomains:
    return build(tmp_path_factory.mktemp("world"))


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_of(response: str) -> str | None:
    return verify.extract(response, verify.compile_pattern(two_domains.ANSWER_PATTERN))


def carried_out(problem: str) -> str:
    """An interpreter that shares nothing with the module: programs as strings of digits."""
    program, digits = problem.split(" : ")
    text = digits.replace(" ", "")
    for operation in program.split():
        if operation == "rev":
            text = text[::-1]
        elif operation == "rot":
            text = text[1:] + text[:1]
        elif operation == "swap":
            text = text[1::-1] + text[2:]
        else:
            text = text.translate(str.maketrans("0123456789", "1234567890"))
    return " ".join(text)


def test_programs_give_what_an_independent_interpreter_gives_and_every_clause_is_its_step() -> None:
    assert lists.truth("rev inc swap : 3 1 4 9") == carried_out("rev inc swap : 3 1 4 9") == "5 0 2 4"
    rng = random.Random(1)
    for _ in range(300):
        problem = lists.make_problem(rng)
        solution = lists.solution(problem, rng)
        assert answer_of(solution) == lists.truth(problem) == carried_out(problem)
        program, digits = problem.split(" : ")
        clauses = [clause.split() for clause in solution.removeprefix("| ").split("#")[0].split(" ;")[:-1]]
        assert [clause[1] for clause in clauses] == program.split()
        for _link, operation, *after in clauses:
            digits = carried_out(f"{operation} : {digits}")
            assert " ".join(after) == digits


def test_an_operation_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sort.*rev rot inc swap"):
        lists.apply_operation("sort", [1, 2, 3, 4])


def test_the_answer_pattern_takes_the_answers_of_both_tasks_and_only_at_the_end() -> None:
    assert answer_of("| so inc 2 3 4 5 ; # 2 3 4 5") == "2 3 4 5"
    assert answer_of("| so 1 + 1 = 2 ; # 2") == "2"
    assert answer_of("| so 1 + 1 = 2 ; # 2 so") == "2 so"
    assert answer_of("| # 1 # 2 3 4 5") == "2 3 4 5"
    assert answer_of("| so inc 2 3 4 5 ;") is None


def test_corruption_changes_most_answers_and_derails_some() -> None:
    rng = random.Random(2)
    problems = [lists.make_problem(rng) for _ in range(1000)]
    texts = [lists.corrupted_solution(problem, rng) for problem in problems]
    wrong = sum(answer_of(text) != lists.truth(problem) for problem, text in zip(problems, texts, strict=True))
    clean_length = len(lists.solution(problems[0], rng).split())
    assert 0.5 < wrong / 1000 < 0.9
    assert 0.05 < sum(len(text.split()) != clean_length for text in texts) / 1000 < 0.3
    assert all(text.count(tasks.ANSWER_MARK) == 1 for text in texts)
    assert {word for text in texts for word in text.split()} <= set(lists.WORDS)


def test_prompts_take_turns_and_their_route_is_their_task(built: two_domains.TwoDomains) -> None:
    prompts, held_out = rows(built.prompts), rows(built.held_out)
    assert (len(prompts), len(held_out)) == (24, 8)
    everything = prompts + held_out
    assert [row["teacher"] for row in everything] == ["math", "code"] * 16
    contents = [row["messages"][0]["content"] for row in everything]  # type: ignore[index]
    assert len(set(contents)) == len({row["prompt_id"] for row in everything}) == 32
    for row, content in zip(everything, contents, strict=True):
        assert str(row["prompt_id"]).startswith(f"{row['teacher']}-")
        assert (":" in content) == (row["teacher"] == "code")
        assert row["answer"] == (carried_out(content) if row["teacher"] == "code" else tasks.truth(content))


def test_all_models_share_one_tokenizer_that_knows_the_words_of_both_tasks(built: two_domains.TwoDomains) -> None:
    folders = [built.both, built.student, *built.alone.values(), *built.tuned.values()]
    assert sorted(folder.name for folder in folders) == sorted(MODELS)
    texts = {(folder / "tokenizer.json").read_bytes() for folder in folders}
    assert len(texts) == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(built.student)
    ids = tokenizer(" ".join((*tasks.WORDS, *lists.WORDS)), add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert len(set(ids)) == len(two_domains.WORDS) == len(tokenizer) - len(world.SPECIALS)


def test_each_model_is_trained_on_the_texts_it_should_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model read is drawn again here: its tasks, whether solutions are right, and where it started."""
    read: dict[str, list[world.Example]] = {}
    started: dict[str, str] = {}
    found = iter(MODELS)
    loaded: list[str] = []

    def fit(model: object, tokenizer: object, draw: object, *rest: object) -> None:
        name = next(found)
        started[name] = loaded.pop() if loaded else "nothing"
        read[name] = [draw() for _ in range(60)]  # type: ignore[operator]

    def load(folder: Path) -> object:
        loaded.append(folder.name)
        return world.load_model(folder)

    monkeypatch.setattr(two_domains, "fit", fit)
    monkeypatch.setattr(two_domains, "load_model", load)
    build(tmp_path)
    seen = {name: {"code" if ":" in problem else "math" for problem, _ in examples} for name, examples in read.items()}
    either = {"math", "code"}
    assert seen == {
        "alone-math": {"math"}, "alone-code": {"code"}, "both": either, "student": either,
        "tuned-math": {"math"}, "tuned-code": {"code"},
    }  # fmt: skip
    assert started == {
        "alone-math": "nothing", "alone-code": "nothing", "both": "nothing", "student": "both",
        "tuned-math": "student", "tuned-code": "student",
    }  # fmt: skip
    for name, examples in read.items():
        truths = [(lists if ":" in problem else tasks).truth(problem) for problem, _ in examples]
        right = sum(answer_of(text) == truth for (_, text), truth in zip(examples, truths, strict=True))
        assert (right < 45) if name == "student" else (right == 60), name


def test_no_model_reads_a_problem_of_the_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one operation there are few problems, 147 and 400: without the check, many would be met again."""
    monkeypatch.setattr(lists, "LENGTH", 2)
    monkeypatch.setattr(lists, "OPERATIONS_PER_PROBLEM", 1)
    monkeypatch.setattr(tasks, "OPERATIONS_PER_PROBLEM", 1)
    read: set[str] = set()

    def fit(model: object, tokenizer: object, draw: object, *rest: object) -> None:
        read.update(draw()[0] for _ in range(300))  # type: ignore[operator]

    monkeypatch.setattr(two_domains, "fit", fit)
    built = build(tmp_path)
    given = {row["messages"][0]["content"] for row in rows(built.prompts) + rows(built.held_out)}  # type: ignore[index]
    assert len(given) == 32
    assert not read & given
    assert len(read) > 400


def test_the_same_seed_gives_the_same_bytes_and_a_missing_part_is_made_again(
    built: two_domains.TwoDomains, tmp_path: Path
) -> None:
    same, other = build(tmp_path / "same"), build(tmp_path / "other", seed=1)
    names = ("prompts.jsonl", "held_out.jsonl", *(f"{name}/model.safetensors" for name in MODELS))
    for name in names:
        bytes_built = (built.student.parent / name).read_bytes()
        assert (same.student.parent / name).read_bytes() == bytes_built
        assert (other.student.parent / name).read_bytes() != bytes_built
    wanted = (same.tuned["code"] / "model.safetensors").read_bytes()
    same.tuned["code"].rename(tmp_path / "away")
    said: list[str] = []
    again = two_domains.build_two_domains(
        tmp_path / "same", prompts=24, held_out=8, sizes=TINY, report=lambda what, done, total: said.append(what)
    )
    assert set(said) == {"prompts", "tuned-code"}
    assert (again.tuned["code"] / "model.safetensors").read_bytes() == wanted


def test_a_folder_with_another_world_is_refused(built: two_domains.TwoDomains) -> None:
    with pytest.raises(ConfigError, match="other arguments"):
        build(built.student.parent, seed=1)
    with pytest.raises(ConfigError, match="other arguments"):
        world.build_world(built.student.parent, prompts=24, held_out=8, sizes=TINY)


def test_the_example_trains_arms_with_and_without_routes_and_takes_up_what_is_finished(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--smoke", "--folder", str(tmp_path), "--arms"]
    names = ["tuned/routed", "tuned/math", "tuned/code", "tuned/code-own"]
    answer = subprocess.run([*command, ",".join(names)], capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    found = {row["arm"]: row for row in map(json.loads, answer.stdout.splitlines())}
    assert list(found) == names
    # The same student, prompts and noise: a route changes who scores a row and nothing else.
    for task in ("math", "code"):
        key, other = f"{task} teacher_logprob", "tuned/code" if task == "math" else "tuned/math"
        own = pytest.approx(found[f"tuned/{task}"][key], rel=1e-7)
        assert found["tuned/routed"][key] == own
        assert found[other][key] != own
    assert "math teacher_logprob" not in found["tuned/code-own"]
    assert "tuned/routed against tuned/code" in (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert [row["arm"] for row in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["arms"]] == names
    checkpoints = sorted(tmp_path.rglob("checkpoints/round-000/model.safetensors"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    again = subprocess.run([*command, ",".join(names)], capture_output=True, text=True, timeout=300, check=False)
    assert again.stdout == answer.stdout
    assert [path.stat().st_mtime_ns for path in checkpoints] == times
