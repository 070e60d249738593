"""From graded samples of a prompt to accuracies: means, pass@k and maj@k, exact over all draws of k samples."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def mean(values: Sequence[float]) -> float | None:
    """Correctly rounded mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right, from `correct` of n (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 if n - correct < k else 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[str | None], rewards: Sequence[float], k: int) -> float:
    """Expected reward of the majority vote over k of the samples: the mean over all draws of k without replacement.

    None abstains; where all drawn samples do, the reward is 0. Of answers with equally many votes one is drawn with
    equal chances, which is taken into account by its expectation, not by a random number. An answer's reward is the
    mean of those that gave it. Exact: draws are counted, not sampled.
    """
    given: dict[str, list[float]] = collections.defaultdict(list)
    for vote, reward in zip(votes, rewards, strict=True):
        if vote is not None:
            given[vote].append(reward)
    silent = len(votes) - sum(map(len, given.values()))
    expected = 0.0
    for vote, mine in given.items():
        worth = math.fsum(mine) / len(mine)
        if worth == 0.0:
            continue
        others = [len(theirs) for other, theirs in given.items() if other != vote]
        for j in range(1, min(k, len(mine)) + 1):
            ways = math.comb(len(mine), j)
            for ties, count in enumerate(_ways(others, silent, j, k - j)):
                expected += worth * (ways * count / math.comb(len(votes), k)) / (ties + 1)
    return expected


def per_prompt(rows: Iterable[Mapping[str, Any]], ks: Iterable[int]) -> dict[str, dict[str, float]]:
    """Metrics of an evaluation, each a value per prompt: greedy, avg@n, and pass@k and maj@k of n sampled responses.

    maj@k also for k = n, and for no k of 1, which is avg@n but for abstentions; it needs a verifier that finds answers.
    A response is right if its reward is above 1/2. `rows`: prompt_id, mode, reward, and vote or extracted.
    """
    greedy: dict[str, float] = {}
    sampled: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        if row["mode"] == "greedy":
            greedy[row["prompt_id"]] = row["reward"]
        else:
            sampled[row["prompt_id"]].append(row)
    found = {"greedy": greedy} if greedy else {}
    if not sampled:
        return found
    rewards = {prompt: [row["reward"] for row in mine] for prompt, mine in sampled.items()}
    votes = {prompt: [row.get("vote", row["extracted"]) for row in mine] for prompt, mine in sampled.items()}
    n = len(next(iter(rewards.values())))
    found[f"avg@{n}"] = {prompt: math.fsum(r) / len(r) for prompt, r in rewards.items()}
    for k in dict.fromkeys(ks):
        found[f"pass@{k}"] = {p: pass_at_k(len(r), sum(x > 0.5 for x in r), k) for p, r in rewards.items()}
    if any(vote is not None for mine in votes.values() for vote in mine):
        for k in sorted({*ks, n} - {1}):
            found[f"maj@{k}"] = {p: maj_at_k(votes[p], r, k) for p, r in rewards.items()}
    return found


def _ways(others: Sequence[int], silent: int, most: int, rest: int) -> list[int]:
    """In how many ways `rest` samples come from other answers, none with more than `most` votes, and from the silent.

    The list is over how many of the others have exactly `most` votes.
    """
    # found[ties][used]: ways so far.
    found = [[math.comb(silent, used) for used in range(rest + 1)]]
    for size in others:
        fresh = [[0] * (rest + 1) for _ in range(len(found) + 1)]
        for ties, row in enumerate(found):
            for used, ways in enumerate(row):
                if not ways:
                    continue
                for votes in range(min(size, most, rest - used) + 1):
                    fresh[ties + (votes == most)][used + votes] += ways * math.comb(size, votes)
        found = fresh
    return [row[rest] for row in found]
