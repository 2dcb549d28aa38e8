"""Loops over routing choices, compiled by numba: the best slots of each token, and the choices by expert.

T tokens, E experts, A slots, K choices, N = T * K.
"""

from __future__ import annotations

import numba
import numpy as np

from .compiled import THREADS, compiled, run_parts


@compiled()
def sort_choices(ids, num_slots, choice, offsets):
    """Fill choice with the places in ids [N] of the experts' ids, those of e from offsets[e] to offsets[e + 1]; int64.

    Return the first id that is no slot and not -1 (num_slots -1: any id may be), or -1 if there is none.
    """
    num_experts = len(offsets) - 1
    offsets[:] = 0
    for e in ids:
        if e < -1 or 0 <= num_slots <= e:
            return e
        if 0 <= e < num_experts:
            offsets[e + 1] += 1
    for e in range(num_experts):
        offsets[e + 1] += offsets[e]
    for n in range(len(ids)):
        if 0 <= ids[n] < num_experts:
            choice[offsets[ids[n]]] = n
            offsets[ids[n]] += 1
    for e in range(num_experts, 0, -1):  # each one's end is where the next one began
        offsets[e] = offsets[e - 1]
    offsets[0] = 0
    return -1


@compiled()
def plan_and_set_identities(x, weights, ids, identities, num_slots, offsets, y):
    """Return what sort_choices returns, and token [N] and weight [N] of the N choices of experts; fill offsets [E + 1].

    Makes y the identities' terms (the slots from E on), NaN throughout for a token with a NaN.
    x, y [T, H], weights [T, K] float32, ids [T, K] int64.
    """
    num_experts, K = len(offsets) - 1, ids.shape[1]
    choice = np.empty(ids.size, dtype=np.int64)
    wrong = sort_choices(ids.reshape(-1), num_slots, choice, offsets)
    if wrong != -1:
        offsets[:] = 0
    for t in range(len(ids)):
        alpha = np.float32(0)
        for k in range(K):
            if num_experts <= ids[t, k] < num_experts + identities:
                alpha += weights[t, k]
        for h in range(x.shape[1]):
            if x[t, h] != x[t, h]:
                alpha = np.float32(np.nan)
        for h in range(x.shape[1]):
            y[t, h] = alpha * x[t, h]
    choice = choice[: offsets[-1]]
    return wrong, choice // K, weights.reshape(-1)[choice]


@compiled()
def largest(choice, logits, masked, ids, start, stop):
    """Fill ids[t] with the k largest of choice[t] for t from start to stop, equal values by lower id.

    choice: float32, ids int64. masked: a slot whose logit is -inf counts as -inf. A NaN is never chosen before another
    value, and every id is from 0 to A - 1.
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


def largest_by_threads(choice, logits, masked, ids):
    """`largest` for all rows, shared out over threads."""
    run_parts(_largest_part, _largest_parts, choice, logits, masked, ids)


@compiled()
def _largest_part(choice, logits, masked, ids, n, parts):
    T = len(choice)
    largest(choice, logits, masked, ids, T * n // parts, T * (n + 1) // parts)


@compiled(parallel=THREADS)
def _largest_parts(choice, logits, masked, ids, parts):
    for n in numba.prange(parts):
        _largest_part(choice, logits, masked, ids, n, parts)


@compiled()
def select(logits, bias, dropped, renormalize, scaling, weights, ids):
    """Fill ids with the best K by softmax score + bias, and weights with their scores.

    The scores are divided by their sum if `renormalize`, and multiplied by `scaling`.

    logits [T, A], bias [up to A] (0 for the rest), weights [T, K] float32; ids [T, K] int64. Renormalising, slots from
    `dropped` on weigh nothing. A slot with a logit of -inf is chosen last. A token with a logit of NaN or +inf, or
    nothing but -inf, gets NaN.
    """
    (T, A), K = logits.shape, ids.shape[1]
    scores, choice = np.empty((T, A), dtype=np.float32), np.empty((T, A), dtype=np.float32)
    for t in range(T):
        highest = np.float32(-np.inf)
        for a in range(A):
            highest = max(highest, logits[t, a])
        total = 0.0
        for a in range(A):
            scores[t, a] = np.exp(logits[t, a] - highest)  # NaN for NaN, and for infinity minus itself: so is the sum
            total += scores[t, a]
        for a in range(A):
            scores[t, a] /= total
            choice[t, a] = scores[t, a] + bias[a] if a < len(bias) else scores[t, a]
    largest(choice, logits, True, ids, 0, T)
    for t in range(T):
        total = np.float32(0)
        for k in range(K):
            weights[t, k] = scores[t, ids[t, k]]
            if renormalize and ids[t, k] >= dropped:
                weights[t, k] *= 0  # not set to 0, so that NaN stays
            total += weights[t, k]
        if not renormalize or total == 0:
            total = np.float32(1)
        for k in range(K):
            weights[t, k] = weights[t, k] / total * scaling
