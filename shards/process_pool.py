"""The partitions of a worker, by several processes of this machine where that is faster: reading and hashing
local files takes longer than writing them, and one Python process keeps one core busy.

Partitions are independent of each other (see `partition`), so the bytes do not depend on which process writes
them. Each process gets every n-th missing partition. The processes are forked, because the open source
(functions over open files) cannot be pickled. An error in one of them, or the death of one, ends all; so does
the end of the parent, even by SIGKILL.

In: work, options. Out: the finished partitions.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any

from shards.common.errors import BadInputError
from shards.options import BuildOptions
from shards.partition import Partition
from shards.prepare import on_disk
from shards.storage import Storage, disk_errors
from shards.worker import (
    Progress,
    Tally,
    Work,
    clean_up,
    finished_partitions,
    partitions_to_do,
    run_worker,
)

_MIN_RECORDS = 2000  # with fewer, starting processes takes longer than it saves
_MAX_PROCESSES = 8
_POLL_S = 0.1  # seconds between two calls of progress()
_PR_SET_PDEATHSIG = 1  # prctl(2)


def run_work(
    storage: Storage, work: Work, options: BuildOptions, *, progress: Progress | None = None
) -> dict[int, Partition]:
    """Writes the missing partitions of `work`; returns all of them by number.

    progress(done, total): called with the records done, those of earlier calls included. Raises BadInputError
    as `run_worker` does, or if a process was killed.
    """
    finished = clean_up(storage.root, work)
    numbers = partitions_to_do(work, finished)
    if isinstance(numbers, list) and not numbers:
        return finished
    total = work.total(options.shard_samples)
    tally = Tally(
        sum(partition.records for partition in finished.values()),
        sum(partition.failed for partition in finished.values()),
    )
    processes = _num_processes(storage, work, options, numbers=numbers) if isinstance(numbers, list) else 1
    if processes > 1 and isinstance(numbers, list):
        shared = replace(
            options,
            processes=processes,
            concurrency=max(1, options.concurrency // processes),
            per_host=max(1, options.per_host // processes),
        )
        _run_pool(_Job(storage, work, shared), numbers, tally, progress=progress, total=total)
    else:
        run_worker(
            storage,
            work,
            replace(options, processes=1),
            numbers=numbers,
            tally=tally,
            progress=lambda: progress(tally.records, total) if progress is not None else None,
        )
    return finished_partitions(storage.root, work)


def _num_processes(storage: Storage, work: Work, options: BuildOptions, *, numbers: Sequence[int]) -> int:
    """How many processes share the partitions `numbers`."""
    if (
        storage.filesystem is not None  # the client of a store does not survive a fork
        or options.duplicates == "drop"  # duplicates are found in the order of the records
        or not sys.platform.startswith("linux")
    ):
        return 1
    if options.processes is not None:
        return min(options.processes, len(numbers))
    if "://" in work.name or len(numbers) * options.shard_samples < _MIN_RECORDS:
        return 1
    first = work.span(numbers[0], options.shard_samples)[0]
    records = list(islice(work.records([(first, first + 1)]), 1))
    if not records or not on_disk(records[0], work.base):
        return 1  # over a network one process has all connections and keeps their limits
    return max(1, min(len(os.sched_getaffinity(0)), len(numbers), _MAX_PROCESSES))


@dataclass(frozen=True)
class _Job:
    """What every process of the pool gets by the fork."""

    storage: Storage
    work: Work
    options: BuildOptions


class _SharedTally(Tally):
    """The records and failures of all processes, in shared memory: `counts`, a multiprocessing.Array."""

    def __init__(self, counts: Any) -> None:
        self._counts = counts

    def add(self, failed: bool) -> None:
        with self._counts.get_lock():
            self._counts[0] += 1
            self._counts[1] += failed
            self.records, self.failed = self._counts


def _run_pool(
    job: _Job, numbers: Sequence[int], tally: Tally, *, progress: Progress | None, total: int
) -> None:
    context = multiprocessing.get_context("fork")
    counts: Any = context.Array("q", (tally.records, tally.failed))
    count = job.options.processes or 1
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start, initargs=(job, counts, os.getpid())
    )
    workers: list[BaseProcess] = []
    try:
        futures = {pool.submit(_write, list(numbers[place::count])) for place in range(count)}
        workers = [each for each in multiprocessing.active_children() if each not in others]
        while futures:
            if progress is not None:
                progress(counts.get_obj()[0], total)  # without the lock: a killed process may hold it
            done, futures = wait(futures, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        if progress is not None:
            progress(counts[0], total)
    except BrokenProcessPool as error:
        pool.shutdown()
        raise BadInputError(
            f"{job.work.name}: a process of the build was killed ({_exit_of(workers)}); run again"
        ) from error
    except BaseException:
        for each in multiprocessing.active_children():
            if each not in others:  # ProcessPoolExecutor of Python 3.11 cannot stop tasks that have begun
                each.terminate()
        raise
    finally:
        pool.shutdown()


_job: tuple[_Job, _SharedTally]  # of a forked process


def _start(job: _Job, counts: Any, parent: int) -> None:
    """The first call in a forked process."""
    global _job
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before prctl
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what the parent made is never garbage here: do not look through it again and again
    _job = job, _SharedTally(counts)


def _write(numbers: Sequence[int]) -> None:
    """In a forked process: writes these partitions."""
    job, tally = _job
    with disk_errors(job.storage.out):
        run_worker(job.storage, job.work, job.options, numbers=numbers, tally=tally)


def _exit_of(workers: Sequence[BaseProcess]) -> str:
    """How the first of the processes ended that the pool has not ended itself (by SIGTERM)."""
    codes = [worker.exitcode or 0 for worker in workers]
    code = next((code for code in codes if code not in (0, -signal.SIGTERM)), -signal.SIGTERM)
    if code == -signal.SIGKILL:
        return "SIGKILL: often too little memory"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
