"""Prompts: every form people have them in, every mistake with its line, and a schedule that is a function of a seed."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fire_data.prompts import as_messages, prompts_digest, read_prompts
from fire_data.schedule import round_slots, trajectory_id
from fire_data.schemas.errors import ConfigError, DataError, FireError, StorageError

HELLO = [{"role": "user", "content": "hello"}]


def lines(folder: Path, *rows: Any, name: str = "p.jsonl") -> Path:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def read(folder: Path, *rows: Any, **kwargs: Any) -> list[dict[str, Any]]:
    return read_prompts(lines(folder, *rows).name, folder, **kwargs).to_pylist()


def refused(folder: Path, *rows: Any, **kwargs: Any) -> FireError:
    with pytest.raises(FireError) as caught:
        read(folder, *rows, **kwargs)
    assert caught.value.fix
    return caught.value


def test_messages_and_plain_prompts_are_both_prompts(tmp_path: Path) -> None:
    rows = read(tmp_path, {"messages": HELLO}, {"prompt": "say hello", "messages": None})
    assert rows[0]["messages"] == HELLO
    assert rows[1]["messages"] is None
    assert as_messages(rows[1]) == [{"role": "user", "content": "say hello"}]


def test_fields_that_are_not_ours_are_kept_as_json(tmp_path: Path) -> None:
    source = {"level": 3, "tags": ["a", None], "who": {"né": 1.5}}
    (row,) = read(tmp_path, {"prompt": "x", "answer": "y", "teacher": "t", "prompt_id": "id", **source})
    assert json.loads(row["extra"]) == source
    assert (row["prompt_id"], row["answer"], row["teacher"]) == ("id", "y", "t")
    assert read(tmp_path, {"prompt": "x"})[0]["extra"] is None


@pytest.mark.parametrize(("given_", "kept"), [(7, "7"), (-0.5, "-0.5"), ("07", "07"), (10**40, "1" + "0" * 40)])
def test_a_number_as_answer_or_id_becomes_its_text(tmp_path: Path, given_: Any, kept: str) -> None:
    (row,) = read(tmp_path, {"prompt": "x", "answer": given_, "prompt_id": given_})
    assert row["answer"] == kept
    assert row["prompt_id"] == kept


def test_a_byte_order_mark_crlf_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    plain = read_prompts(lines(tmp_path, {"prompt": "a"}, {"prompt": "b"}).name, tmp_path)
    odd = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \r\n{"prompt": "b"}'
    (tmp_path / "odd.jsonl").write_bytes(odd)
    assert read_prompts("odd.jsonl", tmp_path).equals(plain)


def test_parquet_gives_the_same_table_as_json_lines(tmp_path: Path) -> None:
    rows = [
        {"messages": HELLO, "answer": "1", "level": 1},
        {"messages": [*HELLO, {"role": "assistant", "content": "?"}], "answer": None, "level": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read_prompts("p.parquet", tmp_path).equals(read_prompts(lines(tmp_path, *rows).name, tmp_path))


def test_not_a_number_in_parquet_is_a_missing_value(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b"], "answer": [float("nan"), 2.0], "level": [1.0, float("nan")]})
    pq.write_table(table, tmp_path / "p.parquet")
    first, second = read_prompts("p.parquet", tmp_path).to_pylist()
    assert (first["answer"], first["extra"]) == (None, '{"level": 1.0}')
    assert (second["answer"], second["extra"]) == ("2.0", None)


def test_prompts_without_id_are_named_by_content_and_repeats_get_a_suffix(tmp_path: Path) -> None:
    rows = read(
        tmp_path, {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a", "teacher": "t"},
        {"prompt": "b"}, {"prompt": "a", "answer": "z"},
    )  # fmt: skip
    ids = [r["prompt_id"] for r in rows]
    assert ids[1] == f"{ids[0]}-2"  # the same conversation, however it was written
    assert ids[4] == f"{ids[0]}-3"
    assert len(set(ids)) == 5
    assert ids[0] == read(tmp_path, {"prompt": "a"})[0]["prompt_id"]


def test_a_made_name_never_meets_a_given_one(tmp_path: Path) -> None:
    name = read(tmp_path, {"prompt": "a"})[0]["prompt_id"]
    given_ = [{"prompt": "other", "prompt_id": name}, {"prompt": "third", "prompt_id": f"{name}-2"}]
    ids = [r["prompt_id"] for r in read(tmp_path, {"prompt": "a"}, *given_, {"prompt": "a"})]
    assert ids[1:3] == [name, f"{name}-2"]
    assert len(set(ids)) == 4


def test_an_id_given_twice_is_an_error_that_names_both_places(tmp_path: Path) -> None:
    error = refused(tmp_path, {"prompt": "a", "prompt_id": "x"}, "", {"prompt": "b", "prompt_id": "x"})
    assert f"'x' is given twice, first in {tmp_path / 'p.jsonl'}, line 1" in error.what
    assert error.where == f"{tmp_path / 'p.jsonl'}, line 3"
    assert error.exit_code == 3


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{broken", "not valid JSON"),
        ('{"prompt": "a"', "not valid JSON"),
        ('{"prompt": "a", "x": NaN}', "NaN is not a JSON number"),
        ('{"prompt": "a", "x": 1e999}', "cannot be kept as JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["a"]', "an object, not list"),
        ("17", "an object, not int"),
        ('{"ask": "a"}', "none of `messages`, `prompt`, `problem` and `question`; it has: ask"),
        ('{"question": "a", "problem": "b"}', "both `problem` and `question`"),
        ("{}", "it has: no field"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "both `messages` and `prompt`"),
        ('{"prompt": 3}', "`prompt` must be text, not int"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": "hello"}', "must be a list"),
        ('{"messages": [{"role": "user"}]}', "message 0 needs"),
        ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "message 0 has `name`"),
        ('{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}', "message 1 needs"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "both text"),
        ('{"prompt": "a", "answer": true}', "`answer` must be text or a number, not bool"),
        ('{"prompt": "a", "answer": ["b"]}', "`answer` must be text or a number, not list"),
        ('{"prompt": "a", "prompt_id": {}}', "`prompt_id` must be"),
        ('{"prompt": "\\ud83d"}', "half of a surrogate pair"),
        ('{"prompt": "a", "note": "\\udc00"}', "half of a surrogate pair"),
    ],
)
def test_a_mistake_on_line_17_is_named_with_its_line(tmp_path: Path, row: str, words: str) -> None:
    error = refused(tmp_path, *[{"prompt": f"good {i}"} for i in range(16)], row, {"prompt": "after"})
    assert words in error.what
    assert error.where == f"{tmp_path / 'p.jsonl'}, line 17"
    assert isinstance(error, DataError)


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match="not valid JSON") as caught:
        read_prompts("p.jsonl", tmp_path)
    assert caught.value.where == f"{tmp_path / 'p.jsonl'}, line 2"


def test_an_answer_is_needed_only_where_something_compares_with_it(tmp_path: Path) -> None:
    assert read(tmp_path, {"prompt": "a"})[0]["answer"] is None
    error = refused(tmp_path, {"prompt": "a", "answer": ""}, {"prompt": "b"}, need_answer=True)
    assert "no `answer`" in error.what
    assert error.where == f"{tmp_path / 'p.jsonl'}, line 2"
    assert "rollout.verifier=none" in str(error.fix)


@pytest.mark.parametrize("content", ["", "\n\n", "   \r\n"])
def test_a_file_without_prompts_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DataError, match="no prompt in the file"):
        read_prompts("p.jsonl", tmp_path)


def test_a_missing_file_and_a_folder_are_config_errors(tmp_path: Path) -> None:
    for name, words in (("none.jsonl", "does not exist"), (".", "is a folder")):
        with pytest.raises(ConfigError, match=words) as caught:
            read_prompts(name, tmp_path)
        assert "prompts.path" in str(caught.value.fix)


def test_a_damaged_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_prompts("p.parquet", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_prompts("p.parquet", tmp_path)


@pytest.mark.parametrize("what", ["text", "name", "date"])
def test_parquet_that_holds_what_python_does_not_know_is_a_data_error(tmp_path: Path, what: str) -> None:
    """A format that others write: text that is no UTF-8, and dates before the year 1."""
    bad = pa.array([b"\xff\xfe"]).view(pa.string()) if what == "text" else pa.array(["a"])
    date = pa.array([-(2**31)], pa.int32()).view(pa.date32())
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": bad, "when": date} if what == "date" else {"prompt": bad}), path)
    if what == "name":
        path.write_bytes(path.read_bytes().replace(b"prompt", b"pro\xffpt"))
    with pytest.raises(DataError, match="not a readable Parquet file") as caught:
        read_prompts("p.parquet", tmp_path)
    assert caught.value.fix


def test_the_digest_knows_the_content_and_not_the_order(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "prompt_id": "1"}, {"prompt": "b", "prompt_id": "2"}]

    def digest(*given_: Any) -> str:
        return prompts_digest(read_prompts(lines(tmp_path, *given_).name, tmp_path))

    assert digest(*rows) == digest(*rows[::-1])
    assert digest(*rows) != digest(rows[0])
    assert digest(*rows) != digest(rows[0], {**rows[1], "answer": "3"})


def test_a_hub_path_without_network_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the Hub did not give the prompts") as caught:
        read_prompts("hf://datasets/someone/something/p.jsonl", tmp_path)
    assert caught.value.where == "hf://datasets/someone/something/p.jsonl"
    assert caught.value.fix
    for path in ("hf://datasets/someone", "hf://datasets/someone/something", "hf://datasets/"):
        with pytest.raises(ConfigError, match="names a file"):
            read_prompts(path, tmp_path)


COMMIT = "a" * 40
CONTENT = b'{"prompt": "from the hub", "answer": 3}\n'


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as downloading one file of one data set needs."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        known = self.path == "/datasets/someone/something/resolve/v1/data/p.jsonl"
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(CONTENT) if known else 0))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"0123456789"')
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if body and known:
            self.wfile.write(CONTENT)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_hub_path_is_downloaded_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import sys, pathlib; from fire_data.prompts import read_prompts\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(read_prompts(path, pathlib.Path('.')).to_pylist()[0]['answer'])\n"
        "    except Exception as e: print(type(e).__name__, e.what)\n"
    )
    with hub() as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)  # read when the client is imported: hence a process of its own
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        base = "hf://datasets/someone/something@v1/data"
        done = subprocess.run(
            [sys.executable, "-c", script, f"{base}/p.jsonl", f"{base}/none.jsonl"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert first == "3", done.stderr
    assert second.startswith("DataError the Hub did not give the prompts")


IDS = st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=12, unique=True)


@given(IDS, st.integers(0, 99), st.integers(1, 20), st.integers(1, 6))
def test_every_prompt_comes_exactly_once_per_pass(ids: list[str], seed: int, size: int, rounds: int) -> None:
    stream = [s.row for r in range(rounds) for s in round_slots(ids, seed, r, size)]
    assert len(stream) == size * rounds
    for start in range(0, len(stream) - len(ids) + 1, len(ids)):
        assert sorted(stream[start : start + len(ids)]) == list(range(len(ids)))


@given(IDS, st.integers(0, 99), st.integers(0, 5), st.none() | st.integers(1, 40), st.randoms())
def test_the_order_does_not_depend_on_the_order_of_the_file(
    ids: list[str], seed: int, round_: int, size: int | None, rng: Any
) -> None:
    other = ids[:]
    rng.shuffle(other)
    mine = [(ids[s.row], s.repeat) for s in round_slots(ids, seed, round_, size)]
    assert mine == [(other[s.row], s.repeat) for s in round_slots(other, seed, round_, size)]


@given(IDS, st.integers(0, 9), st.integers(0, 5), st.integers(1, 40), st.integers(1, 3))
def test_sample_numbers_and_names_are_unique_within_a_round(
    ids: list[str], seed: int, round_: int, size: int, n: int
) -> None:
    slots = round_slots(ids, seed, round_, size)
    samples = [(ids[s.row], s.repeat * n + j) for s in slots for j in range(n)]
    assert len(set(samples)) == size * n
    assert len({trajectory_id(seed, round_, p, s) for p, s in samples}) == size * n
    for prompt, count in Counter(p for p, _ in samples).items():
        assert sorted(s for p, s in samples if p == prompt) == list(range(count))


def test_a_round_without_size_is_the_whole_set_in_an_order_of_its_own() -> None:
    ids = [str(i) for i in range(30)]
    rounds = [[s.row for s in round_slots(ids, 0, r, None)] for r in range(3)]
    assert all(sorted(r) == list(range(30)) for r in rounds)
    assert len({tuple(r) for r in rounds}) == 3
    assert rounds[0] != [s.row for s in round_slots(ids, 1, 0, None)]


def test_a_trajectory_has_one_name_in_all_runs_with_its_seed() -> None:
    assert trajectory_id(0, 0, "p", 0) == trajectory_id(0, 0, "p", 0)
    names = {trajectory_id(s, r, p, k) for s in (0, 1) for r in (0, 1) for p in ("a", "b") for k in (0, 1)}
    assert len(names) == 16
    assert all(len(n) == 32 and set(n) <= set("0123456789abcdef") for n in names)
    # Written down: a change of this name would unpair every run made before.
    assert trajectory_id(0, 0, "p", 0) == "c7f49e936d72b281c849f1408b4b606d"


def test_a_disk_that_fails_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')

    def fails(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(StorageError, match="the file system failed"):
        read_prompts("p.jsonl", tmp_path)
