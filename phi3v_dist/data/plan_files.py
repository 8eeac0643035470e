"""The plan on disk: epochs and the number of the first row of each, so that resuming at a late step does not
plan all epochs before it again.

In: a directory and a key, which is a digest of everything that shapes the plan. Out: epochs, mapped into
memory, so that the ranks of a node share them. The plan is a pure function, so a missing or damaged file is
computed again. One process (the main rank) writes; all processes read.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi3v_dist.data.epoch import EpochRows
from shards.common.files import write_atomically

_WORTH_KEEPING = 20_000  # samples; a smaller epoch is planned in a moment, so it gets no file
_MOST_BYTES = 4 << 30  # limit of all epochs on disk together
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanFiles:
    """Files `plan-KEY.*` in `directory`. writer: whether this process writes."""

    directory: Path
    key: str
    writer: bool

    def first_rows(self) -> list[int]:
        """The number of the first row of each epoch planned so far; empty if there is none."""
        stored = self._load("rows", None)
        return [] if stored is None or not len(stored) or stored[0] != 0 else stored.tolist()

    def keep_first_rows(self, first_rows: list[int]) -> None:
        """Writes the number of the first row of each epoch."""
        self._store("rows", np.array(first_rows, dtype=np.int64))

    def epoch(self, number: int) -> EpochRows | None:
        """The rows of an epoch; None if there is no usable file."""
        stored = self._load(f"epoch-{number:06d}", "r")
        if stored is None or len(stored) < 2:
            return None
        rows = int(stored[0])
        offsets, samples = stored[1 : rows + 2], stored[rows + 2 :]
        complete = len(offsets) == rows + 1 and int(offsets[-1]) == len(samples)
        return EpochRows(samples, np.asarray(offsets)) if complete else None

    def keep_epoch(self, number: int, rows: EpochRows, ahead: bool) -> None:
        """Writes the file of an epoch. If the files together would be too large, those of earlier epochs are
        deleted first; with `ahead` (the run still needs those) this epoch is not kept instead.
        """
        if not self.writer or len(rows.samples) < _WORTH_KEEPING:
            return
        values = np.concatenate([[len(rows)], rows.offsets, rows.samples])
        kept = sorted(self.directory.glob(f"plan-{self.key}.epoch-*.npy"))
        total = values.nbytes + sum(file.stat().st_size for file in kept)
        for old in [] if ahead else kept:
            if total > _MOST_BYTES and int(old.name.split(".epoch-")[1][:6]) < number:
                total -= old.stat().st_size
                old.unlink()
        if total <= _MOST_BYTES:
            self._store(f"epoch-{number:06d}", values)

    def _path(self, name: str) -> Path:
        return self.directory / f"plan-{self.key}.{name}.npy"

    def _load(self, name: str, mmap_mode: str | None) -> np.ndarray | None:
        path = self._path(name)
        try:
            stored = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)  # type: ignore[arg-type]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            _log.warning("%s: cannot be read (%s); planned again", path, error)
            return None
        return stored if stored.dtype == np.int64 and stored.ndim == 1 else None

    def _store(self, name: str, values: np.ndarray) -> None:
        if not self.writer:
            return
        data = io.BytesIO()
        np.save(data, values.astype(np.int64, copy=False))
        write_atomically(self._path(name), data.getvalue(), durable=False)
