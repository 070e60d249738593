"""What `fire env` shows: versions and hardware, for a bug report. Names of users and machines, and keys, stay out.

Versions are read from what is installed, without importing it; torch alone is imported, for what it sees of devices.
Bytes are bytes, and memory is what this process may use of the machine's.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "fire-opd", "torch", "transformers", "safetensors", "polars", "pyarrow", "numpy", "pydantic", "huggingface-hub",
    "typer", "rich", "peft", "vllm", "ray", "httpx", "stamina", "altair", "vl-convert-python", "datasets",
    "math-verify", "tensorboard", "trackio", "wandb",
)  # fmt: skip
# Variables that change what is computed, where it comes from or how it is shown, and say nothing of who asks.
VARIABLES = (
    "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
    "POLARS_MAX_THREADS", "TOKENIZERS_PARALLELISM", "PYTORCH_CUDA_ALLOC_CONF", "FIRE_DEBUG", "NO_COLOR", "FORCE_COLOR",
    "TERM", "LANG", "LC_ALL",
)  # fmt: skip
# Of these, and of every other FIRE_*, only that they are set: their values may be secret, or name a machine.
HIDDEN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_ADDRESS", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")

KEY = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[bp]-|AKIA)[\w-]{12,}")
"""What keys of the usual services look like."""

_SET = "set"


def environment(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Facts about this machine that may change speed or bytes, JSON-ready. `variables`: others than the process's."""
    found = os.environ if variables is None else variables
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory(),
        "disk_free_bytes": shutil.disk_usage(".").free,
        **_torch(),
        "driver": _driver(),
        "hub_token": _SET if _has_token(found) else None,
        "variables": _variables(found),
    }


def _packages() -> dict[str, str | None]:
    """Version of every relevant package; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu() -> str | None:
    """The processor as it calls itself."""
    named = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine() or None


def memory() -> int | None:
    """Main memory, or the limit of the container that this process runs in."""
    limits = [
        int(text)
        for path in ("memory.max", "memory/memory.limit_in_bytes")
        if (text := _read(f"/sys/fs/cgroup/{path}").strip()).isdigit()
    ]
    if "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _torch() -> dict[str, Any]:
    """What torch computes with; without torch, how to get it."""
    try:
        import torch
    except ModuleNotFoundError:
        return {"devices": [], "torch": "not installed: pip install 'fire-opd[torch]'"}
    devices: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        capability = f"{about.major}.{about.minor}"
        devices.append({"name": about.name, "memory_bytes": about.total_memory, "capability": capability})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps"})
    facts = {"devices": devices or [{"name": "cpu"}], "threads": torch.get_num_threads()}
    return {**facts, "cuda": torch.version.cuda}


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    named = re.search(r"(\d+\.\d+(?:\.\d+)?)", _read("/proc/driver/nvidia/version"))
    return named[1] if named else None


def _variables(found: Mapping[str, str]) -> dict[str, str]:
    """Those that are set: what may be shown with home folder and user name hidden, of the rest that they are set."""
    shown = {name: redacted(found[name]) for name in VARIABLES if name in found}
    hidden = [n for n in found if n.upper() in HIDDEN or (n.startswith("FIRE_") and n not in VARIABLES)]
    return {**shown, **dict.fromkeys(sorted(hidden), _SET)}


def _has_token(found: Mapping[str, str]) -> bool:
    """Whether the Hub's client would find a token; it is not read."""
    home = Path(found.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return bool(found.get("HF_TOKEN")) or Path(found.get("HF_TOKEN_PATH") or home / "token").is_file()


def redacted(text: str, home: str | None = None, user: str | None = None) -> str:
    """A setting without home folders, the user's name, what a URL says of its caller, and what looks like a key."""
    home = str(Path.home()) if home is None else home
    user = _user() if user is None else user
    text = re.sub(r"(?<=://)[^/@\s]*@", "", text)
    text = re.sub(r"(://[^?#]*)[?#].*", r"\1", text)
    text = KEY.sub(_SET, text)
    if home not in ("", "/"):
        text = re.sub(rf"{re.escape(home)}(?=[/:]|$)", "~", text)
    text = re.sub(r"(?<=/home/|Users/)[^/:]+", "USER", text)
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "USER", text) if user else text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
