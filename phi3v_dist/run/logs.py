"""The logs of a run: one file a rank in RUN/logs, and the main rank's on the terminal as well."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from phi3v_dist.run.layout import LOGS
from shards.common.errors import BadInputError

_NOISY = ("httpx", "DeepSpeed", "torch.distributed", "fsspec", "urllib3")


def make_run_dir(run_dir: Path) -> None:
    """Makes RUN and RUN/logs. Raises BadInputError if they cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / LOGS).mkdir(exist_ok=True)
    except OSError as error:
        raise not_writable(run_dir, error) from error


def not_writable(run_dir: Path, error: OSError) -> BadInputError:
    """The error for a run directory that cannot be written."""
    return BadInputError(f"{run_dir}: cannot write ({error.strerror or error}); choose another runs_dir")


def log_to_files(run_dir: Path, rank: int) -> None:
    """Sends this process's log to RUN/logs/rank-N.log, and the main rank's to the standard output as well.

    Raises BadInputError if the directory cannot be written.
    """
    make_run_dir(run_dir)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / LOGS / f"rank-{rank}.log")]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
        handlers[1].setFormatter(logging.Formatter("%(message)s"))
    root.handlers = handlers
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
