"""Who may build in a directory: build.json says what is built there, locks say who is building now.

In: a storage and the plan of a build. Out: contexts in which this process may write. Another source, or
options that would give other bytes, are refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shards.common.errors import BadInputError
from shards.common.files import create_once, partial_path, write_atomically
from shards.common.locks import alone_in, alone_with
from shards.format.dataset import BUILD_JSON, DATASET_JSON, INDEX_DIR, LEDGER_DIR, read_dataset_info
from shards.storage import LOCK_SUFFIX, TASKS, Storage


@dataclass(frozen=True)
class BuildPlan:
    """The content of build.json.

    fingerprint: hex digest of all that shapes the bytes. source: its name. num_rows: records in the source;
    None if only reading to the end tells. built_with: the options that shape the bytes, with `tasks`.
    retry_rounds: how often failed records were tried again.
    """

    fingerprint: str
    source: str
    num_rows: int | None
    built_with: dict[str, Any]
    retry_rounds: int = 0

    @property
    def tasks(self) -> int:
        """The number of tasks as far as it shapes the bytes: 1 where it does not."""
        return int(self.built_with["tasks"])

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()


def read_plan(storage: Storage) -> BuildPlan:
    """The plan in build.json. Raises BadInputError if there is none or it cannot be read."""
    text = storage.read(BUILD_JSON)
    if text is None:
        raise BadInputError(f"{storage.out}: no {BUILD_JSON}, so no build has begun here")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        found = json.loads(text)
        plan = BuildPlan(**{each.name: found[each.name] for each in fields(BuildPlan)})
        if plan.tasks:
            return plan
    raise BadInputError(
        f"{storage.out}: its {BUILD_JSON} is not of this version of shards build; choose another --out"
    )


def write_plan(storage: Storage, plan: BuildPlan) -> None:
    """Replaces build.json."""
    write_atomically(storage.root / BUILD_JSON, plan.to_json())
    storage.upload([BUILD_JSON])


def is_complete(storage: Storage) -> bool:
    """Whether dataset.json is there and includes the last retry round of the plan."""
    if not (storage.root / DATASET_JSON).exists():
        return False
    rounds = read_dataset_info(str(storage.root)).built_with["retry_rounds"]
    return bool(rounds == read_plan(storage).retry_rounds)


@contextlib.contextmanager
def claim(storage: Storage, plan: BuildPlan) -> Iterator[None]:
    """While the context is open, this process alone builds in `storage`, by this plan.

    Raises BadInputError if another process is writing there, or something else is or was built there.
    """
    root = storage.root
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        storage.pull()
        if not (root / BUILD_JSON).exists():
            _check_empty(root)
            write_plan(storage, plan)
        _check_same(storage, plan)
        _make_folders(root)
        yield


@contextlib.contextmanager
def join(storage: Storage, plan: BuildPlan, *, task: int, tasks: int) -> Iterator[None]:
    """While the context is open, this process alone does task `task` of `tasks` in `storage`. Other tasks
    may start and run at the same time. Raises BadInputError as `claim` does.
    """
    root = storage.root
    root.mkdir(parents=True, exist_ok=True)
    if storage.filesystem is None and not (root / BUILD_JSON).exists():
        _check_empty(root)
    with alone_in(root, shared=True), alone_with(root / f".task-{task:04d}{LOCK_SUFFIX}"):
        storage.pull()
        if not (root / BUILD_JSON).exists():
            create_once(root / BUILD_JSON, plan.to_json())
            storage.upload([BUILD_JSON])
        _check_same(storage, plan)
        if not is_complete(storage):
            _check_tasks(storage, tasks)
        _make_folders(root)
        yield


def _check_tasks(storage: Storage, tasks: int) -> None:
    """Records the number of tasks if no other task has, and raises BadInputError if it was another number."""
    file = storage.root / TASKS
    if not file.exists():
        create_once(file, f"{tasks}\n".encode())
        storage.upload([TASKS])
    others = file.read_text().strip()
    if others != str(tasks):
        raise BadInputError(
            f"{storage.out}: is being built by {others} tasks, now {tasks}; use --task I/{others}, or no "
            "--task to build here what is missing"
        )


def _make_folders(root: Path) -> None:
    for folder in (INDEX_DIR, LEDGER_DIR):
        (root / folder).mkdir(exist_ok=True)


def _check_empty(root: Path) -> None:
    """Raises BadInputError if there are files in `root` that no build has made."""
    plan = root / BUILD_JSON
    starting = (partial_path(plan).name, ".task")  # files of another task that is starting now
    found = [path for path in root.iterdir() if path != plan and not path.name.startswith(starting)]
    foreign = [path for path in found if path.name not in (INDEX_DIR, LEDGER_DIR) or any(path.iterdir())]
    if foreign and not plan.exists():
        raise BadInputError(f"{root}: not empty and not a directory of shards build; choose another --out")


def _check_same(storage: Storage, plan: BuildPlan) -> None:
    """Raises BadInputError, naming what differs, if `storage` holds a build by another plan."""
    found = read_plan(storage)
    if found.fingerprint == plan.fingerprint:
        return
    before, now = found.built_with, plan.built_with
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        what = "; ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in changed)
    else:
        what = f"another content of the source ({found.source}, now {plan.source})"
    raise BadInputError(
        f"{storage.out}: holds a build with {what}; choose another --out, or delete this one to start again"
    )
