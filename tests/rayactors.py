"""What the actors of the Ray tests run; imports little, because every actor imports it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fire_data.schemas.errors import ConfigError, DataError, PartialError
from fire_data.schemas.tables import FLOATS, IDS


def fake() -> Any:
    """Generator that needs no model."""
    from fire_data.engines import FakeGenerator
    from fire_data.vocabulary import Vocabulary

    return FakeGenerator(Vocabulary(20, np.arange(20) != 7), frozenset([1]))


def plain(rows: pa.Table) -> pa.Table:
    """Responses that follow from the names of the rows."""
    ids = [[ord(c) % 20 for c in name] for name in rows["trajectory_id"].to_pylist()]
    logprobs = pa.array([[-float(i) for i in row] for row in ids], FLOATS)
    return pa.table(
        {"response_ids": pa.array(ids, IDS), "rollout_logprob": logprobs, "finish_reason": ["stop"] * len(ids)}
    )


class Tiny:
    """Generator and Scorer with the models of a run."""

    def __init__(self, root: str) -> None:
        from fire_data.run import open_run
        from fire_data.schemas.config import TEACHER
        from fire_data.session import Session
        from fire_data.steps import engines

        session = Session(open_run(root))
        self.generate = engines.make_generator(session, 0).generate
        self.score = engines.joint_scorer(session, 0, TEACHER).score


class Troubled:
    """As `plain`, but for what happens when it is asked for certain rows.

    Args:
        happens: trajectory id -> what, see `happen`.
        folder: remembers the calls, one byte each, in the file "calls".
        node: id of the only node on which anything happens.
    """

    def __init__(self, happens: dict[str, str], folder: str, node: str | None = None) -> None:
        self.happens, self.folder, self.node = happens, Path(folder), node

    def evaluate(self, rows: pa.Table) -> pa.Table:
        import ray

        with (self.folder / "calls").open("a") as f:
            f.write("x")
        if self.node in (None, ray.get_runtime_context().get_node_id()):
            for name in rows["trajectory_id"].to_pylist():
                if name in self.happens:
                    self.happen(self.happens[name], rows)
        return plain(rows)

    def happen(self, what: str, rows: pa.Table) -> None:
        """`die` and `wait` (for ever, having told so through the pipe) can be limited to the first time."""
        what, _, once = what.partition(" ")
        if once and (self.folder / "happened").exists():
            return
        (self.folder / "happened").touch()
        if what == "die":
            os._exit(1)
        if what == "wait":
            (self.folder / "pipe").write_text("here")
            threading.Event().wait()
        if what == "data":
            raise DataError("no good", where="row 3", fix="another row")
        if what == "partial":
            raise PartialError("given up", where="the end", done=rows.slice(0, 1))
        raise KeyError("a mistake of ours")


class Facts:
    """Tells about the process that it is in."""

    entropy_kind = "topk-lower-bound"

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(3)  # as a library might

    def evaluate(self, rows: pa.Table) -> pa.Table:
        import torch

        proxies = [n for n in os.environ if n.lower().endswith("_proxy") and n.lower() != "no_proxy"]
        return pa.table(
            {"threads": [torch.get_num_threads()], "proxies": [proxies], "offline": [os.environ.get("HF_HUB_OFFLINE")]}
        )


class Interrupting:
    """Interrupts its caller for the first shard, as the user does with a key; no call ever ends."""

    def __init__(self, caller: int) -> None:
        self.caller = caller

    def evaluate(self, rows: pa.Table) -> pa.Table:
        if rows["trajectory_id"].to_pylist() == ["00000"]:
            os.kill(self.caller, signal.SIGINT)
        threading.Event().wait()
        return rows


def refuse() -> Any:
    raise ConfigError("cannot be made", where="here", fix="do better")


def mistaken() -> Any:
    raise KeyError("a mistake of ours")


def die() -> Any:
    os._exit(1)
