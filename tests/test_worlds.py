"""The worlds of experiments: tasks are what they say, parts are shared, and a lost teacher is lost exactly there."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

# After the skip, because the modules need it.
from fire_data import verify  # noqa: E402
from fire_data.models import head_of, hidden_states, load_model  # noqa: E402
from fire_data.schemas.config import ModelConfig  # noqa: E402
from fire_data.schemas.errors import EngineError  # noqa: E402
from fire_data.worlds import addition, arithmetic, build, lost, registry, successor  # noqa: E402
from fire_data.worlds.registry import PARTS, TASKS, WORLDS  # noqa: E402
from fire_data.worlds.world import Sizes, make_tokenizer, new_model, save  # noqa: E402


def answer_of(response: str) -> str | None:
    return verify.extract(response, verify.compile_pattern(registry.ANSWER_PATTERN))


def test_sums_are_pythons_and_every_clause_is_a_step_of_them() -> None:
    rng = random.Random(1)
    for _ in range(300):
        problem = addition.make_problem(rng)
        left, right = (int(side.replace(" ", "")) for side in problem.split("+"))
        text = addition.solution(problem, rng)
        assert answer_of(text) == addition.truth(problem) == " ".join(f"{left + right:04d}")
        for clause in text.removeprefix("| ").split("#")[0].split(" ;")[:-1]:
            _link, a, _, b, _, carry, _, digit, _, over = clause.split()
            assert int(a) + int(b) + int(carry) == int(over) * 10 + int(digit)
    assert answer_of(addition.solution("9 9 9 + 9 9 9", rng, misread=1.0)) == "0 8 8 8", "no carry is carried"


def test_successors_are_those_of_the_digits() -> None:
    assert successor.truth("succ : 3 1 4 1 5 9 2 9") == "4 2 5 2 6 0 3 0"
    problem = successor.make_problem(random.Random(0))
    assert answer_of(successor.solution(problem, random.Random(0))) == successor.truth(problem)


@pytest.mark.parametrize("task", ["chain", "addition", "lists"])
def test_weak_texts_are_mostly_wrong_and_keep_the_vocabulary(task: str) -> None:
    kind: Any = TASKS[task]
    rng = random.Random(2)
    problems = [kind.make_problem(rng) for _ in range(500)]
    texts = [kind.corrupted_solution(p, rng) for p in problems]
    wrong = sum(answer_of(text) != kind.truth(p) for p, text in zip(problems, texts, strict=True))
    assert 0.4 < wrong / 500 < 0.95
    assert {word for text in texts for word in text.split()} <= {*build.WORDS}
    assert all(text.count("#") == 1 for text in texts)


@pytest.mark.parametrize("task", ["chain", "addition", "lists"])
def test_a_loop_repeats_the_last_words_of_a_right_beginning(task: str) -> None:
    kind: Any = TASKS[task]
    loops = arithmetic.Corruption(misread=0.0, derail=1.0, derail_words=(40, 70), loops=True)
    periods = Counter()
    for seed in range(200):
        rng = random.Random(seed)
        words = kind.corrupted_solution(kind.make_problem(rng), rng, loops).split()
        body = words[: words.index("#")]
        period = next(p for p in range(1, 5) if all(a == b for a, b in zip(body[-40:], body[-40 - p :], strict=False)))
        periods[period] += 1
        assert len(body) >= 41
    assert len(periods) == 4, periods


def test_every_world_names_parts_and_tasks_that_exist_and_is_explained() -> None:
    for name, world in WORLDS.items():
        assert {*world.prompts, *world.main, *world.retain} <= {*TASKS}, name
        assert sum(world.prompts.values()) == pytest.approx(1.0)
        for chosen in world.teachers.values():
            assert {world.student, *(chosen.values() if isinstance(chosen, dict) else [chosen])} <= {*PARTS}, name
        assert not any(task in PARTS[t].texts for task in world.retain for t in _teachers(name)), "teachers know it"
        assert all(task in PARTS[world.student].texts for task in world.retain), "the student does not"
    page = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in WORLDS)


def _teachers(world: str) -> list[str]:
    chosen = WORLDS[world].teachers.values()
    return [part for c in chosen for part in (c.values() if isinstance(c, dict) else [c])]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same parts with hardly any training, and few prompts."""
    for name, part in PARTS.items():
        monkeypatch.setitem(PARTS, name, dataclasses.replace(part, steps=2, hidden=16, layers=1))
    monkeypatch.setattr(build, "PROMPTS", 60)
    monkeypatch.setattr(build, "MAIN", 12)
    monkeypatch.setattr(build, "RETAIN", 6)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def problems_of(path: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in rows(path)]


def test_worlds_of_a_seed_share_their_parts_and_are_not_built_twice(tmp_path: Path, tiny: None) -> None:
    first = build.build(tmp_path, "chain", "single", 0)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    second = build.build(tmp_path, "unknown-10", "single", 0)
    assert (first.student, first.teachers) == (second.student, second.teachers)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before
    assert problems_of(first.main) == problems_of(second.main)
    assert not {*problems_of(first.main)} & {*problems_of(first.prompts)}
    shares = Counter(row["teacher"] for row in rows(second.prompts))
    assert shares == {"chain": 54, "successor": 6}
    assert all(TASKS[r["teacher"]].truth(r["messages"][0]["content"]) == r["answer"] for r in rows(second.prompts))


def test_no_model_is_trained_on_a_problem_of_the_pools(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(successor, "LENGTH", 2)  # a hundred problems: many draws fall into the pool of 72
    drawn: list[str] = []
    real = build.fit

    def spy(model: Any, tokenizer: Any, draw: Any, *rest: Any) -> None:
        drawn.extend(draw()[0] for _ in range(200))
        real(model, tokenizer, draw, *rest)

    monkeypatch.setattr(build, "fit", spy)
    made = build.build(tmp_path, "unknown-25", "single", 0)
    pool = {*build._pool("successor", 0)}
    assert len(pool) == 72
    assert any(problem.startswith("succ") for problem in drawn)
    assert not {*drawn} & ({*problems_of(made.prompts)} | pool)


def test_noisy_prompts_differ_in_two_words_and_keep_the_answer(tmp_path: Path, tiny: None) -> None:
    clean, noisy = (build.build(tmp_path, name, "single", 0) for name in ("chain", "noisy"))
    asked = {row["answer"]: row for row in rows(clean.prompts)}
    assert asked
    known = {*problems_of(clean.prompts)}
    changed = [text for text in problems_of(noisy.prompts) if text not in known]
    assert 8 < len(changed) < 32
    for text in changed:
        nearest = min(sum(a != b for a, b in zip(text.split(), k.split(), strict=True)) for k in known)
        assert nearest == 2


def test_prompts_of_two_tasks_name_the_teacher_of_theirs(tmp_path: Path, tiny: None) -> None:
    made = build.build(tmp_path, "two-tasks", "multi", 0)
    assert {*made.teachers} == {"chain", "lists"} == {row["teacher"] for row in rows(made.prompts)}


@pytest.fixture
def lost_pair(tmp_path: Path) -> tuple[Any, Any, Any]:
    """A random model, its lost twin as loaded from its folder, and the tokenizer of both."""
    tokenizer = make_tokenizer(build.WORDS)
    model = new_model(tokenizer, Sizes(hidden=16, heads=2, intermediate=16), 0)
    save(model, tokenizer, tmp_path / "own")
    lost.wrap(tmp_path / "own", tmp_path / "lost", tokenizer, "chain")
    twin = load_model(ModelConfig(model=str(tmp_path / "lost"), trust_remote_code=True), tmp_path)
    return model.eval(), twin, tokenizer


def distributions(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        tokens = torch.tensor([ids])
        return head_of(model)(hidden_states(model, tokens, torch.ones_like(tokens)))[0].softmax(-1)


def test_a_lost_teacher_is_itself_until_the_first_wrong_word_and_then_lost(lost_pair: tuple[Any, Any, Any]) -> None:
    own, twin, tokenizer = lost_pair
    prompt = "<user> 3 * 2 - 4 + 5 * 6 <assistant>"
    right = "| hence 3 * 2 = 6 ; ok 6 - 4 = 2 ; so 2 + 5 = 0 ; so 0 * 6 = 0 ; # 0 <eos>"
    wrong = right.replace("6 - 4 = 2 ;", "6 - 4 = 3 ;")
    differs = [a != b for a, b in zip(right.split(), wrong.split(), strict=True)]
    at = len(prompt.split()) + differs.index(True)
    junk = [i for i, word in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if word in lost.JUNK]
    others = [i for i in range(len(tokenizer)) if i not in junk]
    for text, first in ((right, None), (wrong, at)):
        ids = tokenizer(f"{prompt} {text}", add_special_tokens=False)["input_ids"]
        plain, told = distributions(own, ids), distributions(twin, ids)
        torch.testing.assert_close(told[:first], plain[:first])
        if first is None:
            continue
        assert tokenizer.convert_ids_to_tokens(ids[first]) == "3", "the mistake itself is judged by a clear head"
        after = told[first:]
        torch.testing.assert_close(after[:, junk], torch.full_like(after[:, junk], 0.9 / 16))
        share = plain[first:, others] / plain[first:, others].sum(-1, keepdim=True)
        torch.testing.assert_close(after[:, others], 0.1 * share)


def test_a_lost_teacher_scores_and_refuses_to_write(lost_pair: tuple[Any, Any, Any]) -> None:
    _, twin, tokenizer = lost_pair
    ids = torch.tensor([tokenizer("<user> 3 * 2 <assistant>", add_special_tokens=False)["input_ids"]])
    with pytest.raises(EngineError, match="scores and does not write"):
        twin.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
