"""k8s/ as it stands: what `phi3v launch k8s` prints, right in every field, also with each overlay; and a
check that sees what is wrong.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import k8s, manifests
from launch.description import GRACE_S, POD_GRACE_S, JobSize
from shards.common.errors import BadInputError
from tests.k8s.strict import faults

Object = dict[str, Any]
REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "k8s"
CONFIG = REPOSITORY / "configs" / "burberry.yaml"
OVERLAYS = sorted(path.parent for path in K8S.glob("overlays/*/kustomization.yaml"))


def load(*files: Path) -> list[Object]:
    return [
        each for file in sorted(files) for each in yaml.safe_load_all(file.read_text()) if each is not None
    ]


@pytest.fixture
def applied() -> list[Object]:
    """What `kubectl apply -f k8s/` applies, in its order."""
    return load(*K8S.glob("*.yaml"))


def the(kind: str, objects: list[Object]) -> Object:
    return next(each for each in objects if each["kind"] == kind)


def test_the_set_as_it_stands_is_right(applied: list[Object]) -> None:
    assert faults(applied) == []
    assert [each["kind"] for each in applied].count("PyTorchJob") == 1, "two jobs would both start"
    assert not (K8S / "kustomization.yaml").exists(), "kubectl apply -f k8s/ would fail on it"


def test_the_set_is_what_the_command_renders() -> None:
    job = k8s.describe(str(CONFIG), [], JobSize(2))
    texts = manifests.render(manifests.manifests(job, CONFIG.read_text(), manifests.KubernetesOptions()))
    again = "phi3v launch k8s configs/burberry.yaml --out k8s (and --out k8s/base)"
    for directory in (K8S, K8S / "base"):
        found = {file.name: file.read_text() for file in directory.glob("*-*.yaml")}
        assert found == texts, f"{directory}: not what the command renders; run: {again}"


def test_the_overlay_for_the_trainer_is_what_the_command_renders() -> None:
    job = k8s.describe(str(CONFIG), [], JobSize(2))
    options = manifests.KubernetesOptions(operator="v2")
    text = manifests.render(manifests.manifests(job, CONFIG.read_text(), options))["30-train.yaml"]
    again = "phi3v launch k8s configs/burberry.yaml --operator v2 --out DIR; copy its 30-train.yaml"
    assert (K8S / "overlays/trainjob/30-train.yaml").read_text() == text, again
    kinds = [each["kind"] for each in kustomize(K8S / "overlays/trainjob")]
    assert kinds[-2:] == ["TrainingRuntime", "TrainJob"] and "PyTorchJob" not in kinds


def test_the_shards_job_is_right(applied: list[Object]) -> None:
    shards = load(*(K8S / "shards").glob("*.yaml"))
    assert faults([*applied[:-1], *shards]) == []
    assert [each["kind"] for each in shards] == ["Job", "Pod", "Job"]
    for change in ({"restartpolicy": "Never"}, {"securityContext": {}}, {"volumes": []}):
        broken = copy.deepcopy(shards)
        the("Pod", broken)["spec"].update(change)
        assert faults([*applied[:-1], *broken]), change


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_every_overlay_is_right(overlay: Path) -> None:
    objects = kustomize(overlay)
    assert faults(objects) == []
    assert objects != load(*(K8S / "base").glob("*-*.yaml"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_the_image_is_changed_in_one_place(overlay: Path, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s/image/kustomization.yaml"
    file.write_text(file.read_text().replace("newName: registry.example.com", "newName: mine.example.org"))
    built = kustomize(tmp_path / "k8s/overlays" / overlay.name)
    assert images_in(built) == {"mine.example.org/phi3v-dist:0.1.0"}


@pytest.mark.system
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl: it is not installed")
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlays_are_built_as_kubectl_builds_them(overlay: Path) -> None:
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=True)
    built = list(yaml.safe_load_all(done.stdout))
    key = lambda each: (each["kind"], each["metadata"]["name"])  # noqa: E731
    assert sorted(built, key=key) == sorted(kustomize(overlay), key=key)


def test_master_and_workers_make_the_nodes(tmp_path: Path) -> None:
    config = tmp_path / "a config.yaml"
    config.write_text(CONFIG.read_text().replace("name: burberry", "name: My_Run.2"))
    job = k8s.describe(str(config), ["train.lr=2e-5", "track.group=two words"], JobSize(4, 4))
    objects = [
        each
        for part in manifests.manifests(job, config.read_text(), manifests.KubernetesOptions("team")).values()
        for each in part
    ]
    assert faults(objects) == []
    spec = the("PyTorchJob", objects)["spec"]
    assert the("PyTorchJob", objects)["metadata"] | {"labels": {}} == {
        "name": "my-run-2",
        "namespace": "team",
        "labels": {},
    }
    assert spec["nprocPerNode"] == "4"
    assert {role: each["replicas"] for role, each in spec["pytorchReplicaSpecs"].items()} == {
        "Master": 1,
        "Worker": 3,
    }
    arguments = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[-2:] == ["train.lr=2e-5", "track.group=two words"]
    alone = k8s.describe(str(config), [], JobSize())
    assert list(
        manifests.pytorch_job(alone, manifests.KubernetesOptions())["spec"]["pytorchReplicaSpecs"]
    ) == ["Master"]


def test_several_data_sets_are_named_by_the_config(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    sources = "sources: [{path: /data/a, weight: 1}, {path: /data/b, weight: 2}]"
    config.write_text(CONFIG.read_text().replace("path: ${oc.env:PHI3V_SHARDS,data/burberry}", sources))
    job = k8s.describe(str(config), [], JobSize(2))
    assert job.overrides == ("runs_dir=/runs",)
    job = k8s.describe(str(CONFIG), ["data.path=null", f"data.{sources.replace(': ', '=', 1)}"], JobSize(2))
    assert "data.path=/data/shards" not in job.overrides


def test_a_node_gets_what_its_gpus_need() -> None:
    def asked(**size: int) -> tuple[str, str]:
        job = k8s.describe(str(CONFIG), ["train.global_batch=16"], JobSize(2, **size))
        amounts = manifests.container(job, "pytorch")["resources"]["requests"]
        return amounts["cpu"], amounts["memory"]

    assert asked(gpus_per_node=8) == ("64", "900Gi") and asked(gpus_per_node=1) == ("8", "200Gi")
    assert asked(gpus_per_node=1, cpus_per_gpu=12, memory_gb_per_node=80) == ("12", "80Gi")


def test_ranks_have_time_to_save_before_the_pod_is_killed() -> None:
    assert GRACE_S + 30 <= POD_GRACE_S


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        (["train.lrr=1"], 2, "did you mean"),
        ([], 0, "0 nodes"),
        ([], 3, "global_batch=16 rows cannot be shared by 3 x 8 = 24 ranks; set train.global_batch=24"),
        (["name=" + "x" * 60], 2, "at most 40 are allowed"),
    ],
)
def test_wrong_input_is_refused_in_one_line(overrides: list[str], nodes: int, message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        k8s.launch_k8s(str(CONFIG), overrides, JobSize(nodes))
    assert "\n" not in str(caught.value)


def test_the_example_image_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k8s.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(BadInputError, match="only an example"):
        k8s.launch_k8s(str(CONFIG), [], JobSize(2), apply=True)


def pod(job: Object, role: str = "Master") -> Object:
    return job["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]


def main(job: Object) -> Object:
    return pod(job)["containers"][0]


def amounts(job: Object) -> list[Object]:
    return [main(job)["resources"][kind] for kind in ("requests", "limits")]


def replica(job: Object, role: str = "Master") -> Object:
    return job["spec"]["pytorchReplicaSpecs"][role]


# Each breaks one thing in a good set. Most are taken by the API server and fail later, some never: see docs.
MUTATIONS: dict[str, Callable[[Object], Any]] = {
    "unknown field of the job": lambda j: j["spec"].update(nprocsPerNode="8"),
    "unknown field of the run policy": lambda j: j["spec"]["runPolicy"].update(maxRestarts=3),
    "unknown field of the pod": lambda j: pod(j).update(gracePeriod=3),
    "unknown field of the container": lambda j: main(j).update(volumeMount=[]),
    "nprocPerNode as a number": lambda j: j["spec"].update(nprocPerNode=8),
    "replicas as text": lambda j: replica(j, "Worker").update(replicas="1"),
    "two masters": lambda j: replica(j).update(replicas=2),
    "no master": lambda j: j["spec"]["pytorchReplicaSpecs"].pop("Master"),
    "no workers in a worker spec": lambda j: replica(j, "Worker").update(replicas=0),
    "a replica type of another framework": lambda j: j["spec"]["pytorchReplicaSpecs"].update(
        Chief=j["spec"]["pytorchReplicaSpecs"]["Master"]
    ),
    "container of another name": lambda j: main(j).update(name="train"),
    "name with capitals": lambda j: j["metadata"].update(name="Burberry"),
    "name that starts with a digit": lambda j: j["metadata"].update(name="1-burberry"),
    "name too long for pods and services": lambda j: j["metadata"].update(name="b" * 55),
    "no namespace": lambda j: j["metadata"].pop("namespace"),
    "another namespace": lambda j: j["metadata"].update(namespace="default"),
    "a label with a space": lambda j: j["metadata"]["labels"].update(team="two words"),
    "restart policy misspelt": lambda j: replica(j).update(restartPolicy="OnFail"),
    "restart policy in the pod": lambda j: pod(j).update(restartPolicy="Never"),
    "clean-up policy misspelt": lambda j: j["spec"]["runPolicy"].update(cleanPodPolicy="running"),
    "negative backoff limit": lambda j: j["spec"]["runPolicy"].update(backoffLimit=-1),
    "mount without volume": lambda j: pod(j)["volumes"].pop(0),
    "volume twice": lambda j: pod(j)["volumes"].append(pod(j)["volumes"][0]),
    "volume with two sources": lambda j: pod(j)["volumes"][0].update(emptyDir={}),
    "volume of the host": lambda j: pod(j)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
    "mount path twice": lambda j: main(j)["volumeMounts"][0].update(mountPath="/data"),
    "relative mount path": lambda j: main(j)["volumeMounts"][0].update(mountPath="config"),
    "shared memory not mounted": lambda j: main(j)["volumeMounts"].pop(3),
    "claim that is not in the set": lambda j: pod(j)["volumes"][1].update(
        persistentVolumeClaim={"claimName": "x"}
    ),
    "config map that is not in the set": lambda j: pod(j)["volumes"][0]["configMap"].update(name="x"),
    "GPU request below limit": lambda j: main(j)["resources"]["requests"].update({"nvidia.com/gpu": "4"}),
    "misspelt GPU resource": lambda j: [each.update({"nvidia.com/gpus": "8"}) for each in amounts(j)],
    "half a GPU": lambda j: [each.update({"nvidia.com/gpu": "0.5"}) for each in amounts(j)],
    "more processes than GPUs": lambda j: j["spec"].update(nprocPerNode="16"),
    "quantity with a wrong unit": lambda j: main(j)["resources"]["limits"].update(memory="900GB"),
    "request above limit": lambda j: main(j)["resources"]["requests"].update(cpu="65"),
    "no resources": lambda j: main(j).pop("resources"),
    "value and valueFrom": lambda j: main(j)["env"][-1].update(value="x"),
    "variable twice": lambda j: main(j)["env"].append({"name": "HOME", "value": "/"}),
    "variable value as a number": lambda j: main(j)["env"][1].update(value=240),
    "variable with a dash": lambda j: main(j)["env"][0].update(name="RUN-ID"),
    "secret in the manifest": lambda j: main(j)["env"].append({"name": "HF_TOKEN", "value": "hf_x"}),
    "grace longer than the pod's": lambda j: main(j)["env"][1].update(value="300"),
    "no time to save": lambda j: pod(j).update(terminationGracePeriodSeconds=30),
    "port name too long": lambda j: main(j)["ports"][0].update(name="pytorchjob-port-x"),
    "port out of range": lambda j: main(j)["ports"][0].update(containerPort=70000),
    "pull policy misspelt": lambda j: main(j).update(imagePullPolicy="ifNotPresent"),
    "command as text": lambda j: main(j).update(command="phi3v launch node"),
    "privileged": lambda j: main(j)["securityContext"].update(privileged=True),
    "as root": lambda j: pod(j)["securityContext"].update(runAsNonRoot=False),
    "privilege escalation": lambda j: main(j)["securityContext"].pop("allowPrivilegeEscalation"),
    "capability that baseline refuses": lambda j: main(j)["securityContext"].update(
        capabilities={"add": ["IPC_LOCK"], "drop": ["ALL"]}
    ),
    "network of the host": lambda j: pod(j).update(hostNetwork=True),
    "toleration that both exists and equals": lambda j: pod(j)["tolerations"][0].update(value="true"),
    "toleration effect misspelt": lambda j: pod(j)["tolerations"][0].update(effect="Noschedule"),
    "another API version": lambda j: j.update(apiVersion="kubeflow.org/v2"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_the_check_sees_what_is_broken(applied: list[Object], mutation: Callable[[Object], Any]) -> None:
    broken = copy.deepcopy(applied)
    mutation(the("PyTorchJob", broken))
    assert faults(broken)


def runtime_job(objects: list[Object]) -> Object:
    return the("TrainingRuntime", objects)["spec"]["template"]["spec"]["replicatedJobs"][0]


def node_pod(objects: list[Object]) -> Object:
    return runtime_job(objects)["template"]["spec"]["template"]["spec"]


def trainer(objects: list[Object]) -> Object:
    return the("TrainJob", objects)["spec"]["trainer"]


TRAINER_MUTATIONS: dict[str, Callable[[list[Object]], Any]] = {
    "unknown field of the job": lambda o: the("TrainJob", o)["spec"].update(nodes=2),
    "unknown field of the trainer": lambda o: trainer(o).update(numProcsPerNode=8),
    "unknown field of the pod": lambda o: node_pod(o).update(gracePeriod=3),
    "processes as a word": lambda o: trainer(o).update(numProcPerNode="auto"),
    "no nodes": lambda o: trainer(o).update(numNodes=0),
    "more processes than GPUs": lambda o: trainer(o).update(numProcPerNode=16),
    "variable of torchrun": lambda o: trainer(o).update(env=[{"name": "PET_NNODES", "value": "2"}]),
    "runtime of the cluster": lambda o: the("TrainJob", o)["spec"]["runtimeRef"].pop("kind"),
    "another runtime": lambda o: the("TrainJob", o)["spec"]["runtimeRef"].update(name="torch-distributed"),
    "no torch policy": lambda o: the("TrainingRuntime", o)["spec"]["mlPolicy"].pop("torch"),
    "job of another name": lambda o: runtime_job(o).update(name="trainer"),
    "container of another name": lambda o: node_pod(o)["containers"][0].update(name="pytorch"),
    "no ancestor label": lambda o: runtime_job(o)["template"].pop("metadata"),
    "restarts in place": lambda o: node_pod(o).update(restartPolicy="OnFailure"),
    "failure action misspelt": lambda o: runtime_job(o)["template"]["spec"]["podFailurePolicy"]["rules"][
        0
    ].update(action="Fail"),
    "exit codes out of order": lambda o: runtime_job(o)["template"]["spec"]["podFailurePolicy"]["rules"][0][
        "onExitCodes"
    ].update(values=[4, 2]),
    "mount without volume": lambda o: node_pod(o)["volumes"].pop(0),
    "claim that is not in the set": lambda o: node_pod(o)["volumes"][1]["persistentVolumeClaim"].update(
        claimName="x"
    ),
    "no time to save": lambda o: node_pod(o).update(terminationGracePeriodSeconds=30),
    "as root": lambda o: node_pod(o)["securityContext"].update(runAsNonRoot=False),
}


@pytest.mark.parametrize("mutation", TRAINER_MUTATIONS.values(), ids=TRAINER_MUTATIONS)
def test_the_check_sees_what_is_broken_for_the_trainer(mutation: Callable[[list[Object]], Any]) -> None:
    objects = kustomize(K8S / "overlays/trainjob")
    assert faults(objects) == []
    mutation(objects)
    assert faults(objects)


def test_the_check_sees_broken_sets(applied: list[Object]) -> None:
    assert faults([*applied[1:], applied[0]]), "the namespace last"
    assert faults([*applied, applied[-1]]), "the job twice"
    claim = copy.deepcopy(applied)
    the("PersistentVolumeClaim", claim)["spec"]["accessModes"] = ["ReadWriteAll"]
    assert faults(claim)
    the("PersistentVolumeClaim", claim)["spec"].update(
        accessModes=["ReadWriteMany"], resources={"requests": {"storage": "1TB"}}
    )
    assert faults(claim)
    config = copy.deepcopy(applied)
    the("ConfigMap", config)["data"]["number"] = 1
    assert faults(config)


def kustomize(overlay: Path) -> list[Object]:
    """What kustomize builds of our overlays: base or own resources, the image, JSON patches on what their
    target names."""
    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "components", "patches"}
    assert set(kustomization) <= known, "this stand-in for kustomize knows no more"
    objects: list[Object] = []
    for name in kustomization["resources"]:
        path = (overlay / name).resolve()
        objects += kustomize(path) if path.is_dir() else load(path)
    for name in kustomization.get("components", []):
        component = yaml.safe_load((overlay / name / "kustomization.yaml").read_text())
        assert set(component) == {"apiVersion", "kind", "images"}
        for image in component["images"]:
            put_image(objects, image)
    for patch in kustomization.get("patches", []):
        matching = [each for each in objects if each["kind"] == patch["target"]["kind"]]
        assert matching, f"{overlay}: no {patch['target']}"
        for each in matching:
            operations = yaml.safe_load(patch["patch"])
            if isinstance(operations, dict):
                assert operations.pop("$patch") == "delete"
                objects.remove(each)
                continue
            for operation in operations:
                apply_operation(each, operation)
    return objects


def put_image(found: Any, image: Object) -> None:
    """The image into every list of containers, however deep."""
    if isinstance(found, list):
        for each in found:
            put_image(each, image)
    elif isinstance(found, dict):
        for each in found.get("containers") or []:
            if each["image"].rpartition(":")[0] == image["name"]:
                each["image"] = f"{image['newName']}:{image['newTag']}"
        put_image(list(found.values()), image)


def images_in(found: Any) -> set[str]:
    if isinstance(found, list):
        return {image for each in found for image in images_in(each)}
    if isinstance(found, dict):
        own = {each["image"] for each in found.get("containers") or []}
        return own | images_in(list(found.values()))
    return set()


def apply_operation(target: Any, operation: Object) -> None:
    """One operation of a JSON patch (RFC 6902): add, replace or remove."""
    *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in path:
        target = target[int(part)] if isinstance(target, list) else target[part]
    if operation["op"] == "remove":
        del target[int(last) if isinstance(target, list) else last]
    elif isinstance(target, list):
        if operation["op"] == "replace":
            target[int(last)] = operation["value"]
        else:
            target.insert(len(target) if last == "-" else int(last), operation["value"])
    else:
        assert operation["op"] == "add" or last in target, operation
        target[last] = operation["value"]
