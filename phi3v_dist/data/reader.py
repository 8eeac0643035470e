"""The pictures of one sample: a ranged read per sample, from local files or any fsspec store.

In: a dataset directory and a row of its index. Out: the bytes of its images. Called by the loader's workers
and by evaluation.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec

from shards.format import BadInputError

_OPEN_FILES = 64


class SampleReader:
    """Reads samples of the dataset in `root`; local shards stay open. One per process."""

    def __init__(self, root: str) -> None:
        self._fs, path = fsspec.core.url_to_fs(root)
        self._path = path.rstrip("/")
        self._local = isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def images(self, record: Mapping[str, Any]) -> list[bytes]:
        """The image files of a sample, in order. record: a row of the index (shard, images).

        Raises BadInputError if the shard is missing, unreadable or shorter than the index says.
        """
        images: Sequence[Mapping[str, Any]] = record["images"]
        if not images:
            return []
        start = min(image["offset"] for image in images)
        end = max(image["offset"] + image["length"] for image in images)
        try:
            data = self._range(record["shard"], start, end)
        except OSError as error:
            raise BadInputError(f"{record['shard']}: cannot be read ({error.strerror or error})") from error
        if len(data) != end - start:
            raise BadInputError(
                f"{record['shard']}: holds {len(data)} of the {end - start} bytes that the index names"
            )
        return [data[image["offset"] - start : image["offset"] - start + image["length"]] for image in images]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _range(self, shard: str, start: int, end: int) -> bytes:
        if "/" in shard or shard.startswith("."):
            raise BadInputError(f"shard name {shard!r} in the index is not a file name; rebuild the index")
        name = f"{self._path}/{shard}"
        if not self._local:
            return bytes(self._fs.cat_file(name, start=start, end=end))
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(name, os.O_RDONLY)
        return os.pread(self._descriptors[shard], end - start, start)
