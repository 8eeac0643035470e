"""What `phi3v doctor CONFIG` checks of a run: its directory, datasets, weights, batch, memory, W&B."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.cluster import cpu_processes
from launch.doctor.finding import GB, Finding, Status
from launch.doctor.machine import gpu_bytes
from launch.health import unwritable
from launch.local import CPU_PROCESSES, cores, visible_gpus
from phi3v_dist.config import RunConfig
from shards.common.errors import BadInputError
from shards.format.dataset import read_dataset_info

SLOW_DISK_MB_S = 100.0
"""A slower run directory gets a yellow finding. 10^6 bytes per second."""
PROBE_BYTES = 64 << 20
"""Size of the file that is written to measure the speed."""
MAX_SKEW_S = 5.0
"""Most seconds between this clock and that of the storage."""


def run_directory(config: RunConfig) -> Iterator[Finding]:
    """Space and write speed where checkpoints go, and the clock of the machine that stores them."""
    directory = nearest_existing(config.run_dir)
    free = shutil.disk_usage(directory).free
    if fault := unwritable(directory):
        yield Finding("red", "run directory", fault, "choose another runs_dir")
        return
    status: Status = "green" if free > 200 * GB else "yellow" if free > 5 * GB else "red"
    fix = "" if status == "green" else "a checkpoint of the 4.15B model with its optimizer takes about 58 GB"
    yield Finding(status, "run directory", f"{config.run_dir}, {free / GB:.0f} GB free", fix)
    if free >= 2 * PROBE_BYTES:
        yield from _storage(directory)


def _storage(directory: Path) -> Iterator[Finding]:
    """Write speed of a directory, and the difference between the clock of its storage and this one."""
    probe = directory / f".probe-{uuid.uuid4().hex}"
    data = os.urandom(1 << 20) * (PROBE_BYTES >> 20)
    try:
        began = time.time()
        with probe.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        speed = PROBE_BYTES / 1e6 / max(time.time() - began, 1e-6)
        skew = probe.stat().st_mtime - time.time()
    finally:
        probe.unlink(missing_ok=True)
    good = speed >= SLOW_DISK_MB_S
    fix = "" if good else "saving will be slow; raise checkpoint.every_steps and --signal=USR1@seconds"
    yield Finding("green" if good else "yellow", "write speed", f"{speed:.0f} MB/s", fix)
    good = abs(skew) < MAX_SKEW_S
    fix = "" if good else "synchronize the clocks (chrony); exit codes are recognized by their time"
    yield Finding("green" if good else "yellow", "clock", f"{skew:+.1f} s difference to the storage", fix)


def dataset(config: RunConfig) -> Iterator[Finding]:
    """The shards of all datasets are there and complete, and have the splits that the config names."""
    for path in config.data.paths:
        yield from _one_dataset(config, path)


def _one_dataset(config: RunConfig, path: str) -> Iterator[Finding]:
    try:
        info = read_dataset_info(path)
    except BadInputError as error:
        yield Finding("red", "shards", str(error))
        return
    wrong = [
        shard.name for shard in info.shards if size_of(Path(path) / shard.name) not in (shard.bytes, None)
    ]
    missing = [
        split for split in (config.data.train_split, config.data.val_split) if not info.splits.get(split)
    ]
    if wrong:
        fix = f"copy them again, or `phi3v shards verify {path}`"
        yield Finding(
            "red", "shards", f"{path}: {len(wrong)} shard(s) of the wrong size, such as {wrong[0]}", fix
        )
    if missing:
        fix = f"it has {', '.join(info.splits)}; set data.train_split and data.val_split"
        yield Finding("red", "shards", f"{path}: no sample in split {missing[0]}", fix)
    if not wrong and not missing:
        size = sum(shard.bytes for shard in info.shards) / GB
        yield Finding("green", "shards", f"{path}: {info.num_samples} samples, {size:.1f} GB")


def size_of(file: Path) -> int | None:
    """Bytes of a local file, 0 if it is missing; None where the path is a URL."""
    if "://" in str(file) or ":/" in str(file).lstrip("/"):
        return None
    return file.stat().st_size if file.exists() else 0


def weights(config: RunConfig) -> Iterator[Finding]:
    """The files of the model that is fine-tuned are here; no rank asks the Hub for them."""
    if config.model.path is None:
        yield Finding("green", "model", "new, from model.config")
        return
    path = Path(config.model.path)
    if not path.is_dir():
        yield Finding("red", "model", f"{path}: no such directory", "download the weights; set model.path")
        return
    index = path / "model.safetensors.index.json"
    files = {"config.json", "tokenizer.json"}
    files |= (
        set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    )
    missing = sorted(name for name in files if not (path / name).exists())
    if missing:
        yield Finding("red", "model", f"{path}: {', '.join(missing)} missing", "download the weights again")
    else:
        yield Finding("green", "model", f"{path}: {len(files) - 2} weight file(s), tokenizer")


def _ranks(environment: Mapping[str, str]) -> int:
    """Ranks of a job on this machine, or of the Slurm job in which this runs."""
    per_node = visible_gpus() or cpu_processes(environment) or min(CPU_PROCESSES, cores())
    return per_node * int(environment.get("SLURM_JOB_NUM_NODES", "1"))


def batch(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """global_batch is a multiple of the number of groups of ranks that share a row, on this machine or in the
    Slurm job in which this runs.
    """
    ranks, rows, sp = _ranks(environment), config.train.global_batch, config.parallel.sp
    found = f"global_batch {rows} on {ranks} rank(s)" + (f", {sp} to a row" if sp > 1 else "")
    if ranks % sp:
        yield Finding("red", "batch", found, f"set parallel.sp to a divisor of {ranks}")
        return
    try:
        each = config.train.rows_each(ranks // sp)
    except BadInputError as error:
        yield Finding("red", "batch", found, str(error).rpartition("; ")[2])
    else:
        yield Finding("green", "batch", f"{found}: {each} row(s) a step on each")


def memory(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the GPUs of this machine are large enough, by the arithmetic of `phi3v estimate`."""
    from phi3v_dist.budget.memory import advice, estimate
    from phi3v_dist.pretrained import model_config_of

    if config.model.path is not None and not (Path(config.model.path) / "config.json").exists():
        return  # `weights` reports it
    model, ranks = model_config_of(config), _ranks(environment)
    if ranks % config.parallel.sp:
        return  # `batch` reports it
    needed = estimate(config, model, ranks)
    found = f"{needed.total / GB:.0f} GB on each of {ranks} rank(s), {needed.host / GB:.0f} GB of host memory"
    capacity = gpu_bytes() if visible_gpus() else None
    if capacity is None:
        yield Finding("green", "memory", f"{found}; no GPU here to compare with")
    elif needed.total > capacity:
        changes = "; ".join(advice(config, model, ranks, gpu_bytes=capacity))
        yield Finding("red", "memory", f"{found}, the GPU has {capacity / GB:.0f}", changes)
    else:
        yield Finding("green", "memory", f"{found}, the GPU has {capacity / GB:.0f}")


def wandb(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Where the metrics go."""
    from phi3v_dist.tracking.tracker import has_key, resolve_mode

    mode = resolve_mode(config, environment)
    if mode == "online" and not has_key(environment):
        yield Finding("yellow", "W&B", "online without WANDB_API_KEY", "export it, or track.mode=offline")
    else:
        sent = f", `phi3v report {config.run_dir} --sync` sends it later" if mode == "offline" else ""
        yield Finding("green", "W&B", f"{mode}{sent}")


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
