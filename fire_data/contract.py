"""Whether models still read ids and write prompts as the sealed tables say: what `weigh` and `train` insist on.

A number in a table is about ids behind a prompt. With another tokenizer, template or system message it is about other
text, and nothing in it shows. So manifests are compared with each other, and the models that the configuration names
now with the manifests. `weigh` loads no model: the files that decide are hashed, and whoever had the tokenizer loaded
recorded what files with this hash mean. Only for files nobody has seen a tokenizer is loaded, so that a difference
without consequence passes. Nothing is fetched: what is not on this machine is told, not compared.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fire_data import chat, vocabulary
from fire_data.run import Run
from fire_data.schemas.config import ADDED_TEACHER, TEACHER, ModelConfig
from fire_data.schemas.errors import ConfigError, DataError, FingerprintError
from fire_data.schemas.manifest import Manifest, differences, digest
from fire_data.shards import Part, read_manifest, sealed
from fire_data.stages import Reporter

if TYPE_CHECKING:
    from fire_data.session import Session

Facts: TypeAlias = dict[str, Any]
Made: TypeAlias = tuple[Part, Manifest]

STUDENT = "student"
_PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "writer": STUDENT}
_DECIDING = (
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model",
    "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip


def enforce(run: Run, round: int, addons: Sequence[Made], report: Reporter) -> dict[str, Any]:
    """Compare the tables that weights are made of with each other and with the models named now, without loading these.

    Warns of sampling that was not from the student's full distribution, where no correction for it is asked for.

    Args:
        addons: those whose columns are read.

    Returns:
        What the manifest of the weights records of how the rollouts were sampled.

    Raises:
        FingerprintError: they differ in tokenizer, allowed ids, template, system message or model; the message names
            each difference and the command that makes the tables anew.
    """
    sources = _sources(run, round)
    _insist(sources, addons, functools.partial(_on_disk, run, report=report))
    sampling = _sampling(sources)
    told = truncation(sampling)
    if told and run.config.weigh.rollout_is_cap is None:
        report.warn(
            f"the rollouts were sampled with {told}, not from the student's full distribution, and the coefficients "
            "are not corrected for it (--set weigh.rollout_is_cap=5 does so, up to that factor)"
        )
    return {"sampling": sampling} if sampling else {}


def enforce_live(session: Session, round: int, addons: Sequence[Made] = ()) -> None:
    """As `enforce`, for a process that has the tokenizers: every model is compared exactly. Raises FingerprintError."""
    _insist(_sources(session.run, round), addons, functools.partial(_in_session, session))


def attest(session: Session, teachers: Iterable[str] = ()) -> dict[str, dict[str, str]]:
    """What the files of student and teachers mean, by their digest: for `recorded`, where `enforce` looks it up."""
    run, cfg, found = session.run, session.run.config, {}
    for who in (STUDENT, *teachers):
        model = cfg.student if who == STUDENT else run.teacher(who)
        files = files_digest(model, run.root)
        if files is None:
            continue
        if who == STUDENT:
            found[who] = {"files": files, "tokenizer": session.vocabulary_fields["tokenizer"]}
        else:
            found[who] = {"files": files, "tokenizer": vocabulary.fingerprint(session.teacher_tokenizer(who))}
        if _templated(run, who):
            found[who]["chat_template"] = session.template_fields(None if who == STUDENT else who)
    return found


def truncation(sampling: Mapping[str, Any]) -> str:
    """`temperature 0.7, top_p 0.9`: how sampling differs from the student's full distribution; "" if not."""
    return ", ".join(f"{k} {sampling[k]}" for k, plain in _PLAIN.items() if sampling.get(k, plain) != plain)


def sampling_of(rollouts: Manifest) -> dict[str, Any]:
    """Temperature, top-p and top-k of sealed rollouts, and who wrote them if that was not the student."""
    return {k: v for k in _PLAIN if (v := rollouts.fields["rollout"].get(k, STUDENT)) != STUDENT}


def facts(made: Manifest) -> Facts:
    """What a manifest says of models and prompts, by the names these have in the configuration.

    A teacher behind a server is the same teacher: where it runs is no fact.
    """
    fields = made.fields
    found = {f"student.{k}": v for k, v in (fields.get("student") or {}).items()}
    ids = fields.get("vocabulary") or {}
    if "tokenizer" in ids:  # else they are those of a reference model, which may lack some
        found |= {"student.tokenizer": ids["tokenizer"], **{f"vocabulary.{k}": ids[k] for k in ("size", "allowed")}}
    if made.stage == "rollouts":
        found["rollout.raw"] = fields["template"] == "raw"
        found |= {} if found["rollout.raw"] else {"student.chat_template": fields["template"]}
    teachers = dict(fields["teachers"]) if "teachers" in fields else {}
    if made.stage == "addons" and "teacher" in fields:
        teachers[(made.name or "").removeprefix(ADDED_TEACHER)] = fields["teacher"]
    for name, told in teachers.items():
        key = _key(name)
        found |= {f"{key}.{k}": told.get(k) for k in ("weights", "dtype", "tokenizer", "system")}
        shared = told["template"] == "shared"
        found["score.teacher_prompt"] = "shared" if shared else "own"
        found |= {} if shared else {f"{key}.chat_template": told["template"]}
    return found


def files_digest(cfg: ModelConfig, base: Path) -> str | None:
    """sha256 (hex) of all that decides how a model reads ids and writes prompts; None if the model is not here.

    Covered are the files of its tokenizer and its config.json (rows of the output matrix), a template file of the
    configuration and the template's arguments. `base` is the folder that paths of the configuration are relative to.
    """
    folder = model_folder(cfg, base)
    if folder is None:
        return None
    patterns = (*_DECIDING, *(("*.py",) if cfg.trust_remote_code else ()))
    paths = {p.relative_to(folder).as_posix(): p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    if cfg.chat_template:
        paths["chat_template of fire.yaml"] = base / Path(cfg.chat_template).expanduser()
    contents = {name: _sha256(path) for name, path in paths.items()}
    return digest([contents, cfg.chat_template_kwargs])


def model_folder(cfg: ModelConfig, base: Path) -> Path | None:
    """Where a model's files lie on this machine, a Hub model's in the cache; None if they are not here."""
    path = base / Path(cfg.model).expanduser()
    if path.exists():
        return path if path.is_dir() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(cfg.model, "config.json", revision=cfg.revision)
    except HFValidationError:  # a path, then, that leads nowhere here
        return None
    return Path(found).parent if isinstance(found, str) else None


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _key(teacher: str) -> str:
    return teacher if teacher == TEACHER else f"teachers.{teacher}"


def _templated(run: Run, who: str) -> bool:
    """True if a model's own chat template writes prompts."""
    return not run.config.rollout.raw if who == STUDENT else run.config.score.teacher_prompt == "own"


def _sources(run: Run, round: int) -> list[Made]:
    """The scores of a round and, before them, its rollouts, which may not be here."""
    rollouts, scores = run.part("rollouts", round), run.part("scores", round)
    wrote = read_manifest(rollouts)
    return [*([(rollouts, wrote)] if wrote is not None and wrote.sealed else []), (scores, sealed(scores))]


def _sampling(sources: Sequence[Made]) -> dict[str, Any]:
    """How the rollouts were sampled, by their manifest or else by what scoring recorded; empty if nobody knows."""
    first, scores = sources[0][1], sources[-1][1]
    return sampling_of(first) if first.stage == "rollouts" else dict(scores.recorded.get("sampling") or {})


def _insist(sources: Sequence[Made], addons: Sequence[Made], look: Callable[[Sequence[Manifest]], Facts]) -> None:
    """Raise FingerprintError if the facts of now, as `look` finds them, or the tables among each other differ."""
    _require_agreement(sources)
    made = (*sources, *addons)
    now = look([manifest for _, manifest in made])
    for part, manifest in made:
        changed = _differing(facts(manifest), now)
        if changed:
            text = f"{part.label} is about other ids or prompts than the models that fire.yaml names now: "
            fix = f"set back what differs (settings, or files of the model), or: {part.command} --redo"
            raise FingerprintError(text + "; ".join(changed), where=str(part.manifest_path), fix=fix)
    _require_agreement([sources[-1], *addons])


def _require_agreement(made: Sequence[Made]) -> None:
    """Raise FingerprintError if a table was made with other models or prompts than the first."""
    (first, known), *others = made
    for part, manifest in others:
        changed = _differing(facts(known), facts(manifest))
        if changed:
            text = f"{part.label} was made with other models or prompts than {first.label}: " + "; ".join(changed)
            fix = f"{part.command} --redo"
            if part.stage == "addons":
                fix += f" (if {first.label} is what is out of date: {first.command} --redo)"
            raise FingerprintError(text, where=str(part.manifest_path), fix=fix)


def _differing(known: Facts, now: Facts) -> list[str]:
    """The names, with both values, of what both tell and tell differently."""
    both = known.keys() & now.keys()
    return differences({k: known[k] for k in both}, {k: now[k] for k in both})


def _settings(run: Run) -> Facts:
    """What the configuration alone decides."""
    cfg = run.config
    systems = {f"{_key(name)}.system": model.system for name, model in run.teachers.items()}
    return {"rollout.raw": cfg.rollout.raw, "score.teacher_prompt": cfg.score.teacher_prompt, **systems}


def _in_session(session: Session, made: Sequence[Manifest]) -> Facts:
    """The facts of now, from tokenizers that are loaded anyway; of teachers, those that the manifests tell of."""
    ids, told = session.vocabulary_fields, _told(made)
    now = {"student.tokenizer": ids["tokenizer"], **{f"vocabulary.{k}": ids[k] for k in ("size", "allowed")}}
    now |= _settings(session.run)
    if _templated(session.run, STUDENT):
        now["student.chat_template"] = session.template_fields()
    for name in (n for n in session.run.teachers if f"{_key(n)}.tokenizer" in told):
        now[f"{_key(name)}.tokenizer"] = vocabulary.fingerprint(session.teacher_tokenizer(name))
        if _templated(session.run, name):
            now[f"{_key(name)}.chat_template"] = session.template_fields(name)
    return now


def _told(made: Sequence[Manifest]) -> set[str]:
    return {key for manifest in made for key in facts(manifest)}


def _on_disk(run: Run, made: Sequence[Manifest], *, report: Reporter) -> Facts:
    """The facts of now, from the files of the models that are here; a tokenizer is loaded only for unknown files."""
    models = {STUDENT: run.config.student, **run.teachers}
    files = {who: files_digest(cfg, run.root) for who, cfg in models.items()}
    absent = [f"{who} ({models[who].model})" for who, found in files.items() if found is None]
    if absent:
        report.note(f"not on this machine, so not compared with the tables: {', '.join(absent)}")
    load = functools.cache(lambda who: _tokenizer(run, who, models[who], report))
    told, known, now = _told(made), _attested(made), _settings(run)
    for who, found in files.items():
        key = who if who == STUDENT else _key(who)
        if found is None or f"{key}.tokenizer" not in told:
            continue
        wanted = ["tokenizer", *(["chat_template"] if _templated(run, who) else [])]
        meant = known.get(found, {})
        if not meant.keys() >= set(wanted):
            meant = _meaning(run, who, models[who], load(who), report)
        now |= {f"{key}.{k}": meant[k] for k in wanted if k in meant}
    if not absent and set(files.values()) != _scored(made):
        now |= _allowed(run, models, [load(who) for who in models], report)
    return now


def _attested(made: Sequence[Manifest]) -> dict[str, dict[str, str]]:
    """What is known of files, by their digest: whatever was recorded when a tokenizer was loaded."""
    known: dict[str, dict[str, str]] = {}
    for told in (t for manifest in made for t in (manifest.recorded.get("reads") or {}).values()):
        known.setdefault(told["files"], {}).update(told)
    return known


def _scored(made: Sequence[Manifest]) -> set[str]:
    """The digests of the files of all models whose common ids are those of the scores."""
    return {t["files"] for m in made if m.stage == "scores" for t in (m.recorded.get("reads") or {}).values()}


def _tokenizer(run: Run, who: str, cfg: ModelConfig, report: Reporter) -> Any:
    """A model's tokenizer from the files that are here; None, and a warning, if they cannot be read here."""
    from fire_data import models

    report.busy(f"reading the tokenizer of {who}")
    try:
        return models.load_tokenizer(_here(run, cfg), run.root)
    except (DataError, ImportError) as error:
        report.warn(
            f"the files that say how {who} ({cfg.model}) reads ids are not those of the tables, and are not compared: "
            f"{error.what if isinstance(error, DataError) else error}"
        )
        return None


def _here(run: Run, cfg: ModelConfig) -> ModelConfig:
    """The configuration of a model by its folder on this machine, so that nobody asks the Hub for a newer one."""
    return cfg.model_copy(update={"model": str(model_folder(cfg, run.root.resolve())), "revision": None})


def _meaning(run: Run, who: str, cfg: ModelConfig, tokenizer: Any, report: Reporter) -> dict[str, str]:
    """What `attest` would record, as far as it can be told."""
    if tokenizer is None:
        return {}
    found = {"tokenizer": vocabulary.fingerprint(tokenizer)}
    if _templated(run, who):
        try:
            found["chat_template"] = chat.template_fingerprint(tokenizer, cfg, run.root, False)
        except ConfigError as error:
            if cfg.chat_template:  # a file of the configuration, which may have stayed elsewhere
                report.warn(f"the chat template of {who} is not compared with the tables: {error.what}")
            else:
                found["chat_template"] = "none"
    return found


def _allowed(run: Run, models: Mapping[str, ModelConfig], tokenizers: Sequence[Any], report: Reporter) -> Facts:
    """The ids that all models have; nothing where a model cannot be read."""
    from fire_data.models import output_rows

    if any(tokenizer is None for tokenizer in tokenizers):
        return {}
    try:
        rows = [output_rows(_here(run, cfg), run.root) for cfg in models.values()]
    except DataError as error:
        report.warn(f"the ids that all models have are not compared with the tables: {error.what}")
        return {}
    ids = vocabulary.shared_vocabulary(*tokenizers, rows=rows)
    return {"vocabulary.size": ids.size, "vocabulary.allowed": digest(ids.allowed.nonzero()[0].tolist())}
