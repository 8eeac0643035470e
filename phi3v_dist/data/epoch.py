"""The packed rows of one epoch, in order. Pure functions of numbers.

In: the costs of the samples, the shards that they lie in, the seed, the number of the epoch. Out:
`EpochRows`.

The algorithm:
1. Each dataset gives its share of samples to the epoch, in the order of its shards, which are shuffled.
2. This sequence is cut into windows of about 16,384 neighbouring samples. Everything that follows happens
   inside one window, so a stretch of training reads few shards (for a network disk and a cache of the node).
3. The samples of a window are shuffled and packed into rows (`pack.pack`).
4. Rows of similar work are put into groups, one for each optimizer step (`pack.group`). Rows that find no
   group wait for the next window. The groups are shuffled.

The number of ranks is not an argument. The order depends on the samples, the seed, the epoch, seq_len and
global_batch alone, so a run can resume on another number of ranks. Shuffling sorts by hashes (splitmix64:
Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) instead of a library's random
generator, so the order is the same with every version of numpy.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass

import numpy as np

from phi3v_dist.data.pack import group, pack

_WINDOW = 16_384  # about the least number of samples of a window; enough to fill rows well
_WINDOW_STEPS = 16  # about the least number of optimizer steps of a window: grouping needs a choice of rows


@dataclass(frozen=True)
class Layout:
    """Where the samples lie.

    shards: int32 [samples], the number of the shard of each sample. The samples of a shard are neighbours,
    and so are those of a dataset. bounds: the number of the first sample of each dataset, then the number of
    all samples. weights: the share of each dataset in the samples of an epoch; None: an epoch has every
    sample once.
    """

    shards: np.ndarray
    bounds: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def single(cls, samples: int) -> Layout:
        """One dataset of one shard."""
        return cls(np.zeros(samples, np.int32), (0, samples))


@dataclass(frozen=True)
class PackingSettings:
    """What shapes the rows besides the samples.

    seq_len: largest number of tokens of a row. global_batch: rows of an optimizer step. shuffle: if not set,
    samples are ordered by number, and rows by their first sample. packing: if not set, every row is one
    sample.
    """

    seq_len: int
    global_batch: int
    seed: int
    _: KW_ONLY
    shuffle: bool = True
    packing: bool = True


@dataclass(frozen=True)
class EpochRows:
    """The rows of one epoch in order.

    samples: int64, numbers of samples in the index. offsets: int64 [rows + 1]. Row r holds the samples
    samples[offsets[r] : offsets[r + 1]].
    """

    samples: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> np.ndarray:
        """The samples of a row: int64 [samples of the row]."""
        return self.samples[self.offsets[number] : self.offsets[number + 1]]

    def take(self, numbers: np.ndarray) -> EpochRows:
        """These rows, in this order."""
        starts, lengths = self.offsets[numbers], np.diff(self.offsets)[numbers]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return EpochRows(self.samples[places], offsets)


def hashes(count: int, *key: object) -> np.ndarray:
    """uint64 [count]: a hash (splitmix64) of each number from 0 on; another key gives other hashes."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    start = np.uint64(int.from_bytes(digest[:8], "little"))
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def shuffled(count: int, *key: object) -> np.ndarray:
    """int64 [count]: the numbers from 0 on, in an order that depends on the key alone."""
    return np.argsort(hashes(count, *key), kind="stable")


def epoch_draws(layout: Layout, usable: np.ndarray) -> list[int]:
    """How many samples each dataset gives to an epoch. usable: numbers of the samples that may be used."""
    counts = np.diff(np.searchsorted(usable, layout.bounds))
    if layout.weights is None:
        return [int(count) for count in counts]
    weights = np.array(layout.weights) * (counts > 0)
    exact = weights / weights.sum() * len(usable)
    draws = np.floor(exact).astype(int)
    most = np.argsort(-(exact - draws), kind="stable")[: len(usable) - int(draws.sum())]
    draws[most] += 1  # the largest remainders get the samples that rounding down left
    return [int(count) for count in draws]


def epoch_samples(
    layout: Layout, usable: np.ndarray, seed: int, *, epoch: int, shuffle: bool
) -> list[np.ndarray]:
    """For each dataset the samples of an epoch, int64, in the order of their shards.

    A dataset is read in passes, and each pass has another order of the shards. An epoch continues where the
    epoch before it stopped, so every sample of a dataset is used once before any is used again.
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
    """The places of the samples, shard by shard, with the shards shuffled."""
    starts = np.flatnonzero(np.diff(shards, prepend=shards[0] - 1))
    lengths = np.diff(starts, append=len(shards))
    order = shuffled(len(starts), "shards", *key)
    starts, lengths = starts[order], lengths[order]
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(len(shards))


def window_count(samples: int, tokens: int, *, seq_len: int, global_batch: int) -> int:
    """The number of windows of an epoch with this many samples and tokens."""
    rows = max(1.0, tokens / seq_len)
    window = max(_WINDOW, _WINDOW_STEPS * global_batch * samples / rows)
    return max(1, round(samples / window))


def epoch_rows(
    lengths: np.ndarray,
    work: np.ndarray,
    layout: Layout,
    *,
    usable: np.ndarray,
    settings: PackingSettings,
    epoch: int,
    phase: int = 0,
) -> EpochRows:
    """The rows of epoch number `epoch`. The same arguments always give the same rows.

    lengths: int [samples], tokens. work: float64 [samples], as `plan.sample_work`. usable: int64, the numbers
    of the samples to use, ascending; each has at most seq_len tokens. phase: how many rows of its first
    optimizer step the epoch before has given.
    """
    seed, shuffle, global_batch = settings.seed, settings.shuffle, settings.global_batch
    sources = epoch_samples(layout, usable, seed, epoch=epoch, shuffle=shuffle)
    total = sum(len(part) for part in sources)
    tokens = sum(int(lengths[part].sum()) for part in sources)
    windows = window_count(total, tokens, seq_len=settings.seq_len, global_batch=global_batch)
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
        if settings.packing:
            places, offsets = pack(lengths[chosen], work[chosen], settings.seq_len)
            rows = EpochRows(chosen[places], offsets)
        else:
            rows = EpochRows(chosen, np.arange(len(chosen) + 1))
        if not shuffle:
            placed.append(_by_number(rows))
            continue
        rows = joined([waiting, rows])
        cost = np.add.reduceat(work[rows.samples], rows.offsets[:-1]) if len(rows) else np.empty(0)
        groups, left = group(cost, global_batch, first=missing, last=window == windows - 1)
        waiting = rows.take(left)
        groups, missing = _shuffle_groups(groups, global_batch, missing, key=(seed, epoch, window))
        placed += [rows.take(np.concatenate(groups))] if groups else []
    return joined(placed)


def joined(parts: list[EpochRows]) -> EpochRows:
    """The rows of all parts, one part after the other."""
    starts = np.cumsum([0] + [len(part.samples) for part in parts])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    return EpochRows(
        np.concatenate([np.empty(0, np.int64), *(part.samples for part in parts)]),
        np.concatenate([*offsets, starts[-1:]]).astype(np.int64),
    )


def _by_number(rows: EpochRows) -> EpochRows:
    """The same rows: the samples of a row in ascending order, the rows ordered by their first sample."""
    row_of = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    ordered = EpochRows(rows.samples[np.lexsort((rows.samples, row_of))], rows.offsets)
    return ordered.take(np.argsort(ordered.samples[ordered.offsets[:-1]], kind="stable"))


def _shuffle_groups(
    groups: list[np.ndarray], size: int, missing: int, *, key: tuple[int, int, int]
) -> tuple[list[np.ndarray], int]:
    """(the groups in random order, rows that the step begun in the epoch before still misses).

    A group that completes that step stays first, and a group of fewer than `size` rows stays last.
    """
    head = groups[:1] if missing and groups else []
    tail = groups[-1:] if len(groups) > len(head) and len(groups[-1]) < size else []
    middle = groups[len(head) : len(groups) - len(tail)]
    order = shuffled(len(middle), "groups", *key).tolist()
    return head + [middle[i] for i in order] + tail, 0 if head else missing
