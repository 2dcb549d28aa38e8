"""Several processes on one machine, for tests: each joins a group, works, and leaves it in a way that always ends."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def as_rank(rank: int, meeting: str, work: Callable[..., None], *arguments: Any, world: int = 2) -> None:
    """`work(*arguments)` as one of `world` processes that find each other by the file `meeting`, on one thread each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    work(*arguments)
    # What still held the group would let go of it later, with Python's lock, and wait for gloo's threads, which may
    # need that lock: the process hangs; or not at all, and is aborted when a thread of gloo's outlives Python.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
