"""Programmatic dependent launch: a kernel is set up while the one before it still runs, on NVIDIA GPUs from Hopper on.

Every kernel of this folder begins with `begin` and is launched with `launch_options`. Otherwise the GPU does nothing
for one to two microseconds before each launch, six times a layer. That is much for few tokens. For many tokens it is
left off: programs that wait beside others that work cost more than they save (dev/gpu.md).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...versions import warn_if_untested
from .gpus import gpu_of

warn_if_untested("triton", triton.__version__)

_MOST_TOKENS = 1024


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Let the next kernel be set up, and wait until all that the kernels before have written can be read.

    Every program calls this before it reads or writes anything, so that when a kernel is done, all before it are done.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def launch_options(tensor: Tensor, num_tokens: int) -> dict[str, bool]:
    """Return the options of each launch on the device of `tensor`; on a CPU Triton's interpreter runs the kernels."""
    if num_tokens <= _MOST_TOKENS and tensor.is_cuda and gpu_of(tensor.device).overlaps:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}
