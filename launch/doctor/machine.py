"""What `phi3v doctor` looks at on this machine: packages, GPUs, shared memory, network, collectives."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from launch.description import single_node, torchrun_options
from launch.doctor.finding import GB, Finding
from launch.health import MIN_SHM_BYTES
from launch.local import CPU_PROCESSES, cores, visible_gpus
from launch.torchrun.node import run_node


def versions() -> Iterator[Finding]:
    """The pinned packages have the versions that were tested together."""
    for requirement in requires("phi3v-dist") or []:
        pinned = re.fullmatch(r"([A-Za-z0-9_-]+)==([\w.]+)", requirement.split(";")[0].strip())
        if pinned is None or ";" in requirement:
            continue
        name, wanted = pinned.groups()
        try:
            have = version(name).split("+")[0]
        except PackageNotFoundError:
            have = "not installed"
        fix = f"pip install -c constraints.txt {name}=={wanted}"
        good = have == wanted
        yield Finding("green" if good else "red", name, have, "" if good else f"{fix} ({wanted} is tested)")


def compiled_resize() -> Iterator[Finding]:
    """The C part of image preprocessing was built when the package was installed."""
    from phi3v_dist.processor import resample

    if resample.available():
        yield Finding("green", "image resize", "compiled")
    else:
        fix = "install a C compiler (gcc), then this package again: images are prepared 1.7 times as fast"
        yield Finding("yellow", "image resize", "done by Pillow", fix)


def gpus() -> Iterator[Finding]:
    """GPUs, their driver, and a torch build that can use them."""
    count = visible_gpus()
    if count == 0:
        yield Finding("yellow", "GPUs", f"none, {cores()} CPU cores", "enough only for configs/tiny.yaml")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    yield Finding("green", "GPUs", f"{count} x {listed[0] if listed else 'unknown'}")
    if version("torch").endswith("+cpu"):
        yield Finding(
            "red", "torch", "a CPU build on a machine with GPUs", "install a CUDA build (README, CPU or CUDA)"
        )


def gpu_bytes() -> int | None:
    """Memory of the smallest GPU in bytes, as the driver reports it; None if it does not answer."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    sizes = [int(word) * 2**20 for word in listed if word.isdigit()]
    return min(sizes, default=None)


def shared_memory() -> Iterator[Finding]:
    """NCCL and data workers use /dev/shm."""
    total = shutil.disk_usage("/dev/shm").total
    good = total >= MIN_SHM_BYTES
    fix = "" if good else "docker run --shm-size=16g, or a volume as in k8s/30-train.yaml"
    yield Finding("green" if good else "red", "/dev/shm", f"{total / GB:.1f} GB", fix)


def network() -> Iterator[Finding]:
    """Ranks on this machine can reach each other: the host name resolves, and a port can be opened and
    reached.
    """
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
        with socket.create_server((address, 0)) as server:
            socket.create_connection((address, server.getsockname()[1]), timeout=5).close()
    except OSError as error:
        fix = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        yield Finding("yellow", "rendezvous", f"host name {name} is not reachable ({error})", fix)
        return
    yield Finding("green", "rendezvous", f"{name} is {address}, ports can be opened")


def all_reduce() -> Iterator[Finding]:
    """Ranks start on this machine, find each other, and all-reduce 64 MB."""
    count = visible_gpus() or min(CPU_PROCESSES, cores())
    options = torchrun_options(single_node(count))
    result = Path(os.environ.get("TMPDIR", "/tmp")) / f"phi3v-all-reduce-{uuid.uuid4().hex}"
    try:
        command = ["-m", "launch.bandwidth", str(result)]
        ended = run_node(options, command, result, environment={"OMP_NUM_THREADS": "1"}, grace_s=30)
        if ended.code or not result.exists():
            fix = "NCCL_DEBUG=INFO phi3v doctor --bandwidth prints details"
            yield Finding("red", "all-reduce", f"failed on {count} rank(s), exit code {ended.code}", fix)
        else:
            yield Finding("green", "all-reduce", f"{result.read_text()} over {count} rank(s)")
    finally:
        result.unlink(missing_ok=True)
