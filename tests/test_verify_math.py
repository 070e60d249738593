"""Maths answers: what counts as the same answer however it is written, what does not, and what never ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fire_data.schemas.config import VerifyConfig
from fire_data.verify import Verifier
from fire_data.verify.answers import last_boxed

pytest.importorskip("math_verify")

# Response, right answer. What is not in \boxed is found by what is said around it.
SAME = [
    # fractions, decimals, percent
    (r"The answer is $\frac{1}{2}$.", "0.5"),
    (r"\boxed{\frac{3}{4}}", r"\frac{6}{8}"),
    (r"\boxed{0.75}", "3/4"),
    (r"\boxed{1\frac{1}{2}}", r"\frac{3}{2}"),
    (r"\boxed{\frac13}", r"\frac{1}{3}"),
    (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}"),
    (r"\boxed{.5}", "0.5"),
    (r"\boxed{\frac{2}{3}}", "0.6666667"),
    (r"\boxed{1/3+1/6}", "1/2"),
    (r"\boxed{25\%}", "0.25"),
    (r"\boxed{25\%}", "25"),
    ("So it is 25%.", r"25\%"),
    (r"\boxed{50\text{ percent}}", "50%"),
    # whole numbers, separators, scientific notation
    ("The total is \\boxed{1,234}", "1234"),
    (r"\boxed{10{,}000}", "10000"),
    (r"\boxed{10\,000}", "10000"),
    (r"\boxed{007}", "7"),
    (r"\boxed{42.0}", "42"),
    (r"\boxed{3 \times 10^8}", "300000000"),
    (r"\boxed{3\cdot 10^{-3}}", "0.003"),
    (r"\boxed{6.02e23}", r"6.02 \times 10^{23}"),
    # surds, powers, functions, angles
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{\sqrt{2}}{2}"),
    (r"\boxed{11\sqrt2}", r"11\sqrt{2}"),
    (r"\boxed{2^{10}}", "1024"),
    (r"\boxed{\sqrt[3]{27}}", "3"),
    (r"\boxed{\log_2 8}", "3"),
    (r"\boxed{\ln e^2}", "2"),
    (r"\boxed{\sin(\pi/6)}", r"\frac{1}{2}"),
    (r"\boxed{\frac{3}{4}\pi}", r"\frac{3\pi}{4}"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{\binom{5}{2}}", "10"),
    # complex numbers, infinity
    (r"\boxed{3+4i}", "4i+3"),
    (r"\boxed{\infty}", r"\infty"),
    # intervals, inequalities
    (r"\boxed{[0,1)}", "[0, 1)"),
    (r"\boxed{(-\infty, 0) \cup (1, \infty)}", r"(1,\infty)\cup(-\infty,0)"),
    (r"\boxed{0 \le x < 1}", "[0,1)"),
    (r"\boxed{x > 3}", r"(3,\infty)"),
    (r"\boxed{3<x}", "x>3"),
    (r"\boxed{x \in [1,2]}", "[1,2]"),
    # sets, tuples, several values
    (r"\boxed{\{1,2,3\}}", r"\{3,1,2\}"),
    (r"\boxed{1, 2}", r"\{1,2\}"),
    (r"\boxed{2, 1}", "1, 2"),
    (r"\boxed{(\frac12, 3)}", "(0.5,3)"),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{x=2 \text{ or } x=-3}", "-3,2"),
    ("The final answer is $x=2$ or $x=3$.", "2,3"),
    (r"\boxed{4 \text{ and } 6}", "4, 6"),
    # equations, expressions
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{y = 2x + 1}", "y=1+2x"),
    (r"\boxed{2x - y + 1 = 0}", "y=2x+1"),
    (r"\boxed{f(x)=x^2}", "x^2"),
    (r"\boxed{(x-1)(x+1)}", "x^2-1"),
    (r"\boxed{x(x+2)+1}", "(x+1)^2"),
    (r"\boxed{\frac{x^2-1}{x-1}}", "x+1"),
    (r"\boxed{\sin^2 x + \cos^2 x}", "1"),
    (r"\boxed{\frac{\sqrt{a^{2}+b^{2}}}{2}}", r"\frac12\sqrt{a^2+b^2}"),
    ("x^2-1", "(x-1)(x+1)"),
    # matrices
    (r"\boxed{\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    # units, money
    (r"\boxed{5 \text{ cm}}", "5"),
    (r"\boxed{5\,\mathrm{km}}", "5"),
    (r"\boxed{12 apples}", "12"),
    (r"\boxed{\$18}", "18"),
    ("So she pays 12.50 dollars.", "12.5"),
    ("The answer is 3/4 of a cup.", "3/4"),
    # words
    (r"\boxed{\text{Tuesday}}", "tuesday"),
    ("The answer is Paris.", "Paris"),
    ("Paris", "paris"),
    (r"\boxed{\text{(B)}}", r"\text{(B)}"),
    # where the answer is
    (r"First \boxed{3}, no, finally \boxed{4}.", "4"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"$$\boxed{x^{2}}$$", "x^2"),
    ("We get 3 apples and 4 pears. The final answer is 7.", "7"),
    ("Working ...\n#### 1,234", "1234"),
    ("The answer is **18**.", "18"),
    (r"\(\boxed{5}\)", "$5$"),
    (r"\boxed{p - q}", r"\boxed{p-q}"),
]
DIFFERENT = [
    (r"\boxed{3.14}", r"\pi"),
    (r"\boxed{\frac{22}{7}}", r"\pi"),
    (r"\boxed{0.333}", r"\frac13"),
    (r"\boxed{\frac{1}{2}}", r"-\frac{1}{2}"),
    (r"\boxed{7/8}", "8/7"),
    (r"\boxed{5\%}", "0.5"),
    (r"\boxed{1234}", "1243"),
    (r"\boxed{42}", "-42"),
    (r"\boxed{100000001}", "100000000"),
    (r"\boxed{0.50001}", "0.5"),
    (r"\boxed{3 \times 10^{8}}", r"3 \times 10^{7}"),
    (r"\boxed{1.6 \times 10^{-19}}", r"9.1 \times 10^{-31}"),
    (r"\boxed{0.000000003}", "0.000000004"),
    (r"\boxed{\sqrt{3}}", r"\sqrt{5}"),
    (r"\boxed{1.4142}", r"\sqrt2"),
    (r"\boxed{3-4i}", "3+4i"),
    (r"\boxed{-\infty}", r"\infty"),
    (r"\boxed{[0, 1]}", "[0,1)"),
    (r"\boxed{1 \le x \le 2}", "(1,2)"),
    (r"\boxed{x\geq 3}", "x>3"),
    (r"\boxed{x<3}", "x>3"),
    (r"\boxed{\{1,2\}}", r"\{1,2,3\}"),
    (r"\boxed{(1,2)}", "(2,1)"),
    (r"\boxed{-3}", "2,-3"),
    (r"\boxed{y = 2x - 1}", "y=2x+1"),
    (r"\boxed{x^2+1}", "x^2-1"),
    (r"\boxed{a-b}", "b-a"),
    (r"\boxed{\pi r^2}", r"2\pi r"),
    (r"\boxed{\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    (r"\boxed{6 \text{ cm}}", "5"),
    (r"\boxed{\text{Monday}}", "Tuesday"),
    ("Sirap", "Paris"),  # the same letters
    (r"\boxed{2:3}", "3:2"),
    (r"\boxed{1101_2}", "1011_2"),
    (r"First \boxed{3}, no, finally \boxed{4}.", "3"),
    ("I do not know.", "5"),
]


def graded(pairs: list[tuple[str, str]], **settings: object) -> list[tuple[float | None, str, str | None, str | None]]:
    texts, answers = [r for r, _ in pairs], [a for _, a in pairs]
    with Verifier(VerifyConfig(kind="math", workers=2, **settings), Path()) as verifier:  # type: ignore[arg-type]
        return [tuple(g) for g in verifier.grade(texts, answers, [None] * len(pairs))]  # type: ignore[misc]


def test_equal_answers_are_right_however_they_are_written_and_near_misses_are_wrong() -> None:
    assert len(SAME) >= 60
    found = graded([*SAME, *DIFFERENT])
    wrong = [pair for pair, g in zip(SAME, found, strict=False) if g[0] != 1.0]
    assert wrong == []
    right = [pair for pair, g in zip(DIFFERENT, found[len(SAME) :], strict=True) if g[0] != 0.0]
    assert right == []


def test_a_response_without_an_answer_says_so_and_does_not_vote() -> None:
    found = graded([("", "5"), (r"\boxed{}", "5"), ("no idea at all, honestly, this one is far too hard", "5")])
    assert [g[1:] for g in found] == [("no answer", None, None)] * 3


def test_numbers_vote_by_their_value_and_everything_else_by_its_text() -> None:
    texts = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{\frac{2}{4}}", r"\boxed{X + 1}", r"\boxed{ x+1 }"]
    votes = [g[3] for g in graded([(text, "7") for text in texts])]
    assert votes[0] == votes[1] == votes[2]
    assert votes[3] != votes[4]
    assert votes[0] not in votes[3:]


def test_the_pattern_picks_the_answer_that_is_compared() -> None:
    pairs = [("so <a>1/2</a> and not \\boxed{3}", "0.5"), ("no tag, \\boxed{0.5}", "0.5")]
    found = graded(pairs, pattern="<a>(.*?)</a>")
    assert [g[1] for g in found] == ["right", "no answer"]


def test_a_comparison_that_never_ends_is_killed_and_the_others_are_graded() -> None:
    endless = (r"\boxed{10^{10^{10}}}", "5")  # sympy computes it, in native code that hears no signal
    fine = (r"\boxed{\frac{1}{2}}", "0.5")
    found = graded([fine, endless, fine, fine], timeout_s=2.0)
    assert [g[1] for g in found] == ["right", "timeout", "right", "right"]
    assert found[1][0] == 0.0


def test_a_comparison_that_takes_all_memory_ends_alone() -> None:
    hungry = (r"\boxed{(1+x)^{1000000}}", "x^{2000000}+1")
    fine = (r"\boxed{\frac{1}{2}}", "0.5")
    found = graded([fine, hungry, fine], timeout_s=5.0, memory_mb=64)
    assert [g[0] for g in found] == [1.0, 0.0, 1.0]


def test_the_command_itself_never_imports_math_verify() -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom fire_data.schemas.config import VerifyConfig\n"
        "from fire_data.verify import Verifier\n"
        "with Verifier(VerifyConfig(kind='math', workers=1), Path()) as v:\n"
        "    assert v.grade([r'\\boxed{1/2}'], ['0.5'], [None])[0].reward == 1.0\n"
        "    assert v.recorded['math-verify']\n"
        "print({'math_verify', 'sympy', 'polars', 'torch'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{a{b}c} then \boxed{d", "a{b}c"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{3} \boxed {4}", "4"),
        ("none", None),
    ],
)
def test_the_last_box_with_balanced_braces_is_found(text: str, found: str | None) -> None:
    assert last_boxed(text) == found
