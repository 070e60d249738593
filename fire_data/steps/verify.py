"""`fire verify`: grades stored rollouts and keeps the rewards beside them, row by row. No model is loaded.

The rewards are an addon of the round like any other: receipts, a seal, `--redo`; a rule that reads `reward` takes them
in place of what the rollouts have. Other settings of `verify` are other rewards.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from fire_data.overview import start_over
from fire_data.prompts import read_prompts
from fire_data.run import Run
from fire_data.schemas.manifest import Manifest, Receipt, Shard
from fire_data.schemas.tables import FORMAT, REWARD, conform
from fire_data.shards import Part, read_shard, sealed
from fire_data.stages import Reporter, Silent, Stage, run_stage
from fire_data.verify import Verifier, mean, tally
from fire_data.verify.answers import TIMEOUT, UNGRADED

_PROMPT = ["prompt_id", "answer", "extra"]
_READ = ["trajectory_id", "response", "answer", "extra"]
_LATE = 0.01  # of the responses, from which on it is worth a word


def verify(run: Run, round: int, report: Reporter | None = None, *, redo: bool = False) -> Manifest:
    """Make, continue or confirm the rewards of a round, or make them anew. Returns the sealed manifest.

    Raises ConfigError as `Verifier.start`, DataError if no response could be graded.
    """
    report = report or Silent()
    source_part, part = run.part("rollouts", round), run.part("addons", round, REWARD)
    source = sealed(source_part)
    receipts = {r.shard: r for r in source.shards}
    with Verifier(run.config.verify, run.root) as verifier:
        fields = {"format": FORMAT, "verify": verifier.fields, "rollouts": source.digest}
        stage = Stage(part, fields, source.plan, {"verify": run.config.verify.performance()})

        def ready(_: list[Shard]) -> None:
            _require_some(verifier, source_part, source)
            for warning in verifier.start():
                report.warn(warning)

        def make(shard: Shard) -> pa.Table:
            rows = read_shard(source_part, receipts[shard.name], _READ).to_pydict()
            graded = verifier.grade(rows["response"], rows["answer"], rows["extra"])
            columns = {
                "trajectory_id": pa.array(rows["trajectory_id"], pa.string()),
                "reward": pa.array([g.reward for g in graded], pa.float32()),
                "extracted": pa.array([g.extracted for g in graded], pa.string()),
                "verdict": pa.array([g.verdict for g in graded], pa.string()),
            }
            return conform(pa.table(columns), part.table, f"{part.label}, shard {shard.name}")

        def finish(done: list[Receipt]) -> dict[str, Any]:
            stage.recorded["verify"] |= verifier.recorded
            tables = [read_shard(part, r, ["reward", "verdict"]) for r in done]
            rewards = [x for t in tables for x in t["reward"].to_pylist()]
            verdicts = tally([x for t in tables for x in t["verdict"].to_pylist()])
            graded = [x for x in rewards if x is not None]
            if doubt := verifier.doubt(graded):
                report.warn(doubt)
            return {"trajectories": len(rewards), "mean_reward": mean(graded), "verdicts": verdicts}

        if redo:
            ready([])  # what is wrong is told before anything is set aside
            start_over(run, "addons", round, report, REWARD)
        manifest = run_stage(stage, make, finish, report, before=ready)
    _tell(manifest, report)
    return manifest


def check_prompts(run: Run) -> None:
    """Raise, before an hour of sampling, what `verify` would about prompts that a rule needs a reward for."""
    prompts = read_prompts(run.config.prompts.path, run.root)
    with Verifier(run.config.verify, run.root) as verifier:
        verifier.start()
        verifier.check(prompts.to_pylist(), run.config.prompts.path, "correct the prompts, or --set verify.kind=KIND")


def _require_some(verifier: Verifier, part: Part, source: Manifest) -> None:
    """Raise DataError, about the first prompt, if there is none whose responses can be graded."""
    first = None
    for receipt in source.shards:
        for row in read_shard(part, receipt, _PROMPT).to_pylist():
            if verifier.reason(row["answer"], row["extra"]) is None:
                return
            first = first or row
    if first is not None:
        verifier.check([first], part.label, f"correct the prompts, then: {part.command} --redo; or another --kind")


def _tell(manifest: Manifest, report: Reporter) -> None:
    """Warn of responses without a reward, and of many that took too long."""
    verdicts, total = manifest.stats["verdicts"], manifest.stats["trajectories"]
    ungraded, late = verdicts.get(UNGRADED, 0), verdicts.get(TIMEOUT, 0)
    if ungraded:
        report.warn(f"{ungraded:,} of {total:,} responses have no reward: their prompts have nothing to compare with")
    if late > _LATE * total:
        report.warn(f"{late:,} of {total:,} responses took longer than verify.timeout_s to grade: their reward is 0")
