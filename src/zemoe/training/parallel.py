"""The processes of a run: alone, or started by torchrun, with a whole model each (DDP) or shards of one (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..doctor import usable_devices
from .settings import RunSettings, SettingsError


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. mode: "alone", "ddp" or "fsdp"."""

    rank: int
    world: int
    mode: str
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, model: Any) -> nn.Module:
        """What to call instead of `model`, a causal language model of transformers, which moves to the device.

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

    def sharing_gradients(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """For one micro-batch, forward and backward: the ranks' gradients are averaged in the last one only."""
        if isinstance(wrapped, FSDPModule):
            wrapped.set_requires_gradient_sync(last)
        if isinstance(wrapped, DistributedDataParallel) and not last:
            return wrapped.no_sync()
        return nullcontext()

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.mode != "alone":
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank; through the CPU, so that a GPU is not waited for."""
        return flag if self.mode == "alone" else bool(self.sum_(torch.tensor(int(flag))))

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)


def _device(name: str, number: int | None) -> torch.device:
    """The device called `name`; `number`: of this process on its machine, None if it is alone."""
    usable = usable_devices()
    kind = usable[-1].partition(":")[0] if name == "auto" else name
    full = kind if kind == "cpu" or ":" in kind else f"{kind}:{number or 0}"
    if number is not None and ":" in kind:
        raise SettingsError(f"run.device must be without a number under torchrun, got {name!r}")
    if full not in usable:
        raise SettingsError(f"run.device must be one that torch can use here ({', '.join(usable)}), got {full!r}")
    return torch.device(full)


@contextmanager
def ranks(run: RunSettings) -> Iterator[Ranks]:
    """The processes that torchrun started, or those of the process group that is there, or this one alone.

    A group that is there must reduce CPU tensors too ("gloo", "cpu:gloo,cuda:nccl"); it is left as it was.

    Raises:
        SettingsError: for a device that isn't there.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    there = dist.is_available() and dist.is_initialized()
    if not launched and not there:
        yield Ranks(0, 1, "alone", _device(run.device, None))
        return
    number = int(os.environ["LOCAL_RANK"]) if launched else dist.get_rank() % max(torch.accelerator.device_count(), 1)
    device = _device(run.device, number)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    if not there:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size(), run.parallel, device)
    if not there:  # after an error the others may still be waiting in a collective: then the process just ends
        dist.destroy_process_group()
