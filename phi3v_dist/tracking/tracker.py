"""Where the numbers go: metrics.jsonl always, W&B when it can.

In: dicts of metrics with the optimizer step, one a step at most. Out: RUN/metrics.jsonl, which is the truth,
and a W&B run that mirrors it from a thread (`wandb_run`). Nothing that fails here stops a run. Called by the
train loop on the main rank.
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
from phi3v_dist.run.layout import METRICS, STARTS, STEP
from phi3v_dist.tracking.wandb_run import Mirror, NodeMetrics
from shards.common.files import write_atomically

_WAITING = 10_000  # lines kept in memory while the disk takes none
_log = logging.getLogger(__name__)


class Tracker:
    """The metrics of a run; `log`, `close`.

    from_step, from_row: the step and the row of the plan that the run goes on from; lines of later steps,
    left by a killed process, are cut off: they come again. about: what the W&B run's configuration holds
    beside the resolved configuration.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, from_step: int, about: dict[str, Any], from_row: int = 0
    ) -> None:
        self._path = run_dir / METRICS
        self._waiting: deque[bytes] = deque(maxlen=_WAITING)
        self._complained = False
        cut_after(self._path, from_step)
        _record_start(run_dir, from_step, from_row, about)
        mode = resolve_mode(config)
        self.mirror = None if mode == "disabled" else Mirror(config, run_dir, mode, about)

    def log(self, step: int, metrics: dict[str, float | int | None]) -> None:
        """Writes one line of metrics at optimizer step `step`; what is None or not finite is left out."""
        finite = {k: v for k, v in metrics.items() if v is not None and math.isfinite(v)}
        line = {STEP: step, **finite, "time/unix": round(time.time(), 3)}
        self._waiting.append((json.dumps(line) + "\n").encode())
        self._write()
        if self.mirror is not None:
            self.mirror.wake()

    def preempting(self) -> None:
        """Tells W&B, at the close, that this run was stopped from outside and will go on."""
        if self.mirror is not None:
            self.mirror.preempting = True

    def close(self, exit_code: int = 0) -> None:
        """Writes what is left and waits for W&B, track.close_timeout_s at most."""
        self._write()
        if self.mirror is not None:
            self.mirror.close(exit_code)

    def _write(self) -> None:
        """Appends the waiting lines whole; if the disk does not take them they wait for the next step."""
        data = b"".join(self._waiting)
        try:
            with self._path.open("ab", buffering=0) as stream:
                size = stream.tell()
                try:
                    done = stream.write(data)
                    if done < len(data):
                        raise OSError(28, "No space left on device")
                except OSError:
                    with contextlib.suppress(OSError):
                        stream.truncate(size)
                    raise
        except OSError as error:
            if not self._complained:
                _log.warning("%s: cannot be written (%s); lines wait in memory", self._path, error.strerror)
            self._complained = True
            return
        self._waiting.clear()
        self._complained = False


def host_memory() -> dict[str, float | int | None]:
    """mem/host_gb: of this process and its children (data workers, W&B) now; mem/host_peak_gb: the most that
    this process alone has had. In GB (10^9 bytes).
    """
    process = psutil.Process()
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += child.memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"mem/host_gb": total / 1e9, "mem/host_peak_gb": peak / 1e9}


def watch_node(config: RunConfig, run_dir: Path, mesh: Mesh) -> NodeMetrics | None:
    """System metrics of this node beside those of the first, if track.node_metrics asks for them."""
    is_first_here = mesh.local_rank == 0 and not mesh.is_main
    if not (config.track.node_metrics and is_first_here and resolve_mode(config) == "online"):
        return None
    return NodeMetrics(config, run_dir, socket.gethostname())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order; what is no line of metrics is left out, as in `cut_after`."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n") and _step_of(line) < math.inf]


def row_at(run_dir: Path, step: int, global_batch: int) -> int:
    """The first row of the plan that a run takes in optimizer step `step`, as far as its starts tell: where
    the run was once to end, a step is short, also if it was prolonged afterwards.
    """
    first_step = first_row = 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for line in (run_dir / STARTS).read_text().splitlines():
            start = json.loads(line)
            if int(start["step"]) <= step:
                first_step, first_row = int(start["step"]), int(start["row"])
    return first_row + (step - first_step) * global_batch


def cut_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and those that are no line of metrics: a half-written one, or
    what a crash of the machine left.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if kept != lines:
        write_atomically(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity if it is none."""
    try:
        return int(json.loads(line)[STEP])
    except (ValueError, KeyError, TypeError):
        return math.inf


def resolve_mode(
    config: RunConfig, environment: Mapping[str, str] = os.environ
) -> Literal["online", "offline", "disabled"]:
    """How W&B is used: track.mode, WANDB_MODE where that is auto, else by whether there is a key."""
    asked = environment.get("WANDB_MODE", "")
    if config.track.mode == "disabled" or asked == "disabled":
        return "disabled"
    if config.track.mode in ("online", "offline"):
        return "online" if config.track.mode == "online" else "offline"
    if asked in ("online", "offline"):
        return "online" if asked == "online" else "offline"
    return "online" if has_key(environment) else "offline"


def has_key(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B has a key: WANDB_API_KEY, or one for its host in ~/.netrc."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _record_start(run_dir: Path, from_step: int, from_row: int, about: dict[str, Any]) -> None:
    """Appends to RUN/starts.jsonl: when the run started or went on, where, with how many ranks."""
    fields = {"step": from_step, "row": from_row, "time": round(time.time(), 3)}
    fields |= {name: about[name] for name in ("world_size", "host", "job", "git") if name in about}
    try:
        with (run_dir / STARTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(fields) + "\n")
    except OSError as error:
        _log.warning("%s: cannot be written (%s)", run_dir / STARTS, error.strerror)
