"""Several processes that train one pair: who this one is, and what they agree on.

torchrun says it in RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, Slurm's srun in variables of its
own; one process needs no launcher. Gradients are averaged by DistributedDataParallel, centres by
`ops.Center`; what the host has to agree on goes through a gloo group, so that no GPU waits for it.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ..errors import UserError
from .rendezvous import of_this_start

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # while rank 0 looks through the pictures


class Place(NamedTuple):
    rank: int
    size: int
    local: int  # rank among the processes of this machine


def place(environment: Mapping[str, str]) -> Place:
    """Where the launcher put this process; sets nothing."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    else:
        return Place(0, 1, 0)
    return Place(*(int(environment.get(name, 0)) for name in names))


def slurm_master(environment: Mapping[str, str]) -> tuple[str, str]:
    """(address, port) where the processes of a Slurm step meet: its first node, a port of the job.

    A list of nodes is written node[003-006,008] or a,b.
    """
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes} names no node; set MASTER_ADDR")
    port = 20000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000
    return first[1] + (first[2] or ""), str(port)


class World:
    """The processes of a run. With one there is no process group, and nothing is sent.

    device: "auto", "cpu" or "cuda", of the training; decides how tensors travel. A process group
    that is there already is used and left alone.
    """

    def __init__(self, device: str = "auto") -> None:
        self.rank, self.size, self.local = place(os.environ)
        self._own = False
        self._wish: tuple[Tensor, Any] | None = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        elif self.size > 1:
            self._join(device)
        self._control: Any = None
        if self.size > 1:
            self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def _join(self, device: str) -> None:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(self.rank), str(self.size)
        if "MASTER_ADDR" not in os.environ:
            if "SLURM_STEP_NODELIST" not in os.environ:
                raise UserError("RANK and WORLD_SIZE are set but MASTER_ADDR is not: use torchrun")
            address, port = slurm_master(os.environ)
            os.environ["MASTER_ADDR"] = address
            os.environ.setdefault("MASTER_PORT", port)
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            if self.local >= torch.cuda.device_count():
                raise UserError(
                    f"process {self.local} of this machine has no GPU of its own, there are "
                    f"{torch.cuda.device_count()}: start as many processes, or train.device=cpu"
                )
            torch.cuda.set_device(self.local)
        store, rank, size = next(rendezvous("env://", self.rank, self.size))
        if dist.is_torchelastic_launched():
            store = of_this_start(store, rank, size, dist.default_pg_timeout)
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        self._own = True

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, logs and speaks."""
        return self.rank == 0

    def leave(self) -> None:
        if self._own:
            dist.destroy_process_group()
            self._own = False

    def folder(self, run: Path) -> Path:
        """Where this process writes: the run folder, or one that nobody reads and that goes with
        the process."""
        if self.first:
            return run
        self._scratch = TemporaryDirectory(prefix="mokd-fast-")
        return Path(self._scratch.name)

    def decide(self, act: Callable[[], T]) -> T:
        """What `act` returns in the first process, everywhere. A UserError there ends all of them,
        the others without a word."""
        if self.size == 1:
            return act()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = act()
            except UserError as error:
                told[1] = error
        dist.broadcast_object_list(told, group=self._control)
        if told[1] is not None:
            raise told[1] if self.first else SystemExit(2)
        found: T = told[0]
        return found

    def gather(self, value: T) -> list[T]:
        """Of every process, in the first one; elsewhere empty."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, found, group=self._control)
        return found or []

    def mean(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the processes of 0-d tensors, in one all-reduce on the device."""
        if self.size == 1:
            return values
        flat = torch.stack(list(values.values()))
        dist.all_reduce(flat)
        return dict(zip(values, (flat / self.size).unbind(), strict=True))

    def stops(self, wish: bool) -> bool:
        """Whether any process wished to stop, the same answer everywhere: with several of them that
        of the call before, which has arrived without a wait."""
        if self.size == 1:
            return wish
        before = self._wish
        flag = torch.tensor(int(wish))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._wish = flag, work
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    @staticmethod
    def apart(network: nn.Module, wish: bool) -> contextlib.AbstractContextManager[None]:
        """Where `wish`, gradients are not averaged yet: another micro-batch follows."""
        if wish and isinstance(network, nn.parallel.DistributedDataParallel):
            return network.no_sync()
        return contextlib.nullcontext()

    def share(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module whose gradients are averaged over the processes.

        Buffers are each process's own (BatchNorm's, which a GPU synchronises in forward).
        """
        if self.size == 1:
            return module
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():  # of the argument's new name, which torch 2.11 lacks
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False
            )
