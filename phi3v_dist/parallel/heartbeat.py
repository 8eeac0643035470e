"""Heartbeats: every rank says what it is doing, and a rank that loses a peer names the one that is silent.

A thread of each rank writes its place (a count of what it has begun, the step, what it is doing) into the
key-value store of the process group every few seconds. When a collective fails, `lost` leaves a note there,
waits for the notes of the others, and names the ranks that left none: they died or hang. A rank that finds
such notes and does not fail itself writes its stacks to logs/rank-N.stacks and ends. Nothing here waits for
ever.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phi3v_dist.exits import CRASHED, LostRankError
from phi3v_dist.parallel.mesh import Mesh
from shards.common.text import one_line

_LONGEST_PERIOD_S = 5.0
_POLL_S = 0.2
_NOTES_S = 10.0  # for the notes of the others, who began to wait at about the same time
_DEAD_AFTER = 4  # periods without a heartbeat
_LEFT = "heartbeat/left"  # key: the ranks that have left a note, each followed by a comma
_SHOWN = 8  # ranks that a message describes; also the ranks that warn of a slow step
_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe|peer", re.I)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a rank is. count: of what it has begun so far. since: it does that since this time; beat: when it
    wrote this. Both in seconds since the epoch.
    """

    count: int
    step: int
    doing: str
    since: float
    beat: float
    host: str


class Heartbeat:
    """This rank's heartbeat: `at` when it begins something, `lost` when a collective failed.

    logs: directory for the stacks of a rank that hangs.
    """

    def __init__(self, mesh: Mesh, logs: Path) -> None:
        self._mesh, self._logs = mesh, logs
        self._period = min(_LONGEST_PERIOD_S, mesh.timeout_s / 8)
        now = time.time()
        self._place = Place(0, 0, "starting", since=now, beat=now, host=socket.gethostname())
        self._has_left = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if mesh.size > 1:
            self._thread.start()

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Raises LostRankError in place of the failure of a collective."""
        lost = None if error is None else self.lost(error)
        self._closed.set()
        if lost is not None:
            raise lost from error

    def at(self, step: int, doing: str) -> None:
        """This rank begins something in optimizer step `step`."""
        now, before = time.time(), self._place
        self._place = Place(before.count + 1, step, doing, since=now, beat=now, host=before.host)

    def lost(self, error: BaseException) -> LostRankError | None:
        """The error to end with in place of `error`; None if that is not the failure of a collective."""
        if self._mesh.size == 1 or not is_collective_failure(error):
            return None
        self._has_left = True
        silent = sorted({*range(self._mesh.size)} - {self._mesh.rank})
        places: dict[int, Place] = {}
        try:
            self._mesh.store.append(_LEFT, f"{self._mesh.rank},")
            until = time.monotonic() + min(_NOTES_S, self._mesh.timeout_s)
            while silent and time.monotonic() < until:
                time.sleep(_POLL_S)
                left = {*self._mesh.store.get(_LEFT).decode().split(",")}
                silent = [rank for rank in silent if str(rank) not in left]
            places = self._places(silent[:_SHOWN])
        except Exception as failure:  # the store is lost with the node that kept it
            _log.warning("the ranks' store does not answer: %s", failure)
        if not silent:
            who = "all ranks answered: a connection between them broke"
        else:
            who = "silent: " + "; ".join(_described(rank, places.get(rank)) for rank in silent[:_SHOWN])
            if len(silent) > _SHOWN:
                who += f" and {len(silent) - _SHOWN} more"
        return LostRankError(
            f"rank {self._mesh.rank} ({socket.gethostname()}) lost its peers in step {self._place.step} "
            f"({self._place.doing}); {who}; the same command resumes from the last checkpoint "
            f"[{one_line(error)[:300]}]"
        )

    def _beat(self) -> None:
        """The thread: writes the place, warns of a slow step, ends a process that the others gave up."""
        warned_at = -1
        notes_since: float | None = None
        while not self._closed.wait(self._period):
            try:
                place = self._place
                self._mesh.store.set(
                    _key(self._mesh.rank), json.dumps({**asdict(place), "beat": time.time()})
                )
                is_slow = time.time() - place.since > self._mesh.timeout_s / 2
                if is_slow and warned_at != place.count and not self._has_left:
                    warned_at = place.count
                    self._warn(place)
                if notes_since is None and self._mesh.store.check([_LEFT]):
                    notes_since = time.monotonic()
            except Exception:  # the store is lost: the rank that holds it has ended, and so will this one
                continue
            given_up = notes_since is not None and time.monotonic() - notes_since > 2 * _NOTES_S
            if given_up and not self._has_left and not self._closed.is_set():
                self._end()

    def _warn(self, mine: Place) -> None:
        """One line in this rank's log about the ranks that may hold up the others. Only the first ranks write
        it: each asks for the place of every rank, and all wait at the same time.
        """
        if self._mesh.rank >= _SHOWN:
            return
        places = self._places(range(self._mesh.size))
        behind = [rank for rank in range(self._mesh.size) if _is_dead(places.get(rank), self._period)]
        if not behind:
            least = min(place.count for place in places.values())
            behind = [rank for rank, place in places.items() if place.count == least]
        if len(behind) < self._mesh.size:
            _log.warning(
                "step %d (%s) has taken %.0f s; behind the others: %s", mine.step, mine.doing,
                time.time() - mine.since,
                "; ".join(_described(rank, places.get(rank)) for rank in behind[:_SHOWN]),
            )  # fmt: skip

    def _places(self, ranks: Iterable[int]) -> dict[int, Place]:
        """By rank; without those that never wrote one."""
        store = self._mesh.store
        keys = {rank: _key(rank) for rank in ranks}
        return {rank: Place(**json.loads(store.get(key))) for rank, key in keys.items() if store.check([key])}

    def _end(self) -> None:
        stacks = self._logs / f"rank-{self._mesh.rank}.stacks"
        line = (
            f"rank {self._mesh.rank} ({socket.gethostname()}): the other ranks have given up on this one, "
            f"which is in step {self._place.step} ({self._place.doing}); ending it, its stacks are in "
            f"{stacks}"
        )
        try:
            with stacks.open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            _log.error(line)
            print(f"phi3v: {line}", file=sys.stderr, flush=True)
        finally:
            os._exit(CRASHED)


def is_collective_failure(error: BaseException) -> bool:
    """Whether a collective failed: a peer is gone, or did not come within the time limit."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _COLLECTIVE.search(str(error)) is not None


def _key(rank: int) -> str:
    return f"heartbeat/place/{rank}"


def _is_dead(place: Place | None, period: float) -> bool:
    return place is None or time.time() - place.beat > _DEAD_AFTER * period + 1


def _described(rank: int, place: Place | None) -> str:
    if place is None:
        return f"rank {rank} (never heard of)"
    now = time.time()
    return (
        f"rank {rank} on {place.host}, in step {place.step} ({place.doing}) for {now - place.since:.0f} s, "
        f"last sign {now - place.beat:.0f} s ago"
    )
