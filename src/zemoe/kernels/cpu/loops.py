"""Products of experts' rows on CPUs, compiled by numba: first a tile in LLVM's terms, then loops over tiles in Python.

Libraries take a weight apart and put it together again before they multiply, which takes longer than the product itself
when there are few rows. Here the rows are rearranged instead, into panels: the values of one column for up to 64 rows
beside each other. `_tile` multiplies each number of a weight, read as it lies, with whole vectors of the panel, so
nothing is ever summed across a vector, and the result is a panel again.

T tokens, E experts, O and H rows and columns of a weight, N rows of all experts, G groups of up to 64 rows of one
expert, L lanes (a group's rows, rounded up to 8).
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .compiled import THREADS, compiled, run_parts

_FAST = {"contract", "nsz", "arcp"}  # NaN and infinity are what they are
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
# Rows of a weight that `_tile` multiplies at a time: more than 8 at multiples of 4 KiB would compete for the same lines
# of the first-level cache, and the panel's lines need some too.
ROWS = 6
LANES = 8  # of the narrowest vector
GROUP = 64  # rows of one expert; a panel of more would not stay in the second-level cache
_STRIP = 48  # rows of a result that are turned round at a time: whole ROWS and whole LANES
_SUMMED = 256  # columns whose products are summed before they are added to the rest, for the sake of accuracy
_AHEAD = 2048  # columns, which take _tile a microsecond or two, between calling for a row and its use
_LINE = 16  # float32 numbers of a cache line


def _vector_lanes(features: str) -> tuple[int, int]:
    """Return the lanes of a vector, and the most lanes whose sums with ROWS rows stay in registers, by CPU features.

    AVX-512 has 32 registers of 16 lanes, AVX2 16 of 8, and arm64 32 of 4, two of which make one of ours.
    """
    return (16, 64) if "+avx512vl" in features.split(",") else (8, 16)


# Of the CPU that numba compiles for, which its variables can make another than this one.
_VECTOR, _MOST_LANES = _vector_lanes(cpu_target.target_context.codegen().magic_tuple()[2])


# ----------------------------------------------------------------------------------------------------------- one tile


@intrinsic
def _tile(_, w, row, last, soon, first, stop, panel, start, pitch, lanes, out, to):
    """out[to + r * pitch + m] (+)= the sum over h from first to stop of w[r, h] * panel[start + h * pitch + m].

    For ROWS rows r of w [E, O, H] (float32, or bits of bfloat16), counted over all experts, from `row` on (`last` again
    instead of one beyond it), and `lanes` m, at most _MOST_LANES. Added where first > 0. Meanwhile rows `soon` and
    up are called into the second-level cache: each row has pages of its own, and hardware foresees none.
    """

    def generate(context, builder, signature, arguments):
        _, row, last, soon, first, stop, _, start, pitch, lanes, _, to = arguments
        w, panel, out = (context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 6, 10))
        H = builder.extract_value(w.shape, 2)
        following = [builder.add(row, ir.Constant(_I64, r)) for r in range(ROWS)]
        rows = [builder.select(builder.icmp_signed("<", n, last), n, last) for n in following]
        weights = [builder.gep(w.data, [builder.mul(n, H)]) for n in rows]
        coming = [builder.gep(w.data, [builder.mul(builder.add(soon, ir.Constant(_I64, r)), H)]) for r in range(ROWS)]
        results = [builder.gep(out.data, [builder.add(to, builder.mul(n, pitch))]) for n in rows]
        xs = builder.gep(panel.data, [start])
        again = builder.icmp_signed(">", first, ir.Constant(_I64, 0))
        end = builder.append_basic_block("end")
        switch = builder.switch(lanes, end)
        for size in range(LANES, _MOST_LANES + 1, LANES):
            case = builder.append_basic_block(f"lanes{size}")
            switch.add_case(ir.Constant(_I64, size), case)
            builder.position_at_end(case)
            widths = [_VECTOR] * (size // _VECTOR) + [LANES] * (size % _VECTOR // LANES)
            sums = _sums(builder, widths, weights, coming, xs, pitch, first, stop)
            places = [place for result in results for place in _vectors(builder, result, widths)]
            before = [builder.load(place, align=4) for place in places]
            zeros = [ir.Constant(value.type, None) for value in before]
            before = [builder.select(again, value, zero) for value, zero in zip(before, zeros, strict=True)]
            # All loaded before any is stored: row `last` may be among them several times.
            for place, value, vector in zip(places, before, (v for vectors in sums for v in vectors), strict=True):
                builder.store(builder.fadd(value, builder.load(vector)), place, align=4)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return numba.types.void(w, row, last, soon, first, stop, panel, start, pitch, lanes, out, to), generate


def _vectors(builder, pointer, widths):
    """Return pointers to vectors of these widths, one after the other."""
    places = [builder.gep(pointer, [ir.Constant(_I64, sum(widths[:n]))]) for n in range(len(widths))]
    return [builder.bitcast(p, ir.VectorType(_F32, n).as_pointer()) for p, n in zip(places, widths, strict=True)]


def _sums(builder, widths, weights, coming, xs, pitch, first, stop):
    """Build the loop of `_tile`; return pointers to the sums, as vectors of these widths, for each row of `weights`."""
    sums = [[cgutils.alloca_once(builder, ir.VectorType(_F32, n)) for n in widths] for _ in weights]
    for vector in (vector for vectors in sums for vector in vectors):
        builder.store(ir.Constant(vector.type.pointee, None), vector)  # LLVM keeps these in registers
    with cgutils.for_range_slice(builder, first, stop, ir.Constant(_I64, _LINE)) as (line, _):
        for row in coming:
            _prefetch(builder, builder.gep(row, [line]))
        line_stop = builder.add(line, ir.Constant(_I64, _LINE))
        line_stop = builder.select(builder.icmp_signed("<", line_stop, stop), line_stop, stop)
        with cgutils.for_range_slice(builder, line, line_stop, ir.Constant(_I64, 1)) as (h, _):
            x = _vectors(builder, builder.gep(xs, [builder.mul(h, pitch)]), widths)
            x = [builder.load(vector, align=4) for vector in x]
            for row, vectors in zip(weights, sums, strict=True):
                number = builder.load(builder.gep(row, [h]))
                for vector, value in zip(vectors, x, strict=True):
                    term = builder.fmul(_splat(builder, number, value.type), value, flags=("contract",))
                    builder.store(builder.fadd(builder.load(vector), term, flags=("contract",)), vector)
    return sums


def _prefetch(builder, pointer):
    """Have a line brought from memory; whether the address is a valid one does not matter."""
    byte = ir.IntType(8).as_pointer()
    form = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0")
    hints = [ir.Constant(_I32, n) for n in (0, 2, 1)]  # for reading, into the second-level cache, data
    builder.call(prefetch, [builder.bitcast(pointer, byte), *hints])


def _splat(builder, number, kind):
    """Return a vector of one number, of a float32 type; the bits of a bfloat16 are the upper half of a float32."""
    lanes = kind if number.type == _F32 else ir.VectorType(_I16, 2 * kind.count)
    undefined = ir.Constant(lanes, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(_I32, 0))
    splat = builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes.count), None))
    if lanes is kind:
        return splat
    return builder.bitcast(builder.and_(splat, ir.Constant(lanes, [0, -1] * kind.count)), kind)


@intrinsic
def _turn(_, source, start, pitch, out, to, out_pitch):
    """out[to + j * out_pitch + i] = source[start + i * pitch + j] for i and j below LANES; both float32."""

    def generate(context, builder, signature, arguments):
        _, start, pitch, _, to, out_pitch = arguments
        source, out = (context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 3))

        def place(array, start, pitch, i):
            first = builder.add(start, builder.mul(pitch, ir.Constant(_I64, i)))
            return _vectors(builder, builder.gep(array.data, [first]), [LANES])[0]

        rows = [builder.load(place(source, start, pitch, i), align=4) for i in range(LANES)]
        half = LANES // 2
        halves = [[n for j in range(first, first + half) for n in (j, LANES + j)] for first in (0, half)]
        masks = [ir.Constant(ir.VectorType(_I32, LANES), mask) for mask in halves]
        for _ in range(3):  # LANES = 2^3; each time the first and the second half of the rows are shuffled like cards
            rows = [builder.shuffle_vector(rows[i], rows[i + half], mask) for i in range(half) for mask in masks]
        for i, row in enumerate(rows):
            builder.store(row, place(out, to, out_pitch, i), align=4)
        return context.get_dummy_value()

    return numba.types.void(source, start, pitch, out, to, out_pitch), generate


# ------------------------------------------------------------------------------------------------- products of groups


@compiled()
def group_rows(offsets, most):
    """Return [G, 4] int64: expert, first row, number of rows, lanes of all groups before.

    Experts with more than `most` rows are left out.
    """
    groups = np.empty((len(offsets) + offsets[-1] // GROUP, 4), dtype=np.int64)
    found = place = 0
    for e in range(len(offsets) - 1):
        if offsets[e + 1] - offsets[e] > most:
            continue
        for first in range(offsets[e], offsets[e + 1], GROUP):
            rows = min(GROUP, offsets[e + 1] - first)
            groups[found, 0], groups[found, 1], groups[found, 2], groups[found, 3] = e, first, rows, place
            found += 1
            place += _lanes(rows)
    return groups[:found]


@compiled()
def _lanes(rows):
    return (rows + LANES - 1) // LANES * LANES


@compiled()
def lanes_of(groups):
    """Return the lanes of all groups together."""
    return groups[-1, 3] + _lanes(groups[-1, 2]) - groups[0, 3]


@compiled()
def _row_of_block(expert, block, parts, O):
    """Return the row of w, counted over all experts, at which a block of ROWS begins; each part has its own blocks."""
    blocks = (O // parts + ROWS - 1) // ROWS
    return expert * O + block // blocks * (O // parts) + block % blocks * ROWS


@compiled(fastmath=_FAST)
def _multiply(w, row, last, soon, panels, start, lanes, out, to):
    """Run `_tile` over all columns and lanes."""
    for first in range(0, w.shape[2], _SUMMED):
        stop = min(first + _SUMMED, w.shape[2])
        for m in range(0, lanes, _MOST_LANES):
            width = min(lanes - m, _MOST_LANES)
            _tile(w, row, last, soon, first, stop, panels, start + m, lanes, width, out, to + m)


@compiled(fastmath=_FAST)
def _pack(x, token, first, rows, eight, panel):
    """panel[h * L + m] = x[token[first + m], h], and the last row again for lanes without a row.

    eight: room for LANES rows.
    """
    H, lanes = x.shape[1], _lanes(rows)
    width = _lanes(H) + _LINE  # no multiple of 4 KiB, at which the rows would compete for the same lines of a cache
    for m in range(0, lanes, LANES):
        for i in range(LANES):
            t = token[first + min(m + i, rows - 1)]
            for h in range(H):
                eight[i * width + h] = x[t, h]
        for h in range(0, H, LANES):
            _turn(eight, h, width, panel, h * lanes + m, lanes)


@compiled(fastmath=_FAST)
def _gather(x, token, groups, w, panels, begin, end):
    """Do `multiply` with gather for blocks `begin` to `end` of each weight."""
    (parts, _), (O, H) = panels.shape, w.shape[1:]
    I = O // parts
    blocks, ahead = (I + ROWS - 1) // ROWS, (_AHEAD + H - 1) // H
    panel = np.empty(GROUP * _lanes(H), dtype=np.float32)
    eight = np.zeros(LANES * (_lanes(H) + _LINE), dtype=np.float32)
    for g in range(len(groups)):
        e, first, rows, place = groups[g]
        lanes, following = _lanes(rows), groups[min(g + 1, len(groups) - 1), 0]
        _pack(x, token, first, rows, eight, panel)
        for block in range(begin, end):
            row = _row_of_block(e, block, parts, O)
            soon = _row_of_block(e, block + ahead, parts, O)
            if block + ahead >= end:
                soon = _row_of_block(following, min(begin + block + ahead - end, end - 1), parts, O)
            start = e * O + block // blocks * I
            to = (place - groups[0, 3]) * I - start * lanes
            _multiply(w, row, start + I - 1, soon, panel, 0, lanes, panels[block // blocks], to)


@compiled(fastmath=_FAST)
def _scatter(y, token, weight, groups, w, panels, begin, end):
    """Do `multiply` without gather for columns `begin` to `end` of y."""
    H, I = w.shape[1:]
    ahead = (_AHEAD + I - 1) // I * ROWS
    strip, turned = np.empty(_STRIP * GROUP, dtype=np.float32), np.empty(_STRIP * GROUP, dtype=np.float32)
    for g in range(len(groups)):
        e, first, rows, place = groups[g]
        lanes, following = _lanes(rows), groups[min(g + 1, len(groups) - 1), 0]
        start = (place - groups[0, 3]) * I
        for h in range(begin, end, _STRIP):
            width = min(_STRIP, end - h)
            for row in range(e * H + h, e * H + h + width, ROWS):
                soon = row + ahead if row + ahead < e * H + end else following * H + begin + row + ahead - e * H - end
                _multiply(w, row, e * H + H - 1, soon, panels, start, lanes, strip, -(e * H + h) * lanes)
            for i in range(0, width, LANES):
                for m in range(0, lanes, LANES):
                    _turn(strip, i * lanes + m, lanes, turned, m * _STRIP + i, _STRIP)
            for m in range(rows):
                t, scale = token[first + m], weight[first + m]
                for i in range(width):
                    y[t, h + i] += scale * turned[m * _STRIP + i]


def multiply(x, token, weight, groups, w, panels, gather):
    """Multiply experts' weights with the rows of their groups.

    gather: from x [T, H] to panels [parts, I * lanes of all groups], where each part of a weight w [E, parts * I, H]
    makes a panel [I, L] a group, one after the other. Else from panels [1, I * lanes of all groups] to x [T, H]:
    weight[n] * w[e] times row n is added to x[token[n]], w [E, H, I]. token, weight [N]; all contiguous, float32 (w
    bfloat16 too). Each thread takes some rows of every weight, so has some columns of y to itself, and the groups in
    their order: their number changes no sum.
    """
    run_parts(_multiply_part, _multiply_parts, x, token, weight, groups, w, panels, gather)


@compiled(fastmath=_FAST)
def _multiply_part(x, token, weight, groups, w, panels, gather, n, parts):
    rows = w.shape[1] // len(panels)
    blocks = (rows + ROWS - 1) // ROWS * len(panels)
    begin, end = blocks * n // parts, blocks * (n + 1) // parts
    if begin < end:
        if gather:
            _gather(x, token, groups, w, panels, begin, end)
        else:
            _scatter(x, token, weight, groups, w, panels[0], begin * ROWS, min(end * ROWS, rows))


@compiled(fastmath=_FAST, parallel=THREADS)
def _multiply_parts(x, token, weight, groups, w, panels, gather, parts):
    for n in numba.prange(parts):
        _multiply_part(x, token, weight, groups, w, panels, gather, n, parts)


def rows_of_panels(panels, groups, rows):
    """Fill rows [N, parts * I] with what `multiply` wrote to panels [parts, I * lanes of all groups], row by row."""
    run_parts(_rows_part, _rows_parts, panels, groups, rows)


@compiled()
def _rows_part(panels, groups, rows, n, parts):
    I = rows.shape[1] // len(panels)
    for g in range(len(groups) * n // parts, len(groups) * (n + 1) // parts):
        _, first, M, place = groups[g]
        for panel in range(len(panels)):
            for m in range(M):
                for i in range(I):
                    lane = ((place - groups[0, 3]) * I + i * _lanes(M)) + m
                    rows[first + m, panel * I + i] = panels[panel, lane]


@compiled(parallel=THREADS)
def _rows_parts(panels, groups, rows, parts):
    for n in numba.prange(parts):
        _rows_part(panels, groups, rows, n, parts)


@compiled(fastmath=_FAST)
def silu_panels(panels, groups):
    """Set panels[0] = silu(panels[0]) * panels[1], only in the lanes that have a row."""
    I = panels.shape[1] // lanes_of(groups)
    for g in range(len(groups)):
        _, _, rows, place = groups[g]
        for i in range(I):
            first_lane = place * I + i * _lanes(rows)
            for m in range(first_lane, first_lane + rows):
                panels[0, m] *= panels[1, m] / (np.float32(1) + np.exp(-panels[0, m]))
