"""What people see cannot steer their terminal, and no digit of a table is lost in a narrow one."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from fire_data.cli.errors import say
from fire_data.cli.inspect import _coloured, show_trajectory
from fire_data.cli.terminal import Terminal, show, show_one
from fire_data.tokenview import Piece

EVIL = "a\x1b[2Jb\x07 \u202e :fire: [bold]x[/bold]"
SHOWN = r"a\x1b[2Jb\x07 \u202e :fire: [bold]x[/bold]"
ROUNDS: list[dict[str, Any]] = [
    {"arm": "uniform", "round": r, "greedy": 0.1234 + r, "avg@4": 0.5, "pass@4": 1.0, "length": 103.4,
     "tokens": 10**13 + r, "last_token_advantage": -1.2e-7, "kept": None,
     "rule": "fire-paper with a long name of several words"}
    for r in range(3)
]  # fmt: skip


@pytest.fixture(autouse=True, params=[40, 80])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def test_texts_of_others_are_printed_as_they_are_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(f"error: {EVIL}\n  fix:   x")
    terminal = Terminal()
    terminal.note(f"{EVIL}\nsecond")
    terminal.warn(EVIL)
    show_one({"value": EVIL, "list": [EVIL], "dict": {EVIL: EVIL}}, False)
    _coloured([Piece(EVIL, 0, 1)], [1.0])
    out, err = capsys.readouterr()
    assert err == f"error: {SHOWN}\n  fix:   x\n{SHOWN}\nsecond\nwarning: {SHOWN}\n"
    assert out.splitlines()[:4] == [f"value  {SHOWN}", f"list   {SHOWN}", f"dict   {SHOWN}={SHOWN}", SHOWN]
    show([{"text": EVIL}], False, title=EVIL)
    out = "".join(capsys.readouterr().out.split())
    assert out == "".join([SHOWN, "text", SHOWN]).replace(" ", "")


def test_messages_of_a_trajectory_have_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"trajectory_id": EVIL, "messages": [{"role": EVIL, "content": "x\n" + EVIL}], "response_ids": [1]}
    monkeypatch.setattr("fire_data.tokenview.trajectory", lambda *_: row)
    monkeypatch.setattr("fire_data.tokenview.pieces", lambda *_: [Piece(EVIL, 0, 1)])
    monkeypatch.setattr("fire_data.models.load_tokenizer", lambda *_: None)
    show_trajectory(Mock(), 0, "0", None, False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"trajectory_id  {SHOWN}", rf"{SHOWN}: x\n{SHOWN}", SHOWN]
    assert all(line.isprintable() for line in lines)


def test_a_response_without_a_tokenizer_is_as_it_is_stored_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"messages": [], "response": EVIL, "response_ids": [7, 8], "weight": [0.25, 1.0]}
    monkeypatch.setattr("fire_data.tokenview.trajectory", lambda *_: row)
    monkeypatch.setattr("fire_data.tokenview.student_tokenizer", lambda _: (None, f"there is no {EVIL}"))
    show_trajectory(Mock(), 0, "0", None, False)
    out, err = capsys.readouterr()
    assert err == f"tokens are shown without their text: there is no {SHOWN}\n"
    assert out.splitlines()[0] == SHOWN
    assert [line.split() for line in out.splitlines()[2:]] == [["0", "7", "0.250"], ["1", "8", "1.000"]]


def test_no_column_and_no_digit_is_cropped(capsys: pytest.CaptureFixture[str]) -> None:
    show(ROUNDS, False, title="t" * 100)
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines if not set(line.strip()) <= {"t"}]
    assert words[0] == list(ROUNDS[0])
    starts = [row for row in words if row[0] == "uniform"]
    for row, line in zip(ROUNDS, starts, strict=True):
        assert line[1:9] == [
            str(row["round"]), f"{row['greedy']:.4g}", "0.5", "1", "103.4", str(row["tokens"]), "-1.2e-07", "-"
        ]  # fmt: skip
    assert "".join(w for row in words[1:] for w in row).count("several") == 3


def test_headers_of_numbers_break_between_words_only(capsys: pytest.CaptureFixture[str]) -> None:
    show([{"": 7, "token": "x" * 50, "rank T": 1, "logp S": "-0.100", "H S": "1.250", "advantage": "+0.000"}], False)
    lines = capsys.readouterr().out.splitlines()
    assert {word for line in lines for word in line.split()} >= {"rank", "T", "logp", "H", "advantage", "-0.100", "7"}
    assert "".join(lines).count("x") == 50


def test_texts_fold_and_the_table_fits_while_there_is_room(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    show([{"name": "n" * 30, "what": "w" * 100, "count": 12345}], False)
    out = capsys.readouterr().out
    assert (out.count("n"), out.count("w")) == (30 + 2, 100 + 1)
    assert max(map(len, out.splitlines())) <= max(columns, 16 + 2 + 16 + 2 + 5)
