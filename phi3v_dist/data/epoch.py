"""The rows of one epoch: which samples, in which windows, packed how, in which order. Pure.

In: what samples cost and where they lie, the seed, the number of the epoch. Out: `EpochRows`.

Shards are shuffled, then cut into windows of neighbouring samples; samples are shuffled, packed and grouped
within a window only, so that a stretch of training reads few shards: of a network disk, of a node's cache.
Shuffling is by hashes, not by a library's random numbers: the same order with any version of anything.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from phi3v_dist.data.pack import group, pack

_WINDOW = 16_384  # samples packed together, at least; larger fills no better
_WINDOW_STEPS = 16  # optimizer steps of a window, at least: there must be a choice of rows to group


@dataclass(frozen=True)
class Layout:
    """Where the samples lie. shards: int32 [samples], number of the shard of each; samples of a shard are
    neighbours, those of a dataset too. bounds: first sample of each dataset, and the number of samples.
    weights: share of each dataset in the samples of an epoch; None: every sample once an epoch.
    """

    shards: np.ndarray
    bounds: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def single(cls, samples: int) -> Layout:
        """One dataset of one shard."""
        return cls(np.zeros(samples, np.int32), (0, samples))


@dataclass(frozen=True)
class EpochRows:
    """The rows of one epoch in order. Row r is samples[offsets[r] : offsets[r + 1]], numbers into the
    index.
    """

    samples: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> np.ndarray:
        """The samples of a row: int64 [samples of it]."""
        return self.samples[self.offsets[number] : self.offsets[number + 1]]

    def take(self, numbers: np.ndarray) -> EpochRows:
        """These rows, in this order."""
        starts, lengths = self.offsets[numbers], np.diff(self.offsets)[numbers]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return EpochRows(self.samples[places], offsets)


def hashes(count: int, *key: object) -> np.ndarray:
    """uint64 [count]: a hash of each number from 0, other ones for every key (splitmix64)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    start = np.uint64(int.from_bytes(digest[:8], "little"))
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def shuffled(count: int, *key: object) -> np.ndarray:
    """int64 [count]: the numbers from 0 in an order that the key decides."""
    return np.argsort(hashes(count, *key), kind="stable")


def epoch_draws(layout: Layout, usable: np.ndarray) -> list[int]:
    """Samples that each dataset gives to an epoch. usable: numbers of the samples that may be used."""
    counts = np.diff(np.searchsorted(usable, layout.bounds))
    if layout.weights is None:
        return [int(count) for count in counts]
    weights = np.array(layout.weights) * (counts > 0)
    exact = weights / weights.sum() * len(usable)
    draws = np.floor(exact).astype(int)
    most = np.argsort(-(exact - draws), kind="stable")[: len(usable) - int(draws.sum())]
    draws[most] += 1  # largest remainders
    return [int(count) for count in draws]


def epoch_samples(
    layout: Layout, usable: np.ndarray, seed: int, epoch: int, shuffle: bool
) -> list[np.ndarray]:
    """The samples of an epoch in shard order, for each dataset.

    A dataset is gone through pass by pass, each with another order of its shards; an epoch continues where
    the one before it stopped, so every sample of a dataset is used before any is used again.
    """
    parts = []
    for source, draws in enumerate(epoch_draws(layout, usable)):
        first, end = np.searchsorted(usable, layout.bounds[source : source + 2])
        own = usable[first:end]
        pieces = []
        at, stop = epoch * draws, (epoch + 1) * draws
        while at < stop:
            number, start = divmod(at, len(own))
            order = own[_shard_order(layout.shards[own], seed, source, number)] if shuffle else own
            pieces.append(order[start : start + stop - at])
            at += len(pieces[-1])
        parts.append(np.concatenate(pieces) if pieces else own[:0])
    return parts


def _shard_order(shards: np.ndarray, *key: int) -> np.ndarray:
    """Places of samples, shard by shard, the shards shuffled."""
    starts = np.flatnonzero(np.diff(shards, prepend=shards[0] - 1))
    lengths = np.diff(starts, append=len(shards))
    order = shuffled(len(starts), "shards", *key)
    starts, lengths = starts[order], lengths[order]
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(len(shards))


def window_count(samples: int, tokens: int, seq_len: int, global_batch: int) -> int:
    """Windows of an epoch of so many samples and tokens."""
    rows = max(1.0, tokens / seq_len)
    window = max(_WINDOW, _WINDOW_STEPS * global_batch * samples / rows)
    return max(1, round(samples / window))


def epoch_rows(
    lengths: np.ndarray,
    work: np.ndarray,
    layout: Layout,
    usable: np.ndarray,
    *,
    seq_len: int,
    global_batch: int,
    seed: int,
    epoch: int,
    phase: int = 0,
    shuffle: bool = True,
    packing: bool = True,
) -> EpochRows:
    """Packs the samples numbered `usable` (ascending; each with lengths[i] <= seq_len tokens).

    work: float64 [samples]. phase: rows of the step under way that the epoch before has given. Without
    `packing` every row is one sample. Without `shuffle` samples go by number, and rows by their first one.
    Deterministic in the arguments.
    """
    sources = epoch_samples(layout, usable, seed, epoch, shuffle)
    total = sum(len(part) for part in sources)
    tokens = sum(int(lengths[part].sum()) for part in sources)
    windows = window_count(total, tokens, seq_len, global_batch)
    placed: list[EpochRows] = []
    waiting = EpochRows(np.empty(0, np.int64), np.zeros(1, np.int64))
    missing = -phase % global_batch
    for window in range(windows):
        parts = [
            part[len(part) * window // windows : len(part) * (window + 1) // windows] for part in sources
        ]
        chosen = np.concatenate(parts)
        if shuffle:
            chosen = chosen[shuffled(len(chosen), "window", seed, epoch, window)]
        if packing:
            places, offsets = pack(lengths[chosen], work[chosen], seq_len)
            rows = EpochRows(chosen[places], offsets)
        else:
            rows = EpochRows(chosen, np.arange(len(chosen) + 1))
        if not shuffle:
            placed.append(_by_number(rows))
            continue
        rows = joined([waiting, rows])
        cost = np.add.reduceat(work[rows.samples], rows.offsets[:-1]) if len(rows) else np.empty(0)
        groups, left = group(cost, global_batch, missing, window == windows - 1)
        waiting = rows.take(left)
        groups, missing = _shuffle_groups(groups, global_batch, missing, seed, epoch, window)
        placed += [rows.take(np.concatenate(groups))] if groups else []
    return joined(placed)


def joined(parts: list[EpochRows]) -> EpochRows:
    """The rows of all parts."""
    starts = np.cumsum([0] + [len(part.samples) for part in parts])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    return EpochRows(
        np.concatenate([np.empty(0, np.int64), *(part.samples for part in parts)]),
        np.concatenate([*offsets, starts[-1:]]).astype(np.int64),
    )


def _by_number(rows: EpochRows) -> EpochRows:
    """Samples of a row in ascending order, rows by their first one."""
    row_of = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    ordered = EpochRows(rows.samples[np.lexsort((rows.samples, row_of))], rows.offsets)
    return ordered.take(np.argsort(ordered.samples[ordered.offsets[:-1]], kind="stable"))


def _shuffle_groups(
    groups: list[np.ndarray], size: int, missing: int, seed: int, epoch: int, window: int
) -> tuple[list[np.ndarray], int]:
    """The groups in random order, but for one that completes a step (first) and one not full (last)."""
    head = groups[:1] if missing and groups else []
    tail = groups[-1:] if len(groups) > len(head) and len(groups[-1]) < size else []
    middle = groups[len(head) : len(groups) - len(tail)]
    order = shuffled(len(middle), "groups", seed, epoch, window).tolist()
    return head + [middle[i] for i in order] + tail, 0 if head else missing
