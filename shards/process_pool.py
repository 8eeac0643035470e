"""The windows of a worker by several processes of this machine, for local files: hashing and reading a
gigabyte takes longer than any disk, and one Python process keeps one core busy.

Windows are independent of each other (see `window`), so whoever writes them the bytes are the same. The
processes are forked: they have the source open and everything imported. Each gets every n-th window that is
missing. One that fails ends all, and so does the end of the parent, however it comes about.

In: work, options. Out: the finished windows. Called by `build`.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

from shards.common.errors import BadInputError
from shards.options import BuildOptions
from shards.partition import Window
from shards.prepare import on_disk
from shards.storage import Place, writing
from shards.worker import Progress, Tally, Work, finished_windows, run_worker, tidy, windows_to_do

_WORTH = 2000  # rows from which on starting processes pays
_MOST = 8
_REPORT_EVERY = 32  # rows
_PR_SET_PDEATHSIG = 1  # prctl(2)


def do_work(
    place: Place, work: Work, options: BuildOptions, progress: Progress | None = None
) -> dict[int, Window]:
    """Does the rest of `work` and returns all its windows by number.

    progress(done, total): called with rows as they are done, those of an earlier call included; total 0 if it
    is not known. Raises BadInputError as `run_worker` does, or if a process was killed.
    """
    windows = tidy(place.root, work)
    todo = windows_to_do(work, windows)
    if isinstance(todo, list) and not todo:
        return windows
    done = sum(window.rows for window in windows.values())
    failed = sum(window.failed for window in windows.values())
    total = work.total(options.shard_samples)
    processes = _processes(place, work, options, todo) if isinstance(todo, list) else 1
    if processes > 1 and isinstance(todo, list):
        shared = replace(
            options,
            processes=processes,
            concurrency=max(1, options.concurrency // processes),
            per_host=max(1, options.per_host // processes),
        )
        _run_crew(place, work, shared, todo, (done, failed), progress, total)
    else:
        tally = Tally(done, failed)
        run_worker(
            place, work, replace(options, processes=1), todo, tally,
            lambda: progress(tally.rows, total) if progress is not None else None,
        )  # fmt: skip
    return finished_windows(place.root, work)


def _processes(place: Place, work: Work, options: BuildOptions, todo: Sequence[int]) -> int:
    """How many processes are to share the windows `todo`."""
    if place.filesystem is not None or options.duplicates == "drop" or not sys.platform.startswith("linux"):
        return 1  # a store's client survives no fork; duplicates are told in the order of rows
    if options.processes is not None:
        return min(options.processes, len(todo))
    if "://" in work.name or len(todo) * options.shard_samples < _WORTH:
        return 1
    first = work.span(todo[0], options.shard_samples)[0]
    rows = list(islice(work.rows([(first, first + 1)]), 1))
    if not rows or not on_disk(rows[0], work.base):
        return 1  # over a network one process has all the connections, and their limits
    return max(1, min(len(os.sched_getaffinity(0)), len(todo), _MOST))


class _SharedTally(Tally):
    """The rows and failures of all processes, in shared memory; sends the rows to the parent now and then."""

    def __init__(self, counts: Any, pipe: Connection) -> None:
        self._counts, self._pipe, self._unsent = counts, pipe, 0

    def add(self, failed: bool) -> None:
        with self._counts.get_lock():
            self._counts[0] += 1
            self._counts[1] += failed
            self.rows, self.failed = self._counts
        self._unsent += 1
        if self._unsent == _REPORT_EVERY:
            self._pipe.send(None)
            self._unsent = 0


def _run_crew(
    place: Place,
    work: Work,
    options: BuildOptions,
    todo: Sequence[int],
    counts: tuple[int, int],
    progress: Progress | None,
    total: int,
) -> None:
    context = multiprocessing.get_context("fork")
    shared = context.Array("q", counts)
    crew: dict[Connection, ForkProcess] = {}
    fault: str | None = None
    count = options.processes or 1
    try:
        for number in range(count):
            mine = todo[number::count]
            pipe, process = _start(context, place, work, options, mine, shared)
            crew[pipe] = process
        waiting = dict(crew)
        while waiting and fault is None:
            for ready in wait(list(waiting)):
                assert isinstance(ready, Connection)
                try:
                    message = ready.recv()
                except EOFError:
                    process = waiting.pop(ready)
                    process.join()
                    if process.exitcode and fault is None:
                        fault = (
                            f"{work.name}: a process of the build was killed ({_ending(process)}); run again"
                        )
                else:
                    fault = message or fault
                if progress is not None:
                    progress(shared[0], total)
    finally:
        for process in crew.values():
            process.terminate()
        for pipe, process in crew.items():
            process.join()
            pipe.close()
    if fault is not None:
        raise BadInputError(fault)


def _ending(process: ForkProcess) -> str:
    code = process.exitcode or 0
    if code == -signal.SIGKILL:
        return "SIGKILL: often too little memory"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _start(
    context: ForkContext, place: Place, work: Work, options: BuildOptions, todo: Sequence[int], shared: Any
) -> tuple[Connection, ForkProcess]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(place, work, options, todo, shared, sender, os.getpid()))
    process.start()
    sender.close()
    return receiver, process


def _serve(
    place: Place,
    work: Work,
    options: BuildOptions,
    todo: Sequence[int],
    shared: Any,
    pipe: Connection,
    parent: int,
) -> None:
    """In the forked process: its windows; a fault goes into the pipe."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # nothing that the parent made is garbage: do not look through it again and again
    try:
        with writing(place.out):
            run_worker(place, work, options, todo, _SharedTally(shared, pipe))
    except BadInputError as error:
        pipe.send(str(error))
