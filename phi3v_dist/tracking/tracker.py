"""Where metrics go: always to metrics.jsonl, and to W&B if it works.

In: dicts of metrics, at most one per optimizer step. Out: RUN/metrics.jsonl, which is authoritative, and a
W&B run that is filled from it by a thread (`wandb_run`). A failure here never stops a run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import netrc
import os
import resource
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil

from phi3v_dist.config import RunConfig
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.run.layout import METRICS, STEP
from phi3v_dist.tracking.starts import record_start
from phi3v_dist.tracking.wandb_run import Mirror, NodeMetrics
from shards.common.files import write_atomically

_WAITING = 10_000  # lines kept in memory while the file cannot be written
_log = logging.getLogger(__name__)


class Tracker:
    """Writes the metrics of a run: `log` once per window of steps, `close` at the end. Main rank only.

    from_step, from_row: the optimizer step and the row of the plan at which this start begins. Lines of later
    steps, left by a killed process, are removed, because these steps are done again. about: what the W&B
    run's config gets in addition to the resolved configuration.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, from_step: int, *, about: dict[str, Any], from_row: int = 0
    ) -> None:
        self._path = run_dir / METRICS
        self._waiting: deque[bytes] = deque(maxlen=_WAITING)
        self._warned = False
        cut_after(self._path, from_step)
        record_start(run_dir, from_step, from_row, about=about)
        mode = resolve_mode(config)
        self.mirror = None if mode == "disabled" else Mirror(config, run_dir, mode, about=about)

    def log(self, step: int, metrics: dict[str, float | int | None]) -> None:
        """Writes the metrics of optimizer step `step` as a line; None and non-finite values are left out."""
        finite = {k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}
        line = {STEP: step, **finite, "time/unix": round(time.time(), 3)}
        self._waiting.append((json.dumps(line) + "\n").encode())
        self._write()
        if self.mirror is not None:
            self.mirror.wake()

    def preempting(self) -> None:
        """At the close, tells W&B that this run was stopped from outside and will resume."""
        if self.mirror is not None:
            self.mirror.preempting = True

    def close(self, exit_code: int = 0) -> None:
        """Writes the remaining lines, then waits at most track.close_timeout_s seconds for W&B."""
        self._write()
        if self.mirror is not None:
            self.mirror.close(exit_code)

    def _write(self) -> None:
        """Appends all waiting lines. If that fails, the file is unchanged and they wait for the next call."""
        data = b"".join(self._waiting)
        try:
            with self._path.open("ab", buffering=0) as stream:
                size = stream.tell()
                try:
                    if stream.write(data) < len(data):
                        raise OSError(28, "No space left on device")
                except OSError:
                    with contextlib.suppress(OSError):
                        stream.truncate(size)
                    raise
        except OSError as error:
            if not self._warned:
                _log.warning("%s: cannot be written (%s); lines wait in memory", self._path, error.strerror)
            self._warned = True
            return
        self._waiting.clear()
        self._warned = False


def host_memory() -> dict[str, float | int | None]:
    """Memory in GB (10^9 bytes). mem/host_gb: resident memory of this process and its children (data workers,
    W&B) now. mem/host_peak_gb: the peak of this process alone.
    """
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += child.memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"mem/host_gb": total / 1e9, "mem/host_peak_gb": peak / 1e9}


def watch_node(config: RunConfig, run_dir: Path, mesh: Mesh) -> NodeMetrics | None:
    """Starts recording this node's system metrics, if track.node_metrics asks for it and W&B is online.

    Out: the recorder, on the first rank of every node except the main rank's; None on all other ranks.
    """
    is_first_here = mesh.local_rank == 0 and not mesh.is_main
    if not (config.track.node_metrics and is_first_here and resolve_mode(config) == "online"):
        return None
    return NodeMetrics(config, run_dir, socket.gethostname())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order; damaged and incomplete lines are left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n") and _step_of(line) < math.inf]


def cut_after(path: Path, step: int) -> None:
    """Removes from a metrics.jsonl the lines of steps after `step`, and lines that are damaged (by a crash of
    the machine) or incomplete.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if kept != lines:
        write_atomically(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity if the line is damaged."""
    try:
        return int(json.loads(line)[STEP])
    except (ValueError, KeyError, TypeError):
        return math.inf


def resolve_mode(
    config: RunConfig, environment: Mapping[str, str] = os.environ
) -> Literal["online", "offline", "disabled"]:
    """How W&B is used: track.mode; if that is auto, WANDB_MODE; else online if there is a key, else offline.

    WANDB_MODE=disabled turns W&B off in any case.
    """
    asked = environment.get("WANDB_MODE", "")
    if config.track.mode == "disabled" or asked == "disabled":
        return "disabled"
    chosen = asked if config.track.mode == "auto" else config.track.mode
    if chosen in ("online", "offline"):
        return "online" if chosen == "online" else "offline"
    return "online" if has_key(environment) else "offline"


def has_key(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether there is a W&B key: in WANDB_API_KEY, or for W&B's host in ~/.netrc."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
