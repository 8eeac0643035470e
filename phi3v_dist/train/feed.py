"""The rows of the train loop, one at a time, also when the run is to stop and no row comes.

In: the loader's rows of this rank in order. Out: `FedRow`s. All ranks run the same collectives for every row,
so a rank whose data is stuck cannot just leave: it goes on with rows of the same shape that hold no pictures
and no targets, and the step is thrown away. Called by the train loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from phi3v_dist.data.loader import LoadedRow, RowMaker
from phi3v_dist.data.plan import MicroRow, Plan, StepRows, rank_rows
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.run.stop import Stop, StoppedWaitingError
from shards.common.errors import BadInputError
from shards.format.records import SampleRecord


@dataclass(frozen=True)
class FedRow:
    """A row as loaded. is_real: False for a stand-in."""

    loaded: LoadedRow
    is_real: bool


class Feed:
    """`next` gives the rows of this rank in order."""

    def __init__(
        self,
        rows: Iterator[LoadedRow],
        maker: RowMaker,
        plan: Plan,
        vision_chunk: int,
        mesh: Mesh,
        stop: Stop,
    ) -> None:
        self._rows, self._maker, self._plan, self._stop = rows, maker, plan, stop
        self._vision_chunk, self._mesh = vision_chunk, mesh
        self._stuck = False

    def next(self, step: StepRows, micro: int) -> FedRow:
        """The row of accumulation step `micro`; a stand-in once the run is to stop and the loader is
        stuck.
        """
        if not self._stuck:
            try:
                with self._stop.breaking_off():
                    return FedRow(next(self._rows), True)
            except StoppedWaitingError:
                self._stuck = True
        return FedRow(self._maker.load(self._micros(step)[micro], _NothingToRead()), False)

    def keys(self, step: StepRows, micro: int) -> list[str]:
        """The keys of the samples in that row of this rank."""
        return self._maker.keys(self._micros(step)[micro])

    def _micros(self, step: StepRows) -> list[MicroRow]:
        return rank_rows(
            step,
            self._plan.costs,
            dp_rank=self._mesh.dp_rank,
            dp_size=self._mesh.dp_size,
            vision_chunk=self._vision_chunk,
        )


class _NothingToRead:
    """Stands in for a SampleReader: every picture is unreadable."""

    def images(self, record: SampleRecord) -> list[bytes]:
        raise BadInputError("not read: the run is to stop")
