"""`phi3v launch k8s`: a run as Kubernetes objects, for the Kubeflow training operator (v1, PyTorchJob) or for
its successor, the Kubeflow Trainer (v2, TrainJob).

In: the job's description and the config file's text. Out: objects by file name, or their YAML; k8s/ in this
repository is what it prints for its default arguments, a test holds that. Applying is left to kubectl.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.description import GRACE_S, POD_GRACE_S, JobDescription, check_batch, job_name
from phi3v_dist.config import load_config
from phi3v_dist.exits import CRASHED, DIVERGED, USAGE
from shards.common.errors import BadInputError
from shards.common.shipped import shipped

NAMESPACE = "phi3v"
IMAGE = "registry.example.com/phi3v-dist:0.1.0"
DATA_CLAIM, RUNS_CLAIM = "phi3v-data", "phi3v-runs"
DATA_MOUNT, RUNS_MOUNT, CONFIG_MOUNT = "/data", "/runs", "/config"
CONFIG_FILE = "train.yaml"
WANDB_SECRET = "phi3v-wandb"
USER_ID = 1000
RENDEZVOUS_PORT = 23456
TRAINER_API = "trainer.kubeflow.org/v1alpha1"
TRAINER_CONTAINER = "node"  # the Trainer looks for a replicated job and a container of this name

Object = dict[str, Any]


@dataclass(frozen=True)
class KubernetesOptions:
    """Where the job runs. data_size, runs_size: quantities of the claims, such as "1Ti". operator: v1 makes a
    PyTorchJob, v2 a TrainJob with its TrainingRuntime.
    """

    namespace: str = NAMESPACE
    data_size: str = "1Ti"
    runs_size: str = "1Ti"
    operator: Literal["v1", "v2"] = "v1"


DEFAULTS = KubernetesOptions()


def describe(
    config_path: str,
    overrides: Sequence[str],
    nodes: int,
    gpus_per_node: int,
    image: str = IMAGE,
    cpus_per_gpu: int = 8,
    memory_gb: int | None = None,
) -> JobDescription:
    """The job of a config on Kubernetes: data under /data, run directories under /runs.

    Raises BadInputError: config not usable, sizes not possible, a run name that makes no object name.
    """
    mounted = [f"data.path={DATA_MOUNT}/shards", f"runs_dir={RUNS_MOUNT}"]
    named = {override.split("=", 1)[0] for override in overrides}
    if "data.sources" in named or ("data.path" not in named and _has_sources(config_path)):
        named.add("data.path")
    mounted = [override for override in mounted if override.split("=", 1)[0] not in named]
    config = load_config(config_path, [*mounted, *overrides])
    job = JobDescription(
        name=job_name(config.name),
        config=config_path,
        overrides=(*mounted, *overrides),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_gpu=cpus_per_gpu,
        memory_gb_per_node=memory_gb,
        image=image,
    )
    check_batch(job, config.train, config.parallel.sp)
    return job


def _has_sources(config_path: str) -> bool:
    """Whether the file names several data sets. What is wrong with it `load_config` will say."""
    try:
        tree = yaml.safe_load(shipped(Path(config_path)).read_text())
        return bool(tree["data"]["sources"])
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return False


def manifests(job: JobDescription, config_text: str, options: KubernetesOptions) -> dict[str, list[Object]]:
    """All objects of a job by file name, in the order in which they must be applied."""
    return {
        "00-namespace.yaml": [namespace(options)],
        "10-storage.yaml": [
            claim(DATA_CLAIM, options.data_size, options),
            claim(RUNS_CLAIM, options.runs_size, options),
        ],
        "20-config.yaml": [config_map(job, config_text, options)],
        "30-train.yaml": (
            [pytorch_job(job, options)]
            if options.operator == "v1"
            else [training_runtime(job, options), train_job(job, options)]
        ),
    }


def namespace(options: KubernetesOptions) -> Object:
    """The namespace. Enforced: baseline, because the operator's own init container asks for no more than
    that."""
    level = "pod-security.kubernetes.io"
    labels = {f"{level}/enforce": "baseline", f"{level}/warn": "restricted"}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": options.namespace, "labels": {**_labels(), **labels}},
    }


def claim(name: str, size: str, options: KubernetesOptions) -> Object:
    """A claim that all pods mount at once; the cluster's default storage class must offer ReadWriteMany."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": options.namespace, "labels": _labels()},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": size}}},
    }


def config_map(job: JobDescription, config_text: str, options: KubernetesOptions) -> Object:
    """The config file as it is; overrides are arguments of the pods."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": f"{job.name}-config",
            "namespace": options.namespace,
            "labels": _labels(job.name),
        },
        "data": {CONFIG_FILE: config_text},
    }


def pytorch_job(job: JobDescription, options: KubernetesOptions) -> Object:
    """Node 0 as Master, the others as Worker; the pods are equal. ExitCode: a pod that ends with 128 or more
    (stopped, killed, its node lost) is replaced, one that ends below fails the job.
    """
    replicas = {"Master": replica(job, 1)}
    if job.nodes > 1:
        replicas["Worker"] = replica(job, job.nodes - 1)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name, "namespace": options.namespace, "labels": _labels(job.name)},
        "spec": {
            "nprocPerNode": str(job.processes_per_node),
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 50},
            "pytorchReplicaSpecs": replicas,
        },
    }


def replica(job: JobDescription, count: int) -> Object:
    """`count` equal pods."""
    return {"replicas": count, "restartPolicy": "ExitCode", "template": pod_template(job, "pytorch")}


def training_runtime(job: JobDescription, options: KubernetesOptions) -> Object:
    """The pods of a TrainJob. A pod that ends with one of our codes below 128 (bad config, diverged, crashed)
    fails the job; any other is replaced, and a drained or preempted one is not even counted.
    """
    template = pod_template(job, TRAINER_CONTAINER)
    template["spec"]["restartPolicy"] = "Never"  # the Job replaces pods; podFailurePolicy asks for it
    policy = {
        "rules": [
            {
                "action": "FailJob",
                "onExitCodes": {
                    "containerName": TRAINER_CONTAINER,
                    "operator": "In",
                    "values": sorted({CRASHED, USAGE, DIVERGED}),
                },
            },
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
    }
    node = {
        "name": TRAINER_CONTAINER,
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 50, "podFailurePolicy": policy, "template": template},
        },
    }
    return {
        "apiVersion": TRAINER_API,
        "kind": "TrainingRuntime",
        "metadata": {
            "name": job.name,
            "namespace": options.namespace,
            "labels": {**_labels(job.name), "trainer.kubeflow.org/framework": "torch"},
        },
        "spec": {
            "mlPolicy": {"numNodes": job.nodes, "torch": {}},
            "template": {"spec": {"replicatedJobs": [node]}},
        },
    }


def train_job(job: JobDescription, options: KubernetesOptions) -> Object:
    """The job on that runtime. Processes are counted here: the Trainer's own guess is the word "auto"."""
    return {
        "apiVersion": TRAINER_API,
        "kind": "TrainJob",
        "metadata": {"name": job.name, "namespace": options.namespace, "labels": _labels(job.name)},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name},
            "trainer": {"numNodes": job.nodes, "numProcPerNode": job.processes_per_node},
        },
    }


def pod_template(job: JobDescription, container_name: str) -> Object:
    """One node of the job. container_name: "pytorch" for the operator v1, "node" for v2."""
    return {
        "metadata": {"labels": _labels(job.name)},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": POD_GRACE_S,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER_ID,
                "runAsGroup": USER_ID,
                "fsGroup": USER_ID,
                # Else every start would change the owner of every shard.
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "containers": [container(job, container_name)],
            "volumes": [
                {"name": "config", "configMap": {"name": f"{job.name}-config"}},
                {"name": "data", "persistentVolumeClaim": {"claimName": DATA_CLAIM, "readOnly": True}},
                {"name": "runs", "persistentVolumeClaim": {"claimName": RUNS_CLAIM}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
                {"name": "tmp", "emptyDir": {"sizeLimit": "100Gi"}},
            ],
        },
    }


def container(job: JobDescription, name: str) -> Object:
    """The one container. Its name is fixed by the operator; the Trainer (v2) names its own port."""
    resources: dict[str, Any] = {
        "cpu": str(job.cpus_per_gpu * job.processes_per_node),
        "memory": f"{job.memory_gb}Gi",
    }
    if job.gpus_per_node:
        resources["nvidia.com/gpu"] = str(job.gpus_per_node)
    variables = {
        "PHI3V_RUN_ID": job.name,
        "PHI3V_GRACE_S": str(GRACE_S),
        "PHI3V_MODEL": f"{DATA_MOUNT}/models/Phi-3-vision-128k-instruct",
        "HOME": "/tmp",
        **({"PHI3V_CPU_PROCESSES": str(job.cpu_processes)} if job.cpu_processes else {}),
        **job.environment,
    }
    ports = [{"name": "pytorchjob-port", "containerPort": RENDEZVOUS_PORT}]
    return {
        "name": name,
        "image": job.image or IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["phi3v", "launch", "node"],
        "args": [f"{CONFIG_MOUNT}/{CONFIG_FILE}", *job.overrides],
        **({"ports": ports} if name != TRAINER_CONTAINER else {}),
        "env": [
            *({"name": name, "value": value} for name, value in variables.items()),
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {
                "name": "WANDB_API_KEY",
                "valueFrom": {"secretKeyRef": {"name": WANDB_SECRET, "key": "api-key", "optional": True}},
            },
        ],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_MOUNT, "readOnly": True},
            {"name": "data", "mountPath": DATA_MOUNT, "readOnly": True},
            {"name": "runs", "mountPath": RUNS_MOUNT},
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


HEADERS = {
    "00-namespace.yaml": "The namespace of all that follows; its name sorts first.",
    "10-storage.yaml": "Shards and weights (phi3v-data), run directories (phi3v-runs); all pods mount both.",
    "20-config.yaml": "The recipe. A running job keeps the one that it read.",
    "30-train.yaml": "The job. What it needs before it starts: docs/kubernetes.md.",
}


def render(objects: Mapping[str, Sequence[Object]]) -> dict[str, str]:
    """The files' text: a comment, then the objects."""
    return {name: _comment(HEADERS.get(name, "")) + dump(parts) for name, parts in objects.items()}


def dump(objects: Sequence[Object]) -> str:
    """YAML documents, keys in the order given, texts of several lines as blocks."""
    return yaml.dump_all(
        objects,
        Dumper=_Dumper,
        sort_keys=False,
        width=1000,
        default_flow_style=False,
        explicit_start=len(objects) > 1,
    )


def launch_k8s(
    config_path: str,
    overrides: Sequence[str],
    nodes: int = 2,
    gpus_per_node: int = 8,
    image: str = IMAGE,
    cpus_per_gpu: int = 8,
    memory_gb: int | None = None,
    options: KubernetesOptions = DEFAULTS,
    apply: bool = False,
    out: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Prints the manifests of a run, writes them to the directory `out`, or applies them with kubectl.

    Raises BadInputError: config or sizes not usable, no kubectl, kubectl refused.
    """
    job = describe(config_path, overrides, nodes, gpus_per_node, image, cpus_per_gpu, memory_gb)
    texts = render(manifests(job, shipped(Path(config_path)).read_text(), options))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text)
    if not apply:
        if out is None:
            print("---\n".join(text.removeprefix("---\n") for text in texts.values()), end="")
        return 0
    if shutil.which("kubectl") is None:
        raise BadInputError("no kubectl on the PATH; without --apply the manifests are printed")
    if image == IMAGE:
        raise BadInputError(
            f"{IMAGE} is only an example; build the Dockerfile and name your image with --image"
        )
    done = subprocess.run(
        ["kubectl", "apply", "-f", "-"],
        input="---\n".join(texts.values()),
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        raise BadInputError(f"kubectl apply ended with exit code {done.returncode}; see its message above")
    return 0


def _labels(job: str | None = None) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "phi3v-dist"}
    return labels | ({"app.kubernetes.io/instance": job} if job else {})


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 108))


class _Dumper(yaml.SafeDumper):
    """Indents lists under their key, writes texts of several lines as blocks, and never writes aliases."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
