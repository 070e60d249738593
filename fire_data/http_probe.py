"""Asks a completions server what it is before any work: model, tokenizer, context, and how its logprobs are meant.

Nothing is believed that can be tried: texts are tokenized there and here, a fixed sequence of ids is scored, a few
tokens are sampled and their logprobs compared with what the server says of the same tokens as a prompt, which shows
values that are shifted or come from somewhere else. Sampling the same place at two temperatures shows whether logprobs
are those of the distribution sampled from. Units: nats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fire_data.http_client import Answer, HttpClient
from fire_data.http_dialect import (
    EXACT_K,
    Dialect,
    Malformed,
    Sample,
    Scores,
    read_sample,
    read_scores,
    sample_body,
    score_body,
    score_bytes,
)
from fire_data.sampling import Sampling
from fire_data.schemas.errors import ConfigError, EngineError, TokenizerError
from fire_data.schemas.tables import TOPK_BOUND
from fire_data.vocabulary import Vocabulary

SERVE = "python -m vllm.entrypoints.openai.api_server --model MODEL"

_TEXTS = (
    "The quick brown fox: 3.14159 × 2 = 6.28318, isn't it? 12345678 90",
    "naïve café – 日本語 한국어 العربية 👩‍🔬 \U0001f600\u200d",
    "  def f(x):\n\t\treturn x**2   # twice\n\n\r\n",
)
_PIECES = 200  # tokens of the vocabulary, evenly spread, that are compared as one text
_SPECIAL = 50
_SCORED = 16  # ids of the fixed sequence
_SAMPLED = 8
_PATIENCE = 10.0  # seconds for a server to be there at all
_DISAGREES = 0.25  # nats on average; bfloat16 alone gives 0.02
_GAP = 0.05  # nats between two tokens that are needed to tell two temperatures apart
_WHERE = "probe of the server"


@dataclass(frozen=True)
class Abilities:
    """What a server is and can do. `cannot_score` and `cannot_sample` are the reason and the remedy, None if it can."""

    served: str
    root: str | None
    max_model_len: int | None
    tokenization: str
    ids: list[int]
    scoring: Dialect | None
    logprobs_of_ids: list[float]
    logprobs: Literal["raw", "processed", "unknown"]
    cannot_score: tuple[str, str] | None
    cannot_sample: tuple[str, str] | None

    def record(self, url: str) -> dict[str, Any]:
        """JSON-ready."""
        kind = None if self.scoring is None else "exact" if self.scoring.exact else TOPK_BOUND
        return {
            "url": url,
            "served": self.served,
            "root": self.root,
            "max_model_len": self.max_model_len,
            "tokenization": self.tokenization,
            "dialect": None if self.scoring is None else self.scoring.name,
            "entropy_kind": kind,
            "entropy_topk": None if self.scoring is None or self.scoring.exact else self.scoring.k,
            "logprobs_mode": self.logprobs,
            "generates": self.cannot_sample is None,
            "probe_ids": self.ids,
            "probe_logprobs": self.logprobs_of_ids,
        }


def examine(
    client: HttpClient, model: str, served_name: str | None, tokenizer: Any, vocabulary: Vocabulary, k: int,
    longest: int, scores: bool,
) -> Abilities:  # fmt: skip
    """What `client`'s server can do with `model`. `scores`: it is asked to score, for which one token more has to fit.

    Raises:
        ConfigError: it serves another model, or too small a context.
        TokenizerError: it tokenizes differently.
        EngineError: it cannot be reached, or its answers cannot be used.
    """
    return client.calls.run(_examine(client, model, served_name, tokenizer, vocabulary, k, longest, scores))


async def _examine(
    client: HttpClient, model: str, served_name: str | None, tokenizer: Any, vocabulary: Vocabulary, k: int,
    longest: int, scores: bool,
) -> Abilities:  # fmt: skip
    entry = await _entry(client, model, served_name)
    length = _context(client, entry, longest + scores)
    tokenization = await _require_tokenizer(client, entry["id"], tokenizer)
    ids = probe_ids(tokenizer, vocabulary)
    ids = ids if length is None else ids[: max(2, length - _SAMPLED - 1)]
    asked = _Asked(client, entry["id"])
    dialect, values, cannot_score = await asked.scoring(ids, k)
    sample, mode, cannot_sample = await asked.sampling(ids)
    if dialect is not None and sample is not None:
        cannot_score = await asked.disagreement(dialect, ids, sample)
    return Abilities(
        served=entry["id"],
        root=entry["root"],
        max_model_len=length,
        tokenization=tokenization,
        ids=ids,
        scoring=None if cannot_score else dialect,
        logprobs_of_ids=[] if values is None else [round(float(v), 6) for v in values.logprob],
        logprobs=mode,
        cannot_score=cannot_score,
        cannot_sample=cannot_sample,
    )


async def _entry(client: HttpClient, model: str, served_name: str | None) -> dict[str, Any]:
    """The server's own entry for the declared model: id, root, max_model_len."""
    patience = min(client.settings.deadline, _PATIENCE)
    try:
        answer = await client.ask("GET", f"{client.url}/models", where=_WHERE, deadline=patience)
    except EngineError as error:
        raise EngineError(
            error.what, where=_WHERE, fix=error.fix or f"correct the url, or start a server: {SERVE}"
        ) from None
    if not answer.ok:
        raise client.refusal(answer, _WHERE)
    entries = client.read(answer, _entries, _WHERE)
    name = served_name or model
    found = next((e for e in entries if e["id"] == name), None)
    found = found or next((e for e in entries if e["root"] == model), None)
    if found is None:
        there = ", ".join(repr(e["id"][:100]) for e in entries[:20]) or "nothing"
        text = f"{client.who}: {client.url} does not serve {name!r}; it serves {there}"
        raise ConfigError(text, where=_WHERE, fix="set served_name, or start the server with the declared model")
    root = found["root"]
    if root != found["id"] and _is_hub_id(root) and _is_hub_id(model) and root.casefold() != model.casefold():
        text = f"{client.who}: {client.url} runs {root} under the name {found['id']!r}, declared is {model}"
        raise ConfigError(text, where=_WHERE, fix=f"declare it, model: {root}; a folder is written ./{model}")
    return found


def _entries(answer: Any) -> list[dict[str, Any]]:
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in data):
        raise Malformed("the list of models is no list of objects with an id")
    entries = []
    for entry in data:
        root, length = entry.get("root"), entry.get("max_model_len")
        entries.append(
            {
                "id": entry["id"],
                "root": root if isinstance(root, str) else None,
                "max_model_len": length if type(length) is int and length > 0 else None,
            }
        )
    return entries


def _is_hub_id(name: str | None) -> bool:
    return bool(name and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name))


def _context(client: HttpClient, entry: dict[str, Any], needed: int) -> int | None:
    length: int | None = entry["max_model_len"]
    if length is not None and length < needed:
        text = f"{client.who}: {client.url} has room for {length} tokens, the longest row needs {needed}"
        fix = f"start the server with --max-model-len {needed}, or lower rollout.max_new_tokens"
        raise ConfigError(text, where=_WHERE, fix=fix)
    return length


async def _require_tokenizer(client: HttpClient, served: str, tokenizer: Any) -> str:
    """Compare texts there and here; how it was done: tokenize, prompt_token_ids, counts or unchecked."""
    ways = {"tokenize": _by_tokenizing, "prompt_token_ids": _by_completing}
    texts = [text for text in probe_texts(tokenizer) if text]
    for way, ask in ways.items():
        for text in texts:
            theirs = await ask(client, served, text)
            if theirs is None:
                break
            if isinstance(theirs, int):
                way = "counts"
            _require_same(client, tokenizer, text, theirs, way)
        else:
            return way
    return "unchecked"


async def _by_tokenizing(client: HttpClient, served: str, text: str) -> list[int] | int | None:
    found = await _optional(client, f"{client.root}/tokenize", {"model": served, "prompt": text})
    tokens = found.get("tokens") if isinstance(found, dict) else None
    return tokens if _is_ids(tokens) else None


async def _by_completing(client: HttpClient, served: str, text: str) -> list[int] | int | None:
    body = {"model": served, "prompt": text, "max_tokens": 1, "temperature": 0.0, "return_token_ids": True}
    found = await _optional(client, f"{client.url}/completions", body)
    try:
        ids = found["choices"][0].get("prompt_token_ids")
        count = found["usage"]["prompt_tokens"] if ids is None else None
    except (AttributeError, KeyError, IndexError, TypeError):
        return None
    return ids if _is_ids(ids) else count if type(count) is int else None


async def _optional(client: HttpClient, url: str, body: dict[str, Any]) -> Any:
    """The server's JSON; None where it does not offer this, in whatever way it says so."""
    patience = min(client.settings.deadline, _PATIENCE)
    try:
        answer = await client.ask("POST", url, body | {"add_special_tokens": False}, where=_WHERE, deadline=patience)
        return client.read(answer, lambda found: found, _WHERE) if answer.ok else None
    except EngineError:
        return None


def _is_ids(found: Any) -> bool:
    return isinstance(found, list) and all(type(i) is int for i in found)


def _require_same(client: HttpClient, tokenizer: Any, text: str, theirs: list[int] | int, way: str) -> None:
    ours = tokenizer.encode(text, add_special_tokens=False)
    # A server that was not asked through /tokenize may put its usual special tokens around a text.
    allowed = [ours] if way == "tokenize" else [ours, tokenizer.encode(text)]
    if theirs in (allowed if isinstance(theirs, list) else [len(ids) for ids in allowed]):
        return
    if isinstance(theirs, int):
        what = f"{len(ours)} tokens here and {theirs} there"
    else:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        here, there = (str(ids[at]) if at < len(ids) else "the end" for ids in (ours, theirs))
        what = f"token {at} is {here} here and {there} there"
    raise TokenizerError(
        f"{client.who}: {client.url} tokenizes differently: {what}, in the text {text[:60]!r}",
        where=_WHERE,
        fix="declare the model that the server runs, or start the server with the declared model and its tokenizer",
    )


def probe_texts(tokenizer: Any) -> list[str]:
    """What is compared: words, digits, bytes, blanks, special tokens, and an even choice from the vocabulary."""
    added = list(dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]))[:_SPECIAL]
    every = sorted(tokenizer.get_vocab().values())
    chosen = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, _PIECES).astype(int))]
    pieces = [tokenizer.decode([i]) for i in chosen]
    return [*_TEXTS, "a".join(added), " ".join(p for p in pieces if "\ufffd" not in p)]


def probe_ids(tokenizer: Any, vocabulary: Vocabulary) -> list[int]:
    """The fixed sequence that is scored: different ids, of text where the vocabulary has words for it."""
    ids = tokenizer.encode(_TEXTS[0], add_special_tokens=False)
    ids = list(dict.fromkeys(i for i in ids if i < vocabulary.size and vocabulary.allowed[i]))
    if len(ids) < _SCORED // 2:
        allowed = np.flatnonzero(vocabulary.allowed).tolist()
        ids = [allowed[i] for i in np.unique(np.linspace(0, len(allowed) - 1, _SCORED).astype(int))]
    return list(ids[:_SCORED])


@dataclass(frozen=True)
class _Asked:
    """The questions about logprobs, to one model of one server."""

    client: HttpClient
    served: str

    async def _ask(self, body: dict[str, Any], limit: int = 1 << 20) -> Answer:
        return await self.client.ask("POST", f"{self.client.url}/completions", body, where=_WHERE, limit=limit)

    async def _score(self, dialect: Dialect, ids: list[int], start: int = 1) -> tuple[Scores | None, str]:
        """Values of `ids[start:]`, or why there are none."""
        answer = await self._ask(score_body(dialect, self.served, ids), score_bytes(dialect, len(ids)))
        if not answer.ok:
            return None, answer.says
        return self._tried(answer, lambda found: read_scores(found, dialect, ids, start))

    def _tried(self, answer: Answer, read: Any) -> tuple[Any, str]:
        """What `read` makes of an answer, or why it cannot."""

        def attempt(found: Any) -> tuple[Any, str]:
            try:
                return read(found), ""
            except Malformed as error:
                return None, str(error)

        return self.client.read(answer, attempt, _WHERE)

    async def scoring(self, ids: list[int], k: int) -> tuple[Dialect | None, Scores | None, tuple[str, str] | None]:
        """The dialect that gives usable logprobs of `ids`, and those; or the reason and the remedy."""
        exact = Dialect("prompt_logprobs", EXACT_K, exact=True)
        values, _ = await self._score(exact, ids)
        if values is not None and values.entropy.max() > 0:
            return exact, values, None
        reasons = []
        for dialect in (
            Dialect("prompt_logprobs", k),
            Dialect("prompt_logprobs", k, ranks=False),
            Dialect("echo", k, generate=0, ranks=False),
            Dialect("echo", k, generate=1, ranks=False),
        ):
            values, reason = await self._score(dialect, ids)
            if values is not None:
                return dialect, values, None
            reasons.append(reason)
        fix = f"{SERVE} --max-logprobs {k}"
        return None, None, (f"asked for prompt_logprobs: {reasons[0]}; asked for echo: {reasons[2]}", fix)

    async def sampling(
        self, ids: list[int]
    ) -> tuple[Sample | None, Literal["raw", "processed", "unknown"], tuple[str, str] | None]:
        """A few sampled tokens and how their logprobs are meant; or the reason and the remedy."""
        plain = Sampling(seed=0, max_new_tokens=_SAMPLED)
        found = []
        for sampling in (plain, replace(plain, temperature=0.5, max_new_tokens=1)):
            answer = await self._ask(sample_body(self.served, ids, sampling, 1, [], logprobs=5))
            if not answer.ok:
                return None, "unknown", (answer.says, f"serve the model with vLLM: {SERVE}")
            sample, reason = self._tried(
                answer,
                lambda got, n=sampling.max_new_tokens: (read_sample(got, ids, n, frozenset()), _top(got)),
            )
            if sample is None:
                return None, "unknown", (reason, f"serve the model with vLLM: {SERVE}")
            found.append(sample)
        (sample, at_one), (_, at_half) = found
        return sample, _mode(at_one, at_half), None

    async def disagreement(self, dialect: Dialect, ids: list[int], sample: Sample) -> tuple[str, str] | None:
        """Whether the values of a prompt are those of the same tokens when they were sampled; the reason if not."""
        values, reason = await self._score(dialect, [*ids, *sample.ids], len(ids))
        fix = f"serve the model with a current vLLM: {SERVE}"
        if values is None:
            return reason, fix
        sampled = np.array(sample.logprobs)
        apart = float(np.abs(values.logprob - sampled).mean())
        if apart <= _DISAGREES:
            return None
        text = f"the logprobs of a prompt are {apart:.2f} nats from those of the same tokens when they were sampled"
        shifts = (values.logprob[1:] - sampled[:-1], values.logprob[:-1] - sampled[1:])
        if min(np.abs(s).mean() for s in shifts) < apart / 10:
            text += ": they are shifted by one position"
        return text, fix


def _top(answer: Any) -> dict[str, float]:
    """The logprobs listed at the first sampled position; empty where there are none."""
    top = answer["choices"][0]["logprobs"].get("top_logprobs")
    first = top[0] if isinstance(top, list) and top else None
    values = first.items() if isinstance(first, dict) else ()
    return {token: value for token, value in values if isinstance(value, float) and -1e3 < value <= 0}


def _mode(at_one: dict[str, float], at_half: dict[str, float]) -> Literal["raw", "processed", "unknown"]:
    """Halving the temperature doubles the distance of two logprobs, if they are those of the distribution sampled."""
    common = sorted(at_one.keys() & at_half.keys(), key=at_one.__getitem__)
    if len(common) < 2:
        return "unknown"
    before, after = (top[common[-1]] - top[common[0]] for top in (at_one, at_half))
    if before < _GAP:
        return "unknown"
    return "processed" if abs(after - 2 * before) < abs(after - before) else "raw"
