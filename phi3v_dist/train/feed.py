"""The rows of the train loop, one at a time, also when the run is to stop and no row comes.

All ranks run the same collectives for every row, so a rank whose data is stuck cannot simply leave: it
continues with rows of the same shape that hold no images and no targets, and the step is discarded.
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
    """A row as loaded. is_real: False for a stand-in without images and targets."""

    loaded: LoadedRow
    is_real: bool


class Feed:
    """`next` gives the rows of this rank in order.

    rows: of this rank, in the order of the plan, from the first one of this start. maker: makes stand-ins.
    views_per_call: views of a row that pass the vision tower at once. stop: ends a wait for data.
    """

    def __init__(
        self,
        rows: Iterator[LoadedRow],
        maker: RowMaker,
        plan: Plan,
        *,
        views_per_call: int,
        mesh: Mesh,
        stop: Stop,
    ) -> None:
        self._rows, self._maker, self._plan, self._stop = rows, maker, plan, stop
        self._views_per_call, self._mesh = views_per_call, mesh
        self._is_stuck = False

    def next(self, step: StepRows, micro: int) -> FedRow:
        """The row of accumulation step `micro`; a stand-in once the run is to stop and the loader is stuck.

        Raises what the loader raises.
        """
        if not self._is_stuck:
            try:
                with self._stop.interrupting():
                    return FedRow(next(self._rows), is_real=True)
            except StoppedWaitingError:
                self._is_stuck = True
        return FedRow(self._maker.load(self._micros(step)[micro], _NothingToRead()), is_real=False)

    def keys(self, step: StepRows, micro: int) -> list[str]:
        """The keys of the samples in that row of this rank."""
        return self._maker.keys(self._micros(step)[micro])

    def _micros(self, step: StepRows) -> list[MicroRow]:
        return rank_rows(
            step,
            self._plan.costs,
            dp_rank=self._mesh.dp_rank,
            dp_size=self._mesh.dp_size,
            vision_chunk=self._views_per_call,
        )


class _NothingToRead:
    """Stands in for a SampleReader: every image is unreadable."""

    def images(self, record: SampleRecord) -> list[bytes]:
        raise BadInputError("not read: the run is to stop")
