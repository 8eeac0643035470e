"""A strict check of Kubernetes manifests without a server: what the API server, the training operator's
webhook, pod creation and pod security would refuse, and what they would take although it cannot be meant.

In: the objects of one set. Out: a list of faults, one line each, empty for a good set. The schemas of
PyTorchJob and TrainJob are the operators' own, closed: unknown fields are faults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime
from pydantic import BaseModel

Object = dict[str, Any]

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL_VALUE = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]|")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P|m)?")
SCALE = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    unit: 1024.0**power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), 1)
}
CORE_RESOURCES = ("cpu", "memory", "ephemeral-storage")
DEVICES = ("nvidia.com/gpu", "rdma/rdma_shared_device_a")
BASELINE_CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip

TRAINER_API = "trainer.kubeflow.org/v1alpha1"

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _STRINGS,
        "annotations": _STRINGS,
    },
}
_SIZE = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
_RESOURCES = {
    "type": "object",
    "properties": {
        name: {"type": "object", "additionalProperties": _SIZE} for name in ("requests", "limits")
    },
}


def _close(schema: Any) -> Any:
    """The schema with unknown fields refused wherever it lists the known ones."""
    if isinstance(schema, list):
        return [_close(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _close(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed


def _kind(spec: Object | None, extra: Object | None = None) -> Object:
    properties = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": _METADATA}
    properties |= {"spec": spec} if spec else {}
    required = ["apiVersion", "kind", "metadata", *(["spec"] if spec else [])]
    return {"type": "object", "properties": properties | (extra or {}), "required": required}


def _model_schema(model: type[BaseModel]) -> Object:
    schema = model.model_json_schema(by_alias=True)
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    schema["properties"]["metadata"] = _METADATA
    for name in schema["$defs"]:
        if name.endswith(("ResourceQuantity", "IntOrString")):
            schema["$defs"][name] = _SIZE
    return schema


def _schemas() -> dict[tuple[str, str], Object]:
    job = json.loads(Path(__file__).with_name("pytorchjob-v1.9.4.schema.json").read_text())
    replicas = job["properties"]["spec"]["properties"]["pytorchReplicaSpecs"]["additionalProperties"]
    pod_template = replicas["properties"]["template"]
    pod_template["properties"]["metadata"] = _METADATA
    job["properties"]["metadata"] = _METADATA
    job["required"] = ["apiVersion", "kind", "metadata", "spec"]
    whole = {"type": "integer", "minimum": 0}
    claim = {
        "type": "object",
        "properties": {
            "accessModes": {
                "type": "array",
                "minItems": 1,
                "items": {"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]},
            },
            "storageClassName": {"type": "string"},
            "resources": {**_RESOURCES, "required": ["requests"]},
        },
        "required": ["accessModes", "resources"],
    }
    batch = {
        "type": "object",
        "properties": {
            "completions": whole,
            "parallelism": whole,
            "backoffLimit": whole,
            "backoffLimitPerIndex": whole,
            "activeDeadlineSeconds": whole,
            "ttlSecondsAfterFinished": whole,
            "completionMode": {"enum": ["Indexed", "NonIndexed"]},
            "template": pod_template,
        },
        "required": ["template"],
    }
    schemas = {
        ("v1", "Namespace"): _kind(None),
        ("v1", "PersistentVolumeClaim"): _kind(claim),
        ("v1", "ConfigMap"): _kind(None, {"data": _STRINGS}),
        ("v1", "Pod"): _kind(pod_template["properties"]["spec"]),
        ("batch/v1", "Job"): _kind(batch),
        ("kubeflow.org/v1", "PyTorchJob"): job,
        (TRAINER_API, "TrainingRuntime"): _model_schema(TrainerV1alpha1TrainingRuntime),
        (TRAINER_API, "TrainJob"): _model_schema(TrainerV1alpha1TrainJob),
    }
    return {kind: _close(schema) for kind, schema in schemas.items()}


SCHEMAS = _schemas()


def faults(objects: Sequence[Object]) -> list[str]:
    """Everything that is wrong with a set of objects that are applied together."""
    return [fault for each in objects for fault in _object_faults(each)] + list(_set_faults(objects))


def _object_faults(each: Object) -> Iterator[str]:
    where = f"{each.get('kind')}/{each.get('metadata', {}).get('name')}"
    schema = SCHEMAS.get((each.get("apiVersion", ""), each.get("kind", "")))
    if schema is None:
        yield f"{where}: unknown kind {each.get('apiVersion')} {each.get('kind')}"
        return
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(each))
    for error in map(_deepest, errors):
        yield f"{where}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
    if errors:
        return
    yield from (f"{where}: {fault}" for fault in _metadata_faults(each))
    if each["kind"] == "PyTorchJob":
        yield from (f"{where}: {fault}" for fault in _pytorch_job_faults(each))
    if each["kind"] == "TrainingRuntime":
        yield from (f"{where}: {fault}" for fault in _runtime_faults(each))
    if each["kind"] == "TrainJob":
        yield from (f"{where}: {fault}" for fault in _train_job_faults(each))
    if each["kind"] == "Pod":
        yield from _pod_faults(each["spec"])
    if each["kind"] == "Job":
        yield from (f"{where}: {fault}" for fault in _job_faults(each))
    if each["kind"] == "PersistentVolumeClaim":
        yield from (
            f"{where}: {fault}" for fault in _resource_faults(each["spec"]["resources"], storage=True)
        )


def _deepest(error: jsonschema.ValidationError) -> jsonschema.ValidationError:
    """The fault inside nested alternatives, instead of "matches none of them"."""
    return jsonschema.exceptions.best_match([error]) or error


def _metadata_faults(each: Object) -> Iterator[str]:
    metadata = each["metadata"]
    name = metadata.get("name", "")
    if not DNS_NAME.fullmatch(name) or len(name) > 253:
        yield f"name {name!r} is no DNS name"
    if each["kind"] != "Namespace" and not metadata.get("namespace"):
        yield "no namespace: it would go wherever kubectl points"
    for key, value in metadata.get("labels", {}).items():
        if not LABEL_VALUE.fullmatch(value):
            yield f"label {key} has the invalid value {value!r}"


def _pytorch_job_faults(each: Object) -> Iterator[str]:
    spec, name = each["spec"], each["metadata"]["name"]
    if not DNS_LABEL.fullmatch(name) or len(name) >= 50:
        yield f"name {name!r}: pods and services need a DNS-1035 label under 50 characters"
    replicas = spec["pytorchReplicaSpecs"]
    if unknown := set(replicas) - {"Master", "Worker"}:
        yield f"replica types {sorted(unknown)}; only Master and Worker exist"
    if replicas.get("Master", {}).get("replicas") != 1:
        yield "there must be exactly one Master"
    if "Worker" in replicas and replicas["Worker"].get("replicas", 1) < 1:
        yield "a Worker replica spec needs at least 1 replica"
    policy = spec.get("runPolicy", {})
    if policy.get("cleanPodPolicy", "None") not in ("None", "Running", "All"):
        yield f"cleanPodPolicy {policy['cleanPodPolicy']!r} does nothing"
    if policy.get("backoffLimit", 0) < 0:
        yield "backoffLimit is negative"
    if not re.fullmatch(r"auto|cpu|gpu|[1-9]\d*", spec.get("nprocPerNode", "auto")):
        yield f"nprocPerNode {spec['nprocPerNode']!r}"
    for role, replica in replicas.items():
        if replica.get("restartPolicy") not in ("Always", "OnFailure", "Never", "ExitCode"):
            yield f"{role}: restartPolicy {replica.get('restartPolicy')!r}"
        pod = replica["template"]["spec"]
        if "restartPolicy" in pod:
            yield f"{role}: the pod's restartPolicy is overwritten by the replica's"
        if "pytorch" not in [container["name"] for container in pod["containers"]]:
            yield f"{role}: no container is named pytorch"
        yield from (f"{role}: {fault}" for fault in _pod_faults(pod))
        yield from (f"{role}: {fault}" for fault in _training_faults(pod, spec))


def _runtime_faults(each: Object) -> Iterator[str]:
    """What the Trainer looks for by name, and what the Jobs made of it would be refused for."""
    jobs = each["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", [])
    if [job.get("name") for job in jobs] != ["node"]:
        yield "the replicated job must be named node"
        return
    if "torch" not in each["spec"].get("mlPolicy", {}):
        yield "no mlPolicy.torch: the pods would get no PET_ variables"
    template = jobs[0]["template"]
    step = template.get("metadata", {}).get("labels", {}).get("trainer.kubeflow.org/trainjob-ancestor-step")
    if step != "trainer":
        yield f"trainjob-ancestor-step is {step!r}, not trainer: the Trainer would not touch this job"
    job, pod = template["spec"], template["spec"]["template"]["spec"]
    containers = [container["name"] for container in pod["containers"]]
    if "node" not in containers:
        yield "no container is named node"
    policy = job.get("podFailurePolicy")
    if pod.get("restartPolicy") not in (("Never",) if policy else ("Never", "OnFailure")):
        yield f"restartPolicy {pod.get('restartPolicy')!r} is not possible in such a Job"
    for rule in (policy or {}).get("rules", []):
        if rule.get("action") not in ("FailJob", "FailIndex", "Ignore", "Count"):
            yield f"podFailurePolicy action {rule.get('action')!r}"
        codes = rule.get("onExitCodes")
        if (codes is None) == (not rule.get("onPodConditions")):
            yield "a rule of podFailurePolicy needs onExitCodes or onPodConditions, and one alone"
        if codes is not None:
            if codes.get("containerName") not in containers:
                yield f"podFailurePolicy watches the container {codes.get('containerName')!r}"
            values = codes.get("values", [])
            if codes.get("operator") not in ("In", "NotIn") or values != sorted(set(values)) or not values:
                yield "exit codes of podFailurePolicy: In or NotIn, ascending, each once"
            if codes.get("operator") == "In" and 0 in values:
                yield "exit code 0 cannot be a failure"
    yield from _pod_faults(pod)
    yield from _node_faults(pod, "node")


def _train_job_faults(each: Object) -> Iterator[str]:
    name, trainer = each["metadata"]["name"], each["spec"].get("trainer") or {}
    if not DNS_LABEL.fullmatch(name) or len(name) >= 50:
        yield f"name {name!r}: pods and services need a DNS-1035 label under 50 characters"
    for key in ("numNodes", "numProcPerNode"):
        if not isinstance(trainer.get(key), int) or trainer[key] < 1:
            yield f"trainer.{key} is {trainer.get(key)!r}"
    reserved = [variable["name"] for variable in trainer.get("env") or []]
    yield from (f"{variable} is set by the Trainer" for variable in reserved if variable.startswith("PET_"))


def _training_faults(pod: Object, spec: Object) -> Iterator[str]:
    """What only our own training needs: processes = GPUs, time to save, shared memory."""
    gpus = _gpus(pod, "pytorch")
    if gpus is not None and str(gpus) != spec.get("nprocPerNode"):
        yield f"nprocPerNode {spec.get('nprocPerNode')!r}, but {gpus} GPUs"
    yield from _node_faults(pod, "pytorch")


def _gpus(pod: Object, name: str) -> str | None:
    container = next((each for each in pod["containers"] if each["name"] == name), pod["containers"][0])
    return container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu")


def _node_faults(pod: Object, name: str) -> Iterator[str]:
    container = next((each for each in pod["containers"] if each["name"] == name), pod["containers"][0])
    grace = next((e["value"] for e in container.get("env", []) if e["name"] == "PHI3V_GRACE_S"), "240")
    if not float(grace) + 30 <= pod.get("terminationGracePeriodSeconds", 30):
        yield f"PHI3V_GRACE_S {grace} leaves no margin before the pod is killed"
    if "/dev/shm" not in [mount["mountPath"] for mount in container.get("volumeMounts", [])]:
        yield "/dev/shm has the 64 MB of the container runtime"


def _job_faults(each: Object) -> Iterator[str]:
    pod = each["spec"]["template"]["spec"]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        yield f"restartPolicy {pod.get('restartPolicy')!r} is not possible in a Job"
    if "backoffLimitPerIndex" in each["spec"] and each["spec"].get("completionMode") != "Indexed":
        yield "backoffLimitPerIndex without completionMode Indexed"
    yield from _pod_faults(pod)


def _pod_faults(pod: Object) -> Iterator[str]:
    volumes = pod.get("volumes", [])
    names = [volume["name"] for volume in volumes]
    yield from (f"volume {name} is defined twice" for name in sorted(set(names)) if names.count(name) > 1)
    for volume in volumes:
        sources = set(volume) - {"name"}
        if len(sources) != 1:
            yield f"volume {volume['name']} has {len(sources)} sources"
        if "hostPath" in sources:
            yield f"volume {volume['name']}: hostPath is refused by pod security"
        medium = volume.get("emptyDir", {}).get("medium", "")
        if medium not in ("", "Memory"):
            yield f"volume {volume['name']}: medium {medium!r}"
    for flag in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(flag):
            yield f"{flag} is refused by pod security"
    if pod.get("terminationGracePeriodSeconds", 30) < 1:
        yield "terminationGracePeriodSeconds must be positive"
    kind = pod.get("securityContext", {}).get("seccompProfile", {}).get("type")
    if kind not in ("RuntimeDefault", "Localhost"):
        yield f"seccompProfile {kind!r}"
    is_root = not pod.get("securityContext", {}).get("runAsNonRoot")
    adds = any(
        each.get("securityContext", {}).get("capabilities", {}).get("add") for each in pod["containers"]
    )
    if is_root and not adds:
        yield "may run as root"
    if adds and not is_root:
        yield "added capabilities reach no process that is not root"
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    container_names = [container["name"] for container in containers]
    if len(set(container_names)) < len(container_names):
        yield "two containers have one name"
    for container in containers:
        yield from (f"{container['name']}: {fault}" for fault in _container_faults(container, names))
    for toleration in pod.get("tolerations", []):
        if toleration.get("operator", "Equal") not in ("Exists", "Equal"):
            yield f"toleration operator {toleration['operator']!r}"
        if toleration.get("operator") == "Exists" and "value" in toleration:
            yield "a toleration that only asks for existence has a value"
        if toleration.get("effect", "") not in ("", "NoSchedule", "PreferNoSchedule", "NoExecute"):
            yield f"toleration effect {toleration['effect']!r}"


def _container_faults(container: Object, volumes: Sequence[str]) -> Iterator[str]:
    if not container.get("image"):
        yield "no image"
    if container.get("imagePullPolicy", "Always") not in ("Always", "IfNotPresent", "Never"):
        yield f"imagePullPolicy {container['imagePullPolicy']!r}"
    paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    yield from (f"{path} is mounted twice" for path in sorted(set(paths)) if paths.count(path) > 1)
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"mount {mount['name']} has no volume"
        if not mount["mountPath"].startswith("/") or ":" in mount["mountPath"]:
            yield f"mountPath {mount['mountPath']!r}"
    names = [variable["name"] for variable in container.get("env", [])]
    yield from (f"variable {name} is set twice" for name in sorted(set(names)) if names.count(name) > 1)
    for variable in container.get("env", []):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable["name"]):
            yield f"variable name {variable['name']!r}"
        if "value" in variable and "valueFrom" in variable:
            yield f"variable {variable['name']} has value and valueFrom"
        if "valueFrom" in variable and len(variable["valueFrom"]) != 1:
            yield f"variable {variable['name']} has {len(variable['valueFrom'])} sources"
        if re.search(r"KEY|TOKEN|PASSWORD|SECRET", variable["name"]) and variable.get("value"):
            yield f"variable {variable['name']} shows a secret"
    for port in container.get("ports", []):
        if not 1 <= port["containerPort"] <= 65535:
            yield f"port {port['containerPort']}"
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?", port.get("name", "p")):
            yield f"port name {port['name']!r}: at most 15 of a-z, 0-9 and -"
    yield from _resource_faults(container.get("resources", {}))
    context = container.get("securityContext", {})
    if context.get("privileged"):
        yield "privileged is refused by pod security"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if "ALL" not in context.get("capabilities", {}).get("drop", []):
        yield "keeps capabilities"


def _resource_faults(resources: Object, storage: bool = False) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for where, amounts in (("request", requests), ("limit", limits)):
        for name, amount in amounts.items():
            known = ("storage",) if storage else (*CORE_RESOURCES, *DEVICES)
            if name not in known:
                yield f"{where} of the unknown resource {name}"
            if _amount(amount) is None:
                yield f"{where} {name}: {amount!r} is no quantity"
            elif "/" in name and not float(_amount(amount) or 0).is_integer():
                yield f"{where} {name}: {amount!r}: devices come whole"
    for name in {*requests, *limits}:
        request, limit = _amount(requests.get(name)), _amount(limits.get(name))
        if "/" in name and request != limit:
            yield f"{name}: request {requests.get(name)} and limit {limits.get(name)} must be equal"
        elif request is not None and limit is not None and request > limit:
            yield f"{name}: request {requests[name]} is above the limit {limits[name]}"
    if not storage and not {"cpu", "memory"} <= set(requests):
        yield "no request for cpu and memory"


def _amount(quantity: Any) -> float | None:
    match = QUANTITY.fullmatch(str(quantity))
    return float(match[1]) * SCALE.get(match[2] or "", 1.0) if match else None


def _set_faults(objects: Sequence[Object]) -> Iterator[str]:
    """What the objects of a set must have in common: namespaces, claims, config maps, pod security."""
    identities = [
        (o.get("kind"), o.get("metadata", {}).get("namespace"), o.get("metadata", {}).get("name"))
        for o in objects
    ]
    yield from (
        f"{identity} is there twice" for identity in set(identities) if identities.count(identity) > 1
    )
    namespaces = {o["metadata"]["name"]: o["metadata"] for o in objects if o.get("kind") == "Namespace"}
    if namespaces and objects[0].get("kind") != "Namespace":
        yield "the namespace comes after what lies in it"
    for each in objects:
        space = each.get("metadata", {}).get("namespace")
        if namespaces and space is not None and space not in namespaces:
            yield f"{each['kind']}: namespace {space} is not in the set"
        if each.get("kind") == "TrainJob":
            yield from _reference_faults(each, objects)
        for pod in _pods(each):
            for volume in pod.get("volumes", []):
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                if claim and ("PersistentVolumeClaim", space, claim) not in identities:
                    yield f"{each['kind']}: claim {claim} is not in the set"
                config = volume.get("configMap", {}).get("name")
                if config and ("ConfigMap", space, config) not in identities:
                    yield f"{each['kind']}: config map {config} is not in the set"
            labels = namespaces.get(space, {}).get("labels", {})
            if labels.get("pod-security.kubernetes.io/enforce") != "privileged":
                for container in pod.get("containers", []):
                    added = set(container.get("securityContext", {}).get("capabilities", {}).get("add", []))
                    if added - BASELINE_CAPABILITIES:
                        yield f"capabilities {sorted(added)} are refused in namespace {space}"


def _reference_faults(job: Object, objects: Sequence[Object]) -> Iterator[str]:
    """The runtime of a TrainJob is in the set, and has as many GPUs a pod as the job has processes."""
    reference = job["spec"]["runtimeRef"]
    wanted = (
        reference.get("kind", "ClusterTrainingRuntime"),
        reference["name"],
        job["metadata"].get("namespace"),
    )
    for each in objects:
        if (each.get("kind"), each["metadata"]["name"], each["metadata"].get("namespace")) == wanted:
            processes = (job["spec"].get("trainer") or {}).get("numProcPerNode")
            for pod in _pods(each):
                if _gpus(pod, "node") not in (None, str(processes)):
                    yield f"TrainJob: numProcPerNode {processes}, but {_gpus(pod, 'node')} GPUs"
            return
    yield f"TrainJob: the runtime {wanted} is not in the set"


def _pods(each: Object) -> list[Object]:
    spec = each.get("spec", {})
    if each.get("kind") == "Pod":
        return [spec]
    if each.get("kind") == "TrainingRuntime":
        jobs = spec.get("template", {}).get("spec", {}).get("replicatedJobs", [])
        return [job["template"]["spec"]["template"]["spec"] for job in jobs]
    templates = [replica.get("template", {}) for replica in spec.get("pytorchReplicaSpecs", {}).values()]
    templates += [spec["template"]] if "template" in spec else []
    return [template.get("spec", {}) for template in templates]
