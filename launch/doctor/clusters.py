"""What `phi3v doctor --slurm` and `--k8s` check: that the cluster answers and can run the job."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from launch.doctor.finding import Finding, output_of


def slurm_cluster() -> Iterator[Finding]:
    """Slurm answers, and its nodes are up."""
    if shutil.which("sbatch") is None:
        yield Finding("red", "Slurm", "no sbatch on the PATH", "run this on a login node")
        return
    sinfo = output_of("sinfo", "--noheader", "--format=%P %a %D %G %t")
    if sinfo.fault:
        yield Finding("red", "Slurm", sinfo.fault, "check that slurmctld runs and that SLURM_CONF is right")
        return
    for row in sinfo.text.splitlines():
        partition, available, nodes, gres, state = row.split()
        bad = state.rstrip("*").startswith(("down", "drain", "fail")) or state.endswith("*")
        found = f"{nodes} node(s) {state}, {gres if gres != '(null)' else 'no GPUs'}, {available}"
        fix = "scontrol show node gives the reason" if bad else ""
        yield Finding("yellow" if bad else "green", f"partition {partition}", found, fix)


def kubernetes_cluster() -> Iterator[Finding]:
    """kubectl reaches a cluster with the training operator (v1) or the Trainer (v2) where this user may
    create jobs.
    """
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
        fix = "install the Kubeflow training operator (v1) or the Kubeflow Trainer (v2)"
        yield Finding("red", "training operator", "; ".join(filter(None, faults.values())), fix)
    for kind in kinds:
        version_of = "v1" if kind.startswith("pytorch") else "v2: `phi3v launch k8s --operator v2`"
        yield Finding("green", "training operator", version_of)
        if fault := _kubectl("auth", "can-i", "create", kind, "--namespace=phi3v"):
            yield Finding("red", "permission", f"create {kind}: {fault}", "ask the administrator for it")
        else:
            yield Finding("green", "permission", f"create {kind}")
    if fault := _kubectl("get", "secret", "phi3v-wandb", "-n", "phi3v"):
        yield Finding("yellow", "W&B secret", fault, "create it (docs/kubernetes.md), or record offline")
    else:
        yield Finding("green", "W&B secret", "there")


def _kubectl(*arguments: str) -> str | None:
    """Why a command of kubectl failed; None if it succeeded."""
    return output_of("kubectl", "--request-timeout=10s", *arguments).fault
