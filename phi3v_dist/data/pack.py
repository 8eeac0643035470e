"""Packs documents into rows of at most seq_len tokens, and rows into groups of similar work. Pure functions.

In: length (tokens) and work (in units of the work of one token in the linear layers) of each document of a
window. Out: which documents share a row; which rows share an optimizer step.

Two aims: little padding, and rows of similar work, because a step lasts as long as its costliest row.

- Rows of few documents (below 32 on average): best fit decreasing. The documents are placed longest first,
  each into the row where it leaves the least room; one that fits nowhere opens a new row. At most 11/9 of the
  least possible number of rows, plus a constant (Johnson et al., "Worst-case performance bounds for simple
  one-dimensional packing algorithms", 1974).
- Rows of many documents: longest processing time first (Graham, "Bounds on multiprocessing timing anomalies",
  1969). The costliest documents, 80 % of the tokens, go one by one to the row with the least work so far. The
  small ones then fill the gaps by best fit decreasing. So no row collects the long documents, whose attention
  costs most.
- Groups: rows are sorted by work and cut into groups of global_batch. A few rows that cost more than any
  others wait for rows like them in the next window.

Sorting is stable and ties keep the order given, so the result depends on the arguments alone. The number of
ranks is not among them.
"""

from __future__ import annotations

import bisect
import heapq

import numpy as np

_MANY = 32  # documents per row from which work is dealt out evenly
_DEALT = 0.8  # fraction of the tokens that is dealt out; the rest fills the gaps
_UNFILLED = 0.003  # largest fraction of the positions left empty so that costly rows do not get costlier
_ROW_BITS = 32  # of an entry of `free`: the low bits are the row, the high bits its free tokens
# A row whose work is more than _UNLIKE times the mean of its group waits for similar rows. At most _WAITING
# groups wait.
_UNLIKE = 1.08
_WAITING = 4


def pack(lengths: np.ndarray, work: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a window. lengths: int64 [documents], each at most seq_len. work: float64 [documents].

    Returns (places, offsets), int64 [documents] and int64 [rows + 1]: row r holds the documents
    places[offsets[r] : offsets[r + 1]].
    """
    if not len(lengths):
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    at_least = -(-int(lengths.sum()) // seq_len)
    if len(lengths) >= _MANY * at_least:
        rows = _deal_and_fill(lengths, work, seq_len=seq_len, count=at_least)
    else:
        order = np.argsort(-lengths, kind="stable")
        rows = np.empty(len(lengths), np.int64)
        rows[order] = _best_fit(lengths[order].tolist(), [], seq_len)
    places = np.argsort(rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    return places, offsets


def _best_fit(needs: list[int], room: list[int], seq_len: int) -> list[int]:
    """The row of each document, by best fit. needs: tokens, longest first. room: free tokens of the rows that
    exist already, from row 0 on.
    """
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


def _deal_and_fill(lengths: np.ndarray, work: np.ndarray, *, seq_len: int, count: int) -> np.ndarray:
    """The row of each document, int64 [documents]: `count` rows of similar work, and more if they do not
    suffice.
    """
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
    per_token = float(work[left].sum()) / max(1, int(lengths[left].sum())) or 1.0
    limits = _limit(np.array(room), done, per_token, mean=float(work.sum()) / count, seq_len=seq_len)
    left = left[np.argsort(-lengths[left], kind="stable")]
    rows[left] = _best_fit(lengths[left].tolist(), limits.tolist(), seq_len)
    # Rows that got no document are removed by numbering the others anew.
    return np.unique(rows, return_inverse=True)[1]


def _limit(room: np.ndarray, done: np.ndarray, per_token: float, *, mean: float, seq_len: int) -> np.ndarray:
    """The tokens that each row may still take, int64 [rows]. Less than its room if the row would otherwise
    cost much more than the mean.

    room: free tokens of each row. done: its work so far. per_token: work of a token of the documents that are
    left. mean: work of a row.
    """
    most = 1.05
    while True:
        limits = np.clip((most * mean - done) / per_token, 0, room).astype(np.int64)
        if (room - limits).sum() <= _UNFILLED * len(room) * seq_len:
            return limits
        most *= 1.02


def group(work: np.ndarray, size: int, *, first: int, last: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Puts rows of similar work into groups.

    work: float64 [rows]. size: rows of a group. first: rows of the first group, if it completes a step that
    the epoch before began; otherwise 0. last: this is the last window, so no row may wait.

    Returns (groups, waiting), numbers of rows. The waiting rows should be given again together with the rows
    of the next window. With `last`, the last group may have fewer than `size` rows. The rows of an incomplete
    group come from the middle, so that the two parts of a step that two epochs share have similar work.
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
    """How many of the costliest rows have fewer than `size` rows of similar work. descending: their work."""
    least, best = float("inf"), 0
    for skipped in range(min(_WAITING * size, max(0, len(descending) - size)) + 1):
        times = descending[skipped] / descending[skipped : skipped + size].mean()
        if times < least:
            least, best = times, skipped
        if times <= _UNLIKE:
            break
    return best


def spread(lengths: np.ndarray, work: np.ndarray, rows: int, *, seq_len: int) -> list[np.ndarray] | None:
    """Deals documents out to `rows` rows of similar work. Returns the documents of each row, int64,
    ascending; or None if a row would be longer than seq_len.
    """
    least = [(0.0, row) for row in range(rows)]
    dealt: list[list[int]] = [[] for _ in range(rows)]
    for place in np.argsort(-work, kind="stable").tolist():
        done, row = least[0]
        dealt[row].append(place)
        heapq.heapreplace(least, (done + float(work[place]), row))
    parts = [np.array(sorted(row), dtype=np.int64) for row in dealt]
    return parts if max(int(lengths[part].sum()) for part in parts) <= seq_len else None
