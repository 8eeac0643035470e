"""Samples that cannot be used: each is logged with its shard, key and reason; too many of them end the run
with the list.

In: what the loaded rows report. Out: RUN/bad-samples.txt when the run ends because of them. Called by the
train loop on every rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from phi3v_dist.exits import DivergedError
from phi3v_dist.parallel.mesh import Mesh
from shards.common.files import write_atomically

LIST = "bad-samples.txt"
_ENOUGH = 1000  # samples that a fraction is taken of, at least, unless an epoch has fewer
_SHOWN = 10
_log = logging.getLogger(__name__)


class Quarantine:
    """The bad samples of this rank since the start of the process."""

    def __init__(self, max_fraction: float, epoch_samples: int, run_dir: Path) -> None:
        self._max_fraction, self._epoch_samples, self._run_dir = max_fraction, epoch_samples, run_dir
        self._reasons: dict[str, None] = {}

    def note(self, step: int, reasons: Sequence[str]) -> None:
        """reasons: "shard key: reason" of the bad samples of a step."""
        for reason in reasons:
            _log.warning("step %d: sample left out: %s", step, reason)
            self._reasons[reason] = None

    def check(self, bad: int, seen: int, mesh: Mesh) -> None:
        """bad, seen: samples of all ranks so far; the same on every rank.

        Raises DivergedError with the list if there are too many.
        """
        if bad <= allowed(self._max_fraction, seen, self._epoch_samples):
            return
        listed = sorted({reason for reasons in mesh.gather(list(self._reasons)) for reason in reasons})
        if mesh.is_main:
            write_atomically(self._run_dir / LIST, "".join(f"{reason}\n" for reason in listed).encode())
        more = f"\n  ... and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        shown = "".join(f"\n  {reason}" for reason in listed[:_SHOWN])
        raise DivergedError(
            f"{bad} unreadable samples among {seen} seen, more than data.max_bad_fraction="
            f"{self._max_fraction:g} allows; all of them are in {self._run_dir / LIST}; run `phi3v shards "
            f"verify` on the dataset{shown}{more}"
        )


def allowed(max_fraction: float, seen: int, epoch_samples: int) -> int:
    """How many bad samples do not end a run that has seen `seen` samples."""
    if not max_fraction:
        return 0
    return max(1, math.ceil(max_fraction * max(seen, min(_ENOUGH, epoch_samples))))
