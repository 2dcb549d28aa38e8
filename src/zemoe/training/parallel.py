"""The processes of a run: alone, or started by torchrun, with a whole model each (DDP) or shards of one (FSDP2)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..machine import usable_devices
from .settings import RunSettings, SettingsError
from .state import TrainingError, last_state


class RankError(TrainingError):
    """Another process of the run has failed, or is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. mode: "alone", "ddp" or "fsdp"."""

    rank: int
    world: int
    mode: str
    device: torch.device

    @property
    def first(self) -> bool:
        """Return whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, model: Any) -> nn.Module:
        """Move `model`, a causal language model of transformers, to the device; return what to call instead of it.

        With FSDP its parameters become shards, in place, so that an optimizer has to be made afterwards.
        """
        if self.mode == "fsdp":
            mesh = init_device_mesh(self.device.type, (self.world,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model.to(self.device)
        if self.mode == "ddp":
            return DistributedDataParallel(model, gradient_as_bucket_view=True)
        return model

    def put(self, tensor: Tensor) -> Tensor:
        """Copy a CPU tensor to the device; a GPU is not waited for, which a copy from unpinned memory would do."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def sharing_gradients(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """For one micro-batch, forward and backward: the ranks' gradients are averaged in the last one only."""
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(last)
        if isinstance(wrapped, DistributedDataParallel) and not last:
            return wrapped.no_sync()
        return nullcontext()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place."""
        if self.mode != "alone":
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return whether it holds on any rank; asked through the CPU, so that a GPU is not waited for."""
        return flag if self.mode == "alone" else bool(self.sum_(torch.tensor(int(flag))))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all ranks; what fails on one of them then fails on all, which would wait for it forever.

        Each rank raises its own error, or one that names a rank that failed: SettingsError if its was one, else
        RankError. The block must call no collectives, or the same ones where it fails.
        """
        if self.mode == "alone":
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except (TrainingError, SettingsError, OSError) as error:
            mine = error
        if not self.any(mine is not None):
            return
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, None if mine is None else (isinstance(mine, SettingsError), str(mine)))
        if mine is not None:
            raise mine
        rank, (asked_wrongly, text) = next((rank, said) for rank, said in enumerate(told) if said is not None)
        raise (SettingsError if asked_wrongly else RankError)(f"process {rank} failed: {text}")


def _kind(name: str) -> str:
    return usable_devices()[-1].partition(":")[0] if name == "auto" else name


def _device(name: str, number: int | None) -> torch.device:
    """Return the device called `name`. number: of this process on its machine, None if it is alone."""
    usable, kind = usable_devices(), _kind(name)
    full = kind if kind == "cpu" or ":" in kind else f"{kind}:{number or 0}"
    if number is not None and ":" in kind:
        raise SettingsError(f"run.device must be without a number under torchrun, got {name!r}")
    if full not in usable:
        raise SettingsError(f"run.device must be one that torch can use here ({', '.join(usable)}), got {full!r}")
    return torch.device(full)


@contextmanager
def ranks(run: RunSettings) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or those of the process group that exists, or run alone.

    A group that is there must reduce CPU tensors too ("gloo", "cpu:gloo,cuda:nccl"); it is left as it was. A group
    made here is left at the end, when nothing of the caller's may hold what `Ranks.wrap` returned.

    Raises:
        SettingsError: for a device that isn't there, on any of them.
        RankError: if another process ends before this one, inside of the `with` block.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    there = dist.is_available() and dist.is_initialized()
    if not launched and not there:
        yield Ranks(0, 1, "alone", _device(run.device, None))
        return
    if not there:  # before a device is looked for, so that all learn of one that isn't there
        nccl = _kind(run.device) == "cuda" and torch.cuda.is_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    processes = Ranks(dist.get_rank(), dist.get_world_size(), run.parallel, torch.device("cpu"))
    number = int(os.environ["LOCAL_RANK"]) if launched else processes.rank % max(torch.accelerator.device_count(), 1)
    try:
        with processes.together():
            device = _device(run.device, number)
            if device.type != "cpu":
                torch.accelerator.set_device_index(device.index)
        yield replace(processes, device=device)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):  # gloo has no exception of its own
            raise
        kept = last_state(Path(run.out) / "states")
        raise RankError(f"another process of the run has failed or was killed; {kept}") from error
    if not there:  # after an error the others may still be waiting in a collective: then the process just ends
        # DDP's reducer holds the group too. Were it the last to let go, with Python's lock, it would wait for a thread
        # of gloo's that needs that lock to free a tensor: now and then a finished run would hang for ever.
        gc.collect()
        dist.destroy_process_group()
