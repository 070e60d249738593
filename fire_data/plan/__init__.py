"""`fire plan`: what the coming rounds would make, skip or refuse, and cost. No model is loaded and nothing changes.

Plain arithmetic over manifests, receipts and the prompts: every number says whether it was measured in this run, given,
or assumed. Units: response tokens, bytes, seconds, GPU-hours.
"""

from __future__ import annotations

import shutil
from typing import Any

from fire_data.environment import memory
from fire_data.plan.figures import (
    Figure,
    bytes_per_row,
    bytes_per_token,
    derived,
    eval_length,
    mean_length,
    newest,
    product,
    receipts_of,
    tokens_per_s,
    total,
)
from fire_data.plan.models import models, training
from fire_data.plan.stages import NOT_COMPARED, Prompts, Work, eval_works, prompts_of, round_works
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError
from fire_data.schemas.tables import columns_of
from fire_data.shards import VERBS
from fire_data.steps.benchmarks import evaluated

COMMANDS = ("rollout", "score", "weigh", "train", "eval")
MANY_SHARDS = 10_000  # of a stage and round: from here on listing, sealing and looking take minutes (docs/scale.md)
LARGE_SHARD = 2_000_000  # tokens: a shard of scores is held several times, at some hundred bytes a token

Speeds = dict[str, float]


def plan(
    run: Run, rounds: int | None = None, *, speeds: Speeds | None = None, length: float | None = None
) -> dict[str, Any]:
    """The dry run, JSON-ready.

    Args:
        rounds: rounds in all, as `fire run --rounds`; None: up to the current one.
        speeds: response tokens per second of a command of `COMMANDS`.
        length: response tokens per trajectory.

    Raises ConfigError for a command that has no throughput, or a number that is not positive.
    """
    speeds = speeds or {}
    for name, value in speeds.items():
        if name not in COMMANDS or not value > 0:
            raise ConfigError(
                f"no throughput {name}={value:g}", where="--tokens-per-s", fix=f"one of {', '.join(COMMANDS)}, above 0"
            )
    if length is not None and not length > 0:
        raise ConfigError(f"a length of {length:g} tokens", where="--length", fix="--length 500")
    current = run.current_round()
    last = current + 1 if rounds is None else max(current, rounds)
    prompts, tokens = prompts_of(run), mean_length(run, length)
    rows = []
    if run.config.eval.prompts is not None and not evaluated(run, None):
        rows += [_row(run, "start", w, tokens, speeds) for w in eval_works(run, None)]
    for number in range(current, last):
        written = {r.shard: r.tokens for r in receipts_of(run.part("rollouts", number))}
        works = (*round_works(run, number, prompts), *eval_works(run, number))
        rows += [_row(run, number, work, tokens, speeds, written) for work in works]
    sizes = models(run)
    _add_checkpoints(run, rows, training(run, sizes[0]["parameters"]))
    made = {
        "run": str(run.root),
        "rounds": {"finished": current, "planned": list(range(current, last))},
        "stages": rows,
        "models": sizes,
        "training": training(run, sizes[0]["parameters"]),
        "totals": _totals(run, rows),
        "machine": {"disk_free": _free(run), "memory": _memory()},
        "prompts": _prompts(prompts),
        "length": tokens,
        "not_compared": NOT_COMPARED,
    }
    told: dict[str, Any] = _json({**made, "bottleneck": _bottleneck(made)})
    return told


def _row(
    run: Run, round: int | str, work: Work, length: Figure, speeds: Speeds, written: dict[str, int] | None = None
) -> dict[str, Any]:
    """What is left to do of a stage, and what it costs."""
    part, command, written = work.part, VERBS[work.part.stage], written or {}
    if part.stage == "evals":
        length = eval_length(run, part.name, length)
    units = work.units
    origin = "its plan" if part.manifest_path.exists() else "prompts and settings"
    prompts = Figure(float(units), "prompts", "given", origin)
    trajectories = derived(float(units * work.rows), "trajectories", f"{work.rows} per prompt", prompts)
    tokens = _tokens(work, {} if part.stage in ("rollouts", "evals") else written, length)
    speed = tokens_per_s(run, part.stage, part.name, command, speeds)
    seconds = derived(_ratio(tokens, speed), "seconds", f"tokens by tokens per second: {speed.how}", tokens, speed)
    if not tokens.value:
        seconds = derived(0.0, "seconds", "nothing to do", tokens)
    gpus = _gpus(run, part.stage)
    return {
        "round": round,
        "stage": part.stage if part.name is None else f"{part.stage}/{part.name}",
        "action": work.action,
        "why": work.why,
        "shards": {"planned": len(work.plan), "done": len(work.plan) - len(work.missing), "to_make": len(work.missing)}
        if part.stage != "checkpoints"
        else None,
        "steps": {"planned": work.steps, "left": work.steps_left} if part.stage == "checkpoints" else None,
        "prompts": prompts,
        "trajectories": trajectories,
        "tokens": tokens,
        "bytes": _bytes(run, work, tokens, trajectories),
        "tokens_per_s": speed,
        "seconds": seconds,
        "gpu_hours": derived(
            None if seconds.value is None or gpus.value is None else seconds.value / 3600 * gpus.value,
            "GPU-hours", f"seconds by {gpus.how}", seconds, gpus,
        ),
    }  # fmt: skip


def _tokens(work: Work, written: dict[str, int], length: Figure) -> Figure:
    """Response tokens that are left: as written where that is known, else trajectories by their mean length."""
    there = sum(written.get(s.name, 0) for s in work.missing)
    rest = sum(s.stop - s.start for s in work.missing if s.name not in written) * work.rows
    found = Figure(float(there), "tokens", "measured", "receipts of the rollouts")
    if rest:
        expected = derived(rest * (length.value or 0.0), "tokens", f"trajectories by mean length: {length.how}", length)
        found = derived(there + (expected.value or 0.0), "tokens", expected.how, found, expected)
    if work.steps:
        share = work.epochs * work.steps_left / work.steps
        found = derived((found.value or 0.0) * share, "tokens", f"{found.how}; steps left", found)
    return found


def _ratio(tokens: Figure, speed: Figure) -> float | None:
    return None if tokens.value is None or not speed.value else tokens.value / speed.value


def _bytes(run: Run, work: Work, tokens: Figure, trajectories: Figure) -> Figure:
    """What the missing shards of a table will take on disk."""
    part = work.part
    if part.stage == "checkpoints":
        return Figure(0.0, "bytes", "given", "nothing to do")
    if part.stage == "evals" or any(c.per == "token" for c in columns_of(part.table)):
        each = bytes_per_token(run, part.stage, part.name)
        if part.stage != "evals" or tokens.value is None:
            return product("bytes", f"{each.how}: {each.value:.3g} per token", tokens, each)
        tokens = trajectories  # their receipts count no tokens
    each = bytes_per_row(run, part.stage, part.name)
    return product("bytes", f"{each.how}: {each.value:.3g} per row", trajectories, each)


def _add_checkpoints(run: Run, rows: list[dict[str, Any]], sizes: dict[str, Figure]) -> None:
    """What training leaves on disk: a checkpoint a round, and the state to go on from, kept once or every round."""
    state_is_there = any((run.root / ".fire" / "train").glob("step-*"))
    for row in (r for r in rows if r["stage"] == "checkpoints" and r["action"] in ("make", "continue")):
        found = newest(run, "checkpoints", None)
        checkpoint = sizes["checkpoint"]
        if found is not None:
            checkpoint = Figure(float(sum(r.bytes for r in found[2])), "bytes", "measured", found[0].label)
        row["bytes"] = checkpoint
        if not state_is_there or run.config.train.keep_states == "all":
            both = (checkpoint.value or 0.0) + (sizes["state"].value or 0.0)
            how = f"checkpoint ({checkpoint.how}) and training state"
            row["bytes"] = derived(both, "bytes", how, checkpoint, sizes["state"])
            state_is_there = True


def _gpus(run: Run, stage: str) -> Figure:
    """GPUs that a stage keeps busy here."""
    cfg = run.config
    engine = {"rollouts": cfg.rollout.engine, "evals": cfg.rollout.engine, "scores": cfg.score.engine}.get(stage, "")
    engine = cfg.score.engine if stage == "addons" else engine
    device = cfg.train.device if stage == "checkpoints" else cfg.student.device
    if stage == "weights" or device == "cpu" or engine in ("fake", "http"):
        return Figure(0.0, "GPUs", "given", "no GPU here")
    if engine == "vllm":
        return Figure(float(cfg.vllm.tensor_parallel_size), "GPUs", "given", "vllm.tensor_parallel_size")
    return Figure(1.0, "GPUs", "given" if device.startswith("cuda") else "assumed", f"one GPU (device {device})")


def _totals(run: Run, rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Sums over what is planned; a refused stage adds nothing."""
    names = {"bytes": "bytes", "seconds": "seconds", "gpu_hours": "GPU-hours"}
    sums = {name: total([row[name] for row in rows], unit) for name, unit in names.items()}
    wrote = [row["tokens"] for row in rows if row["stage"] == "rollouts"]
    return {"tokens": total(wrote, "tokens"), **sums}


def _bottleneck(made: dict[str, Any]) -> dict[str, str]:
    """What stops the plan, or would first, or else where its time goes: with what to do about it."""
    rows, machine, totals = made["stages"], made["machine"], made["totals"]
    for row in rows:
        if row["action"] == "refused":
            return {"what": f"{row['stage']} of round {row['round']} is refused", "why": row["why"], "do": "see why"}
    free, needed = machine["disk_free"].value, totals["bytes"].value
    if free is not None and needed is not None and needed > free:
        why = f"{needed:.3g} bytes to write, {free:.3g} free"
        return {"what": "disk", "why": why, "do": "fewer rounds or prompts_per_round, or another disk"}
    held, memory = made["training"]["memory"].value, machine["memory"].value
    if held is not None and memory is not None and held > memory:
        why = f"training holds {held:.3g} bytes, this machine has {memory:.3g}; a GPU's memory is not looked at"
        return {"what": "memory of training", "why": why, "do": "a smaller student, or a larger machine"}
    for row in rows:
        count = row["shards"]["planned"] if row["shards"] else 0
        tokens = (row["tokens"].value or 0.0) / max(1, row["shards"]["to_make"]) if count else 0.0
        if count > MANY_SHARDS:
            why = f"{row['stage']} of round {row['round']} has {count:,} shards"
            return {"what": "number of shards", "why": why, "do": "a larger rollout.prompts_per_shard"}
        if tokens > LARGE_SHARD:
            why = f"{row['stage']} of round {row['round']} has {tokens:,.0f} tokens a shard, all in memory at once"
            return {"what": "size of shards", "why": why, "do": "a smaller rollout.prompts_per_shard"}
    return _slowest(rows, totals)


def _slowest(rows: list[dict[str, Any]], totals: dict[str, Figure]) -> dict[str, str]:
    busy = [row for row in rows if row["tokens"].value]
    unknown = list(dict.fromkeys(row["tokens_per_s"].how for row in busy if row["seconds"].value is None))
    spent: dict[str, float] = {}
    for row in busy:
        spent[row["stage"]] = spent.get(row["stage"], 0.0) + (row["seconds"].value or 0.0)
    if not busy:
        return {"what": "nothing", "why": "there is nothing left to do", "do": "a larger --rounds"}
    if unknown:
        return {"what": "time, which is not known", "why": "no throughput was measured", "do": " ".join(unknown)}
    stage = max(spent, key=lambda name: spent[name])
    share = spent[stage] / max(1e-9, totals["seconds"].value or 0.0)
    return {"what": f"time of {stage}", "why": f"{share:.0%} of all seconds", "do": _FASTER.get(stage, "more GPUs")}


_FASTER = {
    "rollouts": "rollout.engine: vllm, or more engines with --ray",
    "scores": "a larger score.tokens_per_batch, or more engines with --ray",
    "checkpoints": "a larger train.tokens_per_microbatch",
    "weights": "more CPU threads",
}


def _prompts(prompts: Prompts) -> Figure:
    if prompts.table is None:
        return Figure(None, "prompts", "given", str(prompts.error and prompts.error.what))
    return Figure(float(prompts.table.num_rows), "prompts", "given", "prompts.path")


def _free(run: Run) -> Figure:
    return Figure(float(shutil.disk_usage(run.root).free), "bytes", "measured", "free where the run is")


def _memory() -> Figure:
    found = memory()
    value = None if found is None else float(found)
    return Figure(value, "bytes", "measured", "main memory that this process may use")


def _json(value: Any) -> Any:
    """Figures as plain objects, at any depth."""
    if isinstance(value, Figure):
        return value.json()
    if isinstance(value, dict):
        return {name: _json(inner) for name, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list) else value
