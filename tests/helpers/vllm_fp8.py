"""FP8 in blocks, as published checkpoints have it."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def in_blocks(weight_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(float8 [R, C], scale_inv [R / 128, C / 128], what both stand for in float32) of a float32 weight."""
    rows, columns = weight_RC.shape
    blocks = weight_RC.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    quantised = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    meant = quantised.float() * scale[:, None, :, None]
    return quantised.view(rows, columns), scale, meant.view(rows, columns)
