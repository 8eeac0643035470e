"""Documents -> rows of at most seq_len tokens, and rows -> groups that cost the same. Pure, numpy and lists.

In: lengths (tokens) and work (in the work of one token's linear layers) of the documents of a window. Out:
which of them share a row; which rows share an optimizer step.

A step lasts as long as its costliest row, so rows are made alike where that is possible and grouped with
similar rows where it is not. Rows of few documents: best fit decreasing, which wastes least. Rows of many:
most of the documents are dealt out to the row with the least work so far, and the small ones fill the room
that is left, so that long documents do not gather in one row.
"""

from __future__ import annotations

import bisect
import heapq

import numpy as np

_MANY = 32  # documents a row from which work is dealt out evenly
_DEALT = 0.8  # part of the tokens that is dealt out before the rest fills the gaps
_UNFILLED = 0.003  # part of the positions given up so that costly rows are not filled to the brim
_ROW_BITS = 32
# A row may cost so many times the mean of its step; costlier ones wait for others like them, at most so
# many steps' rows.
_UNLIKE = 1.08
_WAITING = 4


def pack(lengths: np.ndarray, work: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a window. lengths: int64 [documents], each at most seq_len. work: float64 [documents].

    Returns (places, offsets): row r holds the documents places[offsets[r] : offsets[r + 1]]. Ties keep the
    given order, so the result is a function of the arguments alone.
    """
    if not len(lengths):
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    at_least = -(-int(lengths.sum()) // seq_len)
    if len(lengths) >= _MANY * at_least:
        rows = _deal_and_fill(lengths, work, seq_len, at_least)
    else:
        order = np.argsort(-lengths, kind="stable")
        rows = np.empty(len(lengths), np.int64)
        rows[order] = _best_fit(lengths[order].tolist(), [], seq_len)
    places = np.argsort(rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    return places, offsets


def _best_fit(needs: list[int], room: list[int], seq_len: int) -> list[int]:
    """The row of each document, given longest first. room: free tokens of rows 0.. that are open already."""
    free = sorted((left << _ROW_BITS) | row for row, left in enumerate(room) if left > 0)
    count = len(room)
    rows = []
    for need in needs:
        place = bisect.bisect_left(free, need << _ROW_BITS)
        if place == len(free):
            row, left = count, seq_len - need
            count += 1
        else:
            found = free.pop(place)
            row, left = found & ((1 << _ROW_BITS) - 1), (found >> _ROW_BITS) - need
        rows.append(row)
        if left > 0:
            bisect.insort(free, (left << _ROW_BITS) | row)
    return rows


def _deal_and_fill(lengths: np.ndarray, work: np.ndarray, seq_len: int, count: int) -> np.ndarray:
    order = np.argsort(-work, kind="stable")
    dealt = int(np.searchsorted(np.cumsum(lengths[order]), _DEALT * lengths.sum()))
    rows = np.empty(len(lengths), np.int64)
    room = [seq_len] * count
    least = [(0.0, row) for row in range(count)]  # work so far, row
    rest = order[dealt:].tolist()
    for place in order[:dealt].tolist():
        so_far, row = least[0]
        need = int(lengths[place])
        if need > room[row]:
            rest.append(place)
            continue
        room[row] -= need
        rows[place] = row
        heapq.heapreplace(least, (so_far + float(work[place]), row))
    done = np.zeros(count)
    for so_far, row in least:
        done[row] = so_far
    left = np.array(rest, dtype=np.int64)
    limits = _limit(np.array(room), done, lengths[left], work[left], float(work.sum()) / count, seq_len)
    left = left[np.argsort(-lengths[left], kind="stable")]
    rows[left] = _best_fit(lengths[left].tolist(), limits.tolist(), seq_len)
    # a row that nothing was put into would be an empty row
    return np.unique(rows, return_inverse=True)[1]


def _limit(
    room: np.ndarray, done: np.ndarray, lengths: np.ndarray, work: np.ndarray, mean: float, seq_len: int
) -> np.ndarray:
    """The room of each row, less where filling it would make the row cost much more than the mean."""
    per_token = float(work.sum()) / max(1, int(lengths.sum())) or 1.0
    most = 1.05
    while True:
        limits = np.clip((most * mean - done) / per_token, 0, room).astype(np.int64)
        if (room - limits).sum() <= _UNFILLED * len(room) * seq_len:
            return limits
        most *= 1.02


def group(work: np.ndarray, size: int, first: int, last: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Puts rows of like work into groups. work: float64 [rows]. size: rows of a group. first: rows of the
    first group, which completes a step that is under way; 0 for none. last: nothing may wait.

    Returns (groups, waiting): numbers of rows; those that wait should be offered again with more rows. With
    `last`, the last group may have fewer than `size` rows. Those of an incomplete group come from the
    middle, so that the two halves of a step that two epochs share are alike.
    """
    order = np.argsort(-work, kind="stable")
    groups = []
    if first and (last or len(order) >= first):
        chosen, order = _take_middle(order, min(first, len(order)))
        groups.append(chosen)
    elif first:
        return [], np.arange(len(work))
    waiting = np.empty(0, np.int64)
    if not last:
        unlike = _unlike(work[order], size)
        waiting, order = order[:unlike], order[unlike:]
    over, order = _take_middle(order, len(order) % size)
    groups += list(order.reshape(-1, size))
    if last:
        return groups + ([over] if len(over) else []), waiting
    return groups, np.concatenate([waiting, over])


def _take_middle(order: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    start = (len(order) - count) // 2
    return order[start : start + count], np.concatenate([order[:start], order[start + count :]])


def _unlike(descending: np.ndarray, size: int) -> int:
    """How many of the costliest rows have no `size` rows like them."""
    least, best = float("inf"), 0
    for skipped in range(min(_WAITING * size, max(0, len(descending) - size)) + 1):
        times = descending[skipped] / descending[skipped : skipped + size].mean()
        if times < least:
            least, best = times, skipped
        if times <= _UNLIKE:
            break
    return best


def spread(lengths: np.ndarray, work: np.ndarray, rows: int, *, seq_len: int) -> list[np.ndarray] | None:
    """Deals documents out to `rows` rows of like work; None if a row would be longer than seq_len."""
    least = [(0.0, row) for row in range(rows)]
    dealt: list[list[int]] = [[] for _ in range(rows)]
    for place in np.argsort(-work, kind="stable").tolist():
        done, row = least[0]
        dealt[row].append(place)
        heapq.heapreplace(least, (done + float(work[place]), row))
    parts = [np.array(sorted(row), dtype=np.int64) for row in dealt]
    return parts if max(int(lengths[part].sum()) for part in parts) <= seq_len else None
