"""Checked before weights are loaded: do all ranks run the same thing, and has the disk room for checkpoints?

In: the configuration, the mesh, what each rank sees. Out: nothing, or BadInputError on every rank.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import socket
from pathlib import Path
from typing import Any

from phi3v_dist.config import RunConfig, flatten
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.groups import shapes_of
from phi3v_dist.parallel.mesh import Mesh
from phi3v_dist.run.provenance import versions
from shards.common.errors import BadInputError

# Staged shards lie where each node has room; the fingerprint guards their content.
_PER_NODE = ("data.path", "data.sources", "data.cache_dir")


def check_same_everywhere(config: RunConfig, fingerprint: str, mesh: Mesh) -> None:
    """Compares the configuration, code, versions and data of all ranks with those of rank 0.

    Raises BadInputError on every rank, naming the first rank that differs, its host and the differences.
    """
    ours = _identity(config, fingerprint)
    digest = hashlib.sha256(repr(sorted(ours.items())).encode()).hexdigest()
    digests = mesh.gather(digest)
    if len(set(digests)) == 1:
        return
    everyone = mesh.gather((socket.gethostname(), ours))  # only on a difference: it is long
    other = next(rank for rank, each in enumerate(digests) if each != digests[0])
    host, theirs = everyone[other]
    first = everyone[0][1]
    keys = sorted(key for key in {*first, *theirs} if first.get(key) != theirs.get(key))
    raise BadInputError(
        f"rank {other} ({host}) is not like rank 0 ({everyone[0][0]}): "
        + "; ".join(f"{key} is {theirs.get(key)} there, {first.get(key)} here" for key in keys[:5])
        + f"; {sum(each != digests[0] for each in digests)} of {mesh.size} ranks differ; start all of "
        + "them with the same command, code and data"
    )


def _identity(config: RunConfig, fingerprint: str) -> dict[str, Any]:
    tree = {
        key: repr(value) for key, value in flatten(config.model_dump(mode="json")) if key not in _PER_NODE
    }
    return {**tree, **versions(), "code": code_digest(), "data fingerprint": fingerprint}


def code_digest() -> str:
    """Hex digest of the source files of phi3v_dist and shards: 16 characters."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for file in sorted(
        file for package in ("phi3v_dist", "shards") for file in (root / package).rglob("*.py")
    ):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def check_room(config: RunConfig, model: Phi3VConfig, run_dir: Path, *, resuming: bool) -> None:
    """Raises BadInputError unless the disk of `run_dir` has room for the checkpoints to come.

    A new run needs room for two (one, and the next beside it), a run that has some for one more.
    """
    size = checkpoint_bytes(config, model)
    needed = size * (1 if resuming else 2)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise BadInputError(
            f"{run_dir}: {free / 1e9:.2f} GB are free, {needed / 1e9:.2f} GB are needed for "
            f"{'the next checkpoint' if resuming else 'two checkpoints'} of {size / 1e9:.2f} GB; make room, "
            "or choose another runs_dir"
        )


def checkpoint_bytes(config: RunConfig, model: Phi3VConfig) -> int:
    """Bytes of a checkpoint: float32 weights and two moments of what learns, and the frozen weights if they
    are fewer than those that learn.
    """
    learning, frozen = (sum(map(math.prod, each.values())) for each in shapes_of(config.model, model))
    width = 2 if config.model.dtype == "bfloat16" else 4
    return learning * 12 + (frozen * width if frozen <= learning else 0)
