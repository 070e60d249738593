"""A model behind a URL: values are the model's, nothing is lost or asked twice, nothing a server sends is believed."""

from __future__ import annotations

import asyncio
import datetime as dt
import email.utils
import json
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("httpx")
pytest.importorskip("stamina")
torch = pytest.importorskip("torch")


from fire_data.generate import TransformersGenerator  # noqa: E402
from fire_data.http_dialect import Dialect, Malformed, read_scores  # noqa: E402
from fire_data.http_engine import HttpEngine, probe_difference  # noqa: E402
from fire_data.http_probe import Abilities  # noqa: E402
from fire_data.http_words import base_url  # noqa: E402
from fire_data.sampling import Sampling, processed_logprobs  # noqa: E402
from fire_data.schemas.config import HttpConfig  # noqa: E402
from fire_data.schemas.errors import (  # noqa: E402
    ConfigError,
    DataError,
    EngineError,
    PartialError,
    TokenizerError,
)
from fire_data.scoring import TransformersEvaluator  # noqa: E402
from fire_data.vocabulary import Vocabulary  # noqa: E402

from .protocol_server import VOCAB, ProtocolServer, byte_model, byte_tokenizer  # noqa: E402

EVERYTHING = Vocabulary(VOCAB, np.ones(VOCAB, dtype=np.bool_))
STOPS = frozenset({3, 17})  # the server's own end is 0
KEY = "sk-very-secret-0123456789"
Make = Callable[..., HttpEngine]
Body = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return byte_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def server(model: Any, tokenizer: Any) -> Iterator[ProtocolServer]:
    found = ProtocolServer(model, tokenizer)
    found.start()
    yield found
    found.die()


@pytest.fixture
def make(server: ProtocolServer) -> Iterator[Make]:
    """`make(...)`: an engine on the server, with short deadlines. `probed=True`: as if it had been probed already."""
    made: list[HttpEngine] = []

    def engine(
        url: str | None = None, probed: bool = True, vocabulary: Vocabulary = EVERYTHING, **changes: Any
    ) -> HttpEngine:
        limits = {"concurrency": 4, "timeout": 60.0, "deadline": 4.0} | changes.pop("settings", {})
        options: Body = {"model": "tiny", "api_key": None, "stop_ids": STOPS, "entropy_topk": 5, "who": "teacher"}
        options |= changes
        found = HttpEngine(
            url or server.url, options.pop("served_name", None), settings=HttpConfig(**limits),
            vocabulary=vocabulary, **options,
        )  # fmt: skip
        made.append(found)
        if probed:
            dialect = Dialect("prompt_logprobs", found.entropy_topk)
            found._abilities = Abilities("tiny", None, 256, "tokenize", [], dialect, [], "raw", None, None)
        return found

    yield engine
    for engine_made in made:
        engine_made.close()


def rows(count: int = 10, seed: int = 0, longest: int = 6) -> pa.Table:
    """Prompts of 1 to 8 ids and responses of 1 to `longest`."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(1, VOCAB, rng.integers(low, high)).tolist()  # noqa: E731
    ids = pa.list_(pa.int32())
    return pa.table(
        {
            "trajectory_id": [f"t{i}" for i in range(count)],
            "prompt_ids": pa.array([draw(1, 9) for _ in range(count)], ids),
            "response_ids": pa.array([draw(1, longest + 1) for _ in range(count)], ids),
        }
    )


def flat(table: pa.Table, column: str) -> np.ndarray:
    return np.concatenate([np.asarray(v, dtype=np.float64) for v in table[column].to_pylist()])


def expected(model: Any, table: pa.Table) -> pa.Table:
    return TransformersEvaluator(model, EVERYTHING, 2000, 1 << 24).evaluate(table)


def caught(call: Callable[[], Any], kind: type[Exception] = EngineError) -> Any:
    with pytest.raises(kind) as found:
        call()
    return found.value


# Values


@pytest.mark.parametrize(("dialect", "exact"), [("vllm", False), ("echo", False), ("vllm", True)])
def test_scores_are_those_of_the_model_in_this_process(
    server: ProtocolServer, make: Make, model: Any, tokenizer: Any, dialect: str, exact: bool
) -> None:
    server.dialect, server.exact = dialect, exact
    engine = make(probed=False)
    record = engine.probe(tokenizer, 100)
    table = rows(20)
    found, right = engine.evaluate(table), expected(model, table)
    for column in ("logprob", "max_logprob"):
        assert np.abs(flat(found, column) - flat(right, column)).max() < 1e-4, column
    assert found["top1_id"].to_pylist() == right["top1_id"].to_pylist()
    assert ("rank" in found.column_names) is (dialect == "vllm")
    if dialect == "vllm":
        assert found["rank"].to_pylist() == right["rank"].to_pylist()
    assert engine.entropy_kind == record["entropy_kind"] == ("exact" if exact else "topk-lower-bound")
    gap = flat(right, "entropy") - flat(found, "entropy")
    if exact:
        assert "entropy_mass" not in found.column_names
        assert np.abs(gap).max() < 1e-4
        return
    mass = flat(found, "entropy_mass")
    assert (gap > 0.01).all()
    # The tail adds at most what it would if it were spread evenly: r log((V - K) / r); the bound counts -r log(min p).
    assert (gap < (1 - mass) * np.log((VOCAB - 5) / (1 - mass))).all()
    assert (mass > 0.05).all()
    assert (mass < 1).all()


def test_a_longer_list_gives_a_better_bound_and_the_whole_vocabulary_the_entropy(make: Make, model: Any) -> None:
    table = rows(5)
    right, before = flat(expected(model, table), "entropy"), None
    for k in (1, 5, 50, 10 * VOCAB):
        found = make(entropy_topk=k).evaluate(table)
        bound = flat(found, "entropy")
        assert (bound <= right + 1e-4).all()
        assert before is None or (bound >= before - 1e-6).all()
        before = bound
    assert np.abs(before - right).max() < 1e-4
    assert np.abs(flat(found, "entropy_mass") - 1).max() < 1e-5


def test_ranks_count_only_tokens_that_are_strictly_more_likely(server: ProtocolServer, make: Make) -> None:
    def even(answer: Body) -> Body:
        """The first two of every list become equals, as in a model with bfloat16 logits; vLLM then says rank 2."""
        for entry in filter(None, answer["choices"][0]["prompt_logprobs"]):
            best = sorted(entry, key=lambda i: -entry[i]["logprob"])[:2]
            for i in best:
                entry[i] |= {"logprob": -1.0, "rank": 2}
        return answer

    server.mangle = even
    table = rows(1)
    first = int(make(entropy_topk=2).evaluate(table)["top1_id"][0][0].as_py())
    chosen = pa.table({**{c: table[c] for c in ("trajectory_id", "prompt_ids")}, "response_ids": [[first]]})
    assert make(entropy_topk=2).evaluate(chosen)["rank"].to_pylist() == [[1]]


def test_sampled_logprobs_are_those_of_the_model_and_seeds_repeat(
    server: ProtocolServer, make: Make, model: Any, tokenizer: Any
) -> None:
    engine, sampling = make(probed=False), Sampling(7, max_new_tokens=12)
    record = engine.probe(tokenizer, 100, sampling)
    assert (record["logprobs_mode"], record["generates"]) == ("raw", True)
    table = rows(12)
    found = engine.generate(table.select(["trajectory_id", "prompt_ids"]), sampling)
    assert found.column_names == ["response_ids", "rollout_logprob", "finish_reason"]
    answered = table.set_column(2, "response_ids", found["response_ids"])
    right = flat(expected(model, answered), "logprob")
    assert np.abs(flat(found, "rollout_logprob") - right).max() < 1e-4
    assert set(found["finish_reason"].to_pylist()) == {"length", "stop"}
    for ids, reason in zip(found["response_ids"].to_pylist(), found["finish_reason"].to_pylist(), strict=True):
        assert (ids[-1] in STOPS) == (reason == "stop")
        assert reason == "stop" or len(ids) == 12
    server.end = next(ids[1] for ids in found["response_ids"].to_pylist() if len(ids) > 2)
    assert engine.generate(table, sampling).equals(found), "the server's own end is none"
    assert not engine.generate(table, Sampling(8, max_new_tokens=12)).equals(found)
    turned = table.take(list(range(11, -1, -1)))
    assert engine.generate(turned, sampling).equals(found.take(list(range(11, -1, -1))))


def test_greedy_writes_what_the_model_in_this_process_writes(make: Make, model: Any) -> None:
    table, sampling = rows(6), Sampling(0, max_new_tokens=10, greedy=True)
    right = TransformersGenerator(model, EVERYTHING, STOPS, 4).generate(table, sampling)
    found = make().generate(table, sampling)
    assert found["response_ids"].to_pylist() == right["response_ids"].to_pylist()
    assert found["finish_reason"].to_pylist() == right["finish_reason"].to_pylist()
    assert np.abs(flat(found, "rollout_logprob") - flat(right, "rollout_logprob")).max() < 1e-4


@pytest.mark.parametrize("changes", [{"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 5}])
def test_logprobs_of_another_distribution_than_the_sampled_one_are_refused(
    server: ProtocolServer, make: Make, model: Any, tokenizer: Any, changes: dict[str, float]
) -> None:
    sampling = Sampling(3, max_new_tokens=6, **changes)  # type: ignore[arg-type]
    error = caught(lambda: make(probed=False).probe(tokenizer, 100, sampling), ConfigError)
    assert "rollout_logprob would be wrong" in error.what
    assert "--logprobs-mode processed_logprobs" in error.fix
    server.processed = True
    engine = make(probed=False)
    assert engine.probe(tokenizer, 100, sampling)["logprobs_mode"] == "processed"
    table = rows(6)
    found = engine.generate(table, sampling)
    for prompt, ids, logprobs in zip(
        table["prompt_ids"].to_pylist(),
        found["response_ids"].to_pylist(),
        found["rollout_logprob"].to_pylist(),
        strict=True,
    ):
        with torch.inference_mode():
            logits_LV = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        right = processed_logprobs(logits_LV, sampling)[torch.arange(len(ids)), torch.tensor(ids)]
        assert np.abs(right.numpy() - logprobs).max() < 1e-4


def test_responses_with_ids_that_not_all_models_have_are_drawn_again(
    server: ProtocolServer, make: Make, tokenizer: Any
) -> None:
    allowed = np.ones(VOCAB, dtype=np.bool_)
    allowed[::9] = False
    engine = make(vocabulary=Vocabulary(VOCAB, allowed), stop_ids=frozenset({17}))
    found = engine.generate(rows(12), Sampling(1, max_new_tokens=4))
    assert allowed[flat(found, "response_ids").astype(int)].all()
    assert len(server.answered) > 12
    repeated = Counter(tuple(b["prompt"]) for b in server.answered).most_common(1)[0][1]
    assert 2 <= repeated <= 4
    narrow = np.zeros(VOCAB, dtype=np.bool_)
    narrow[:3] = True
    error = caught(
        lambda: make(vocabulary=Vocabulary(VOCAB, narrow)).generate(rows(1), Sampling(1, max_new_tokens=4)), DataError
    )
    assert "row 0 (trajectory t0)" in error.where
    assert "transformers" in error.fix


def test_probable_ids_outside_of_the_vocabulary_are_told_once(make: Make) -> None:
    told: list[str] = []
    allowed = np.zeros(VOCAB, dtype=np.bool_)
    allowed[:10] = True
    make(vocabulary=Vocabulary(VOCAB, allowed), warn=told.append).evaluate(rows(5))
    assert len(told) == 1
    assert "over all its own ids" in told[0]


# The call


def test_rows_keep_their_order_and_empty_responses_need_no_request(
    server: ProtocolServer, make: Make, model: Any
) -> None:
    table = rows(12)
    responses = table["response_ids"].to_pylist()
    responses[3] = responses[7] = []
    table = table.set_column(2, "response_ids", pa.array(responses, pa.list_(pa.int32())))
    told: list[int] = []
    found = make().evaluate(table, told.append)
    assert sum(told) == 12
    assert [len(v) for v in found["logprob"].to_pylist()] == [len(r) for r in responses]
    assert len(server.answered) == 10
    full = [i for i in range(12) if responses[i]]
    right = expected(model, table.take(full))
    assert np.abs(flat(found.take(full), "logprob") - flat(right, "logprob")).max() < 1e-4
    assert make().evaluate(table.slice(0, 0)).num_rows == 0
    types = {f.name: f.type for f in found.schema}
    assert types["logprob"] == types["entropy"] == pa.list_(pa.float32())
    assert types["top1_id"] == types["rank"] == pa.list_(pa.int32())


def test_a_response_without_prompt_is_named_and_nothing_is_sent(server: ProtocolServer, make: Make) -> None:
    table = pa.table({"trajectory_id": ["a", "b"], "prompt_ids": [[1], []], "response_ids": [[2], [3]]})
    assert "row 1 (trajectory b)" in caught(lambda: make().evaluate(table), DataError).where
    assert "row 1 (trajectory b)" in caught(lambda: make().generate(table, Sampling(0)), DataError).where
    assert server.asked == []


def test_two_threads_share_one_bound(server: ProtocolServer, make: Make, model: Any) -> None:
    server.slow = 0.03
    engine, tables, found = make(settings={"concurrency": 3}), [rows(12, seed=s) for s in (1, 2)], {}

    def call(i: int) -> None:
        found[i] = engine.evaluate(tables[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.most == 3
    for i, table in enumerate(tables):
        assert np.abs(flat(found[i], "logprob") - flat(expected(model, table), "logprob")).max() < 1e-4


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C is an exception, also where the tests run in the background of a shell, which has them ignore it."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    if before is not signal.default_int_handler:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_an_interrupt_ends_a_call_at_once_and_its_requests(server: ProtocolServer, make: Make) -> None:
    engine = make()
    server.slow = 5.0
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    began = time.monotonic()
    timer.start()
    table = rows(20)
    with pytest.raises(KeyboardInterrupt):
        engine.evaluate(table)
    assert time.monotonic() - began < 3
    server.slow = 0.0
    assert engine.evaluate(rows(2, seed=1)).num_rows == 2
    both = zip(table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True)
    given_up = [p + r for p, r in both]
    assert sum(body["prompt"] in given_up for _, body in server.asked) <= 4


def test_an_interrupt_before_a_call_has_begun_ends_it_too(
    server: ProtocolServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, real = make(), asyncio.run_coroutine_threadsafe

    def interrupted(*args: Any) -> Any:
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.evaluate(rows(20))
    engine.evaluate(rows(2, seed=1))
    assert len(server.asked) <= 4 + 2


def test_closing_ends_a_call_of_another_thread_and_can_be_repeated(server: ProtocolServer, make: Make) -> None:
    server.slow = 5.0
    engine, errors = make(), []
    thread = threading.Thread(target=lambda: errors.append(caught(lambda: engine.evaluate(rows(3)))))
    thread.start()
    time.sleep(0.1)
    engine.close()
    thread.join(3)
    engine.close()
    assert "was closed" in errors[0].what
    assert "was closed" in caught(lambda: engine.evaluate(rows(1))).what


# Failures that pass


def http_date(seconds: float) -> str:
    return email.utils.format_datetime(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds), usegmt=True)


BURSTS: dict[str, tuple[int, dict[str, str]]] = {
    "429 with seconds": (429, {"Retry-After": "0.2"}),
    "429 with a date": (429, {"Retry-After": http_date(-5)}),
    "429 with nonsense": (429, {"Retry-After": "soon"}),
    "503": (503, {}),
    "502": (502, {}),
    "504": (504, {}),
    "500": (500, {}),
    "408": (408, {}),
    "425": (425, {}),
}


@pytest.mark.parametrize("name", BURSTS)
def test_bursts_of_failures_that_pass_are_retried(server: ProtocolServer, make: Make, name: str) -> None:
    status, headers = BURSTS[name]
    server.replies = [(status, headers, b'{"error": {"message": "later"}}')] * 6
    table = rows(6)
    assert make().evaluate(table).num_rows == 6
    assert len(server.answered) == 6
    assert len([1 for p, _ in server.asked if p == "/v1/completions"]) == 12


def test_retry_after_is_waited_for_and_never_beyond_the_deadline(server: ProtocolServer, make: Make) -> None:
    server.replies = [(429, {"Retry-After": "0.4"}, b"")]
    began = time.monotonic()
    make(settings={"deadline": 1.0}).evaluate(rows(1))
    assert time.monotonic() - began >= 0.4
    server.refuse = lambda _body: (429, {"Retry-After": "3600"}, b'{"error": "quota"}')
    began = time.monotonic()
    error = caught(lambda: make(settings={"deadline": 0.3}).evaluate(rows(1)), PartialError)
    assert time.monotonic() - began < 5
    assert "429" in error.what
    assert "quota" in error.what


def test_broken_and_late_answers_are_asked_for_again(server: ProtocolServer, make: Make) -> None:
    whole = server.mangle
    broken = Counter[tuple[int, ...]]()

    def reset_once(body: Body) -> None:
        broken[tuple(body["prompt"])] += 1
        if broken[tuple(body["prompt"])] == 1:
            raise ConnectionResetError

    server.refuse = reset_once  # type: ignore[assignment]
    assert make().evaluate(rows(5)).num_rows == 5
    assert len(server.answered) == 5

    server.refuse = lambda body: None
    server.mangle, server.slow = whole, 1.0
    engine = make(settings={"timeout": 0.3, "deadline": 30.0})
    threading.Timer(0.4, lambda: setattr(server, "slow", 0.0)).start()
    assert engine.evaluate(rows(2, seed=5)).num_rows == 2


def test_a_server_that_dies_and_comes_back_on_its_port_loses_nothing(
    server: ProtocolServer, make: Make, model: Any
) -> None:
    told: list[str] = []
    server.die_after, server.slow = 9, 0.01
    table = rows(30)
    engine = make(warn=told.append)

    def restart() -> None:
        while server._http is not None:
            time.sleep(0.01)
        time.sleep(0.2)
        server.die_after = None
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    found = engine.evaluate(table)
    thread.join()
    assert np.abs(flat(found, "logprob") - flat(expected(model, table), "logprob")).max() < 1e-4
    assert max(Counter(server.scored()).values()) == 1, "what was answered is not asked again"
    assert any("does not answer" in line for line in told)
    assert any("is back" in line for line in told)


def test_a_server_that_stays_away_stops_everything_and_keeps_what_is_finished(
    server: ProtocolServer, make: Make, model: Any
) -> None:
    server.die_after, server.slow = 7, 0.01
    engine, table, errors = make(settings={"deadline": 0.5}), rows(30), []
    other = threading.Thread(target=lambda: errors.append(caught(lambda: engine.evaluate(rows(30, seed=9)))))
    began = time.monotonic()
    other.start()
    error = caught(lambda: engine.evaluate(table), PartialError)
    other.join()
    assert time.monotonic() - began < 10
    for found in (error, errors[0]):
        assert isinstance(found, PartialError)
        assert server.url in found.what
        assert "same command continues" in found.fix
    assert error.done.num_rows + errors[0].done.num_rows == len(server.answered) == 7
    names = error.done["trajectory_id"].to_pylist()
    kept = table.filter(pa.array([name in names for name in table["trajectory_id"].to_pylist()]))
    assert kept["trajectory_id"].to_pylist() == names
    if names:
        assert np.abs(flat(error.done, "logprob") - flat(expected(model, kept), "logprob")).max() < 1e-4


def test_while_it_is_away_one_small_question_at_a_time_is_asked(server: ProtocolServer, make: Make) -> None:
    server.away = True
    error = caught(lambda: make(settings={"deadline": 1.0, "concurrency": 16}).evaluate(rows(64)), PartialError)
    assert "503" in error.what
    assert "no backend" in error.what
    paths = Counter(p for p, _ in server.asked)
    assert paths["/v1/completions"] <= 16, "no request is repeated before the server is back"
    assert 2 <= paths["/v1/models"] <= 15


def test_a_row_that_alone_fails_is_named_and_the_others_are_kept(server: ProtocolServer, make: Make) -> None:
    table = rows(12)
    poison = table["prompt_ids"].to_pylist()[5] + table["response_ids"].to_pylist()[5]
    server.refuse = lambda body: (500, {}, b'{"error": "CUDA error"}') if body["prompt"] == poison else None
    error = caught(lambda: make(settings={"deadline": 1.5}).evaluate(table), PartialError)
    assert "row 5 (trajectory t5)" in error.where
    assert "CUDA error" in error.what
    assert sorted(error.done["trajectory_id"].to_pylist()) == sorted(f"t{i}" for i in range(12) if i != 5)


def test_a_long_answer_that_breaks_twice_is_asked_for_a_third_time(server: ProtocolServer, make: Make) -> None:
    def late(_body: Body) -> Any:
        time.sleep(0.2)
        return (500, {}, b"") if len(server.asked) < 3 else None

    server.refuse = late
    assert make(settings={"deadline": 0.1}).evaluate(rows(1)).num_rows == 1


# Failures that do not pass


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 501])
def test_refusals_are_told_at_once_with_the_servers_words(server: ProtocolServer, make: Make, status: int) -> None:
    server.refuse = lambda _body: (status, {}, b'{"error": {"message": "\\u001b[2Jthis is why"}}')
    error = caught(lambda: make(settings={"concurrency": 1}).evaluate(rows(5)), PartialError)
    assert f"{status}" in error.what
    assert "this is why" in error.what
    assert "\x1b" not in str(error)
    assert server.url in error.what
    assert "row 0 (trajectory t0)" in error.where
    assert len(server.asked) == 1
    if status in (401, 403):
        assert "api_key_env" in error.fix


def test_redirects_are_not_followed(server: ProtocolServer, make: Make, model: Any, tokenizer: Any) -> None:
    elsewhere = ProtocolServer(model, tokenizer)
    elsewhere.start()
    server.refuse = lambda _body: (307, {"Location": f"{elsewhere.url}/completions"}, b"")
    error = caught(lambda: make(api_key=KEY).evaluate(rows(1)), PartialError)
    assert "redirects" in error.what
    assert elsewhere.asked == []
    elsewhere.die()


def test_the_key_is_in_the_header_and_in_no_message(
    server: ProtocolServer, make: Make, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    server.key = KEY
    told: list[str] = []
    engine = make(api_key=KEY, probed=False, warn=told.append)
    record = engine.probe(tokenizer, 100)
    engine.evaluate(rows(3))
    sent = [h for (p, _), h in zip(server.asked, server.headers, strict=True) if p.startswith("/v1")]
    assert {h["Authorization"] for h in sent} == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(record) + json.dumps(server.asked)
    server.key = "another"
    error = caught(lambda: engine.evaluate(rows(1)), PartialError)
    assert "wrong key Bearer ***" in error.what
    server.refuse = lambda _body: (503, {}, f"no {KEY}".encode())
    server.away = True
    gone = caught(lambda: make(api_key=KEY, settings={"deadline": 0.3}, warn=told.append).evaluate(rows(1)))
    texts = [str(error), str(gone), repr(error), repr(engine), repr(vars(engine.client._http)), *told]
    assert not any(KEY in text for text in texts)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("key", ["", "two words", "line\n", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(make: Make, key: str) -> None:
    error = caught(lambda: make(api_key=key), ConfigError)
    assert not key or key not in str(error)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host/v1", "user:hunter2@host/v1", "http://host/v1?key=hunter2", "http://host/v1#hunter2",
        "http://us er:hunter2@[bad/v1",
    ],
)  # fmt: skip
def test_urls_with_credentials_are_refused_without_repeating_them(url: str) -> None:
    assert "hunter2" not in str(caught(lambda: base_url(url, "teacher"), ConfigError))


@pytest.mark.parametrize("url", ["host:8000/v1", "ftp://host/v1", "http://", "", "http://host:port/v1"])
def test_urls_that_are_none_are_refused(url: str) -> None:
    caught(lambda: base_url(url, "teacher"), ConfigError)
    assert base_url("http://host:8000/v1/", "teacher") == "http://host:8000/v1"


def test_proxies_are_for_other_machines(
    server: ProtocolServer, make: Make, monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any
) -> None:
    proxy = ProtocolServer(model, tokenizer)
    proxy.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert make().evaluate(rows(1)).num_rows == 1
    assert proxy.asked == []
    far = make(url="http://teacher.invalid/v1")
    caught(lambda: far.evaluate(rows(1)), PartialError)
    assert proxy.asked[0][0] == "http://teacher.invalid/v1/completions"
    proxy.die()
    monkeypatch.setenv("all_proxy", "ftp://127.0.0.1")
    assert "proxy" in caught(lambda: make(url="http://teacher.invalid/v1"), ConfigError).what
    assert make().evaluate(rows(1)).num_rows == 1


# Answers that cannot be used


def at(path: str, value: Any) -> Callable[[Body], Body]:
    """Set one place of an answer; `...` deletes it."""

    def change(answer: Body) -> Body:
        holder: Any = answer
        *steps, last = path.split("/")
        for step in steps:
            holder = holder[int(step) if isinstance(holder, list) else step]
        key: Any = int(last) if isinstance(holder, list) else last
        if value is ...:
            del holder[key]
        else:
            holder[key] = value
        return answer

    return change


def own(**values: Any) -> Callable[[Body], Body]:
    """Change the entry of the prompt's own id (11) at position 2."""

    def change(answer: Body) -> Body:
        answer["choices"][0]["prompt_logprobs"][2]["11"] |= values
        return answer

    return change


def renamed(name: str) -> Callable[[Body], Body]:
    """Give the last token that is listed at position 2 another id."""

    def change(answer: Body) -> Body:
        entry = answer["choices"][0]["prompt_logprobs"][2]
        entry[name] = entry.pop(list(entry)[-1])
        return answer

    return change


SCORES: dict[str, tuple[Callable[[Body], Any], str]] = {
    "a list": (lambda _a: [1], "does not hold one completion"),
    "null": (lambda _a: None, "does not hold one completion"),
    "no choices": (at("choices", []), "does not hold one completion"),
    "two choices": (lambda a: {**a, "choices": a["choices"] * 2}, "does not hold one completion"),
    "no logprobs": (at("choices/0/prompt_logprobs", ...), "prompt_logprobs is missing"),
    "text for logprobs": (at("choices/0/prompt_logprobs", "abc"), "prompt_logprobs is str"),
    "one too few": (at("choices/0/prompt_logprobs/3", ...), "3 elements for 4 tokens"),
    "null in the response": (at("choices/0/prompt_logprobs/2", None), "position 2 holds no logprob"),
    "a number for an entry": (at("choices/0/prompt_logprobs/2", 3), "position 2 of prompt_logprobs"),
    "numbers for entries": (at("choices/0/prompt_logprobs/2", {"11": -1.0}), "position 2 of prompt_logprobs"),
    "NaN": (own(logprob=math.nan), "position 2 holds nan"),
    "infinity": (own(logprob=-math.inf), "position 2 holds -inf"),
    "above 0": (own(logprob=1.5), "position 2 holds 1.5"),
    "text for a number": (own(logprob="-1"), "position 2 holds '-1'"),
    "true for a number": (own(logprob=True), "position 2 holds 'True'"),
    "a giant number": (own(logprob=-(10**400)), "cannot be used"),
    "no probability": (own(logprob=-9999.0), "id 11 has no probability"),
    "no rank": (own(rank=None), "has no rank"),
    "rank 0": (own(rank=0), "has no rank"),
    "more than 1": (
        lambda a: [e.update(logprob=-0.1) for e in a["choices"][0]["prompt_logprobs"][2].values()] and a,
        "add up to more than 1",
    ),
    "a token that is no id": (renamed("the"), "no id"),
    "too many listed": (
        lambda a: [a["choices"][0]["prompt_logprobs"][2].update({str(i): {"logprob": -99.0}}) for i in range(70, 80)]
        and a,
        "5 were asked for",
    ),
    "an id out of range": (renamed("9999999999"), "has id 9999999999"),
    "too few listed": (
        lambda a: at("choices/0/prompt_logprobs/2", {"11": {"logprob": -1.0, "rank": 1}})(a),
        "position 2 lists 1 tokens, 5 were asked for",
    ),
    "html": (lambda _a: (200, {}, b"<html><body>Sign <b>in</b></body></html>"), "no JSON: 'Sign in'"),
    "half": (lambda a: (200, {}, json.dumps(a).encode()[:-20]), "no JSON"),
    "not utf-8": (lambda _a: (200, {}, b'{"a": "\xff"}'), "no JSON"),
    "deep": (lambda _a: (200, {}, b"[" * 100_000), "no JSON"),
    "empty": (lambda _a: (200, {}, b""), "no JSON"),
    "escapes": (lambda _a: (200, {}, b"\x1b[2Jgotcha"), "no JSON: ' [2Jgotcha'"),
    "huge": (lambda _a: (200, {}, b" " * (2 << 20)), "answered more than"),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_cannot_be_used_are_named_never_stored(server: ProtocolServer, make: Make, name: str) -> None:
    table = pa.table({"trajectory_id": ["a"], "prompt_ids": [[9, 10]], "response_ids": [[11, 12]]})
    server.mangle, message = SCORES[name]
    error = caught(lambda: make().evaluate(table), PartialError)
    assert message in error.what.replace("\\x1b", " ")
    assert "\x1b" not in str(error)
    assert server.url in error.what
    assert "row 0 (trajectory a)" in error.where
    assert error.done.num_rows == 0
    assert len(server.asked) == 1


SAMPLES: dict[str, tuple[Callable[[Body], Any], str]] = {
    "no ids": (lambda a: at("choices/0/token_ids", ...)(at("choices/0/logprobs/tokens", ["a"] * 4)(a)), "no token ids"),
    "no logprobs": (at("choices/0/logprobs", ...), "logprobs is missing"),
    "too few logprobs": (at("choices/0/logprobs/token_logprobs/0", ...), "3 elements for 4 tokens"),
    "NaN": (at("choices/0/logprobs/token_logprobs/1", math.nan), "holds nan"),
    "null": (at("choices/0/logprobs/token_logprobs/1", None), "holds 'None'"),
    "no probability": (at("choices/0/logprobs/token_logprobs/1", -9999.0), "no probability"),
    "an id out of range": (at("choices/0/token_ids/1", -1), "no list of ids"),
    "text for an id": (at("choices/0/token_ids/1", "7"), "no list of ids"),
    "nothing": (at("choices/0/token_ids", []), "0 tokens were generated"),
    "too much": (at("choices/0/token_ids", [5] * 9), "9 tokens were generated"),
    "another prompt": (at("choices/0/prompt_token_ids", [0, 9, 10]), "prompt was changed"),
    "behind the end": (at("choices/0/token_ids/1", 17), "goes on behind a stop token"),
    "an end of its own": (
        lambda a: at("choices/0/token_ids", [5, 6])(at("choices/0/logprobs/token_logprobs", [-1.0, -1.0])(a)),
        "ends after 2 of 4 tokens with id 6",
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_that_cannot_be_used_are_named_never_stored(server: ProtocolServer, make: Make, name: str) -> None:
    server.mangle, message = SAMPLES[name]
    requests = pa.table({"trajectory_id": ["a"], "prompt_ids": [[9, 10]]})
    error = caught(lambda: make().generate(requests, Sampling(2, max_new_tokens=4)), PartialError)
    assert message in error.what
    assert "row 0 (trajectory a)" in error.where


# The probe


def test_the_probe_tells_what_the_server_is(server: ProtocolServer, make: Make, tokenizer: Any) -> None:
    server.root = "/models/tiny"
    record = make(probed=False).probe(tokenizer, 100)
    assert json.loads(json.dumps(record)) == record
    assert record["served"] == "tiny"
    assert record["root"] == "/models/tiny"
    assert record["max_model_len"] == 256
    assert record["tokenization"] == "tokenize"
    assert record["dialect"] == "prompt_logprobs"
    assert record["entropy_topk"] == 5
    assert len(record["probe_logprobs"]) == len(record["probe_ids"]) - 1 == 15
    assert len(set(record["probe_ids"])) == 16


def test_another_model_is_refused_before_any_work(server: ProtocolServer, make: Make, tokenizer: Any) -> None:
    error = caught(lambda: make(probed=False, model="org/other").probe(tokenizer, 100), ConfigError)
    assert "does not serve 'org/other'; it serves 'tiny'" in error.what
    server.root = "org/other"
    assert make(probed=False, model="org/other").probe(tokenizer, 100)["served"] == "tiny"
    engine = make(probed=False, model="org/declared", served_name="tiny")
    error = caught(lambda: engine.probe(tokenizer, 100), ConfigError)
    assert "runs org/other under the name 'tiny', declared is org/declared" in error.what
    server.root = "/data/some-folder"
    assert make(probed=False, model="org/declared", served_name="tiny").probe(tokenizer, 100)["root"] == server.root


def test_a_context_that_is_too_small_is_refused(server: ProtocolServer, make: Make, tokenizer: Any) -> None:
    server.max_model_len = 100
    error = caught(lambda: make(probed=False).probe(tokenizer, 100), ConfigError)
    assert "room for 100 tokens, the longest row needs 101" in error.what
    assert "--max-model-len 101" in error.fix
    assert make(probed=False).probe(tokenizer, 100, Sampling(0))["max_model_len"] == 100
    server.max_model_len = None
    assert make(probed=False).probe(tokenizer, 100)["max_model_len"] is None


@pytest.mark.parametrize("way", ["tokenize", "prompt_token_ids", "counts", "unchecked"])
def test_a_server_that_tokenizes_differently_is_refused(
    server: ProtocolServer, make: Make, tokenizer: Any, way: str
) -> None:
    server.tokenizes = way == "tokenize"
    if way in ("counts", "unchecked"):
        server.mangle = at("choices/0/prompt_token_ids", None)
        server.counts = way == "counts"
    if way == "unchecked":
        server.mangle = lambda a: at("usage", {})(at("choices/0/prompt_token_ids", None)(a))
    assert make(probed=False).probe(tokenizer, 100)["tokenization"] == way
    if way == "unchecked":
        return
    server.tokenizer = byte_tokenizer("a lazy dog is lazier than the quick fox")
    engine = make(probed=False)
    error = caught(lambda: engine.probe(tokenizer, 100), TokenizerError)
    assert "tokenizes differently" in error.what
    assert ("tokens here and" if way == "counts" else "here and") in error.what
    assert server.url in error.what
    assert error.exit_code == 3


def test_special_tokens_that_the_server_lacks_are_noticed(server: ProtocolServer, make: Make) -> None:
    ours = byte_tokenizer()
    ours.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    error = caught(lambda: make(probed=False).probe(ours, 100), TokenizerError)
    assert "<|think|>" in error.what


@pytest.mark.parametrize("dialect", ["vllm", "echo"])
@pytest.mark.parametrize("shift", [1, -1])
def test_prompt_logprobs_of_a_neighbouring_token_are_noticed(
    server: ProtocolServer, make: Make, tokenizer: Any, dialect: str, shift: int
) -> None:
    server.shift, server.dialect = shift, dialect
    error = caught(lambda: make(probed=False).probe(tokenizer, 100), ConfigError)
    assert "cannot score" in error.what
    assert "shifted by one position" in error.what


@pytest.mark.parametrize("shift", [1, -1])
def test_values_of_another_position_are_noticed_by_sampling(
    server: ProtocolServer, make: Make, tokenizer: Any, shift: int
) -> None:
    server.shift_values = shift
    error = caught(lambda: make(probed=False).probe(tokenizer, 100), ConfigError)
    assert "nats from those of the same tokens when they were sampled" in error.what


def test_a_server_that_cannot_score_may_still_write_and_the_other_way_round(
    server: ProtocolServer, make: Make, tokenizer: Any
) -> None:
    server.dialect = "none"
    engine, sampling = make(probed=False), Sampling(0, max_new_tokens=4)
    error = caught(lambda: engine.probe(tokenizer, 100), ConfigError)
    assert "cannot score" in error.what
    assert "python -m vllm.entrypoints.openai.api_server" in error.fix
    record = engine.probe(tokenizer, 100, sampling)
    assert (record["dialect"], record["probe_logprobs"]) == (None, [])
    assert engine.generate(rows(2), sampling).num_rows == 2
    caught(lambda: engine.evaluate(rows(2)), ConfigError)

    server.dialect, server.gives_ids = "vllm", False
    engine = make(probed=False)
    error = caught(lambda: engine.probe(tokenizer, 100, sampling), ConfigError)
    assert "cannot be used for rollouts" in error.what
    assert "no token ids" in error.what
    assert engine.probe(tokenizer, 100)["generates"] is False
    assert engine.evaluate(rows(2)).num_rows == 2
    caught(lambda: engine.generate(rows(2), sampling), ConfigError)


def test_echo_without_ids_cannot_score(server: ProtocolServer, make: Make, tokenizer: Any) -> None:
    server.dialect, server.gives_ids = "echo", False
    assert "tokens are text, not ids" in caught(lambda: make(probed=False).probe(tokenizer, 100), ConfigError).what


def test_echo_that_insists_on_writing_a_token_is_cut(server: ProtocolServer, make: Make, tokenizer: Any) -> None:
    server.dialect = "echo"
    server.refuse = lambda body: (400, {}, b'{"error": "max_tokens"}') if body["max_tokens"] == 0 else None
    engine = make(probed=False)
    assert engine.probe(tokenizer, 100)["dialect"] == "echo"
    table = rows(3)
    found = engine.evaluate(table)
    assert np.abs(flat(found, "logprob") - flat(expected(server.model, table), "logprob")).max() < 1e-4


def test_more_logprobs_than_the_server_allows_name_the_flag(server: ProtocolServer, make: Make, tokenizer: Any) -> None:
    server.refuse = lambda body: (
        (400, {}, b'{"error": {"message": "greater than max allowed: 2"}}')
        if max(body.get("prompt_logprobs", 0), body["logprobs"] if body.get("echo") else 0) > 2
        else None
    )
    error = caught(lambda: make(probed=False).probe(tokenizer, 100), ConfigError)
    assert "greater than max allowed: 2" in error.what
    assert "--max-logprobs 5" in error.fix


def test_an_extension_that_is_gone_is_noticed_not_read_as_an_entropy(
    server: ProtocolServer, make: Make, tokenizer: Any
) -> None:
    server.exact = True
    engine = make(probed=False)
    engine.probe(tokenizer, 100)
    server.exact = False
    assert "no entropy any more" in caught(lambda: engine.evaluate(rows(3)), PartialError).what


@pytest.mark.parametrize("slot", ["0", "2"])
def test_an_entropy_is_read_from_its_own_place_alone(slot: str) -> None:
    entry = {"7": {"logprob": -1.0, "rank": 2}, "1": {"logprob": -0.5}, slot: {"logprob": 0.25}}
    answer = {"choices": [{"prompt_logprobs": [None, entry]}]}
    dialect = Dialect("prompt_logprobs", 2, exact=True)
    if slot == "0":
        assert read_scores(answer, dialect, [4, 7], 1).entropy.tolist() == [0.25]
    else:
        with pytest.raises(Malformed, match="position 1 has no entropy"):
            read_scores(answer, dialect, [4, 7], 1)


def test_a_server_that_is_not_there_is_told_soon(make: Make, server: ProtocolServer, tokenizer: Any) -> None:
    server.die()
    began = time.monotonic()
    error = caught(lambda: make(probed=False, settings={"deadline": 0.3}).probe(tokenizer, 100))
    assert time.monotonic() - began < 10
    assert server.url in error.what
    assert error.fix


def test_what_is_no_list_of_models_is_told(server: ProtocolServer, make: Make, tokenizer: Any) -> None:
    error = caught(lambda: make(url=server.url + "/v2", probed=False).probe(tokenizer, 100), ConfigError)
    assert "404" in error.what
    assert "base address" in error.fix
    server.name = 7  # type: ignore[assignment]
    error = caught(lambda: make(probed=False).probe(tokenizer, 100))
    assert "the list of models" in error.what


def test_calls_before_the_probe_are_told(make: Make) -> None:
    assert "was not probed" in caught(lambda: make(probed=False).evaluate(rows(1))).what


def test_two_probes_are_compared_by_the_logprobs_of_the_same_ids(
    server: ProtocolServer, make: Make, tokenizer: Any
) -> None:
    old = make(probed=False).probe(tokenizer, 100)
    assert probe_difference(old, make(probed=False).probe(tokenizer, 100)) < 1e-5
    server.model = byte_model(seed=1)
    assert probe_difference(old, make(probed=False).probe(tokenizer, 100)) > 0.1
    assert probe_difference(old, {}) is None
    assert probe_difference(old, old | {"probe_ids": [1, 2]}) is None
    assert probe_difference(old | {"probe_logprobs": []}, old) is None
