"""`fire train`: execute the coefficients of a round in step order, then export the student for everyone else.

The fp32 masters and Adam moments under `.fire/train/` carry training from round to round; the exported checkpoint is a
rounded copy. A kill costs the steps since the last saved state and nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_data import contract, files, metrics, trackers
from fire_data.hub.redact import called
from fire_data.overview import start_over, train_anew
from fire_data.run import Run
from fire_data.schemas.config import TrainConfig
from fire_data.schemas.errors import DamagedError, FingerprintError, IncompleteError, TrainingError
from fire_data.schemas.manifest import Manifest, Receipt, differences
from fire_data.schemas.tables import FORMAT
from fire_data.session import Follows, Session
from fire_data.shards import Part, is_sealed, read_manifest, sealed, verify_checkpoint, versions
from fire_data.stages import Stage, finished, open_stage, seal
from fire_data.steps.track import following
from fire_data.steps.weigh import addon_tables, configured, weights_fields

if TYPE_CHECKING:
    from fire_data.batch import StepBatch

Sealed = tuple[Part, Manifest]


def train(session: Session, round: int, *, redo: bool = False) -> Manifest:
    """Train a round, or continue or confirm it, or train it anew. Returns the sealed manifest of its checkpoint."""
    from fire_data import distributed

    if not distributed.first():
        return _follow(session, round)
    run, cfg = session.run, session.run.config.train
    trackers.require(cfg.tracker)
    part = run.part("checkpoints", round)
    scores, weights = _inputs(run, round)
    topk = _topk(run, round, scores[1], weights)
    recorded = {"weights": cfg.weights or weights[0].name, **session.performance("train")}
    recorded["processes"] = distributed.size()
    stage = Stage(part, _fields(session, round, scores[1], weights[1], topk), (), recorded)
    contract.enforce_live(session, round, _read_addons(run, round, weights[1], topk))
    files.remove_leftovers(part.tmp)
    if redo:
        start_over(run, "checkpoints", round, session.report)
        session.unfollow()

    def waiting() -> None:
        session.report.note("another command trains this run: waiting for it to end")

    # Two trainers would interleave their states and metrics; shards have no such order and need no such lock.
    with files.locked(part.tmp / "train.lock", waiting):
        manifest = open_stage(stage)
        if manifest.sealed:
            try:
                verify_checkpoint(part, manifest)
                session.report.note(finished(part))
                return distributed.tell((manifest, False))[0]
            except DamagedError as error:
                session.report.warn(f"{error.what}: trying to export the checkpoint again from its training state")
        distributed.tell((manifest, True))
        stats = _Training(session, round, manifest.fingerprint, scores, weights, topk).finish()
        receipts = _receipts(part, manifest.fingerprint)
        return distributed.tell(seal(part, manifest, receipts, stats, stage.recorded))


def _follow(session: Session, round: int) -> Manifest:
    """The same steps as the first process, which opens and seals the stage, writes and reports."""
    from fire_data import distributed

    manifest, going = distributed.tell((Manifest.model_construct(), False))
    if not going:
        return manifest
    scores, weights = _inputs(session.run, round)
    topk = _topk(session.run, round, scores[1], weights)
    _Training(session, round, manifest.fingerprint, scores, weights, topk).finish()
    return distributed.tell(manifest)


def _inputs(run: Run, round: int) -> tuple[Sealed, Sealed]:
    scores_part, weights_part = run.part("scores", round), run.part("weights", round, run.config.trained_weights)
    scores, weights = sealed(scores_part), sealed(weights_part)
    if weights.fields["scores"] != scores.digest:
        text = f"{weights_part.label} was made from other scores than those that are there now"
        raise FingerprintError(text, where=str(weights_part.folder), fix=f"{weights_part.command} --redo")
    if run.config.trained_weights == run.config.weights_name:
        # Weights of another name are trained as they are; these are the ones the configuration describes.
        changed = differences(weights.fields, _expected(run, round, scores))
        if changed:
            text = f"{weights_part.label} was made with other settings than fire.yaml has now: " + "; ".join(changed)
            fix = f"set them in fire.yaml, or make the weights anew: {weights_part.command} --redo"
            raise FingerprintError(text, where=str(weights_part.folder), fix=fix)
    return (scores_part, scores), (weights_part, weights)


def _topk(run: Run, round: int, scores: Manifest, weights: Sealed) -> Sealed | None:
    """The addon that holds the teacher's top-k, for weights with a forward-KL term; None for all others."""
    if weights[1].fields.get("fkl_renormalise") is None:
        return None
    part = run.part("addons", round, "topk")
    if not is_sealed(part):
        text = f"{weights[0].label} has a forward-KL term on the teacher's top-k, and {part.label} is not finished"
        raise IncompleteError(text, where=str(part.folder), fix=part.command)
    part, topk = run.addon(round, "topk")
    theirs, mine = ({k: made.fields.get(k) for k in ("student", "teachers")} for made in (scores, topk))
    changed = differences(theirs, mine)
    if changed:
        text = f"{part.label} was made with other models than the scores: " + "; ".join(changed)
        raise FingerprintError(text, where=str(part.folder), fix=f"{part.command} --redo")
    return part, topk


def _read_addons(run: Run, round: int, weights: Manifest, topk: Sealed | None) -> list[Sealed]:
    """The sealed addons that the coefficients, or the forward-KL term, are made of."""
    names = dict.fromkeys([*(weights.fields.get("addons") or {}), *([str(topk[0].name)] if topk else [])])
    parts = [run.part("addons", round, name) for name in names]
    return [(p, made) for p in parts if (made := read_manifest(p)) is not None and made.sealed]


def _expected(run: Run, round: int, scores: Manifest) -> dict[str, Any]:
    rule = configured(run)
    return weights_fields(rule, scores, addon_tables(run, round, rule))


def _fields(session: Session, round: int, scores: Manifest, weights: Manifest, topk: Sealed | None) -> dict[str, Any]:
    student = session.student_fields(round)
    if scores.fields["student"] != student:
        text = "student_logprob was scored with another student than the one to be trained"
        part = session.run.part("scores", round)
        raise FingerprintError(text, where=part.label, fix=f"{part.command} --redo")
    return {
        "format": FORMAT,
        "train": session.run.config.train.executed(),
        "weights": session.run.config.trained_weights,
        "inputs": {
            "scores": scores.digest,
            "weights": weights.digest,
            **({"topk": topk[1].digest} if topk is not None else {}),
        },
        "student": student,
        "vocabulary": session.vocabulary_fields,
    }


class _Training:
    """The steps of one round with the state they change."""

    def __init__(
        self,
        session: Session,
        round: int,
        fingerprint: str,
        scores: Sealed,
        weights: Sealed,
        topk: Sealed | None,
    ) -> None:
        from fire_data import distributed, lora, models, optim, trainmode

        self.session, self.run, self.round, self.fingerprint = session, session.run, round, fingerprint
        self.cfg = session.run.config.train
        self.scores, self.weights, self.topk = scores, weights, topk
        self.steps = len(weights[1].stats["steps"])
        self.total = self.steps * self.cfg.epochs
        self.states = self.run.root / ".fire" / "train"
        start = self.run.config.student.model_copy(update={"device": distributed.load_device(self.cfg.device)})
        self.adapters: dict[str, Any] | None = None  # what they are and whose, for the training state
        if self.cfg.lora is not None:
            lora.require_peft()
            self.adapters = {**self.cfg.lora.results(), "student": session.student_fields(0)["weights"]}
        session.forget("student")
        self.model = models.load_model(start, self.run.root, dtype=_master_dtype(self.cfg.compute_dtype))
        if self.cfg.lora is not None:
            name = called(start.model, self.run.root)
            lora.attach(self.model, self.cfg.lora, self.run.config.seed, name, start.revision)
        self.head = models.head_of(self.model)
        distributed.shard(self.model, self.cfg.device)
        self.writes = distributed.first()
        if self.cfg.attention:  # the head was verified with the default one: flash attention cannot take fp32
            trainmode.use_attention(self.model, self.cfg.attention)
        self.optimizer = optim.make_optimizer(self.model, self.cfg)
        self.ratio: dict[str, float] = {}
        self.stopped: dict[str, Any] = {}
        self.nonfinite = 0  # steps of this round that were skipped for it
        self.follower: Follows | None = None
        self.global_step, self.done = self._restore()

    def finish(self) -> dict[str, Any]:
        """Do what is left of the round, save the state, export the checkpoint; the numbers for the manifest."""
        log = self.run.root / "metrics.jsonl"
        if self.done < self.total or self.total == 0:
            self._train(log)
        self._export()
        steps = metrics.steps(log, self.round)
        return {"global_step": self.global_step, "steps": self.total, **self.stopped, **metrics.summary(steps)}

    def _train(self, log: Path) -> None:
        report = self.session.report
        if self.writes:
            metrics.rewind(log, self.global_step, self.round, self.run.part("checkpoints", self.round).tmp)
            self.follower = following(self.session)
        self._tell_of_padding()
        report.start(f"train round-{self.round:03d}", self.total, "steps", self.done)
        for batch in self._batches():
            if self.done == 0:
                self._check(batch)
            tokens = self._step(batch, log)
            if self.stopped:
                break
            report.advance(1, tokens)
            if self.cfg.save_every and self.done % self.cfg.save_every == 0 and self.done < self.total:
                self._save()
        self._save()

    def _tell_of_padding(self) -> None:
        from fire_data.packed import wanted
        from fire_data.training import packs_rows

        if wanted(self.model, self.cfg.packing) and not packs_rows(self.model, self.cfg):
            text = "lets packed rows see each other: they are padded instead (train.packing: off says no more of it)"
            self.session.report.warn(f"{type(self.model).__name__} {text}")

    def _batches(self) -> Iterator[StepBatch]:
        from fire_data.stream import step_batches

        first = self.done % self.steps if self.done < self.total else self.steps
        epochs = range(self.done // self.steps if self.steps else 0, self.cfg.epochs)
        return itertools.chain.from_iterable(
            step_batches(self.scores, self.weights, first if i == 0 else 0, self.topk) for i, _ in enumerate(epochs)
        )

    def _step(self, batch: StepBatch, log: Path) -> int:
        """One optimizer step, or the end of the round in its place; the response tokens that it was about."""
        from fire_data.training import train_step

        # Until the first update nothing has moved: a bound within the noise of rounding would train nothing.
        numbers = train_step(
            self.model, self.head, self.optimizer, batch, self.cfg, self.session.vocabulary, self.global_step,
            gauge=self._applied() > 0,
        )  # fmt: skip
        place = {
            "global_step": self.global_step,
            "round": self.round,
            "epoch": self.done // self.steps,
            "step": batch.step,
        }
        record = place | numbers | self.ratio
        if self.writes:
            metrics.append(log, record)
        if self.follower is not None:
            self.follower.step(record)
        self.ratio = {}
        if "stopped_by" in numbers:
            self._stop(numbers)
        else:
            self.global_step += 1
            self.done += 1
        if "nonfinite" in numbers:
            self._endure(record)
        return int(numbers["tokens"])

    def _applied(self) -> int:
        """Steps of this round so far that moved the weights: not those without a kept token, nor those not finite."""
        kept: list[bool] = [s["kept_tokens"] > 0 for s in self.weights[1].stats["steps"]]
        epochs, rest = divmod(self.done, max(1, self.steps))
        return epochs * sum(kept) + sum(kept[:rest]) - self.nonfinite

    def _endure(self, record: dict[str, Any]) -> None:
        """Count a step that was skipped because a number was not finite; raise TrainingError where that is too much.

        Nothing is saved then: the same command does the steps since the last state again.
        """
        self.nonfinite += 1
        allowed = self.cfg.max_nonfinite_steps
        where = f"global step {record['global_step']} (step {record['step']} of round {self.round})"
        wrong = " and ".join(name for name in ("loss", "grad_norm") if record[name] is None)
        text = f"{wrong} not finite; the weights were not changed"
        if self.nonfinite > allowed:
            text += f" ({self.nonfinite} such steps in this round; train.max_nonfinite_steps is {allowed})"
        elif self.done == self.total and not self._applied():
            text += "; no step of the round was applied, its checkpoint would be the student it began with"
        else:
            self.session.report.warn(f"{where} was skipped: {text} ({self.nonfinite} of {allowed} allowed in a round)")
            return
        fix = "look at its scores and coefficients (fire inspect RUN), lower train.lr, or train in float32"
        raise TrainingError(text, where=where, fix=fix)

    def _stop(self, numbers: dict[str, Any]) -> None:
        """End the round at the steps that were applied: the policy has moved too far from the one that sampled."""
        unused = self.weights[1].stats["steps"][self.done :]
        self.stopped = {
            "stopped_at": self.global_step,
            "stopped_by": numbers["stopped_by"],
            "stopped_drift_kl": numbers["drift_kl"],
            "stopped_ess": numbers["ess"],
            "unused_steps": self.total - self.done,
            "unused_trajectories": sum(s["trajectories"] for s in unused),
        }
        self.total = self.done
        self.session.report.note(_stop_line(self.round, self.done, self.stopped, self.cfg))

    def _check(self, batch: StepBatch) -> None:
        """Before the first step: the data must be about this very model (DESIGN: ratio check)."""
        from fire_data.training import ratio_check, ratio_tolerance

        before = read_manifest(self.run.part("checkpoints", self.round - 1)) if self.round else None
        exported = [before.fields["train"]["export_dtype"]] if before else []
        tolerance = ratio_tolerance(self.cfg, self.run.config.student.dtype, *exported)
        found = ratio_check(self.model, self.head, batch, self.cfg, self.session.vocabulary, tolerance)
        self.ratio = {"ratio_check": found["ratio_mean_abs"], "ratio_tolerance": tolerance}

    def _save(self) -> None:
        from fire_data import trainstate

        meta = {
            "global_step": self.global_step,
            "round": self.round,
            "done": self.done,
            "total": self.total,
            "fingerprint": self.fingerprint,
            "adapters": self.adapters,
            **({"stopped": self.stopped} if self.stopped else {}),
            **({"nonfinite": self.nonfinite} if self.nonfinite else {}),
        }
        trainstate.save_state(
            self.states / f"step-{self.global_step:08d}-round-{self.round:03d}", self.model, self.optimizer, meta
        )
        if self.writes and self.cfg.keep_states == "last":
            trainstate.prune_states(self.states, keep=1)

    def _restore(self) -> tuple[int, int]:
        """(global step, steps of this round already done), from the newest state that fits or the given student."""
        from fire_data import lora, trainstate

        found = trainstate.whole_states(self.states)
        mine = [(p, m) for p, m in found if (m["round"], m["fingerprint"]) == (self.round, self.fingerprint)]
        before = [(p, m) for p, m in found if m["round"] == self.round - 1 and m["done"] == m["total"]]
        if mine or before:
            folder, meta = (mine or before)[0]
            last = self.run.part("checkpoints", max(self.round - 1, 0)).folder
            lora.require_same(meta.get("adapters"), self.adapters, str(folder), last)
            trainstate.load_state(folder, self.model, self.optimizer)
            if mine:  # a round that was ended early has fewer steps than were planned
                self.total, self.stopped = meta["total"], meta.get("stopped", {})
                self.nonfinite = meta.get("nonfinite", 0)
            return meta["global_step"], meta["done"] if mine else 0
        if found:
            newest = found[0][1]
            place = f"round {newest['round']}, step {newest['done']} of {newest['total']}"
            raise self._no_start(f"the training state is of {place}")
        if self.round:
            raise self._no_start(f"there is no training state at the end of round {self.round - 1}")
        return 0, 0

    def _no_start(self, what: str) -> IncompleteError:
        text = f"round {self.round} cannot start: {what}"
        return IncompleteError(text, where=str(self.states), fix=train_anew(self.run.root))

    def _export(self) -> None:
        from fire_data import trainstate

        part = self.run.part("checkpoints", self.round)
        if self.writes:
            files.set_aside([part.folder], part.orphans)
        with files.storage_errors(part.folder):
            scratch = files.temporary(part.tmp, part.folder.name)
        try:
            trainstate.export_checkpoint(scratch, self.model, self.session.tokenizer, self.cfg.export_dtype)
            if self.writes:
                files.publish_folder(scratch, part.folder)
        finally:
            files.remove(scratch)


def _master_dtype(compute: str) -> str:
    return "float64" if compute == "float64" else "float32"


def _stop_line(round: int, done: int, stopped: dict[str, Any], cfg: TrainConfig) -> str:
    """Why a round ended before its last step, for those who watch."""
    name = stopped["stopped_by"]
    what, side = ("drift_kl", "above") if name == "max_drift_kl" else ("ess", "below")
    return (
        f"round {round} ended after {done} of {done + stopped['unused_steps']} steps: {what} "
        f"{stopped[f'stopped_{what}']:.3g} is {side} train.{name} {getattr(cfg, name):g}; "
        f"{stopped['unused_trajectories']} trajectories were not used; the next round samples afresh"
    )


def _receipts(part: Part, fingerprint: str) -> list[Receipt]:
    """One receipt per file of the checkpoint."""
    if not part.folder.is_dir():
        raise DamagedError("the checkpoint vanished", where=str(part.folder), fix=part.command)
    with files.storage_errors(part.folder):
        found = sorted((p.relative_to(part.folder).as_posix(), p) for p in part.folder.rglob("*") if p.is_file())
        return [
            Receipt(
                shard=name, sha256=files.sha256_file(p), bytes=p.stat().st_size, rows=0, tokens=0,
                fingerprint=fingerprint, versions=versions(),
            )
            for name, p in found
        ]  # fmt: skip
