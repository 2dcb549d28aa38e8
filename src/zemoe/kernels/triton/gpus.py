"""The GPUs that the kernels are compiled for: what their programs may have, and which of them were measured.

Only Hopper was tuned and runs the tests. For all parts of GPUS `make check-arch` compiles every kernel at every tile
size that tiles.py can choose, and compares what a program needs with what it may have. Needs no triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

Capability = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    capability: NVIDIA's compute capability. examples: names that people know. shared_memory: bytes that a program may
    have. tensor_memory: columns that products work in, 0 where they work in registers. descriptors: it reads blocks by
    tensor descriptor (TMA). overlaps: a kernel can be set up while the one before it runs. tuned: tiles were chosen by
    measurements on it; otherwise they were only compiled for it.
    """

    capability: Capability
    examples: str
    shared_memory: int
    tensor_memory: int = 0
    descriptors: bool = False
    overlaps: bool = False
    tuned: bool = False

    @property
    def takes_large_tiles(self) -> bool:
        """Whether the tiles that were tuned on Hopper fit."""
        return self.descriptors and self.shared_memory >= HOPPER.shared_memory


HOPPER = Gpu((9, 0), "H100, H200", 227 * 1024, descriptors=True, overlaps=True, tuned=True)
GPUS = (
    Gpu((8, 0), "A100", 163 * 1024),
    Gpu((8, 6), "A10, RTX 30", 99 * 1024),
    Gpu((8, 9), "L4, L40, RTX 40", 99 * 1024),
    HOPPER,
    Gpu((10, 0), "B200", 227 * 1024, tensor_memory=512, descriptors=True, overlaps=True),
    Gpu((12, 0), "RTX 50, RTX PRO 6000", 99 * 1024, descriptors=True, overlaps=True),
)


def taken_as(capability: Capability, shared_memory: int) -> Gpu | None:
    """The part of GPUS whose tiles a GPU of this capability and memory gets, None if it can run none.

    Itself, or the next older one of its generation, or else the newest older one without descriptors.
    """
    older = [gpu for gpu in GPUS if gpu.capability <= capability and gpu.shared_memory <= shared_memory]
    family = [gpu for gpu in older if gpu.capability[0] == capability[0]]
    return max(family or [gpu for gpu in older if not gpu.descriptors], key=lambda gpu: gpu.capability, default=None)


@cache
def _installed(index: int) -> Gpu | None:
    if torch.version.cuda is None:  # torch calls AMD's devices by the same name
        return None
    found = torch.cuda.get_device_properties(index)
    return taken_as((found.major, found.minor), found.shared_memory_per_block_optin)


def _gpu(device: torch.device) -> Gpu | None:
    if device.type != "cuda":
        return HOPPER
    return _installed(torch.cuda.current_device() if device.index is None else device.index)


def gpu_of(device: torch.device) -> Gpu:
    """Return the entry of GPUS whose tiles a device gets. Devices other than CUDA's run Triton's interpreter.

    Raises ValueError, naming the GPU, for one that the kernels can't run on.
    """
    gpu = _gpu(device)
    if gpu is None:
        raise ValueError(f"backend 'triton' needs {why_not(device)}; backend='torch' runs there")
    return gpu


def about(device: torch.device) -> str:
    """Say whether the tiles of a CUDA device were tuned or only compiled for it, or which GPU's tiles it gets."""
    gpu = _gpu(device)
    if gpu is None:
        return f"the triton backend needs {why_not(device)}"
    kind = f"compute capability {'.'.join(map(str, gpu.capability))} ({gpu.examples})"
    found = torch.cuda.get_device_properties(device)
    if (found.major, found.minor) != gpu.capability:
        return f"{found.major}.{found.minor} is neither tuned nor compiled for: kernels run as on {kind}"
    return f"kernels are tuned for {kind}" if gpu.tuned else f"kernels are compiled for {kind}, not tuned"


def why_not(device: torch.device) -> str:
    """What a device lacks to run the kernels, "" if they run there."""
    if _gpu(device) is not None:
        return ""
    found = torch.cuda.get_device_properties(device)
    if torch.version.cuda is None:
        return f"an NVIDIA GPU, got {found.name}"
    least, needed = GPUS[0].capability, min(gpu.shared_memory for gpu in GPUS)
    has = found.shared_memory_per_block_optin
    return (
        f"an NVIDIA GPU of compute capability {least[0]}.{least[1]} or newer with {needed // 1024} KB of shared memory "
        f"a program, got {found.name} of {found.major}.{found.minor} with {has // 1024}"
    )
