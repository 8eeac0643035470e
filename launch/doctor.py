"""`phi3v doctor [CONFIG]`: what would go wrong, before GPUs are paid for. Each finding says how to mend it.

In: optionally a config, and what to look at besides this machine (Slurm, Kubernetes, collectives). Out: one
line a finding, green, yellow (works, look at it) or red (will fail), and an exit code. No torch, except with
`bandwidth`, where it is in processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from launch.cluster import cpu_processes
from launch.description import Membership, torchrun_options
from launch.health import MIN_SHM_BYTES, UNHEALTHY, unwritable
from launch.local import CPU_PROCESSES, cores, visible_gpus
from launch.torchrun.node import run_node
from phi3v_dist.config import RunConfig, load_config
from phi3v_dist.exits import DONE
from shards.common.errors import BadInputError
from shards.format.dataset import read_dataset_info

Status = Literal["green", "yellow", "red"]
GB = 1e9
SLOW_DISK_MB_S = 100.0
PROBE_BYTES = 64 << 20
MAX_SKEW_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One line of the report. mend: what to do about it, empty where all is well."""

    status: Status
    subject: str
    found: str
    mend: str = ""


def run_doctor(
    config_path: str | None = None,
    overrides: Sequence[str] = (),
    slurm: bool = False,
    k8s: bool = False,
    bandwidth: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Prints the findings as they come; returns 0, or 5 with a red one.

    slurm, k8s: also look at the cluster. bandwidth: also start ranks here and time an all-reduce.
    Raises BadInputError if the config itself cannot be used.
    """
    config = load_config(config_path, overrides) if config_path else None
    checks: list[Callable[[], Iterator[Finding]]] = [versions, compiled_resize, gpus, shared_memory, network]
    if config is not None:
        checks += [lambda: run_directory(config), lambda: dataset(config), lambda: weights(config)]
        checks += [lambda: batch(config, environment), lambda: memory(config, environment)]
        checks += [lambda: wandb(config, environment)]
    if slurm:
        checks.append(slurm_cluster)
    if k8s:
        checks.append(kubernetes_cluster)
    if bandwidth:
        checks.append(all_reduce)
    worst = "green"
    for check in checks:
        for finding in check():
            print(line(finding, colour=sys.stdout.isatty()), flush=True)
            if finding.status == "red" or worst == "green":
                worst = finding.status
    return UNHEALTHY if worst == "red" else DONE


def line(finding: Finding, colour: bool) -> str:
    """A finding as text."""
    codes = {"green": "32", "yellow": "33", "red": "31"}
    status = f"{finding.status:6}"
    shown = f"\033[{codes[finding.status]}m{status}\033[0m" if colour else status
    mend = f"; {finding.mend}" if finding.mend else ""
    return f"{shown} {finding.subject}: {finding.found}{mend}"


def versions() -> Iterator[Finding]:
    """The pinned packages are those that were tested together."""
    for requirement in requires("phi3v-dist") or []:
        pinned = re.fullmatch(r"([A-Za-z0-9_-]+)==([\w.]+)", requirement.split(";")[0].strip())
        if pinned is None or ";" in requirement:
            continue
        name, wanted = pinned.groups()
        try:
            have = version(name).split("+")[0]
        except PackageNotFoundError:
            have = "not installed"
        mend = f"pip install -c constraints.txt {name}=={wanted}"
        good = have == wanted
        yield Finding("green" if good else "red", name, have, "" if good else f"{mend} ({wanted} is tested)")


def compiled_resize() -> Iterator[Finding]:
    """The C part of image preprocessing was built when the package was installed."""
    from phi3v_dist.processor import resample

    if resample.available():
        yield Finding("green", "image resize", "compiled")
    else:
        mend = "install a C compiler (gcc), then this package again: pictures are prepared 1.7 times as fast"
        yield Finding("yellow", "image resize", "done by Pillow", mend)


def gpus() -> Iterator[Finding]:
    """GPUs, their driver, and a torch build that can use them."""
    count = visible_gpus()
    if count == 0:
        yield Finding("yellow", "GPUs", f"none, {cores()} CPU cores", "enough for configs/tiny.yaml alone")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    yield Finding("green", "GPUs", f"{count} x {said[0] if said else 'unknown'}")
    if version("torch").endswith("+cpu"):
        yield Finding("red", "torch", "a CPU build beside GPUs", "install a CUDA build (README, CPU or CUDA)")


def shared_memory() -> Iterator[Finding]:
    """NCCL and data workers use /dev/shm."""
    total = shutil.disk_usage("/dev/shm").total
    good = total >= MIN_SHM_BYTES
    mend = "" if good else "docker run --shm-size=16g, or a volume as in k8s/30-train.yaml"
    yield Finding("green" if good else "red", "/dev/shm", f"{total / GB:.1f} GB", mend)


def network() -> Iterator[Finding]:
    """Ranks on this machine can reach each other: the host name resolves, a port can be opened and
    reached."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.create_server((address, 0)) as server:
            socket.create_connection((address, server.getsockname()[1]), timeout=5).close()
    except OSError as error:
        mend = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        yield Finding("yellow", "rendezvous", f"host name {name} is not reachable ({error})", mend)
        return
    yield Finding("green", "rendezvous", f"{name} is {address}, ports can be opened")


def run_directory(config: RunConfig) -> Iterator[Finding]:
    """Space and write speed where checkpoints go, and the clock of the machine that stores them."""
    place = nearest_existing(config.run_dir)
    free = shutil.disk_usage(place).free
    if fault := unwritable(place):
        yield Finding("red", "run directory", fault, "choose another runs_dir")
        return
    status: Status = "green" if free > 200 * GB else "yellow" if free > 5 * GB else "red"
    mend = "" if status == "green" else "a checkpoint of the 4.15B model with its optimizer takes about 58 GB"
    yield Finding(status, "run directory", f"{config.run_dir}, {free / GB:.0f} GB free", mend)
    if free < 2 * PROBE_BYTES:
        return
    probe = place / f".probe-{uuid.uuid4().hex}"
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
    mend = "" if good else "saving will take long; raise checkpoint.every_steps and --signal=USR1@seconds"
    yield Finding("green" if good else "yellow", "write speed", f"{speed:.0f} MB/s", mend)
    good = abs(skew) < MAX_SKEW_S
    mend = "" if good else "synchronize the clocks (chrony); exit codes are matched by time"
    yield Finding("green" if good else "yellow", "clock", f"{skew:+.1f} s of the storage", mend)


def dataset(config: RunConfig) -> Iterator[Finding]:
    """The shards of all data sets are complete and there, and have the splits that the config names."""
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
        mend = f"copy them again, or `phi3v shards verify {path}`"
        yield Finding(
            "red", "shards", f"{path}: {len(wrong)} shard(s) of the wrong size, such as {wrong[0]}", mend
        )
    if missing:
        mend = f"it has {', '.join(info.splits)}; set data.train_split and data.val_split"
        yield Finding("red", "shards", f"{path}: no sample in split {missing[0]}", mend)
    if not wrong and not missing:
        size = sum(shard.bytes for shard in info.shards) / GB
        yield Finding("green", "shards", f"{path}: {info.num_samples} samples, {size:.1f} GB")


def size_of(file: Path) -> int | None:
    """Bytes of a local file, 0 if it is missing; None where the path is a URL."""
    if "://" in str(file) or ":/" in str(file).lstrip("/"):
        return None
    return file.stat().st_size if file.exists() else 0


def weights(config: RunConfig) -> Iterator[Finding]:
    """The files of the model that is fine-tuned are here: no rank asks a hub for them."""
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
    """Of a job here, or of the job that this runs in."""
    per_node = visible_gpus() or cpu_processes(environment) or min(CPU_PROCESSES, cores())
    return per_node * int(environment.get("SLURM_JOB_NUM_NODES", "1"))


def batch(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """global_batch is a multiple of the groups of ranks that share a row, here or in the job that this runs
    in."""
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
    """What `phi3v estimate` says of the GPUs that are here."""
    from phi3v_dist.budget.memory import advice, estimate
    from phi3v_dist.pretrained import model_config_of

    if config.model.path is not None and not (Path(config.model.path) / "config.json").exists():
        return  # `weights` says so
    model, ranks = model_config_of(config), _ranks(environment)
    if ranks % config.parallel.sp:
        return  # `batch` says so
    needed = estimate(config, model, ranks)
    found = f"{needed.total / GB:.0f} GB on each of {ranks} rank(s), {needed.host / GB:.0f} GB of host memory"
    gpu_bytes = _gpu_bytes() if visible_gpus() else None
    if gpu_bytes is None:
        yield Finding("green", "memory", f"{found}; no GPU here to compare with")
    elif needed.total > gpu_bytes:
        changes = "; ".join(advice(config, model, ranks, gpu_bytes=gpu_bytes))
        yield Finding("red", "memory", f"{found}, the GPU has {gpu_bytes / GB:.0f}", changes)
    else:
        yield Finding("green", "memory", f"{found}, the GPU has {gpu_bytes / GB:.0f}")


def _gpu_bytes() -> int | None:
    """Of the smallest GPU, as the driver says."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    sizes = [int(word) * 2**20 for word in said if word.isdigit()]
    return min(sizes, default=None)


def wandb(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Where the numbers go."""
    from phi3v_dist.tracking.tracker import has_key, resolve_mode

    mode = resolve_mode(config, environment)
    if mode == "online" and not has_key(environment):
        yield Finding("yellow", "W&B", "online without WANDB_API_KEY", "export it, or track.mode=offline")
    else:
        sent = f", `phi3v report {config.run_dir} --sync` sends it later" if mode == "offline" else ""
        yield Finding("green", "W&B", f"{mode}{sent}")


def slurm_cluster() -> Iterator[Finding]:
    """Slurm answers, and has GPUs that work."""
    if shutil.which("sbatch") is None:
        yield Finding("red", "Slurm", "no sbatch on the PATH", "run this on a login node")
        return
    fault, listed = _failed("sinfo", "--noheader", "--format=%P %a %D %G %t")
    if fault:
        yield Finding("red", "Slurm", fault, "is slurmctld up? SLURM_CONF right?")
        return
    for row in listed.splitlines():
        partition, available, nodes, gres, state = row.split()
        bad = state.rstrip("*").startswith(("down", "drain", "fail")) or state.endswith("*")
        found = f"{nodes} node(s) {state}, {gres if gres != '(null)' else 'no GPUs'}, {available}"
        mend = "scontrol show node says why" if bad else ""
        yield Finding("yellow" if bad else "green", f"partition {partition}", found, mend)


def kubernetes_cluster() -> Iterator[Finding]:
    """kubectl reaches a cluster with the training operator (v1) or the Trainer (v2), where we may create
    jobs."""
    if shutil.which("kubectl") is None:
        yield Finding("red", "Kubernetes", "no kubectl on the PATH", "install it")
        return
    if fault := _kubectl("version"):
        yield Finding("red", "API server", fault, "kubectl config get-contexts")
        return
    yield Finding("green", "API server", "there")
    faults = {
        name: _kubectl("get", "crd", name)
        for name in ("pytorchjobs.kubeflow.org", "trainjobs.trainer.kubeflow.org")
    }
    kinds = [name for name, fault in faults.items() if fault is None]
    if not kinds:
        mend = "install the Kubeflow training operator (v1) or the Kubeflow Trainer (v2)"
        yield Finding("red", "training operator", "; ".join(filter(None, faults.values())), mend)
    for kind in kinds:
        version_of = "v1" if kind.startswith("pytorch") else "v2: `phi3v launch k8s --operator v2`"
        yield Finding("green", "training operator", version_of)
        if fault := _kubectl("auth", "can-i", "create", kind, "-n", "phi3v"):
            yield Finding("red", "permission", f"create {kind}: {fault}", "ask for it")
        else:
            yield Finding("green", "permission", f"create {kind}")
    if fault := _kubectl("get", "secret", "phi3v-wandb", "-n", "phi3v"):
        yield Finding("yellow", "W&B secret", fault, "docs/kubernetes.md, or offline")
    else:
        yield Finding("green", "W&B secret", "there")


def _kubectl(*arguments: str) -> str | None:
    """Why a command of kubectl failed, None if it did not."""
    return _failed("kubectl", "--request-timeout=10s", *arguments)[0]


def _failed(*command: str) -> tuple[str | None, str]:
    """(why a command failed or None, its standard output)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]} has not answered within 30 s", ""
    said = " ".join((done.stderr or done.stdout).split())[-160:] or f"exit code {done.returncode}"
    return (said if done.returncode else None), done.stdout


def all_reduce() -> Iterator[Finding]:
    """Ranks start here, find each other, and add up 64 MB."""
    count = visible_gpus() or min(CPU_PROCESSES, cores())
    options = torchrun_options(Membership(1, 0, count, "127.0.0.1", 0, "doctor"))
    result = Path(os.environ.get("TMPDIR", "/tmp")) / f"phi3v-all-reduce-{uuid.uuid4().hex}"
    try:
        ended = run_node(
            options, ["-m", "launch.bandwidth", str(result)], result, {"OMP_NUM_THREADS": "1"}, 30
        )
        if ended.code or not result.exists():
            mend = "NCCL_DEBUG=INFO phi3v doctor --bandwidth tells more"
            yield Finding("red", "all-reduce", f"failed on {count} rank(s), exit code {ended.code}", mend)
        else:
            yield Finding("green", "all-reduce", f"{result.read_text()} over {count} rank(s)")
    finally:
        result.unlink(missing_ok=True)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
