"""A dataset directory: its files, and `dataset.json`.

A dataset directory (local path or fsspec URL) holds `shard-000000.tar ...`, `index/*.parquet` and
`dataset.json`. The tars are plain WebDataset: the members of a sample are adjacent, `KEY.json` first, then
`KEY.jpg` (one image) or `KEY.0.jpg`, `KEY.1.png`, ... (several). The index repeats everything but the pixels,
one record for each sample. `dataset.json` is written last: if it exists, the dataset is complete.

In: a directory. Out: `DatasetInfo`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
from pydantic import TypeAdapter, ValidationError

from shards.common.errors import BadInputError

FORMAT_VERSION = 1
DATASET_JSON = "dataset.json"
INDEX_DIR = "index"
LEDGER_DIR = "ledger"  # the outcome of every record of the source; for people, never read in training
BUILD_JSON = "build.json"  # source and options of the build that writes here


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a dataset: file name, number of samples, size in bytes, sha256 of the file in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    num_samples: over all splits. splits: number of samples of each split. source: where the records came
    from. built_with: the options on which the bytes depend. fingerprint: hex digest of source and options;
    datasets with equal fingerprints are equal.
    """

    format_version: int
    num_samples: int
    splits: dict[str, int]
    shards: tuple[ShardInfo, ...]
    source: str
    built_with: dict[str, Any]
    fingerprint: str


_INFO = TypeAdapter(DatasetInfo)


def dataset_info_json(info: DatasetInfo) -> bytes:
    """The bytes of `dataset.json` for `info`, deterministic."""
    return (json.dumps(asdict(info), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_dataset_info(root: str) -> DatasetInfo:
    """Reads ROOT/dataset.json.

    Raises BadInputError if there is no such directory, if it is incomplete (no dataset.json), damaged, or of
    another format version.
    """
    fs, path = fsspec.core.url_to_fs(str(root))
    name = f"{path.rstrip('/')}/{DATASET_JSON}"
    if not fs.exists(name):
        if not fs.exists(path):
            raise BadInputError(f"{root}: no such dataset directory; build one with `phi3v shards build`")
        raise BadInputError(
            f"{root}: no {DATASET_JSON}, so the dataset is incomplete; run its `phi3v shards build` command "
            "again (or `phi3v shards index` for tars from elsewhere)"
        )
    data = bytes(fs.cat_file(name))
    try:
        version = json.loads(data)["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadInputError(
            f"{name}: not a dataset.json of this format ({error!r}); rebuild the shards"
        ) from error
    if version != FORMAT_VERSION:
        raise BadInputError(
            f"{name}: format version {version!r}, this program reads version {FORMAT_VERSION}; "
            "rebuild the shards"
        )
    try:
        info = _INFO.validate_json(data, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "top level"
        raise BadInputError(
            f"{name}: not a dataset.json of this format ({where}: {fault['msg']}); rebuild the shards"
        ) from error
    for shard in info.shards:
        if "/" in shard.name or shard.name.startswith("."):
            raise BadInputError(f"{name}: {shard.name!r} is not the name of a shard; rebuild the shards")
    return info


def files_in(filesystem: Any, folder: str, suffix: str) -> list[str]:
    """The paths directly in a folder of an fsspec file system that end in `suffix`, sorted; empty if there is
    no such folder. (A glob would read brackets in the folder's name as a pattern.)
    """
    try:
        found = filesystem.ls(folder, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(str(path) for path in found if str(path).endswith(suffix))
