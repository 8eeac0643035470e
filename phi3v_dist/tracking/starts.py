"""RUN/starts.jsonl: one line for each start of a run, with the step from which it started or resumed."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi3v_dist.run.layout import STARTS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """step: optimizer steps done before it. row: first row of the plan that it takes. time: seconds since the
    epoch. world_size: ranks. host: of the main rank. job: variables of the scheduler. None: not recorded.
    """

    step: int
    row: int | None
    time: float
    world_size: int | None = None
    host: str | None = None
    job: dict[str, str] = field(default_factory=dict)


def record_start(run_dir: Path, step: int, row: int, *, about: dict[str, Any]) -> None:
    """Appends a line for a start at this step and row. about: world_size, host, job and git are taken from
    it.

    A file that cannot be written is reported in the log.
    """
    fields = {"step": step, "row": row, "time": round(time.time(), 3)}
    fields |= {name: about[name] for name in ("world_size", "host", "job", "git") if name in about}
    try:
        with (run_dir / STARTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(fields) + "\n")
    except OSError as error:
        _log.warning("%s: cannot be written (%s)", run_dir / STARTS, error.strerror)


def read_starts(run_dir: Path) -> list[Start]:
    """The starts of a run in order; lines that are damaged or incomplete are left out."""
    try:
        lines = (run_dir / STARTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [start for line in lines if (start := _parse(line)) is not None]


def first_row_of_step(run_dir: Path, step: int, global_batch: int) -> int:
    """The first row of the plan that the run takes in optimizer step `step`.

    Steps have `global_batch` rows, except the last step before a former end of the run, which may have fewer;
    so the count begins at the last start at or before `step`.
    """
    first_step = first_row = 0
    for start in read_starts(run_dir):
        if start.step <= step and start.row is not None:
            first_step, first_row = start.step, start.row
    return first_row + (step - first_step) * global_batch


def _parse(line: str) -> Start | None:
    try:
        fields = json.loads(line)
        return Start(
            step=int(fields["step"]),
            row=int(fields["row"]) if "row" in fields else None,
            time=float(fields["time"]),
            world_size=fields.get("world_size"),
            host=fields.get("host"),
            job=fields.get("job") or {},
        )
    except (ValueError, KeyError, TypeError):
        return None
