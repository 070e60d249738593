"""The demo's world: the task is what it says, and the written folders are ordinary Hugging Face folders."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import jinja2
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# After the skips, because the module needs both libraries.
from fire_data import verify  # noqa: E402
from fire_data.schemas.errors import ConfigError  # noqa: E402
from fire_data.worlds import arithmetic as tasks  # noqa: E402
from fire_data.worlds import world  # noqa: E402

TINY = world.Sizes(hidden=16, heads=2, intermediate=16, batch=4, teacher_steps=2, student_steps=2)


def build(folder: Path, seed: int = 0) -> world.World:
    return world.build_world(folder, seed=seed, prompts=24, held_out=8, sizes=TINY)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> world.World:
    return build(tmp_path_factory.mktemp("world"))


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_of(response: str) -> str | None:
    return verify.extract(response, verify.compile_pattern(tasks.ANSWER_PATTERN))


def left_to_right(problem: str) -> str:
    """An evaluation that shares nothing with the module: Python's, with brackets for the order."""
    first, *rest = re.findall(r"[+*-] \d|\d", problem)
    expression = first
    for step in rest:
        expression = f"({expression} {step})"
    return str(eval(expression) % 7)  # noqa: S307  (a string of digits and operators that this test made)


def test_truth_and_clean_solutions_agree_with_an_independent_evaluation() -> None:
    rng = random.Random(1)
    for _ in range(300):
        problem = tasks.make_problem(rng)
        assert tasks.truth(problem) == left_to_right(problem)
        solution = tasks.solution(problem, rng)
        assert answer_of(solution) == left_to_right(problem)
        for left, step, result in re.findall(r"(\d) ([+*-] \d) = (\d) ;", solution):
            assert left_to_right(f"{left} {step}") == result


def test_the_answer_regex_takes_only_an_answer_that_ends_the_response() -> None:
    assert answer_of("| so 1 + 1 = 2 ; # 2") == "2"
    assert answer_of("| so 1 + 1 = 2 ; # 2 so") is None
    assert answer_of("| so 1 + 1 = 2 ;") is None


def test_corruption_changes_a_large_share_of_answers_and_derails_some() -> None:
    rng = random.Random(2)
    problems = [tasks.make_problem(rng) for _ in range(1000)]
    texts = [tasks.corrupted_solution(problem, rng) for problem in problems]
    pairs = list(zip(problems, texts, strict=True))
    wrong = sum(answer_of(text) != tasks.truth(problem) for problem, text in pairs)
    clean_length = len(tasks.solution(problems[0], rng).split())
    assert 0.5 < wrong / 1000 < 0.9
    assert 0.05 < sum(len(text.split()) != clean_length for text in texts) / 1000 < 0.3
    assert all(text.count(tasks.ANSWER_MARK) == 1 for text in texts)


def test_without_corruption_a_corrupted_solution_is_the_clean_one() -> None:
    for seed in range(20):
        problem = tasks.make_problem(random.Random(seed))
        none = tasks.Corruption(misread=0.0, derail=0.0)
        text = tasks.corrupted_solution(problem, random.Random(seed), none)
        assert answer_of(text) == tasks.truth(problem)


def test_prompts_and_held_out_are_disjoint_and_carry_true_answers(built: world.World) -> None:
    prompts, held_out = rows(built.prompts), rows(built.held_out)
    assert (len(prompts), len(held_out)) == (24, 8)
    everything = prompts + held_out
    contents = [row["messages"][0]["content"] for row in everything]  # type: ignore[index]
    assert len(set(contents)) == len({row["prompt_id"] for row in everything}) == 32
    assert [row["answer"] for row in everything] == [left_to_right(content) for content in contents]


def test_the_saved_tokenizer_knows_every_word_and_round_trips(built: world.World) -> None:
    for folder in (built.teacher, built.student):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = " ".join(tasks.WORDS)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(set(ids)) == len(tasks.WORDS)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        assert len({tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 3


def test_the_chat_template_renders_what_the_models_were_trained_on(built: world.World) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(built.teacher)
    user = {"role": "user", "content": "3 * 2 - 4 + 5 * 6"}
    text = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert text == "<user> 3 * 2 - 4 + 5 * 6 <assistant>"
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    response = tasks.solution(user["content"], random.Random(0))
    trained_B_T, labels_B_T = world._batch([(user["content"], response)], tokenizer)
    assert trained_B_T[0, : len(ids)].tolist() == ids
    assert tokenizer.decode(labels_B_T[0, len(ids) :]) == f"{response} <eos>"
    assert (labels_B_T[0, : len(ids)] == world.IGNORED).all()
    answered = [user, {"role": "assistant", "content": response}]
    whole = tokenizer.apply_chat_template(answered, return_dict=False)
    assert whole == trained_B_T[0].tolist()


def test_a_system_message_is_refused_by_the_template(built: world.World) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(built.teacher)
    with pytest.raises(jinja2.TemplateError, match="only the roles"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be brief"}], tokenize=False)


def test_model_folders_load_and_stop_at_the_end_token(built: world.World) -> None:
    for folder in (built.teacher, built.student):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_a_call_after_an_interruption_builds_only_what_is_missing(built: world.World, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built.teacher.parent, copy)
    shutil.rmtree(copy / "student")
    (copy / ".student.partial").mkdir()  # what a killed call leaves behind
    said: list[str] = []
    again = world.build_world(
        copy, prompts=24, held_out=8, sizes=TINY, report=lambda what, done, total: said.append(what)
    )
    assert set(said) == {"prompts", "student"}
    weights = "model.safetensors"
    assert (again.student / weights).read_bytes() == (built.student / weights).read_bytes()
    assert not (copy / ".student.partial").exists()


def test_building_leaves_the_callers_random_state_and_threads(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(built: world.World, tmp_path: Path) -> None:
    same, other = build(tmp_path / "same"), build(tmp_path / "other", seed=1)
    for name in ("teacher/model.safetensors", "student/model.safetensors", "prompts.jsonl", "held_out.jsonl"):
        bytes_built = (built.teacher.parent / name).read_bytes()
        assert (same.teacher.parent / name).read_bytes() == bytes_built
        assert (other.teacher.parent / name).read_bytes() != bytes_built


def test_a_folder_with_another_world_is_refused(built: world.World) -> None:
    with pytest.raises(ConfigError, match="other arguments"):
        build(built.teacher.parent, seed=1)
