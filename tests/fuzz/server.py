"""Targets that a server sends: answers to requests for scores and samples, its list of models, its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fire_data.http_client import Answer, HttpClient
from fire_data.http_dialect import Dialect, read_sample, read_scores
from fire_data.http_probe import _entries, _top
from fire_data.http_words import own_words, printable, retry_after_seconds
from fire_data.schemas.config import HttpConfig
from fire_data.schemas.errors import FireError
from tests.fuzz.target import Target
from tests.fuzz.values import as_json, sources, torn

IDS = [4, 5, 6]
ANSWER: dict[str, Any] = {
    "choices": [
        {
            "prompt_logprobs": [
                None,
                *[{str(i): {"logprob": -1.0, "rank": 1}, "3": {"logprob": -2.0}} for i in (5, 6)],
            ],
            "token_ids": [5, 6],
            "prompt_token_ids": [4],
            "logprobs": {
                "tokens": [f"token_id:{i}" for i in IDS],
                "token_logprobs": [None, -1.0, -1.0],
                "top_logprobs": [None, *[{f"token_id:{i}": -1.0, "token_id:3": -2.0} for i in (5, 6)]],
            },
        }
    ]
}
_EXACT = {"choices": [{"prompt_logprobs": [None, *[{"5": {"logprob": -1.0, "rank": 1}, "0": {"logprob": 1.5}}] * 2]}]}
_SAMPLE = {
    "choices": [{"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -0.5], "top_logprobs": [{"a": -1.0}]}}]
}
_MODELS = {"data": [{"id": "m", "root": "a/m", "max_model_len": 4096}]}
_ERRORS = [{"error": {"message": "too long"}}, {"detail": [{"loc": ["body"], "msg": "x"}]}, {"message": {"error": "x"}}]
_DOCUMENTS = [ANSWER, _EXACT, _SAMPLE, _MODELS, *_ERRORS]


@cache
def _client() -> HttpClient:
    """Of a server that is not there: answers are handed to what reads them."""
    return HttpClient("http://127.0.0.1:9/v1", settings=HttpConfig(), api_key="secret-key", who="teacher")


def _scored(answer: Any, dialect: Dialect) -> None:
    scores = read_scores(answer, dialect, IDS, 1)
    for values in (scores.logprob, scores.entropy, scores.max_logprob):
        assert values.shape == (2,)
        assert np.isfinite(values).all()
    assert (scores.logprob <= scores.max_logprob).all()
    assert (scores.entropy >= 0).all()


def _sampled(answer: Any) -> None:
    sample = read_sample(answer, [4], 2, frozenset({6}))
    assert len(sample.ids) == len(sample.logprobs)
    _top(answer)


READERS: list[Callable[[Any], Any]] = [
    *(
        partial(_scored, dialect=dialect)
        for dialect in (
            Dialect("prompt_logprobs", 2),
            Dialect("prompt_logprobs", 2, exact=True),
            Dialect("echo", 2, ranks=False),
            Dialect("echo", 2, generate=0, ranks=False),
        )
    ),
    _sampled,
    _entries,
]


def _answer(data: bytes) -> None:
    """Read an answer in every way there is; what is refused is told without what steers a terminal."""
    client = _client()
    for read in READERS:
        try:
            client.read(Answer(200, data, ""), read, "row 0")
        except FireError as error:
            assert "\x1b" not in str(error)
            assert len(str(error)) < 2000
    words = printable(own_words(data), "secret-key")
    assert words.isprintable() or not words
    assert "secret-key" not in words
    retry_after_seconds(data[:40].decode("latin-1"))


_EDGES = [
    b"",
    b"null",
    b"[" * 100_000,
    b"<html><body>Sign in</body></html>",
    b"\xff\xfe",
    b"1e999",
    b'{"a": 1e400}',
    b'"secret-key"',
]

SERVER: dict[str, Target] = {
    "server": Target(
        _answer,
        lambda: [as_json(d) for d in _DOCUMENTS],
        lambda: sources(_DOCUMENTS) | st.sampled_from(_EDGES) | torn(json.dumps(ANSWER).encode()),
    )
}
