"""`phi3v doctor [CONFIG]`: finds what would go wrong before GPUs are paid for. Each finding says how to fix
it.

In: optionally a config, and what to look at besides this machine (Slurm, Kubernetes, collectives). Out: one
line per finding and an exit code. No torch, except with `bandwidth`, where it is loaded in other processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from launch.doctor import clusters, machine, run
from launch.doctor.finding import Finding, line
from phi3v_dist.config import load_config
from phi3v_dist.exits import DONE, UNHEALTHY


def run_doctor(
    config_path: str | None = None,
    overrides: Sequence[str] = (),
    *,
    slurm: bool = False,
    k8s: bool = False,
    bandwidth: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Prints the findings as they come; returns UNHEALTHY if one of them is red, else DONE.

    slurm, k8s: also look at the cluster. bandwidth: also start ranks here and time an all-reduce.
    Raises BadInputError if the config itself cannot be used.
    """
    config = load_config(config_path, overrides) if config_path else None
    checks: list[Callable[[], Iterator[Finding]]] = [
        machine.versions,
        machine.compiled_resize,
        machine.gpus,
        machine.shared_memory,
        machine.network,
    ]
    if config is not None:
        checks += [
            lambda: run.run_directory(config),
            lambda: run.dataset(config),
            lambda: run.weights(config),
        ]
        checks += [lambda: run.batch(config, environment), lambda: run.memory(config, environment)]
        checks += [lambda: run.wandb(config, environment)]
    if slurm:
        checks.append(clusters.slurm_cluster)
    if k8s:
        checks.append(clusters.kubernetes_cluster)
    if bandwidth:
        checks.append(machine.all_reduce)
    red = False
    for check in checks:
        for finding in check():
            print(line(finding, colour=sys.stdout.isatty()), flush=True)
            red = red or finding.status == "red"
    return UNHEALTHY if red else DONE
