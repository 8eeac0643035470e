"""`phi3v launch k8s`: prints the Kubernetes objects of a run, writes them, or applies them with kubectl.

In: config, overrides, the job's size. Out: an exit code. The objects are made by launch.manifests.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from launch.description import JobDescription, JobSize, describe_job
from launch.manifests import DATA_MOUNT, DEFAULTS, IMAGE, RUNS_MOUNT, KubernetesOptions, manifests, render
from phi3v_dist.exits import DONE
from shards.common.errors import BadInputError
from shards.common.shipped import shipped


def describe(
    config_path: str, overrides: Sequence[str], size: JobSize, *, image: str = IMAGE
) -> JobDescription:
    """The job of a config on Kubernetes: data under /data, run directories under /runs, unless an override
    says otherwise.

    Raises BadInputError: config not usable, size not possible, a run name that makes no object name.
    """
    mounted = [f"data.path={DATA_MOUNT}/shards", f"runs_dir={RUNS_MOUNT}"]
    named = {override.split("=", 1)[0] for override in overrides}
    if "data.sources" in named or ("data.path" not in named and _has_sources(config_path)):
        named.add("data.path")
    mounted = [override for override in mounted if override.split("=", 1)[0] not in named]
    return describe_job(config_path, [*mounted, *overrides], size, image=image)


def _has_sources(config_path: str) -> bool:
    """Whether the file names several datasets. False for a broken file, which `load_config` will refuse."""
    try:
        tree = yaml.safe_load(shipped(Path(config_path)).read_text())
        return bool(tree["data"]["sources"])
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return False


def launch_k8s(
    config_path: str,
    overrides: Sequence[str],
    size: JobSize,
    *,
    image: str = IMAGE,
    options: KubernetesOptions = DEFAULTS,
    apply: bool = False,
    out: Path | None = None,
) -> int:
    """Prints the objects of a run, writes them to the directory `out`, or applies them with kubectl.

    Raises BadInputError: config or size not usable, no kubectl, the example image with `apply`, kubectl
    failed.
    """
    job = describe(config_path, overrides, size, image=image)
    texts = render(manifests(job, shipped(Path(config_path)).read_text(), options))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text)
    if apply:
        _apply("---\n".join(texts.values()), image)
    elif out is None:
        print("---\n".join(text.removeprefix("---\n") for text in texts.values()), end="")
    return DONE


def _apply(text: str, image: str) -> None:
    if shutil.which("kubectl") is None:
        raise BadInputError("no kubectl on the PATH; without --apply the manifests are printed")
    if image == IMAGE:
        raise BadInputError(
            f"{IMAGE} is only an example; build the Dockerfile and name your image with --image"
        )
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=False)
    if done.returncode:
        raise BadInputError(f"kubectl apply ended with exit code {done.returncode}; see its message above")
