"""Requests to completion servers, and their answers read as if by an enemy: two dialects of scoring, one of sampling.

`prompt_logprobs` (vLLM) lists per prompt token the k most likely ones and the token itself; `echo` (the legacy
interface of OpenAI) the same in other words, here with ids for tokens. Both are read into one shape. A server that runs
this project's extension of vLLM answers `prompt_logprobs: 2` with the exact entropy in the last entry of every token;
any other list gives a lower bound (`engines.tail_bound`). All values are over the ids that the server's model has: the
mask of ids that another model lacks is not applied there. No connection here. Units: nats.

Suffixes: _T response tokens, _K listed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fire_data.engines import tail_bound
from fire_data.sampling import Sampling

Array: TypeAlias = npt.NDArray[Any]

EXACT_K = 2  # the number of prompt logprobs that the extension answers with an entropy
_NO_PROBABILITY = -9000.0  # servers write -9999 for minus infinity, which JSON lacks
_ROUNDING = 1e-3  # by which a logprob may exceed 0 and listed probabilities 1
_LARGEST_ID = 2**31
_TOKEN = "token_id:"


class Malformed(ValueError):
    """An answer cannot be used; the text says what is wrong with it."""


@dataclass(frozen=True)
class Dialect:
    """How a server is asked for logprobs of a prompt. `k`: listed per token. `exact`: the last one is the entropy.
    `generate`: tokens it has to write as well. `ranks`: it tells them."""

    name: Literal["prompt_logprobs", "echo"]
    k: int
    exact: bool = False
    generate: int = 1
    ranks: bool = True


@dataclass(frozen=True)
class Scores:
    """Of response tokens, each [T]. `rank` is None where the server does not tell it, `mass` where nothing is missing.
    `top_ids`, `top_logprobs` [T, K] are what was listed, -1 and -inf where there is nothing."""

    logprob: Array
    entropy: Array
    max_logprob: Array
    top1_id: Array
    rank: Array | None
    mass: Array | None
    top_ids: Array
    top_logprobs: Array


@dataclass(frozen=True)
class Sample:
    """One response: ids and their logprobs (nats, under the distribution the server reports), stop or length."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


def score_body(dialect: Dialect, model: str, ids: list[int]) -> dict[str, Any]:
    """The request for logprobs of `ids`."""
    body: dict[str, Any] = {"model": model, "prompt": ids, "max_tokens": dialect.generate, "temperature": 0.0, "n": 1}
    if dialect.name == "prompt_logprobs":
        return {**body, "prompt_logprobs": dialect.k}
    return {**body, "echo": True, "logprobs": dialect.k, "return_tokens_as_token_ids": True}


def score_bytes(dialect: Dialect, tokens: int) -> int:
    """More bytes than an answer to `score_body` can have."""
    return (1 << 20) + tokens * (dialect.k + 2) * 512


def read_scores(answer: Any, dialect: Dialect, ids: list[int], start: int) -> Scores:
    """The values of `ids[start:]`; `start` is at least 1, since nothing predicts the first token.

    Raises:
        Malformed: something is missing, of another type, not finite, above 0, or about other tokens than `ids`.
    """
    listed, ranks = _from_prompt_logprobs(answer, ids) if dialect.name == "prompt_logprobs" else _from_echo(answer, ids)
    listed = [_own_position(listed, ids, t) for t in range(start, len(ids))]
    entropy = _slots(listed, ids, start) if dialect.exact else None
    counts = np.array([len(entry) for entry in listed])
    if not dialect.exact and not np.isin(counts, (dialect.k, dialect.k + 1)).all():
        at = int(np.argmin(np.isin(counts, (dialect.k, dialect.k + 1))))
        raise Malformed(f"position {start + at} lists {counts[at]} tokens, {dialect.k} were asked for")
    filled_TK = np.arange(counts.max(initial=1)) < counts[:, None]
    ids_TK, logprobs_TK = np.full(filled_TK.shape, -1), np.full(filled_TK.shape, -np.inf)
    ids_TK[filled_TK] = _ids(key for entry in listed for key in entry)
    logprobs_TK[filled_TK] = _logprobs([value for entry in listed for value in entry.values()], filled_TK, start)
    own_T = np.array([entry[key] for entry, key in zip(listed, map(str, ids[start:]), strict=True)], np.float64)
    own_T = np.minimum(own_T, 0.0)
    if (own_T < _NO_PROBABILITY).any():
        at = start + int(np.argmin(own_T))
        raise Malformed(f"position {at}: the token with id {ids[at]} has no probability at all")
    ranked_TK = -np.sort(-logprobs_TK, axis=1)
    if (np.exp(ranked_TK).sum(1) > 1 + _ROUNDING).any():
        at = start + int(np.argmax(np.exp(ranked_TK).sum(1)))
        raise Malformed(f"position {at}: the listed probabilities add up to more than 1; are they logits?")
    smallest_T = ranked_TK[np.arange(len(counts)), np.minimum(counts, dialect.k) - 1]
    mass = None
    if entropy is None:
        entropy, mass = tail_bound(ranked_TK, smallest_T)
    most_TK = np.where(logprobs_TK == ranked_TK[:, :1], ids_TK, _LARGEST_ID)
    rank = _ranks(ranks[start:], own_T, ranked_TK, smallest_T, dialect) if dialect.ranks else None
    return Scores(own_T, entropy, ranked_TK[:, 0], most_TK.min(1), rank, mass, ids_TK, logprobs_TK)


def _from_prompt_logprobs(answer: Any, ids: list[int]) -> tuple[list[Any], list[Any]]:
    """Per position of the prompt {id: logprob}, and the rank of the token itself."""
    entries = _field(_choice(answer), "prompt_logprobs", list)
    _require_length(entries, ids, "prompt_logprobs")
    listed: list[Any] = []
    ranks: list[Any] = []
    for token, entry in zip(ids, entries, strict=True):
        try:
            listed.append({key: value["logprob"] for key, value in entry.items()} if entry is not None else None)
            own = None if entry is None else entry.get(str(token))
            ranks.append(None if own is None else own.get("rank"))
        except (AttributeError, KeyError, TypeError):
            raise Malformed(f"position {len(ranks)} of prompt_logprobs is not {{id: {{logprob}}}}") from None
    return listed, ranks


def _from_echo(answer: Any, ids: list[int]) -> tuple[list[Any], list[Any]]:
    """As `_from_prompt_logprobs`; what was generated behind the prompt is cut off."""
    found = _field(_choice(answer), "logprobs", dict)
    tokens, own, top = (_field(found, name, list) for name in ("tokens", "token_logprobs", "top_logprobs"))
    for values, name in ((tokens, "tokens"), (own, "token_logprobs"), (top, "top_logprobs")):
        _require_length(values[: len(ids)], ids, name)
    listed: list[Any] = []
    for t, (token, text, logprob, others) in enumerate(zip(ids, tokens, own, top, strict=False)):
        if not isinstance(text, str) or not text.startswith(_TOKEN):
            raise Malformed("tokens are text, not ids (token_id:123), so that listed tokens cannot be told apart")
        if text != f"{_TOKEN}{token}":
            raise Malformed(f"position {t} is {text[:40]!r}, the prompt has id {token} there")
        if logprob is None or others is None:
            listed.append(None)
            continue
        if not isinstance(others, dict):
            raise Malformed(f"position {t} of top_logprobs is no object")
        if t == 0 or others.get(text, logprob) != logprob:
            raise Malformed(f"its logprobs are shifted by one position (position {t} has one of another token)")
        listed.append({key.removeprefix(_TOKEN): value for key, value in others.items()} | {str(token): logprob})
    return listed, [None] * len(ids)


def _own_position(listed: list[Any], ids: list[int], t: int) -> dict[str, Any]:
    """What is listed at position t, if it is about the token there."""
    entry = listed[t]
    if isinstance(entry, dict) and str(ids[t]) in entry:
        return entry
    first = isinstance(listed[0], dict) and str(ids[0]) not in listed[0]
    if (entry is None and t == len(ids) - 1) or first or (t + 1 < len(ids) and str(ids[t + 1]) in (entry or ())):
        raise Malformed(f"its logprobs are shifted by one position (position {t} is not about id {ids[t]} there)")
    raise Malformed(f"position {t} holds no logprob of the prompt's own id {ids[t]}")


def _slots(listed: list[dict[str, Any]], ids: list[int], start: int) -> Array:
    """Take the last entry off every position: the entropy, under the first of the ids 0, 1, 2 that is not listed."""
    values = []
    for t, entry in enumerate(listed, start):
        key, value = entry.popitem()
        free = next(i for i in ("0", "1", "2", "3") if i not in entry)
        number = type(value) in (int, float) and 0.0 <= value < np.inf
        if not number or key != free or len(entry) not in (1, EXACT_K) or str(ids[t]) not in entry:
            raise Malformed(f"position {t} has no entropy any more: was the server started without the extension?")
        values.append(value)
    return np.array(values, np.float64)


def _ids(keys: Iterable[Any]) -> Array:
    try:
        found = np.array([int(key) for key in keys], np.int64)
    except (ValueError, OverflowError):
        raise Malformed("a listed token is no id") from None
    if len(found) and (found.min() < 0 or found.max() >= _LARGEST_ID):
        raise Malformed(f"a listed token has id {found.min() if found.min() < 0 else found.max()}")
    return found


def _logprobs(values: list[Any], filled_TK: Array, start: int) -> Array:
    """Float64 [N], at most 0. Raises Malformed naming the position of the first that is no logprob."""
    position = np.nonzero(filled_TK)[0] + start
    if not set(map(type, values)) <= {int, float}:
        at = next(i for i, value in enumerate(values) if type(value) not in (int, float))
        raise Malformed(f"position {position[at]} holds {str(values[at])[:40]!r} for a logprob")
    try:
        found = np.array(values, np.float64)
    except OverflowError:
        raise Malformed("a logprob is too large to be one") from None
    wrong = ~(np.isfinite(found) & (found <= _ROUNDING))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise Malformed(f"position {position[at]} holds {found[at]} for a logprob")
    return np.minimum(found, 0.0)


def _ranks(told: list[Any], own_T: Array, ranked_TK: Array, smallest_T: Array, dialect: Dialect) -> Array:
    """1 + tokens strictly more likely. Counted where all of those are listed: vLLM counts equals among them."""
    if not all(type(rank) is int and 1 <= rank < _LARGEST_ID for rank in told):
        raise Malformed("a token has no rank, though others had")
    rank_T = np.array(told, np.int64)
    if dialect.exact:
        return rank_T
    return np.where(own_T >= smallest_T, 1 + (ranked_TK > own_T[:, None]).sum(1), rank_T)


def sample_body(
    model: str, prompt: list[int], sampling: Sampling, seed: int, stops: list[int], logprobs: int = 0
) -> dict[str, Any]:
    """The request for one response. All that a server may have defaults of its own for is said."""
    return {
        "model": model, "prompt": prompt, "n": 1, "max_tokens": sampling.max_new_tokens, "seed": seed,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": 1.0 if sampling.greedy else sampling.top_p,
        "top_k": -1 if sampling.greedy or not sampling.top_k else sampling.top_k,
        "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        # The tokens that end a response are ours, not the server's.
        "ignore_eos": True, "stop_token_ids": stops,
        "logprobs": logprobs, "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip


def sample_bytes(tokens: int) -> int:
    """More bytes than an answer to `sample_body` can have."""
    return (1 << 20) + tokens * 1024


def read_sample(answer: Any, prompt: list[int], max_new_tokens: int, stops: frozenset[int]) -> Sample:
    """The response in an answer, ended by one of `stops` or by its length.

    Raises:
        Malformed: there are no ids, their logprobs do not fit, or it ended in another way.
    """
    choice = _choice(answer)
    given = choice.get("prompt_token_ids")
    if given is not None and given != prompt:
        raise Malformed("the prompt was changed before the model saw it (prompt_token_ids)")
    found = _field(choice, "logprobs", dict)
    logprobs = _field(found, "token_logprobs", list)
    ids = choice.get("token_ids")
    if ids is None:
        tokens = _field(found, "tokens", list)
        if not all(isinstance(t, str) and t.startswith(_TOKEN) for t in tokens):
            raise Malformed("it gives text back, no token ids (token_ids, or tokens as token_id:123)")
        ids = _ids(t.removeprefix(_TOKEN) for t in tokens).tolist()
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < _LARGEST_ID for i in ids):
        raise Malformed("token_ids is no list of ids")
    if not 1 <= len(ids) <= max_new_tokens:
        raise Malformed(f"{len(ids)} tokens were generated, 1 to {max_new_tokens} were asked for")
    _require_length(logprobs, ids, "token_logprobs")
    values = _logprobs(logprobs, np.ones((len(ids), 1), bool), 0)
    if (values < _NO_PROBABILITY).any():
        raise Malformed(f"the sampled token at position {int(np.argmin(values))} has no probability at all")
    if not stops.isdisjoint(ids[:-1]):
        raise Malformed("it goes on behind a stop token: stop_token_ids is not obeyed")
    if ids[-1] not in stops and len(ids) < max_new_tokens:
        reason = str(choice.get("finish_reason"))[:40]
        raise Malformed(
            f"it ends after {len(ids)} of {max_new_tokens} tokens with id {ids[-1]}, which is no stop token of the "
            f"model (finish_reason {reason!r}): a full context, or a server with stop tokens of its own"
        )
    return Sample(ids, values.tolist(), "stop" if ids[-1] in stops else "length")


def _choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed("it does not hold one completion (choices)")
    return choices[0]


def _field(holder: dict[str, Any], name: str, kind: type) -> Any:
    value = holder.get(name)
    if not isinstance(value, kind):
        raise Malformed(
            f"{name} is {'missing' if value is None else type(value).__name__}, a {kind.__name__} is needed"
        )
    return value


def _require_length(values: list[Any], ids: list[int], name: str) -> None:
    if len(values) != len(ids):
        raise Malformed(f"{name} has {len(values)} elements for {len(ids)} tokens")
