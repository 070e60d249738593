"""Make a run directory: new, or as a second arm of another run that shares its round-0 rollouts and scores."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

from fire_data import files
from fire_data.rules import own
from fire_data.run import Run, open_run
from fire_data.schemas.config import parse_config, parse_yaml, render_config
from fire_data.schemas.errors import ConfigError
from fire_data.shards import Part, put_receipt, read_manifest, verify_shard

_SHARED: tuple[tuple[str, int | str, str | None], ...] = (
    ("rollouts", 0, None),
    ("scores", 0, None),
    ("evals", "start", None),
)
_OWN = {"weigh", "train"}  # sections that may differ between arms that share rollouts and scores


def init_run(root: Path, values: dict[str, Any]) -> Run:
    """Write a commented `fire.yaml` with `values` over the defaults. Local paths in `values` are relative to here.

    Raises ConfigError if there is one already, or if a value is wrong.
    """
    target = root / "fire.yaml"
    taken = ConfigError("there is a fire.yaml already", where=str(target), fix=f"edit it, then: fire rollout {root}")
    if target.exists():
        raise taken
    if root.exists() and not root.is_dir():
        raise ConfigError("this is a file, not a folder", where=str(root), fix="fire init ANOTHER_FOLDER")
    anchored = _anchored(values, Path.cwd(), root)
    Run(root, parse_config(anchored, str(target))).rule()
    if not files.create_bytes(target, render_config(anchored).encode(), root / ".fire" / "tmp"):
        raise taken
    return open_run(root)


def fork_run(source: Run, root: Path, changes: dict[str, Any]) -> Run:
    """A second arm: the source's configuration with `changes` to sections, and its round-0 rollouts, scores, addons
    and start evaluation by hard link, so that both arms begin with the same trajectories.

    Changes beyond weighing and training change the trajectories: then nothing is shared but the settings.
    """
    # What is new was named here, the rest where the source is.
    values = _anchored(source.config.model_dump(mode="json"), source.root, Path.cwd())
    for section, fields in changes.items():
        values[section] = {**(values[section] or {}), **fields} if isinstance(fields, dict) else fields
    run = init_run(root, values)
    shared = [*_SHARED, *(("addons", 0, name) for name in run.addon_names)] if changes.keys() <= _OWN else []
    for place in shared:
        _link(source.part(*place), run.part(*place))
    return run


def missing_paths(root: Path) -> list[str]:
    """Local prompts files and things that look like model folders, but are not there, in words."""
    config = open_run(root).config
    held_out = config.eval.prompts
    named = held_out if isinstance(held_out, dict) else {}
    files_ = {"prompts.path": config.prompts.path, "eval.prompts": held_out if isinstance(held_out, str) else None}
    files_ |= {f"eval.prompts.{name}": path for name, path in named.items()}
    given = {"student": config.student, "teacher": config.teacher, "base": config.base}
    given |= {f"teachers.{name}": cfg for name, cfg in config.teachers.items()}
    models = {f"{name}.model": cfg and cfg.model for name, cfg in given.items()}
    wanted = {k: v for k, v in files_.items() if v and not v.startswith("hf://")}
    wanted |= {k: v for k, v in models.items() if v and (v[0] in "./~" or v.count("/") > 1)}
    there = {k: root / Path(v).expanduser() for k, v in wanted.items()}
    return [f"{key}: there is no {path} yet" for key, path in there.items() if not path.exists()]


def _anchored(values: dict[str, Any], base: Path, root: Path) -> dict[str, Any]:
    """Local paths that are relative to `base`, rewritten relative to `root`; Hub ids and absolute paths stay."""
    result = copy.deepcopy(values)
    models = [result.get(section) for section in ("student", "teacher", "base")]
    models += (result.get("teachers") or {}).values()
    places = [(model, key) for model in models for key in ("model", "chat_template")]
    held_out = (result.get("eval") or {}).get("prompts")
    places += [(held_out, name) for name in held_out] if isinstance(held_out, dict) else []
    for section, key in [*places, (result.get("prompts"), "path"), (result.get("eval"), "prompts")]:
        if not isinstance(section, dict):
            continue
        value = section.get(key)
        if isinstance(value, str) and not Path(value).expanduser().is_absolute() and (base / value).exists():
            # Resolved, because `..` behind a symbolic link leads elsewhere than the text says.
            section[key] = os.path.relpath(base.resolve() / value, root.resolve())

    def moved(file: str) -> str:
        return os.path.relpath(base.resolve() / file, root.resolve()) if (base / file).exists() else file

    for name, key in (("weigh", "rule"), ("verify", "kind")):  # each may be in a file of the user's
        text = (result.get(name) or {}).get(key)
        if isinstance(text, str):
            result[name][key] = own.moved(text, moved)
    return result


def _link(source: Part, target: Part) -> None:
    """Hard-link a sealed stage: shards, then receipts, then the manifest. Copies across file systems."""
    manifest = read_manifest(source)
    if manifest is None or not manifest.sealed:
        return
    with files.storage_errors(target.folder):
        for receipt in manifest.shards:
            files.link_or_copy(verify_shard(source, receipt), target.file(receipt.shard))
            put_receipt(target, receipt)
        files.link_or_copy(source.manifest_path, target.manifest_path)


def with_rule(
    run: Run, rule: str | None, name: str | None, params: list[str], scope: str | None, denominator: str | None
) -> Run:
    """The run with another rule than its configuration's; a new rule does not inherit the old one's parameters."""
    given: dict[str, Any] = {}

    def moved(text: str) -> str:
        """A file on the command line is named from here, one in fire.yaml from the run."""
        return own.moved(text, lambda file: str(Path.cwd() / file))

    rule = None if rule is None else moved(rule)
    if rule is not None and rule != run.config.weigh.rule:
        given |= {"rule": rule, "params": {}, "name": None, "scope": None, "denominator": None}
    given |= {k: v for k, v in {"name": name, "scope": scope, "denominator": denominator}.items() if v is not None}
    values = run.config.model_dump(mode="json")
    values["weigh"] |= given
    twice = next(
        (t for i, t in enumerate(params) if t.partition("=")[0] in [p.partition("=")[0] for p in params[:i]]), None
    )
    if twice is not None:
        raise ConfigError(f"--param {twice.partition('=')[0]} is there twice", fix="give it once")
    for text in params:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--param takes key=value, not {text!r}", fix="-p percentile=30")
        made = parse_yaml(value, f"the value of --param {key}")
        values["weigh"]["params"][key] = moved(made) if key == "match" and isinstance(made, str) else made
    # What is trained stays what fire.yaml says: another rule on the command line is there to compare.
    values["train"]["weights"] = run.config.trained_weights
    return dataclasses.replace(run, config=parse_config(values, "the command line"))
