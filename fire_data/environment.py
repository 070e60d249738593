"""What `fire env` shows: versions, devices, threads. Names of files, users and tokens stay out of it."""

from __future__ import annotations

import os
import platform
from typing import Any

from fire_data.shards import versions


def environment() -> dict[str, Any]:
    """Facts about this machine that may change speed or bytes."""
    facts: dict[str, Any] = {"platform": platform.platform(), "cpus": os.cpu_count(), **versions()}
    facts["hub_offline"] = os.environ.get("HF_HUB_OFFLINE", "0") == "1"
    try:
        import torch
    except ModuleNotFoundError:
        return {**facts, "torch": "not installed: pip install 'fire-opd[torch]'"}
    facts["threads"] = torch.get_num_threads()
    facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    return facts
