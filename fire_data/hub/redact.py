"""What of a run's settings and manifests leaves this machine, and what of shared ones is taken over.

The same function serves both ways. Out go no folders, servers, keys' names or performance settings. In come none
either: a `fire.yaml` from the Hub may not name code to run, a server to send prompts to, or a variable with a key.
Local models become `./NAME`, which is relative to the run, so that they can never be taken for models on the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from fire_data.rules import RULES, own
from fire_data.schemas.config import ADDED_TEACHER, TEACHER, Config, Section, is_expression, split_rule
from fire_data.schemas.errors import ConfigError
from fire_data.schemas.manifest import Manifest

HUB = "hf://"
PLAIN = "uniform"  # what stands for a rule that is not shared
# Of what manifests record beside their fields. Everything else describes the machine.
_RECORDED = ("reads", "sampling", "entropy_kind", "entropy", "tokenizers", "skipped_prompts", "weights")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def shared_manifest(manifest: Manifest, root: Path) -> Manifest:
    """A manifest as others may see it: everything that counts, and models and prompts by name, without folders."""
    recorded = {k: v for k, v in manifest.recorded.items() if k in _RECORDED}
    for key in ("student", "base", "prompts"):
        if isinstance(manifest.recorded.get(key), str):
            recorded[key] = called(manifest.recorded[key], root)
    teachers = manifest.recorded.get("teachers")
    if isinstance(teachers, dict):
        recorded["teachers"] = {name: called(str(model), root) for name, model in teachers.items()}
    return manifest.model_copy(update={"recorded": recorded})


def shared_config(config: Config, root: Path, stages: Iterable[Manifest]) -> dict[str, Any]:
    """The settings of a run as others may see and use them.

    Performance settings are those of this version. Models on the Hub are pinned to the commit that the tables are
    from. A teacher from a folder is left out where the sealed tables do all that is asked of it; training needs none.
    """
    stages = list(stages)
    values = _plain(config)
    weights = _weights(stages)
    for name, key in (("student", "student"), ("teacher", TEACHER), ("base", "base")):
        if values[name] is not None:
            values[name] = _model(values[name], root, weights.get(key, set()))
    values["teachers"] = {n: _model(m, root, weights.get(n, set())) for n, m in values["teachers"].items()}
    added = any(m.stage == "addons" and str(m.name).startswith(ADDED_TEACHER) for m in stages)
    if (
        config.weigh.teacher == "routed"
        and not added
        and not any(n.startswith(ADDED_TEACHER) for n in config.score.add)
    ):
        values["teachers"] = {n: m for n, m in values["teachers"].items() if not is_place(m["model"])}
        if values["teacher"] is not None and is_place(values["teacher"]["model"]):
            values["teacher"] = None
    values["prompts"]["path"] = _place(config.prompts.path, root)
    values["eval"]["prompts"] = _held_out(config.eval.prompts, root)
    file, is_own, function = config.verify.kind.rpartition(".py:")
    values["verify"]["kind"] = f"./{_last(file)}.py:{function}" if is_own else config.verify.kind
    if not _is_known(config.weigh.rule, config.weigh.params):
        trained = config.trained_weights  # trained as they are; the code that made them is not shared
        values["weigh"] |= {
            "rule": PLAIN,
            "params": {},
            "scope": None,
            "name": f"{PLAIN}-2" if trained == PLAIN else None,
        }
        values["train"]["weights"] = trained
    return values


def called(name: str, root: Path) -> str:
    """What others call a model or a file: an id on the Hub as it is, of a path the last name."""
    return name if name.startswith(HUB) or _is_id(name, root) else _last(name)


def require_no_folder(data: bytes, root: Path, what: str) -> None:
    """Raise ConfigError if a text that is about to leave names the user's home folder or the run's.

    The last look, for what the functions above do not know of: a rule's parameters, say.
    """
    text = data.decode("utf-8", "replace")
    for folder in (Path.home(), root.resolve()):
        place = text.find(f"{folder}/") if folder != Path(folder.anchor) else -1
        if place >= 0:
            line = text[text.rfind("\n", 0, place) + 1 :].splitlines()[0].strip()
            fix = "push without that table (--stage scores), or make it anew with a name instead of a path"
            raise ConfigError(f"{what} would name a folder of this machine", where=line[:200], fix=fix)


def _plain(section: Section) -> dict[str, Any]:
    """The values of a section, JSON-ready, with performance settings as in a new run."""
    values: dict[str, Any] = {}
    machine = section.performance()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name in machine:
            values[name] = field.get_default(call_default_factory=True)
        elif isinstance(value, Section):
            values[name] = _plain(value)
        elif isinstance(value, dict) and any(isinstance(v, Section) for v in value.values()):
            values[name] = {k: _plain(v) for k, v in value.items()}
        else:
            values[name] = section.model_dump(mode="json", include={name})[name]
    return values


def _held_out(prompts: str | dict[str, str] | None, root: Path) -> str | dict[str, str] | None:
    if isinstance(prompts, dict):
        return {name: _place(file, root) for name, file in prompts.items()}
    return None if prompts is None else _place(prompts, root)


def _model(values: dict[str, Any], root: Path, weights: set[str]) -> dict[str, Any]:
    name = _place(values["model"], root)
    commits = {w.removeprefix(f"hub:{name}@") for w in weights if w.startswith(f"hub:{name}@")}
    template = values["chat_template"]
    return {
        **values,
        "model": name,
        "revision": commits.pop() if len(commits) == 1 else values["revision"],
        "chat_template": None if template is None else f"./{_last(template)}",
        "trust_remote_code": False,
    }


def _weights(stages: Iterable[Manifest]) -> dict[str, set[str]]:
    """The fingerprints of weights that tables were made with, by who they are."""
    found: dict[str, set[str]] = {}
    for fields in (m.fields for m in stages):
        models = {k: fields.get(k) for k in ("student", "base")}
        teachers = fields.get("teachers")
        models |= teachers if isinstance(teachers, dict) else {}
        for who, told in models.items():
            if isinstance(told, dict) and isinstance(told.get("weights"), str):
                found.setdefault(who, set()).add(told["weights"])
    return found


def _place(name: str, root: Path) -> str:
    """A model or file in a shared fire.yaml: an id on the Hub, or a name in the run folder."""
    return name if name.startswith(HUB) or _is_id(name, root) else f"./{_last(name)}"


def is_place(name: str) -> bool:
    """True for what a shared fire.yaml says of a local model: it is called so, and not here."""
    return name.startswith("./")


def _is_id(name: str, root: Path) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not (root / name).exists()


def _last(name: str) -> str:
    """The last name of a path, whatever system it is from."""
    return PureWindowsPath(name.replace("\\", "/")).name.lstrip(".~") or "unnamed"


def _is_known(rule: str | Mapping[str, str], params: Mapping[str, Any]) -> bool:
    """True for rules of this package and for expressions; false for code that users bring."""
    if isinstance(rule, str) and not _is_ours(rule):
        return False
    for name, value in params.items():
        if isinstance(value, dict) and not _is_known("fire", value):
            return False
        if name.rpartition(".")[2] == "match" and not (isinstance(value, str) and _is_ours(value)):
            return False
    return True


def _is_ours(rule: str) -> bool:
    return is_expression(rule) or all(name in RULES and not own.is_file(name) for name in split_rule(rule))
