"""The Kubernetes objects of a run, for the Kubeflow training operator (v1, PyTorchJob) or for its successor,
the Kubeflow Trainer (v2, TrainJob).

In: the job's description and the text of its config file. Out: objects by file name, or their YAML. k8s/ in
this repository is what `render` makes for the default arguments; a test compares them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from launch.description import GRACE_S, POD_GRACE_S, JobDescription
from phi3v_dist.exits import CRASHED, DIVERGED, USAGE

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
    """Where the job runs.

    namespace: of all objects. data_size, runs_size: quantities of the claims, such as "1Ti". operator: v1
    makes a PyTorchJob, v2 a TrainJob with its TrainingRuntime.
    """

    namespace: str = NAMESPACE
    data_size: str = "1Ti"
    runs_size: str = "1Ti"
    operator: Literal["v1", "v2"] = "v1"


DEFAULTS = KubernetesOptions()


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
    """The namespace. Its pods must meet the security level baseline, not restricted: the init container of
    the operator does not meet that.
    """
    level = "pod-security.kubernetes.io"
    labels = {f"{level}/enforce": "baseline", f"{level}/warn": "restricted"}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": options.namespace, "labels": {**_labels(), **labels}},
    }


def claim(name: str, size: str, options: KubernetesOptions) -> Object:
    """A claim that all pods mount at once; the cluster's default storage class must support ReadWriteMany."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": options.namespace, "labels": _labels()},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": size}}},
    }


def config_map(job: JobDescription, config_text: str, options: KubernetesOptions) -> Object:
    """The config file, unchanged; overrides are arguments of the pods."""
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
    """Node 0 as Master, the others as Worker; their pods are equal. By the restart policy ExitCode a pod that
    ends with 128 or more (stopped, killed, its node lost) is replaced; a lower exit code fails the job.
    """
    replicas = {"Master": replica(job, 1)}
    if job.size.nodes > 1:
        replicas["Worker"] = replica(job, job.size.nodes - 1)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name, "namespace": options.namespace, "labels": _labels(job.name)},
        "spec": {
            "nprocPerNode": str(job.size.processes_per_node),
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": 50},
            "pytorchReplicaSpecs": replicas,
        },
    }


def replica(job: JobDescription, count: int) -> Object:
    """`count` equal pods."""
    return {"replicas": count, "restartPolicy": "ExitCode", "template": pod_template(job, "pytorch")}


def training_runtime(job: JobDescription, options: KubernetesOptions) -> Object:
    """The pods of a TrainJob. A pod that ends with the code for a crash, bad input or a diverged run fails
    the job. Any other pod is replaced, and a drained or preempted pod does not count towards the backoff
    limit.
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
            "mlPolicy": {"numNodes": job.size.nodes, "torch": {}},
            "template": {"spec": {"replicatedJobs": [node]}},
        },
    }


def train_job(job: JobDescription, options: KubernetesOptions) -> Object:
    """The job on that runtime. It gives the number of processes, because the Trainer's default is the word
    "auto".
    """
    return {
        "apiVersion": TRAINER_API,
        "kind": "TrainJob",
        "metadata": {"name": job.name, "namespace": options.namespace, "labels": _labels(job.name)},
        "spec": {
            "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name},
            "trainer": {"numNodes": job.size.nodes, "numProcPerNode": job.size.processes_per_node},
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
                # Otherwise every start would change the owner of every shard.
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
    """The pod's only container. The operator fixes its name; the Trainer (v2) adds the port itself."""
    resources: dict[str, Any] = {
        "cpu": str(job.size.cpus_per_node),
        "memory": f"{job.size.memory_gb}Gi",
    }
    if job.size.gpus:
        resources["nvidia.com/gpu"] = str(job.size.gpus)
    variables = {
        "PHI3V_RUN_ID": job.name,
        "PHI3V_GRACE_S": str(GRACE_S),
        "PHI3V_MODEL": f"{DATA_MOUNT}/models/Phi-3-vision-128k-instruct",
        "HOME": "/tmp",
        **({"PHI3V_CPU_PROCESSES": str(job.size.cpu_processes)} if job.size.cpu_processes else {}),
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
    "00-namespace.yaml": "The namespace of all other objects. It must be created first.",
    "10-storage.yaml": "Shards and weights (phi3v-data), run directories (phi3v-runs); all pods mount both.",
    "20-config.yaml": "The config of the run. A running job keeps the one that it has read.",
    "30-train.yaml": "The job. What must exist before it starts: docs/kubernetes.md.",
}


def render(objects: Mapping[str, Sequence[Object]]) -> dict[str, str]:
    """File name -> text: a comment, then the objects."""
    return {name: _comment(HEADERS.get(name, "")) + dump(parts) for name, parts in objects.items()}


def dump(objects: Sequence[Object]) -> str:
    """YAML documents: keys in the order given, strings of several lines as blocks."""
    return yaml.dump_all(
        objects,
        Dumper=_Dumper,
        sort_keys=False,
        width=1000,
        default_flow_style=False,
        explicit_start=len(objects) > 1,
    )


def _labels(job: str | None = None) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "phi3v-dist"}
    return labels | ({"app.kubernetes.io/instance": job} if job else {})


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 108))


class _Dumper(yaml.SafeDumper):
    """Indents lists under their key, writes strings of several lines as blocks, and never writes aliases."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
