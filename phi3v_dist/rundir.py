"""The run directory: who may write into `runs/NAME`, where it goes on from, and where its logs go.

In: the configuration. Out: a directory that belongs to this run alone. Called by the train loop.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from phi3v_dist.checkpoint import newest, read_meta
from phi3v_dist.config import RunConfig, changed_keys, config_json
from shards.atomic import write_atomically
from shards.format import BadInputError

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
DATA = "plan"  # the plan and what it is made from; made again where it is missing

# What may change between one start of a run and the next; anything else would make it another run.
# data.path may: shards are staged to node-local disks, and the fingerprint guards their content.
_MAY_CHANGE = (
    "checkpoint.",
    "eval.",
    "track.",
    "parallel.",
    "runs_dir",
    "data.path",
    "data.workers",
    "data.prefetch",
    "data.cache_",
)
_MAY_CHANGE_ALOUD = ("train.steps", "train.epochs", "model.gradient_checkpointing", "model.vision_chunk",
                     "data.max_bad_fraction", "data.val_split")  # fmt: skip
_log = logging.getLogger(__name__)


def open_run_dir(config: RunConfig, data_fingerprint: str) -> Path | None:
    """Makes the run directory of `config` this run's; returns the checkpoint to go on from, if there is one.

    Raises BadInputError if it holds a run of another configuration or other data, naming what differs.
    """
    run_dir = config.run_dir
    record = run_dir / CONFIG
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint = newest(run_dir / CHECKPOINTS)
        if checkpoint is not None:
            _check_same(run_dir, config, data_fingerprint, read_meta(checkpoint)["run"])
        write_atomically(record, config_json(config).encode())
    except OSError as error:
        raise BadInputError(
            f"{run_dir}: cannot write ({error.strerror or error}); choose another runs_dir"
        ) from error
    return checkpoint


def _check_same(run_dir: Path, config: RunConfig, data_fingerprint: str, before: dict[str, Any]) -> None:
    changed = changed_keys(before["config"], config.model_dump(mode="json"))
    if "data.sources" in changed and _weights(before["config"]) == _weights(config.model_dump(mode="json")):
        changed.remove("data.sources")  # as for data.path
    refused = [key for key in changed if not key.startswith((*_MAY_CHANGE, *_MAY_CHANGE_ALOUD))]
    if refused:
        old = OmegaConf.select(OmegaConf.create(before["config"]), refused[0])
        new = OmegaConf.select(OmegaConf.create(config.model_dump(mode="json")), refused[0])
        raise BadInputError(
            f"{run_dir}: holds a run with another {', '.join(refused)} ({refused[0]} was {old}, now {new}); "
            "set it back, or choose another name for the new run"
        )
    if before["data_fingerprint"] != data_fingerprint:
        raise BadInputError(
            f"{run_dir}: was trained on other data than {', '.join(config.data.paths)} holds now; "
            "restore the data, or choose another name for the new run"
        )
    for key in changed:
        if key.startswith(_MAY_CHANGE_ALOUD):
            _log.warning("%s: goes on with another %s", run_dir, key)


def _weights(config: dict[str, Any]) -> list[float | None] | None:
    sources = config["data"].get("sources")
    return None if sources is None else [source["weight"] for source in sources]


def log_to_files(run_dir: Path, rank: int) -> None:
    """Sends this process's log to RUN/logs/rank-N.log, and the main rank's to the standard output as well."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
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
