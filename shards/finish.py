"""dataset.json: the sum of all partitions of a build, written when the last one is there.

In: a storage, the plan of its build. Out: `DatasetInfo`; or an error that names what is missing, or why too
many records failed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from shards.claim import BuildPlan
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.format.dataset import DATASET_JSON, FORMAT_VERSION, LEDGER_DIR, DatasetInfo, dataset_info_json
from shards.ledger import failed_records, failure_reasons
from shards.options import num_may_fail
from shards.partition import (
    Partition,
    committed_partitions,
    leading_partitions,
    num_partitions,
    task_partitions,
)
from shards.storage import TASKS, Storage

_log = logging.getLogger(__name__)


def finish(storage: Storage, plan: BuildPlan, *, min_success: float = 0.0) -> DatasetInfo:
    """Writes dataset.json over all partitions.

    Raises BadInputError if a partition is missing, if there is no sample, or if (before any retry round) less
    than `min_success` of the records succeeded.
    """
    root, rounds = storage.root, plan.retry_rounds
    first_round = _first_round(storage, plan)
    retried = [leading_partitions(root, f"r{number:02d}-").values() for number in range(1, rounds + 1)]
    partitions = list(chain(first_round, *retried))
    samples: Counter[str] = sum((partition.samples for partition in partitions), Counter())
    records = sum(partition.records for partition in first_round)
    failed = len(failed_records(root)) if any(partition.failed for partition in partitions) else 0
    if not samples or (not rounds and failed > num_may_fail(records, min_success)):
        reason = next(iter(failure_reasons(root)), "no record")
        raise BadInputError(
            f"{plan.source}: {failed} of {records} records failed (min_success {min_success:g}), "
            f"{samples.total()} samples; most frequent reason: {reason}; the outcome of every record is in "
            f"{root / LEDGER_DIR}; fix the records or lower min_success"
        )
    shards = tuple(shard for partition in partitions for shard in partition.shards)
    content = [plan.fingerprint, [shard.sha256 for shard in shards]]
    info = DatasetInfo(
        format_version=FORMAT_VERSION,
        num_samples=samples.total(),
        splits={split: samples[split] for split in ("train", "val") if samples[split]},
        shards=shards,
        source=plan.source,
        built_with={**plan.built_with, "retry_rounds": rounds},
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    )
    write_atomically(root / DATASET_JSON, dataset_info_json(info))
    storage.upload([DATASET_JSON])
    storage.remove(TASKS)
    dropped = sum(partition.dropped for partition in partitions)
    _log.info("%s: complete: %s, %d failed, %d duplicates dropped", storage.out, info.splits, failed, dropped)
    return info


def check_share(root: Path, source: str, partitions: Sequence[Partition], *, min_success: float) -> None:
    """Raises BadInputError if less than `min_success` of the records in a task's partitions succeeded."""
    records = sum(each.records for each in partitions)
    failed = sum(each.failed for each in partitions)
    if failed > num_may_fail(records, min_success):
        raise BadInputError(
            f"{source}: {failed} of the {records} records of this task failed (min_success {min_success:g}); "
            f"most frequent reason: {next(iter(failure_reasons(root)), 'unknown')}; the outcome of every "
            f"record is in {root / LEDGER_DIR}; fix the records, or lower min_success, and run it again (it "
            "keeps what is done)"
        )


def _first_round(storage: Storage, plan: BuildPlan) -> list[Partition]:
    """All partitions before any retry round, in order. Raises BadInputError if one is missing, naming the
    tasks that are not done.
    """
    root = storage.root
    if plan.num_rows is not None:
        count = num_partitions(plan.num_rows, plan.built_with["shard_samples"])
        found = committed_partitions(root, "", range(count))
        if len(found) == count:
            return [found[number] for number in range(count)]
        text = storage.read(TASKS)
        tasks = int(text) if text else 0
        missing = set(range(count)) - set(found)
        undone = [
            task for task in range(tasks) if not missing.isdisjoint(task_partitions(count, task, tasks))
        ]
    else:
        tasks = plan.tasks
        prefixes = [""] if tasks == 1 else [f"{task:04d}-" for task in range(tasks)]
        by_task = [leading_partitions(root, prefix) for prefix in prefixes]
        undone = [task for task, some in enumerate(by_task) if not some or not some[len(some) - 1].last]
        if not undone:
            return [partition for some in by_task for partition in some.values()]
    if not undone:
        raise BadInputError(f"{storage.out}: not done yet; run its `phi3v shards build` command again")
    named = ", ".join(map(str, undone[:20])) + (", ..." if len(undone) > 20 else "")
    raise BadInputError(f"{storage.out}: not done yet: task {named} of {tasks}; run them again")
