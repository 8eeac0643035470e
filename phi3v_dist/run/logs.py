"""The logs of a run directory."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from shards.common.errors import BadInputError


def make_run_dir(run_dir: Path) -> None:
    """Raises BadInputError if it cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise not_writable(run_dir, error) from error


def not_writable(run_dir: Path, error: OSError) -> BadInputError:
    return BadInputError(f"{run_dir}: cannot write ({error.strerror or error}); choose another runs_dir")


def log_to_files(run_dir: Path, rank: int) -> None:
    """Sends this process's log to RUN/logs/rank-N.log, and the main rank's to the standard output as well."""
    make_run_dir(run_dir)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / "logs" / f"rank-{rank}.log")]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
        handlers[1].setFormatter(logging.Formatter("%(message)s"))
    root.handlers = handlers
    for noisy in ("httpx", "DeepSpeed", "torch.distributed", "fsspec", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
