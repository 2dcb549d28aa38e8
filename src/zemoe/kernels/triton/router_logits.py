"""The router's logits, x W^T, to float32 accuracy on tensor cores that multiply 16-bit numbers.

A float32 weight is written as a sum of 16-bit parts, each product of x with a part is exact, and the sums are float32.
x itself is 16-bit already, so it needs no parts. Which parts, and by which path, depends on T:

one     few tokens: rows of W times x, in plain float32, no tensor core. W is read once, at the speed of memory.
direct  some tokens, and any alignment: blocks of W come in as float32 and are split in registers, for bfloat16 x into
        two bfloat16 parts (17 bits), for float16 x into two float16 parts (22 bits). Where tiles are few, H is cut into
        slices; their partial sums are added in a fixed order by who reads them.
split   many tokens: W is split once by a small launch, then one large product through the copy engine (TMA).
        bfloat16 x: a bfloat16 part times x, and a float16 part (together 20 bits) times x as float16, which is exact
        for 2^-17 <= |x| <= 65504 and elsewhere costs accuracy only, as if W had 9 bits for that element.

NaN and infinity stay where they are: a token's logits depend on its own x and on W alone. NaN in a token's x makes all
its logits NaN; an infinity makes each of them an infinity or NaN (float32 may have the infinity where this has NaN;
routing gives the token NaN weights in either case). NaN or infinity in a row of W does to that slot's logits what it
does in float32. Every part of a finite weight is finite. Limits that no router comes near: with float16 x a weight
beyond 2047 counts as 2047, on the split path one beyond 8192 keeps 9 bits or more, and logits beyond 2^115 overflow.

Legend: T tokens, R rows of the router weight (slots), H hidden size, S slices of H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gpus import gpu_of
from .launch import begin, launch_options
from .tiles import cdiv, next_power_of_2

_FLOAT16_MAX = tl.constexpr(65504.0)
_BFLOAT16_MAX = tl.constexpr(3.3895313892515355e38)
# W is multiplied by 2^12 or 2^6 before it is split, the sums divided by it: a float16 part then has all of its bits for
# weights from 1e-6 (float16 x: 1e-4) up, and finite room above any weight of a router.
_SCALE_BFLOAT16 = tl.constexpr(4096.0)
_SCALE_FLOAT16 = tl.constexpr(64.0)

# What a step of the tensor core cuts off on average, over the power of two below the sum. If the bits cut off were
# random it would be 2^-24; on an H100 the error is 0.70 to 0.76 of that, for both dtypes and H from 2048 to 6144.
_CUT_OFF = tl.constexpr(0.72 * 2.0**-24)
# Blocks of H between two corrections on the split path. With none, 8 and 4 three runs took 474, 476 and 488 us at
# T = 16384, 768 x 6144.
_UNBIAS_EVERY = 4


class RouterSchedule(NamedTuple):
    """How the product runs: its path (see the top of this file), its tile, the slices of H, and the launch."""

    path: str
    block_t: int
    block_r: int
    block_h: int
    slices: int
    warps: int
    stages: int


def router_schedule(T: int, R: int, H: int, dtype: torch.dtype, blocks: bool, wide: bool = True) -> RouterSchedule:
    """Return the schedule for a shape.

    blocks: x and a [R, H] 16-bit matrix can be read in large blocks by the copy engine.

    wide: a program may take 256 slots. Where products work in tensor memory, sums of 128 x 256 and two kinds of x don't
    fit into its 512 columns.

    Timed on an H100 (132 processors), bfloat16 x, W out of the cache, R x H = 768 x 6144 / 384 x 3072 / 96 x 2048, in
    microseconds; slices are not summed here, which takes 2 to 3 more (6 at T = 2048):

        T              1            4            8           64          512        1024       4096        16384
        one      9.0/4.0/2.2 11.2/5.4/2.6 17.5/6.6/2.9
        direct                            10.1/5.0/3.6 11.3/5.7/3.8   32/11/5.7   66/18/8  265/73/19
        split                                                                     55/19/-  174/58/19    488/157/45
        float32     12/7/7     32/17/11     30/19/57     37/21/13    121/44/22  237/75/28 875/263/91 3308/1042/282

    Tiles of 128 x 256 reach 634 TFLOP/s at 768 x 6144, but a third of them would be padding at R = 384.
    """
    # Each program of `one` reads all of x: 8 tokens of a large layer are better off in tiles.
    if T <= 4 or (T <= 8 and R * H <= 2**21):
        block_t = next_power_of_2(T)
        rows, columns = (2, 1024) if T > 2 and R >= 256 else (1, 2048)
        return RouterSchedule("one", block_t, rows, min(columns, next_power_of_2(H)), 1, 4, 1)
    if T * R >= 1024 * 768 and blocks:
        if wide and cdiv(R, 256) * 256 < 1.15 * R:
            # Shared memory is full with 3 blocks of both parts and 2 of bfloat16 x; float16 x needs as many as parts.
            stages = 3 if dtype == torch.bfloat16 else 2
            slices = 132 // (cdiv(T, 128) * cdiv(R, 256))
            return RouterSchedule("split", 128, 256, 64, max(1, min(slices, H // 512)), 8, stages)
        slices = 264 // (cdiv(T, 64) * cdiv(R, 128))
        return RouterSchedule("split", 64, 128, 64, max(1, min(slices, H // 512)), 4, 3)
    # Enough slices for one program on each processor, two where tiles are large; two blocks of H for each at least.
    tiles_r = cdiv(R, 64)
    if T <= 64:
        block_t = max(16, next_power_of_2(T))
        slices = 132 // tiles_r
    else:
        block_t = 64 if cdiv(T, 64) * tiles_r * (H // 128) <= 264 else 128
        slices = 264 // (cdiv(T, block_t) * tiles_r)
    return RouterSchedule("direct", block_t, 64, 64, max(1, min(slices, H // 128)), 4, 4 if block_t <= 64 else 3)


@triton.jit
def _two_parts(w, dtype: tl.constexpr):
    """Two 16-bit parts of a float32 `w` times the scale of `dtype`; the second one is float16."""
    if dtype == tl.float16:
        scaled = w * _SCALE_FLOAT16
        limit: tl.constexpr = _FLOAT16_MAX
    else:
        scaled = w * _SCALE_BFLOAT16
        limit: tl.constexpr = _BFLOAT16_MAX
    finite = w - w == 0
    high = tl.clamp(scaled, -limit, limit).to(dtype)
    rest = tl.clamp(tl.clamp(scaled, -_BFLOAT16_MAX, _BFLOAT16_MAX) - high.to(tl.float32), -_FLOAT16_MAX, _FLOAT16_MAX)
    high = tl.where(finite, high, w.to(dtype))
    return high, tl.where(finite, rest, 0.0).to(tl.float16)


@triton.jit
def _unbias(acc, steps):
    """Return the sum `acc` plus the mean of what `steps` steps of a tensor core have cut off from it.

    A step adds 16 products to the sum and drops the bits below the last place of a float32. That rounds towards zero,
    so that the errors add up, the more the larger the sum is in between. Of 600,000 random tokens (12 of 768, 384 and
    96 slots) 47 get another set of ids than in float64 without this correction, and 10 with it. It is 10 in a float32
    matmul, and 24 on the direct path, which starts each block at zero and has two bfloat16 parts.
    """
    power = (acc.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)  # sign and power of two
    return acc + power * (steps * _CUT_OFF)


@triton.jit
def _one(
    x_ptr,
    w_ptr,
    out_ptr,
    T,
    R,
    H,
    x_stride,
    w_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Logits of all T <= BLOCK_T tokens for BLOCK_R slots."""
    begin(OVERLAP)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T)
    w_ptrs = w_ptr + r.to(tl.int64) * w_stride
    x_ptrs = x_ptr + t.to(tl.int64) * x_stride
    acc = tl.zeros((BLOCK_R, BLOCK_T, BLOCK_H), dtype=tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = (h < H)[None, :]
        w = tl.load(w_ptrs[:, None] + h[None, :], mask=(r < R)[:, None] & inside, other=0.0)
        x = tl.load(x_ptrs[:, None] + h[None, :], mask=(t < T)[:, None] & inside, other=0.0)
        acc += w[:, None, :] * x.to(tl.float32)[None, :, :]
    mask = (r < R)[:, None] & (t < T)[None, :]
    tl.store(out_ptr + t[None, :] * R + r[:, None], tl.sum(acc, axis=2), mask=mask)


@triton.jit
def _direct(
    x_ptr,
    w_ptr,
    out_ptr,
    T,
    R,
    H,
    x_stride,
    w_stride,
    slice_h,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A tile of logits summed over one slice of H, into out [S, T, R]. W is the left operand: parts in registers."""
    begin(OVERLAP)
    tiles_r = tl.cdiv(R, BLOCK_R)
    r = (tl.program_id(0) % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = (tl.program_id(0) // tiles_r) * BLOCK_T + tl.arange(0, BLOCK_T)
    s = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first = s * slice_h
    last = tl.minimum(first + slice_h, H)
    w_ptrs = w_ptr + r[:, None].to(tl.int64) * w_stride + h[None, :]
    x_ptrs = x_ptr + t[None, :].to(tl.int64) * x_stride + h[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
    for start in range(first, last, BLOCK_H):
        inside = start + h < last
        w = tl.load(w_ptrs + start, mask=(r[:, None] < R) & inside[None, :], other=0.0)
        x = tl.load(x_ptrs + start, mask=(t[None, :] < T) & inside[:, None], other=0.0)
        # Each block's sum starts at zero: what a tensor core cuts off (see _unbias) is then nothing beside `acc`.
        if dtype == tl.float16:
            high, low = _two_parts(w, dtype)
        else:
            high = tl.clamp(w, -_BFLOAT16_MAX, _BFLOAT16_MAX).to(dtype)
            low = (w - high.to(tl.float32)).to(dtype)
        acc += tl.dot(high, x, tl.dot(low, x))
    if dtype == tl.float16:
        acc *= 1.0 / _SCALE_FLOAT16
    out_ptrs = out_ptr + s.to(tl.int64) * T * R + t[None, :].to(tl.int64) * R + r[:, None]
    tl.store(out_ptrs, acc, mask=(t[None, :] < T) & (r[:, None] < R))


@triton.jit
def _sum_slices(partial_ptr, out_ptr, size, S, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """out = partial [S, size] summed over S, from the first slice to the last."""
    begin(OVERLAP)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in range(S):
        acc += tl.load(partial_ptr + tl.cast(s, tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, acc, mask=i < size)


@triton.jit
def _split_weight(w_ptr, high_ptr, low_ptr, H, w_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Both parts of one row of W."""
    begin(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    high, low = _two_parts(tl.load(w_ptr + r * w_stride + h, mask=h < H), high_ptr.dtype.element_ty)
    tl.store(high_ptr + r * H + h, high, mask=h < H)
    tl.store(low_ptr + r * H + h, low, mask=h < H)


@triton.jit
def _split(
    x_desc,
    high_desc,
    low_desc,
    out_ptr,
    T,
    R,
    H,
    slice_h,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNBIAS_EVERY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A tile of logits from both parts over one slice of H, into out [S, T, R].

    Tiles of the same tokens are neighbours, so that x comes from memory once.
    """
    begin(OVERLAP)
    tiles_r = tl.cdiv(R, BLOCK_R)
    first_t = (tl.program_id(0) // tiles_r) * BLOCK_T
    first_r = (tl.program_id(0) % tiles_r) * BLOCK_R
    s = tl.program_id(1)
    first = s * slice_h
    blocks = tl.cdiv(tl.minimum(slice_h, H - first), BLOCK_H)
    dtype: tl.constexpr = x_desc.dtype
    steps: tl.constexpr = 2 * BLOCK_H // 16
    acc = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for block in range(blocks):
        x = x_desc.load([first_t, first + block * BLOCK_H])
        high = high_desc.load([first_r, first + block * BLOCK_H])
        low = low_desc.load([first_r, first + block * BLOCK_H])
        if dtype == tl.float16:
            acc = tl.dot(x, low.T, acc)
        else:
            # The small part first: the conversion of x then runs while the product before it does.
            half = tl.clamp(x.to(tl.float32), -_FLOAT16_MAX, _FLOAT16_MAX).to(tl.float16)
            acc = tl.dot(half, low.T, acc)
        if block % UNBIAS_EVERY == UNBIAS_EVERY - 1:
            acc = _unbias(acc, UNBIAS_EVERY * steps)
        acc = tl.dot(x, high.T, acc)
    acc = _unbias(acc, (blocks % UNBIAS_EVERY) * steps)
    if dtype == tl.float16:
        acc *= 1.0 / _SCALE_FLOAT16
    else:
        acc *= 1.0 / _SCALE_BFLOAT16
    t = first_t + tl.arange(0, BLOCK_T)
    r = first_r + tl.arange(0, BLOCK_R)
    out_ptrs = out_ptr + s.to(tl.int64) * T * R + t[:, None].to(tl.int64) * R + r[None, :]
    tl.store(out_ptrs, acc, mask=(t[:, None] < T) & (r[None, :] < R))


def router_partials(x_TH: Tensor, weight_RH: Tensor, schedule: RouterSchedule | None = None) -> Tensor:
    """x W^T, as accurate as a float32 matmul, in S sums that the reader adds in order.

    x_TH: [T, H] bfloat16 or float16; weight_RH: [R, H] float32; the last dimension of both contiguous. `schedule` is
    for measurements: the default is the fastest known one. There is no host synchronisation, and one launch (none for
    T = 0, two on the split path). The same input gives bitwise the same output.

    Returns:
        [S, T, R] float32, contiguous; logits are its sum over S. Values that are not finite: see the top of this file.
    """
    T, H = x_TH.shape
    R = weight_RH.shape[0]
    assert x_TH.dtype in (torch.bfloat16, torch.float16)
    assert weight_RH.dtype == torch.float32
    assert weight_RH.shape[1] == H
    assert x_TH.stride(1) == weight_RH.stride(1) == 1
    if T == 0:
        return weight_RH.new_empty((1, 0, R))
    # A descriptor takes no rows that overlap, as those of an expanded tensor do.
    aligned = H % 8 == 0 and x_TH.stride(0) >= H and x_TH.stride(0) % 8 == 0 and x_TH.data_ptr() % 16 == 0
    gpu = gpu_of(x_TH.device)
    schedule = schedule or router_schedule(
        T, R, H, x_TH.dtype, aligned and gpu.takes_large_tiles, not gpu.tensor_memory
    )
    tile = {"BLOCK_T": schedule.block_t, "BLOCK_R": schedule.block_r, "BLOCK_H": schedule.block_h}
    options = launch_options(x_TH, len(x_TH))
    launch = {"num_warps": schedule.warps, "num_stages": schedule.stages, **options}
    strides = (x_TH.stride(0), weight_RH.stride(0))
    tiles_t, tiles_r = cdiv(T, schedule.block_t), cdiv(R, schedule.block_r)
    slice_h = cdiv(cdiv(H, schedule.slices), schedule.block_h) * schedule.block_h
    S = cdiv(H, slice_h)
    out_STR = weight_RH.new_empty((S, T, R))
    if schedule.path == "one":
        _one[(tiles_r,)](x_TH, weight_RH, out_STR, T, R, H, *strides, **tile, **launch)
    elif schedule.path == "direct":
        _direct[(tiles_t * tiles_r, S)](x_TH, weight_RH, out_STR, T, R, H, *strides, slice_h, **tile, **launch)
    else:
        assert aligned
        high_RH = torch.empty((R, H), dtype=x_TH.dtype, device=x_TH.device)
        low_RH = torch.empty((R, H), dtype=torch.float16, device=x_TH.device)
        _split_weight[(R, cdiv(H, 2048))](weight_RH, high_RH, low_RH, H, weight_RH.stride(0), BLOCK=2048, **options)
        block_TH, block_RH = [schedule.block_t, schedule.block_h], [schedule.block_r, schedule.block_h]
        x_desc = TensorDescriptor(x_TH, [T, H], [x_TH.stride(0), 1], block_TH)
        high_desc = TensorDescriptor(high_RH, [R, H], [H, 1], block_RH)
        low_desc = TensorDescriptor(low_RH, [R, H], [H, 1], block_RH)
        _split[(tiles_t * tiles_r, S)](
            x_desc, high_desc, low_desc, out_STR, T, R, H, slice_h, **tile, UNBIAS_EVERY=_UNBIAS_EVERY, **launch
        )
    return out_STR


def router_logits(x_TH: Tensor, weight_RH: Tensor, schedule: RouterSchedule | None = None) -> Tensor:
    """The sum of `router_partials` over S: [T, R] float32, contiguous. One more launch where S > 1."""
    partial_STR = router_partials(x_TH, weight_RH, schedule)
    S, T, R = partial_STR.shape
    if S == 1:
        return partial_STR[0]
    out_TR = partial_STR.new_empty((T, R))
    _sum_slices[(cdiv(T * R, 256),)](partial_STR, out_TR, T * R, S, BLOCK=256, num_warps=2, **launch_options(out_TR, T))
    return out_TR
