"""Copies datasets to a local disk of the node, once, before the ranks start.

In: a dataset directory or URL, and a directory on the local disk. Out: the path of the copy. It is the same
on every node and for every start, because the copy is named by the fingerprint of the dataset.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

from phi3v_dist.config import DataConfig
from phi3v_dist.data.local_copy import fetch_file
from shards.common.errors import BadInputError
from shards.common.files import partial_path
from shards.common.locks import locked
from shards.format.dataset import DATASET_JSON, INDEX_DIR, files_in, read_dataset_info

COPIES_AT_ONCE = 8


def stage_overrides(data: DataConfig, directory: Path) -> list[str]:
    """Stages every dataset of a config. Returns the overrides that make a run use the copies.

    Raises BadInputError as `stage_dataset`.
    """
    if data.path is not None:
        return [f"data.path={stage_dataset(data.path, directory)}"]
    staged = [
        {**source.model_dump(exclude_none=True), "path": str(stage_dataset(source.path, directory))}
        for source in data.sources or []
    ]
    return [f"data.sources={json.dumps(staged)}"]


def stage_dataset(source: str, directory: Path) -> Path:
    """Copies the dataset `source` into `directory`; returns the path of the copy. A complete copy stays as it
    is, an incomplete one is completed. dataset.json is copied last, so a copy that has it is complete.

    Raises BadInputError if the source is incomplete, a file has the wrong size or the disk has no space.
    """
    info = read_dataset_info(source)
    fs, root = fsspec.core.url_to_fs(source)
    target = directory / info.fingerprint[:16]
    if (target / DATASET_JSON).exists():
        return target
    sizes: dict[str, int | None] = {shard.name: shard.bytes for shard in info.shards}
    parts = files_in(fs, f"{root.rstrip('/')}/{INDEX_DIR}", ".parquet")
    sizes |= {f"{INDEX_DIR}/{Path(name).name}": None for name in parts}

    def copy(name: str) -> None:
        place, size = target / name, sizes[name]
        if place.exists() and (size is None or place.stat().st_size == size):
            return
        fetch_file(fs, f"{root.rstrip('/')}/{name}", place, partial=partial_path(place), size=size)

    try:
        (target / INDEX_DIR).mkdir(parents=True, exist_ok=True)
        with locked(target / ".turn"):  # other jobs on this node may stage the same dataset
            with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
                list(pool.map(copy, sizes))
            sizes[DATASET_JSON] = None
            copy(DATASET_JSON)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadInputError(f"cannot copy {source} to {target}: {reason}; unset PHI3V_STAGE_DIR") from error
    return target
