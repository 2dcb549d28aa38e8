"""Loops for CPUs, compiled by numba, which only this file imports: products of a few rows, and the k largest values.

torch multiplies one expert at a time, and libraries made for large products take two to three times as long as reading
a weight takes when there are few rows. E experts, O rows of a weight, H its columns, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from torch import Tensor


def _has_safe_threads() -> bool:
    """Whether numba has threads that several Python threads may use at a time; its own ones end the process then."""
    for pool in ("tbbpool", "omppool"):
        try:
            import_module(f"numba.np.ufunc.{pool}")
        except ImportError:
            continue
        return True
    return False


class _Memory:
    """A tensor's memory in the form that numpy looks for."""

    def __init__(self, tensor: Tensor) -> None:
        form = {"float32": "<f4", "bfloat16": "<u2", "int64": "<i8"}[str(tensor.dtype).removeprefix("torch.")]
        self.__array_interface__ = {
            "version": 3,
            "typestr": form,
            "shape": tuple(tensor.shape),
            "data": (tensor.data_ptr(), False),
        }


def array(tensor: Tensor) -> np.ndarray:
    """The values of a contiguous float32 or int64 tensor, the bits of a bfloat16 one; it has to outlive the array.

    Not by tensor.numpy(): torch never again resizes a storage that numpy has seen, which fully sharded training does.
    """
    return np.asarray(_Memory(tensor))


def _compiled(**how: Any) -> Callable[[Callable], Callable]:
    """numba.njit, kept on disk from one process to the next where there is a place to write to."""

    def decorate(loop: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **how)(loop)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return numba.njit(**how)(loop)

    return decorate


_THREADS = _has_safe_threads()
# Sums may be taken in any order; NaN and infinity are what they are.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
ROWS = 8  # of a weight that are multiplied with three rows of x at a time: 24 sums, which stay in registers


@intrinsic
def _float32(_, value):
    """A float32, or the bits of a bfloat16, as float32."""

    def generate(_context, builder, _signature, arguments):
        if value == numba.types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return numba.types.float32(value), generate


@_compiled(fastmath=_FAST)
def _sums(w, e, first, last, x, t0, t1, t2, sums):
    """sums[3, 8] of rows first, first + 1 .. of w[e] with three rows of x; beyond `last`, row `last` again."""
    n0, n1, n2, n3 = first, min(first + 1, last), min(first + 2, last), min(first + 3, last)
    n4, n5, n6, n7 = min(first + 4, last), min(first + 5, last), min(first + 6, last), min(first + 7, last)
    s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = s30 = s31 = s32 = np.float32(0)
    s40 = s41 = s42 = s50 = s51 = s52 = s60 = s61 = s62 = s70 = s71 = s72 = np.float32(0)
    for h in range(w.shape[2]):
        x0, x1, x2 = x[t0, h], x[t1, h], x[t2, h]
        a = _float32(w[e, n0, h])
        s00, s01, s02 = s00 + a * x0, s01 + a * x1, s02 + a * x2
        a = _float32(w[e, n1, h])
        s10, s11, s12 = s10 + a * x0, s11 + a * x1, s12 + a * x2
        a = _float32(w[e, n2, h])
        s20, s21, s22 = s20 + a * x0, s21 + a * x1, s22 + a * x2
        a = _float32(w[e, n3, h])
        s30, s31, s32 = s30 + a * x0, s31 + a * x1, s32 + a * x2
        a = _float32(w[e, n4, h])
        s40, s41, s42 = s40 + a * x0, s41 + a * x1, s42 + a * x2
        a = _float32(w[e, n5, h])
        s50, s51, s52 = s50 + a * x0, s51 + a * x1, s52 + a * x2
        a = _float32(w[e, n6, h])
        s60, s61, s62 = s60 + a * x0, s61 + a * x1, s62 + a * x2
        a = _float32(w[e, n7, h])
        s70, s71, s72 = s70 + a * x0, s71 + a * x1, s72 + a * x2
    sums[0, 0], sums[0, 1], sums[0, 2], sums[0, 3] = s00, s10, s20, s30
    sums[0, 4], sums[0, 5], sums[0, 6], sums[0, 7] = s40, s50, s60, s70
    sums[1, 0], sums[1, 1], sums[1, 2], sums[1, 3] = s01, s11, s21, s31
    sums[1, 4], sums[1, 5], sums[1, 6], sums[1, 7] = s41, s51, s61, s71
    sums[2, 0], sums[2, 1], sums[2, 2], sums[2, 3] = s02, s12, s22, s32
    sums[2, 4], sums[2, 5], sums[2, 6], sums[2, 7] = s42, s52, s62, s72


@_compiled(fastmath=_FAST)
def _put(out, row, first, width, sums, j):
    if width == ROWS:  # known when compiled, so that it takes one instruction
        for i in range(ROWS):
            out[row, first + i] = sums[j, i]
    else:
        for i in range(width):
            out[row, first + i] = sums[j, i]


@_compiled(fastmath=_FAST)
def _add(out, row, first, width, sums, j):
    if width == ROWS:
        for i in range(ROWS):
            out[row, first + i] += sums[j, i]
    else:
        for i in range(width):
            out[row, first + i] += sums[j, i]


@_compiled(fastmath=_FAST, parallel=_THREADS)
def multiply(x, w, token, experts, offsets, out, gather, chunks):
    """Rows offsets[g] to offsets[g + 1] belong to expert experts[g] and to the tokens that `token` names.

    gather: out[n] = w[e] x[token[n]], all in one piece, float32 (w bfloat16 too); x [T, H], w [E, O, H], out [N, O].
    Else out[token[n]] += w[e] x[n]; x [N, H], out [T, O]. Each of `chunks` threads has some columns of out to itself
    and takes the experts in their order, so sums are always added in the same order.
    """
    O = w.shape[1]
    blocks = (O + ROWS - 1) // ROWS
    for chunk in numba.prange(chunks):
        sums = np.empty((3, ROWS), dtype=np.float32)
        for g in range(len(experts)):
            e, start, stop = experts[g], offsets[g], offsets[g + 1]
            for first in range(blocks * chunk // chunks * ROWS, min(blocks * (chunk + 1) // chunks * ROWS, O), ROWS):
                width = min(ROWS, O - first)
                for n in range(start, stop, 3):
                    n1, n2 = min(n + 1, stop - 1), min(n + 2, stop - 1)
                    if gather:
                        _sums(w, e, first, O - 1, x, token[n], token[n1], token[n2], sums)
                    else:
                        _sums(w, e, first, O - 1, x, n, n1, n2, sums)
                    for j in range(min(3, stop - n)):
                        if not gather:
                            _add(out, token[n + j], first, width, sums, j)
                        else:
                            _put(out, n + j, first, width, sums, j)


@_compiled(fastmath=_FAST)
def few_choices(x, weights, ids, w13, w2, identities, num_slots, y, chunks):
    """y = the whole of a layer after routing, for few choices: sorting them takes a time that grows with their square.

    x, y [T, H], weights [T, K], w13 [E, 2I, H] and w2 [E, H, I] float32 (w13, w2 bfloat16 too), ids [T, K] int64;
    `identities` slots from E on are identities; silu. Returns the first id that is no slot and not -1 (num_slots -1:
    any), or -1 if there is none.
    """
    (T, K), E, I = ids.shape, w13.shape[0], w2.shape[2]
    token, expert = np.empty(T * K, dtype=np.int64), np.empty(T * K, dtype=np.int64)
    weight = np.empty(T * K, dtype=np.float32)
    rows = 0
    for t in range(T):
        alpha = np.float32(0)
        for k in range(K):
            e = ids[t, k]
            if e < -1 or 0 <= num_slots <= e:
                return e
            if E <= e < E + identities:
                alpha += weights[t, k]
            elif 0 <= e < E:
                place = rows
                while place > 0 and expert[place - 1] > e:
                    expert[place], token[place], weight[place] = expert[place - 1], token[place - 1], weight[place - 1]
                    place -= 1
                expert[place], token[place], weight[place] = e, t, weights[t, k]
                rows += 1
        for h in range(x.shape[1]):
            if x[t, h] != x[t, h]:
                alpha = np.float32(np.nan)
        for h in range(x.shape[1]):
            y[t, h] = alpha * x[t, h]
    if rows == 0:
        return -1
    offsets = np.empty(rows + 1, dtype=np.int64)
    groups = 0
    for n in range(rows):
        if n == 0 or expert[n] != expert[n - 1]:
            offsets[groups], groups = n, groups + 1
    offsets[groups] = rows
    experts = expert[offsets[:groups]]
    both, inner = np.empty((rows, 2 * I), dtype=np.float32), np.empty((rows, I), dtype=np.float32)
    multiply(x, w13, token[:rows], experts, offsets[: groups + 1], both, True, chunks)
    for n in range(rows):
        for i in range(I):
            gate = both[n, i]
            inner[n, i] = gate / (np.float32(1) + np.exp(-gate)) * both[n, I + i] * weight[n]
    multiply(inner, w2, token[:rows], experts, offsets[: groups + 1], y, False, chunks)
    return -1


@_compiled()
def largest(choice, logits, masked, ids, start, stop):
    """ids[t]: the k largest of choice[t] for t from start to stop, equal values by lower id; float32, ids int64.

    masked: a slot whose logit is -inf counts as -inf. A NaN is larger than nothing, and no row of ids leaves 0..A-1.
    """
    A, k = choice.shape[1], ids.shape[1]
    best = np.empty(k, dtype=np.float32)
    for t in range(start, stop):
        found = 0
        for a in range(A):
            value = choice[t, a]
            if masked and logits[t, a] == -np.inf:
                value = np.float32(-np.inf)
            if found == k and not value > best[k - 1]:
                continue
            place = min(found, k - 1)
            while place > 0 and best[place - 1] < value:
                best[place], ids[t, place] = best[place - 1], ids[t, place - 1]
                place -= 1
            best[place], ids[t, place] = value, a
            found = min(found + 1, k)


@_compiled(parallel=_THREADS)
def largest_by_threads(choice, logits, masked, ids, chunks):
    """`largest` for all rows, in `chunks` threads."""
    T = len(choice)
    for chunk in numba.prange(chunks):
        largest(choice, logits, masked, ids, T * chunk // chunks, T * (chunk + 1) // chunks)
