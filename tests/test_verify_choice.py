"""Multiple choice: the letter is found in every form people and models write it, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fire_data.schemas.config import VerifyConfig
from fire_data.schemas.errors import DataError
from fire_data.verify import Verifier
from fire_data.verify.choice import chosen, gold


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # boxed wins over everything
        (r"The answer is A. So \boxed{B}.", "B"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{(D)}", "D"),
        (r"\boxed{\textbf{(e)}}", "E"),
        (r"\boxed{b}", "B"),
        (r"First \boxed{A}, then \boxed{D}", "D"),
        # said
        ("The answer is (B).", "B"),
        ("the answer is (b)", "B"),
        ("Answer: C", "C"),
        ("**Answer:** **D**", "D"),
        ("ANSWER: E", "E"),
        ("The correct option is B because it is", "B"),
        ("I choose C", "C"),
        ("the correct answer is option A.", "A"),
        ("The answer is A. Wait, the answer is D.", "D"),
        ("The answer would be $C$", "C"),
        ("The answer is b.", "B"),
        # on a line of its own
        ("B", "B"),
        ("(b)", "B"),
        ("Some thoughts.\n**C**\n", "C"),
        ("A\n\nno, rather\n\nD.", "D"),
        ("B) Paris", "B"),
        ("Thinking it over.\n(C) Rome", "C"),
        # in brackets anywhere, the last
        ("Between (A) and (C), the second", "C"),
        # no choice
        ("A dog is an animal", None),
        ("The answer is a dog", None),
        ("The answer is Berlin", None),
        ("the answer is not B", None),
        ("Answer: I don't know", None),
        ("E-mail me", None),
        (r"\boxed{42}", None),
        ("", None),
    ],
)
def test_the_letter_that_was_chosen(text: str, letter: str | None) -> None:
    assert chosen(text) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("(b)", "B"), (" c. ", "C"), ("D) Paris", "D"), ("Berlin", None), ("A dog", None), ("F", None)],
)
def test_the_right_letter_is_read_from_the_prompt(answer: str, letter: str | None) -> None:
    assert gold(answer) == letter


def test_choices_are_graded_and_vote_by_their_letter() -> None:
    with Verifier(VerifyConfig(kind="choice"), Path()) as verifier:
        found = verifier.grade(["the answer is (b)", r"\boxed{C}", "hm"], ["B) x", "B", "B"], [None] * 3)
        assert [(g.reward, g.verdict, g.vote) for g in found] == [
            (1.0, "right", "B"), (0.0, "wrong", "C"), (0.0, "no answer", None),
        ]  # fmt: skip
        with pytest.raises(DataError, match="prompt 'q' has the answer '12', which is none of the letters A to E"):
            verifier.check([{"prompt_id": "q", "answer": "12", "extra": None}], "p.jsonl", "correct it")


def test_a_long_response_of_openers_takes_no_time() -> None:
    text = "(" * 200_000 + "answer is " * 20_000 + "\\boxed{" * 20_000
    assert chosen(text) is None
