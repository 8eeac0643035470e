"""Which rank is silent? Every rank says where it is; whoever loses a peer says who it was.

A thread of each rank writes its place (a count of what it has begun, the step, what it is doing) into the
key-value store of the process group every few seconds. When a collective fails, `lost` leaves word, waits
for the word of the others, and names the ranks that left none: those that died, or sleep. A rank that finds
such words and does not come out itself writes its stacks to logs/rank-N.stacks and ends. Nothing here waits
for ever. Called by the train loop and the command line.
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
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phi3v_dist.exits import CRASHED, LostRankError
from phi3v_dist.parallel.mesh import Mesh

_LONGEST_PERIOD_S = 5.0
_POLL_S = 0.2
_WORDS_S = 10.0  # for the others to leave their word; they began to wait at about the same time
_DEAD_AFTER = 4  # periods without a sign
_OUT = "pulse/out"  # key: the ranks that have left word, each with a comma behind it
_SHOWN = 8  # ranks that a message describes; also those that warn of a slow step
_COLLECTIVE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe|peer", re.I)
_log = logging.getLogger(__name__)


class Heartbeat:
    """This rank's sign of life; `at` when it begins something, `lost` when a collective failed."""

    def __init__(self, mesh: Mesh, logs: Path) -> None:
        self._mesh, self._logs = mesh, logs
        self._period = min(_LONGEST_PERIOD_S, mesh.timeout_s / 8)
        self._place = (0, 0, "starting", time.time())
        self._out = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
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
        self._place = (self._place[0] + 1, step, doing, time.time())

    def lost(self, error: BaseException) -> LostRankError | None:
        """The error to end with in place of `error`, None if that is not the failure of a collective."""
        if self._mesh.size == 1 or not is_collective_failure(error):
            return None
        self._out = True
        silent = sorted({*range(self._mesh.size)} - {self._mesh.rank})
        places: dict[int, list[Any]] = {}
        try:
            self._mesh.store.append(_OUT, f"{self._mesh.rank},")
            until = time.monotonic() + min(_WORDS_S, self._mesh.timeout_s)
            while silent and time.monotonic() < until:
                time.sleep(_POLL_S)
                out = {*self._mesh.store.get(_OUT).decode().split(",")}
                silent = [rank for rank in silent if str(rank) not in out]
            places = self._places(silent[:_SHOWN])
        except Exception as failure:  # the store is gone with the node that kept it
            _log.warning("the ranks' store does not answer: %s", failure)
        reason = " ".join(str(error).split())
        if not silent:
            who = "all ranks answered: a connection between them broke"
        else:
            who = "silent: " + "; ".join(_described(rank, places.get(rank)) for rank in silent[:_SHOWN])
            if len(silent) > _SHOWN:
                who += f" and {len(silent) - _SHOWN} more"
        step, doing = self._place[1:3]
        return LostRankError(
            f"rank {self._mesh.rank} ({socket.gethostname()}) lost its peers in step {step} ({doing}); "
            f"{who}; the same command goes on from the last checkpoint [{reason[:300]}]"
        )

    def _beat(self) -> None:
        warned_at = -1
        words_since: float | None = None
        while not self._closed.wait(self._period):
            try:
                host = socket.gethostname()
                place = json.dumps([*self._place, time.time(), host])
                self._mesh.store.set(_place_key(self._mesh.rank), place)
                count, step, doing, since = self._place
                if warned_at != count and time.time() - since > self._mesh.timeout_s / 2 and not self._out:
                    warned_at = count
                    self._warn(step, doing, time.time() - since)
                if words_since is None and self._mesh.store.check([_OUT]):
                    words_since = time.monotonic()
            except Exception:  # the store is gone; whoever holds it has ended, and so will this
                continue
            given_up = words_since is not None and time.monotonic() - words_since > 2 * _WORDS_S
            if given_up and not self._out and not self._closed.is_set():
                self._end()

    def _warn(self, step: int, doing: str, seconds: float) -> None:
        """One line in this rank's log about who may be holding up the others. Of the first ranks alone: each
        asks for every place, and all wait at the same time.
        """
        if self._mesh.rank >= _SHOWN:
            return
        places = self._places(range(self._mesh.size))
        behind = [rank for rank in range(self._mesh.size) if _is_dead(places.get(rank), self._period)]
        if not behind:
            least = min(place[0] for place in places.values())
            behind = [rank for rank, place in places.items() if place[0] == least]
        if len(behind) < self._mesh.size:
            _log.warning(
                "step %d (%s) has taken %.0f s; behind the others: %s", step, doing, seconds,
                "; ".join(_described(rank, places.get(rank)) for rank in behind[:_SHOWN]),
            )  # fmt: skip

    def _places(self, ranks: Iterable[int]) -> dict[int, list[Any]]:
        """By rank: count, step, what it is doing, since when, when it said so, host."""
        store = self._mesh.store
        keys = {rank: _place_key(rank) for rank in ranks}
        return {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}

    def _end(self) -> None:
        stacks = self._logs / f"rank-{self._mesh.rank}.stacks"
        line = (
            f"rank {self._mesh.rank} ({socket.gethostname()}): the other ranks have given up on this one, "
            f"which is in step {self._place[1]} ({self._place[2]}); ending it, its stacks are in {stacks}"
        )
        try:
            with stacks.open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            _log.error(line)
            print(f"phi3v: {line}", file=sys.stderr, flush=True)
        finally:
            os._exit(CRASHED)


def _place_key(rank: int) -> str:
    return f"pulse/place/{rank}"


def is_collective_failure(error: BaseException) -> bool:
    """Whether a collective failed: a peer is gone, or did not come within the time limit."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _COLLECTIVE.search(str(error)) is not None


def _is_dead(place: list[Any] | None, period: float) -> bool:
    return place is None or time.time() - place[4] > _DEAD_AFTER * period + 1


def _described(rank: int, place: list[Any] | None) -> str:
    if place is None:
        return f"rank {rank} (never heard of)"
    _, step, doing, since, said, host = place
    now = time.time()
    place_since = f"in step {step} ({doing}) for {now - since:.0f} s"
    return f"rank {rank} on {host}, {place_since}, last sign {now - said:.0f} s ago"
