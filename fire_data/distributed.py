"""Training on several processes: who is who, which rows are whose, the model in shards, and how all end together.

The coefficients are frozen and the loss is a plain sum, so a step cut into shares is the same step: each process takes
rows by their lengths alone, gradients are summed (never averaged), and nothing of the number of processes can reach the
result beyond rounding. The model is sharded by torch's FSDP2: every layer is gathered when it is needed and given back,
embeddings and head together around them. A single process calls the same functions, and they do nothing.

One process, the first, talks and writes; the others follow. What fails on one ends all: the first to fail says why, and
the others end without a word, with its exit code.
Units: lengths and budgets are tokens.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from fire_data.models import resolve_device
from fire_data.schemas.errors import ConfigError, IncompleteError

T = TypeVar("T")

LAUNCHED = "FIRE_LAUNCHED"
"""Set in the environment of processes that `fire` started itself: it speaks for those that were killed."""
LOST = 75
"""Exit code of a process that ends because another one vanished without a word."""
SAME_COMMAND = "the same command again continues from the last saved state"
_PATIENCE = timedelta(days=7)  # the others wait as long as the first waits for a lock
_GRACE_S = 10.0  # for the launcher to end this process, once another one has said what failed
_HEARING_S = 10.0  # for the others to read what the first process said before it ends
_FAILED, _HEARD = "fire/failed", "fire/heard"
_AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # set by torchrun: what the processes tell each other lies with it
_ROOT = "_fire_sharded_root"
_SET_PDEATHSIG = 1


def asked() -> bool:
    """Whether the environment names several processes, as torchrun and `fire train --launch` do."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that talks and writes."""
    return rank() == 0


@contextmanager
def member(device: str) -> Iterator[None]:
    """Be one of the processes that the environment names until the end of the block; alone, nothing happens.

    Raises:
        ConfigError: there are fewer GPUs here than processes.
        IncompleteError: another process vanished, and nobody else is there to say so.
        SystemExit: another process failed and says why.
    """
    if not asked():
        yield
        return
    _end_with_the_parent()
    store, spoke = _join(device), False
    try:
        yield
        distributed.barrier()
    except KeyboardInterrupt:
        if not first():
            sys.exit(130)
        raise
    except Exception as error:
        _last_words(store, error)
        spoke = True
        raise
    finally:
        distributed.destroy_process_group()  # those who wait for this process wake up here, and ask what it said
        if spoke and os.environ["RANK"] == "0" and os.environ.get(_AGENT) != "True":
            _until_heard(store)


def check_devices(device: str, processes: int) -> None:
    """Raise ConfigError unless every process on this machine has a device of its own, or they share the CPU."""
    there = torch.cuda.device_count()
    if resolve_device(device).type == "cuda" and (device not in ("auto", "cuda") or processes > there):
        text = f"{processes} processes on device {device}: torch sees {there} CUDA devices"
        raise ConfigError(text, fix="fewer processes, or --set train.device=cuda, or cpu")


def tell(value: T) -> T:
    """What the first process says here, for all."""
    if size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def wait() -> None:
    """Until all processes are here."""
    gathered(None)


def gathered(value: T) -> list[T]:
    """What each process says here, in their order, for all."""
    if size() == 1:
        return [value]
    boxes: list[Any] = [None] * size()
    distributed.all_gather_object(boxes, value)
    return boxes


def totals(numbers: dict[str, float], largest: Collection[str] = ()) -> dict[str, float]:
    """The sum of each number over the processes, in their order, or its maximum for those named in `largest`."""
    everyone = gathered(numbers)
    return {k: (max if k in largest else sum)(each[k] for each in everyone) for k in numbers}


def shares(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Rows dealt to `parts` processes so that tokens are balanced: each row, the longest first, to who has the least.

    It depends on the lengths alone. Ties go to the earlier row and the earlier process; within a share rows keep their
    order.
    """
    held: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = tokens.index(min(tokens))
        held[least].append(row)
        tokens[least] += max(1, lengths[row])
    return [sorted(rows) for rows in held]


def own_groups(lengths: Sequence[int], cut: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
    """The micro-batches of this process, as indices of rows; as many on each, an empty one where others have more.

    All have to gather the layers equally often, so who has nothing left to do does it with nothing.

    Args:
        cut: groups rows by their lengths.
    """
    everyone = [
        [[rows[i] for i in group] for group in cut([lengths[r] for r in rows])] for rows in shares(lengths, size())
    ]
    most = max(map(len, everyone))
    mine = everyone[rank()]
    return mine + [[] for _ in range(most - len(mine))]


class _Root(nn.Module):
    """What FSDP sees as the whole model: body and head of a micro-batch are one forward pass of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        return work()


def load_device(device: str) -> str:
    """Where weights are loaded to: what is going to be sharded stays in main memory until then."""
    return device if size() == 1 else "cpu"


def shard(model: nn.Module, device: str) -> None:
    """Leave on each process, and on its device, its share of every parameter; nothing to do for a single process.

    Gathered together are the parameters of a decoder layer, and those of all that is around the layers, so that an
    output matrix tied to the embedding stays one parameter.
    """
    if size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not all(p.requires_grad for p in model.parameters()):
        text = "a model with frozen parameters, as adapters have it, trains on one process only"
        raise ConfigError(text, fix="the same command without --launch")
    mesh = init_device_mesh(resolve_device(device).type, (size(),))
    root = _Root(model)
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not root)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # The mean is in the coefficients already. Without the second call gloo is asked for what it cannot do.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    object.__setattr__(model, _ROOT, root)  # not as a submodule: the model would contain itself


def run(model: nn.Module, work: Callable[[], T]) -> T:
    """Do something that reads the parameters of embeddings, body and head; its backward pass may come after it.

    The tensors that `work` returns are where the backward pass enters. On several processes all have to call this, and
    go backward, equally often.
    """
    root = getattr(model, _ROOT, None)
    if root is None:
        return work()
    found: T = root(work)
    if not torch.is_grad_enabled():
        root.reshard()  # no backward pass will
    return found


def is_share(tensor: Tensor) -> bool:
    """Whether this is one process's share of a tensor that is as large as it says only on all together."""
    if size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all processes; all have to ask for it."""
    return cast(Any, tensor).full_tensor() if is_share(tensor) else tensor


def clip_gradient(parameters: Iterable[Tensor], largest: float) -> float:
    """Scale the gradients so that their norm, over all processes, is at most `largest`; return the norm before."""
    held = [p for p in parameters if p.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in held if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(held, largest, norm)
    return float(norm)


def _join(device: str) -> Any:
    from torch.distributed.rendezvous import rendezvous

    kind = resolve_device(device).type
    check_devices(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, place, number = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    with _stdout_to_stderr():  # gloo greets there
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=store, rank=place, world_size=number, timeout=_PATIENCE,
        )  # fmt: skip
        distributed.barrier()
    return cast(Any, distributed).PrefixStore("fire", store)


def _last_words(store: Any, error: Exception) -> None:
    """Return where this process is the one to say what failed; otherwise end it."""
    try:
        if not _lost(error):
            mine = f"{rank()} {getattr(error, 'exit_code', 1)}"
            said = store.compare_set(_FAILED, "", mine).decode()
            if said == mine:
                return
        else:
            said = store.get(_FAILED).decode() if store.check([_FAILED]) else ""
    except RuntimeError:  # the store ended with its owner
        said = ""
    if said:
        with suppress(RuntimeError):
            store.add(_HEARD, 1)
        time.sleep(_GRACE_S)
        sys.exit(int(said.split()[1]))
    if LAUNCHED in os.environ:
        sys.exit(LOST)
    raise IncompleteError("another process of this training ended", fix=SAME_COMMAND) from error


def _until_heard(store: Any) -> None:
    """The store lives in the first process: it stays until the others have read what it said, or for a while."""
    end = time.monotonic() + _HEARING_S
    with suppress(RuntimeError):  # what failed first is what is told, whatever happens here
        while time.monotonic() < end and store.add(_HEARD, 0) < int(os.environ["WORLD_SIZE"]) - 1:
            time.sleep(0.01)


def _lost(error: Exception) -> bool:
    """Whether an error only says that another process is gone."""
    return isinstance(error, distributed.DistError) or (type(error) is RuntimeError and "gloo" in str(error).lower())


def _end_with_the_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
