"""A model behind a URL: generates and scores through any completions server that takes and gives token ids.

Only ids travel, never text, so nothing is tokenized twice. Before any work `probe` asks the server what it is: the
declared model, the same tokenizer, enough context, and how its logprobs are meant; what it lacks is an error then.
Entropies are exact where the server runs this project's extension of vLLM, else lower bounds from the listed tokens.

A server samples and scores over all ids of its model. Ids that are not in `vocabulary` cannot be masked there: a list
of 150,000 would have to travel with every request. A response that holds one is drawn again, with another seed, a few
times; scores are the server's own, and a listed id with notable probability is told. Both matter only for models with
tokens that the other lacks; the transformers engine masks.

Seeds belong to (seed, trajectory, draw), so equal requests ask for equal samples; what a server makes of a seed may
still depend on what else it is doing. Units: nats.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from fire_data.http_client import HttpClient, Warn
from fire_data.http_dialect import (
    Dialect,
    Sample,
    Scores,
    read_sample,
    read_scores,
    sample_body,
    sample_bytes,
    score_body,
    score_bytes,
)
from fire_data.http_probe import Abilities, examine
from fire_data.sampling import Sampling, seed_of
from fire_data.schemas.config import HttpConfig
from fire_data.schemas.errors import ConfigError, DataError, EngineError, PartialError
from fire_data.schemas.tables import EVALUATED, FLOATS, IDS, TOPK_BOUND
from fire_data.vocabulary import Vocabulary

T = TypeVar("T")
Progress = Callable[[int], None]

_DRAWS = 4  # of one response, until it holds no id that is not allowed
_NOTABLE = 0.01  # probability of such an id that is worth a warning


class HttpEngine:
    """Generator and Evaluator against `{url}/completions`. Any number of threads may call it; `probe` comes first.

    Args:
        url: base address, http://host:8000/v1.
        served_name: what the server calls the model; None: `model`.
        model: the declared model, a Hub id or folder.
        api_key: sent in the Authorization header alone.
        entropy_topk: tokens listed per position where the server has no exact entropy.
        who: what messages call this model.
        warn: told, from another thread, when the server goes away and comes back.

    Raises:
        ConfigError: the url or the key cannot be used.
    """

    holds_gpu = False

    def __init__(
        self, url: str, served_name: str | None = None, *, model: str, settings: HttpConfig, api_key: str | None,
        vocabulary: Vocabulary, stop_ids: frozenset[int], entropy_topk: int, who: str, warn: Warn | None = None,
    ) -> None:  # fmt: skip
        self.client = HttpClient(url, settings=settings, api_key=api_key, who=who, warn=warn)
        self.who = who
        self.vocabulary = vocabulary
        self.stop_ids = stop_ids
        self.entropy_topk = min(entropy_topk, vocabulary.size)
        self._names = (model, served_name)
        self._abilities: Abilities | None = None
        self._warn = warn or (lambda _text: None)
        self._warned = threading.Lock()  # taken once and never given back

    @property
    def entropy_kind(self) -> str:
        """exact or topk-lower-bound; known after `probe`."""
        found = self._abilities
        return "exact" if found is not None and found.scoring is not None and found.scoring.exact else TOPK_BOUND

    def probe(self, tokenizer: Any, longest: int, sampling: Sampling | None = None) -> dict[str, Any]:
        """Find out what the server is and can do; JSON-ready.

        Args:
            tokenizer: of the declared model.
            longest: tokens of the longest prompt and response together.
            sampling: how responses will be drawn; None if the server is to score.

        Raises:
            ConfigError: another model, too small a context, or no means for what is asked of it.
            TokenizerError: it tokenizes differently.
            EngineError: it cannot be reached, or its answers cannot be used.
        """
        model, served = self._names
        found = examine(
            self.client, model, served, tokenizer, self.vocabulary, self.entropy_topk, longest, sampling is None
        )
        self._abilities = found
        if sampling is None:
            self._scoring()
        else:
            self._require_sampling(sampling)
        return found.record(self.client.url)

    def evaluate(self, rows: pa.Table, progress: Progress | None = None) -> pa.Table:
        """The columns of `tables.EVALUATED`, row by row as in `rows` {trajectory_id, prompt_ids, response_ids}.

        Raises:
            DataError: a row has response tokens but no prompt token to predict the first from.
            PartialError: the server is gone, refuses or answers nonsense; `done` has the rows that were finished.
        """
        dialect, model = self._scoring()
        names, prompts, responses = (rows[c].to_pylist() for c in ("trajectory_id", "prompt_ids", "response_ids"))
        for row, (name, prompt, response) in enumerate(zip(names, prompts, responses, strict=True)):
            if response and not prompt:
                raise DataError("a response without any prompt token has no first prediction", where=_row(row, name))

        async def score(row: int) -> Scores | None:
            prompt, response = prompts[row], responses[row]
            if not response:
                return None
            ids = [*prompt, *response]
            return await self._post(
                score_body(dialect, model, ids), lambda answer: read_scores(answer, dialect, ids, len(prompt)),
                _row(row, names[row]), score_bytes(dialect, len(ids)),
            )  # fmt: skip

        def table(done: Sequence[Scores | None]) -> pa.Table:
            for scores in done:
                self._look_at_foreign_ids(scores)
            return _evaluated(done, dialect)

        return self._rows(names, score, table, progress)

    def generate(self, requests: pa.Table, sampling: Sampling, progress: Progress | None = None) -> pa.Table:
        """Responses to requests {trajectory_id, prompt_ids}: `response_ids`, `rollout_logprob`, `finish_reason`.

        Raises:
            ConfigError: the server's logprobs would not be those of the distribution sampled from.
            DataError: a prompt is empty, or every draw of a response held an id that is not allowed.
            PartialError: as for `evaluate`.
        """
        model = self._require_sampling(sampling)
        names, prompts = requests["trajectory_id"].to_pylist(), requests["prompt_ids"].to_pylist()
        for row, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            if not prompt:
                raise DataError("the prompt has no tokens", where=f"{_row(row, name)}, column 'prompt_ids'")
        stops = [i for i in sorted(self.stop_ids) if self._is_allowed(i)]

        async def draw(row: int) -> Sample:
            prompt, name = prompts[row], names[row]
            foreign = -1
            for attempt in range(1 if sampling.greedy else _DRAWS):
                body = sample_body(model, prompt, sampling, seed_of(sampling.seed, name, attempt), stops)
                sample = await self._post(
                    body, lambda answer: read_sample(answer, prompt, sampling.max_new_tokens, frozenset(stops)),
                    _row(row, name), sample_bytes(len(prompt) + sampling.max_new_tokens),
                )  # fmt: skip
                foreign = next((i for i in sample.ids if not self._is_allowed(i)), -1)
                if foreign < 0:
                    return sample
            raise DataError(
                f"{self.who}: the server writes id {foreign}, which is not a token of all models of the run",
                where=_row(row, name),
                fix="rollout.engine: transformers or vllm, which can leave out such ids; or models with one vocabulary",
            )

        return self._rows(names, draw, _generated, progress)

    def close(self) -> None:
        """End all requests in flight; calls that wait for them raise EngineError."""
        self.client.close()

    def _rows(
        self, names: list[str], work: Callable[[int], Coroutine[Any, Any, T]],
        table: Callable[[Sequence[T]], pa.Table], progress: Progress | None,
    ) -> pa.Table:  # fmt: skip
        """`table` of what `work` gives for every row; PartialError with the finished ones if the server stops it."""
        found: dict[int, T] = {}

        def finished(row: int, result: T) -> None:
            found[row] = result
            if progress:
                progress(1)

        try:
            self.client.calls.each(len(names), work, finished)
        except (EngineError, ConfigError) as error:
            order = sorted(found)
            done = table([found[i] for i in order])
            done = done.add_column(0, "trajectory_id", pa.array([names[i] for i in order], pa.string()))
            raise PartialError(error.what, where=error.where, fix=error.fix, done=done) from error
        return table([found[i] for i in range(len(names))])

    async def _post(self, body: dict[str, Any], read: Callable[[Any], T], where: str, limit: int) -> T:
        return await self.client.post(f"{self.client.url}/completions", body, read, where=where, limit=limit)

    def _scoring(self) -> tuple[Dialect, str]:
        found = self._probed()
        if found.scoring is None:
            reason, fix = found.cannot_score or ("no dialect", "")
            text = f"{self.who}: {self.client.url} cannot score, it gives no usable logprobs of prompt tokens: {reason}"
            raise ConfigError(text, fix=fix)
        return found.scoring, found.served

    def _require_sampling(self, sampling: Sampling) -> str:
        found = self._probed()
        if found.cannot_sample:
            reason, fix = found.cannot_sample
            raise ConfigError(f"{self.who}: {self.client.url} cannot be used for rollouts: {reason}", fix=fix)
        plain = sampling.temperature == 1.0 and sampling.top_p == 1.0 and not sampling.top_k
        if not plain and not sampling.greedy and found.logprobs != "processed":
            raise ConfigError(
                f"{self.who}: {self.client.url} reports logprobs at temperature 1 over all tokens, not those of the "
                "distribution that temperature, top_p and top_k make: rollout_logprob would be wrong",
                fix="start the server with --logprobs-mode processed_logprobs, or set rollout.temperature: 1, top_p: 1",
            )
        return found.served

    def _probed(self) -> Abilities:
        if self._abilities is None:
            raise EngineError(f"{self.who}: the server was not probed", fix="call probe(tokenizer, longest) first")
        return self._abilities

    def _is_allowed(self, i: int) -> bool:
        return i < self.vocabulary.size and bool(self.vocabulary.allowed[i])

    def _look_at_foreign_ids(self, scores: Scores | None) -> None:
        """Warn once where an id that is not allowed has notable probability: the values are not those of our mask."""
        if scores is None or self._warned.locked():
            return
        inside = (scores.top_ids >= 0) & (scores.top_ids < self.vocabulary.size)
        inside[inside] = self.vocabulary.allowed[scores.top_ids[inside]]
        share = np.where(~inside, np.exp(scores.top_logprobs), 0.0)
        if share.max(initial=0.0) > _NOTABLE and self._warned.acquire(blocking=False):
            self._warn(
                f"{self.who}: the server gives id {scores.top_ids.flat[share.argmax()]}, which not all models have, "
                f"probability {share.max():.2f} at some place; its values are over all its own ids"
            )


def probe_difference(old: dict[str, Any], new: dict[str, Any]) -> float | None:
    """Largest difference in nats of two probes' logprobs of the same tokens; None if they cannot be compared."""
    before, after = old.get("probe_logprobs"), new.get("probe_logprobs")
    if not before or not after or old.get("probe_ids") != new.get("probe_ids") or len(before) != len(after):
        return None
    return float(max(abs(a - b) for a, b in zip(before, after, strict=True)))


def _evaluated(rows: Sequence[Scores | None], dialect: Dialect) -> pa.Table:
    missing = {"rank"} if not dialect.ranks else set()
    missing |= {"entropy_mass"} if dialect.exact else set()
    fields = {"entropy_mass": "mass"}
    columns = [c for c in EVALUATED if c.name not in missing]
    arrays = {}
    for column in columns:
        kind = column.type.value_type.to_pandas_dtype()
        values = [() if r is None else getattr(r, fields.get(column.name, column.name)).astype(kind) for r in rows]
        arrays[column.name] = pa.array(values, column.type)
    return pa.table(arrays)


def _generated(rows: Sequence[Sample]) -> pa.Table:
    return pa.table(
        {
            "response_ids": pa.array([r.ids for r in rows], IDS),
            "rollout_logprob": pa.array([r.logprobs for r in rows], FLOATS),
            "finish_reason": pa.array([r.finish_reason for r in rows], pa.string()),
        }
    )


def _row(row: int, name: str) -> str:
    return f"row {row} (trajectory {name})"
