"""Writes checkpoints, all ranks together, while training continues or waits.

Every rank calls `Saver.save` between two steps. A thread of each rank writes its file and reports to the main
rank through the process group's key-value store. The main rank's thread then seals and renames the directory,
moves the pointers and removes old checkpoints. With checkpoint.async the slices are first copied to host
memory and training continues at once; otherwise training waits. Everything else is the same.

A save that fails (no space, no permission, slower than checkpoint.timeout_s) leaves earlier checkpoints as
they are. An error is logged, training continues, and the next save tries again. The main rank's count of
consecutive failures is added to the sums of the next step and given to `agree`, which stops all ranks
together.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phi3v_dist.checkpoint.manifest import Written, seal, sum_file, write_tensors
from phi3v_dist.checkpoint.meta import META, CheckpointMeta, Progress
from phi3v_dist.checkpoint.read import (
    BEST,
    LATEST,
    checkpoint_name,
    checkpoints,
    point,
    pointed,
    step_of,
)
from phi3v_dist.checkpoint.state import KeptState
from phi3v_dist.config import CheckpointConfig
from phi3v_dist.parallel.mesh import Mesh
from shards.common.errors import BadInputError
from shards.common.files import write_atomically
from shards.common.text import error_text

_POLL_S = 0.02
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint records of its model. config: fields of Phi3VConfig. model_dir: where its first
    weights are from. tokenizer_dir: the tokenizer, whose files are copied.
    """

    config: dict[str, Any]
    num_crops: int
    model_dir: Path
    tokenizer_dir: Path


@dataclass
class _Save:
    """A save. outcome: None while it runs, "" after success, else what went wrong. publishing: whether the
    main rank has begun to seal and rename it. is_clear: whether all ranks have reported success or failure.
    """

    number: int
    progress: Progress
    partial: Path
    as_best: Callable[[], None] | None
    began: float = field(default_factory=time.monotonic)
    outcome: str | None = None
    reported: bool = False
    publishing: bool = False
    is_clear: bool = False
    thread: threading.Thread | None = None


class Saver:
    """Saves the state of `engine` to folder/step-N. All ranks call `save`, `agree` and `save_surely`.

    run: what else to record (the resolved configuration, versions). wandb_id: file with the id of the W&B
    run. saved_step: step of the checkpoint from which the run resumed, 0 without one. For errors while
    writing see `failures` and `agree`.
    """

    def __init__(
        self,
        engine: Any,
        folder: Path,
        mesh: Mesh,
        *,
        card: ModelCard,
        run: dict[str, Any],
        wandb_id: Path,
        config: CheckpointConfig,
        saved_step: int,
    ) -> None:
        self._folder, self._card, self._run = folder, card, run
        self._wandb_id, self._mesh, self._config = wandb_id, mesh, config
        self._life = mesh.on_main(lambda: secrets.token_hex(4))  # no two processes write to one directory
        self._save: _Save | None = None
        self._saved_step = saved_step
        self._number = 0
        self._in_a_row = 0
        self._last = ""
        self._lock = threading.Lock()
        self._state = KeptState(engine, mesh, buffered=config.async_)

    def save(
        self, progress: Progress, as_best: Callable[[], None] | None = None, *, wait: bool = False
    ) -> None:
        """Saves; all ranks call it. Returns when the state of the engine may change again.

        as_best: if given, `best` will name this checkpoint, and the main rank calls `as_best` after that.
        wait: return only when the checkpoint is on the disk. Failures are counted and logged, not raised: see
        `agree`.
        """
        if not self._free():
            return
        self._number += 1
        target = self._folder / checkpoint_name(progress.step)
        folder = self._folder / f".{target.name}.{self._life}-{self._number}.partial"
        fault = self._mesh.on_main(lambda: _fault(lambda: _prepare(self._folder, folder)))
        save = _Save(self._number, progress, folder, as_best)
        self._save = save
        if fault is not None:
            self._end(save, fault)
            return
        copied = self._state.copy()
        handed: queue.Queue[torch.Tensor | None] | None = None
        if copied is not None:
            chunks: Iterator[torch.Tensor] = iter([copied])
        elif self._state.is_swapped:
            handed = queue.Queue(maxsize=2)
            chunks = iter(handed.get, None)
        else:
            chunks = self._state.stream()
        meta = self._meta(progress) if self._mesh.is_main else None
        thread = save.thread = threading.Thread(
            target=self._write, args=(save, chunks, meta), name="save", daemon=True
        )
        thread.start()
        if handed is not None:
            self._state.hand(handed, lambda: not thread.is_alive() or self._has_ended(save))
        if copied is None or wait:
            self._wait(save)

    def is_under_way(self) -> bool:
        """Whether a save is being written; always False on other ranks than the main rank."""
        return self._save is not None and not self._has_ended(self._save)

    @property
    def failures(self) -> int:
        """The number of consecutive failures on the main rank, 0 on the others. The sum over the ranks is for
        `agree`.
        """
        if self._save is not None:
            self._has_ended(self._save)
        return self._in_a_row if self._mesh.is_main else 0

    def agree(self, failures: int) -> None:
        """Raises BadInputError on every rank after checkpoint.max_failures consecutive failures."""
        if failures < self._config.max_failures:
            return
        reason = self._mesh.on_main(lambda: self._last)
        raise BadInputError(
            f"{failures} checkpoints in a row could not be written ({reason}); the last good one is "
            f"{pointed(self._folder, LATEST) or 'none'}; fix the storage, then the same command resumes "
            "from it"
        )

    def save_surely(self, progress: Progress, as_best: Callable[[], None] | None = None) -> str | None:
        """The last save of a process: waits for it, and tries up to three times. All ranks call it.

        Returns None, or why there is no checkpoint of `progress`; the same on every rank.
        """
        if progress.step == self._saved_step:
            return None
        fault: str | None = "no save was attempted"
        for attempt in range(3):
            save = self._save
            if attempt or save is None or save.progress.step != progress.step:  # else it is running already
                self.save(progress, as_best, wait=True)
                save = self._save
            if save is None or save.progress.step != progress.step:
                fault = "an earlier save is still being written"
                continue
            self._wait(save)
            fault = self._mesh.on_main(partial(getattr, save, "outcome")) or None
            if fault is None:
                return None
        return fault

    def _free(self) -> bool:
        """Whether a new save may begin. Waits for an earlier one as long as checkpoint.timeout_s allows."""
        save = self._save
        if save is None:
            return True
        self._wait(save)

        def verdict() -> bool:
            late = [] if save.outcome == "" else self._late(save)
            if late:
                self._count(f"rank {late[0]} is still writing the previous checkpoint")
            return not late

        return self._mesh.on_main(verdict)

    def _wait(self, save: _Save) -> None:
        """Waits until the main rank knows the outcome of `save`, at most checkpoint.timeout_s."""

        def ended() -> bool:
            limit = time.monotonic() + self._mesh.timeout_s / 4  # shorter than that of the collective
            while not self._has_ended(save) and time.monotonic() < limit:
                time.sleep(_POLL_S)
            return save.outcome is not None

        while not self._mesh.on_main(ended):
            pass

    def _has_ended(self, save: _Save) -> bool:
        """Whether `save` has ended; always False on other ranks than the main rank. A save that takes too
        long is ended here, and a failure is counted.
        """
        if not self._mesh.is_main:
            return False
        allowed = self._config.timeout_s * (2 if save.publishing else 1)
        if save.outcome is None and time.monotonic() > save.began + allowed:
            late = self._late(save)
            self._end(
                save,
                f"rank {late[0] if late else 0} has not written its part within checkpoint.timeout_s="
                f"{self._config.timeout_s:g} s",
            )
        if save.outcome and not save.reported:
            save.reported = True
            self._count(save.outcome)
        return save.outcome is not None

    def _late(self, save: _Save) -> list[int]:
        """The ranks that are still writing, as the main rank sees it."""
        late = [] if save.thread is None or not save.thread.is_alive() else [0]
        others = range(1, self._mesh.size) if save.thread is not None and not save.is_clear else ()
        return late + [rank for rank in others if not self._mesh.store.check([self._key(save, rank)])]

    def _write(self, save: _Save, chunks: Iterator[torch.Tensor], meta: CheckpointMeta | None) -> None:
        """Runs in the thread: writes this rank's file, and on the main rank (with `meta`) completes the
        checkpoint.
        """
        rank = self._mesh.rank
        try:
            if self._mesh.device.type == "cuda":
                torch.cuda.set_device(self._mesh.device)
            written = write_tensors(save.partial / f"rank-{rank:05d}.safetensors", self._state.slots, chunks)
            report: dict[str, Any] = asdict(written)
        except Exception as error:  # of any kind: it must reach the main rank
            report = {"fault": f"rank {rank}: {error_text(error)}"}
        try:
            self._mesh.store.set(self._key(save, rank), json.dumps(report))
            if meta is not None:
                self._complete(save, meta)
        except Exception as error:
            self._end(save, error_text(error))

    def _complete(self, save: _Save, meta: CheckpointMeta) -> None:
        """Waits on the main rank for the other ranks, then publishes the checkpoint."""
        store, keys = self._mesh.store, [self._key(save, rank) for rank in range(self._mesh.size)]
        while not store.check(keys):
            if save.outcome is not None:
                return
            time.sleep(_POLL_S)
        reports = [json.loads(store.get(key)) for key in keys]
        save.is_clear = True
        for key in keys:
            store.delete_key(key)
        fault = next((each["fault"] for each in reports if "fault" in each), None)
        if fault is None:
            with self._lock:
                save.publishing = save.outcome is None
            if not save.publishing:  # it took too long and has been ended
                return
            fault = _fault(lambda: self._publish(save, [Written(**each) for each in reports], meta))
        if fault is not None:
            shutil.rmtree(save.partial, ignore_errors=True)  # to free space on the disk
        self._end(save, fault or "")

    def _publish(self, save: _Save, files: list[Written], meta: CheckpointMeta) -> None:
        """Seals and renames the directory, moves the pointers, removes old checkpoints. Raises OSError."""
        target = self._folder / checkpoint_name(save.progress.step)
        for file in sorted(self._card.tokenizer_dir.glob("*token*.json")):
            shutil.copyfile(file, save.partial / file.name)
            files.append(sum_file(save.partial / file.name))
        write_atomically(save.partial / META, meta.to_json().encode())
        files.append(sum_file(save.partial / META))
        seal(save.partial, files)
        if target.exists():  # of an earlier attempt at this step
            os.replace(target, target.with_name(f".{target.name}.old.partial"))
        os.replace(save.partial, target)
        point(self._folder, LATEST, save.progress.step)
        if save.as_best is not None:
            point(self._folder, BEST, save.progress.step)
            save.as_best()
        try:
            remove_old(self._folder, self._config)
        except OSError as error:
            _log.warning("%s: old checkpoints cannot be removed: %s", self._folder, error)

    def _end(self, save: _Save, outcome: str) -> None:
        """Sets the outcome of `save` unless it has one."""
        with self._lock:
            if save.outcome is not None:
                return
            save.outcome = outcome
        if not outcome:
            self._in_a_row = 0
            _log.info("step %d  saved in %.1f s", save.progress.step, time.monotonic() - save.began)

    def _count(self, reason: str) -> None:
        """Counts and logs a failure on the main rank."""
        if not self._mesh.is_main:
            return
        self._in_a_row, self._last = self._in_a_row + 1, reason
        _log.error(
            "CHECKPOINT NOT WRITTEN (%d in a row, the run ends at %d): %s; earlier ones are intact, training "
            "continues", self._in_a_row, self._config.max_failures, reason,
        )  # fmt: skip

    def _key(self, save: _Save, rank: int) -> str:
        return f"save/{self._life}/{save.number}/{rank}"

    def _meta(self, progress: Progress) -> CheckpointMeta:
        wandb_id = self._wandb_id.read_text().strip() if self._wandb_id.exists() else None
        return CheckpointMeta(
            progress=progress,
            world_size=self._mesh.size,
            adam_steps=self._state.steps(),
            groups=self._state.hyper_parameters(),
            parameters=self._state.parameters(),
            frozen_sums=self._state.frozen_sums,
            frozen_dtype=self._run["config"]["model"]["dtype"],
            model_dir=str(self._card.model_dir),
            model_config=self._card.config,
            num_crops=self._card.num_crops,
            wandb_id=wandb_id,
            run=self._run,
        )


def remove_old(folder: Path, config: CheckpointConfig) -> None:
    """Removes old checkpoints, and what a killed save left. Raises OSError.

    It keeps the newest keep_last, those at multiples of keep_every, and those that `latest` and `best` name.
    """
    kept = {path for pointer in (LATEST, BEST) if (path := pointed(folder, pointer)) is not None}
    for old in checkpoints(folder)[config.keep_last :]:
        if old in kept or (config.keep_every and step_of(old) % config.keep_every == 0):
            continue
        # Renamed first, so that a partly deleted directory is never read as a checkpoint.
        doomed = old.with_name(f".{old.name}.old.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(old, doomed)
        shutil.rmtree(doomed)
    _sweep(folder)


def _sweep(folder: Path) -> None:
    for left in (*folder.glob(".step-*.partial"), *folder.glob("damaged-step-*")):
        shutil.rmtree(left, ignore_errors=True)


def _prepare(folder: Path, partial: Path) -> None:
    """Creates the directory `partial`, and removes those of killed saves. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()


def _fault(work: Callable[[], None]) -> str | None:
    """Runs `work`; returns the text of its OSError, None without one."""
    try:
        work()
    except OSError as error:
        return error_text(error)
    return None
