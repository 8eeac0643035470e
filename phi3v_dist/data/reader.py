"""The image files of one sample: one ranged read per sample, from local files or any fsspec store.

In: dataset directories and the record of a sample. Out: the bytes of its images, checked against the index
and dataset.json, so that a shard of another version is noticed.
"""

from __future__ import annotations

import os
import random
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from phi3v_dist.data.node_cache import CacheOptions, NodeCache, copy_name
from shards.common.errors import BadInputError
from shards.format.dataset import ShardInfo
from shards.format.records import ImageRef, SampleRecord

_OPEN_FILES = 64
_HEADER = 512  # bytes of a tar header, directly before the data of its member
_ATTEMPTS = 5
_FIRST_WAIT_S = 0.25
_GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)  # no retry helps


class SampleReader:
    """Reads samples of the datasets in `roots`; local shards stay open. One per process.

    shards: for each root its shards by name, from dataset.json. cache: keep copies of shards on a disk of the
    node.
    """

    def __init__(
        self,
        roots: str | Sequence[str],
        shards: Sequence[Mapping[str, ShardInfo]] = (),
        cache: CacheOptions | None = None,
    ) -> None:
        self._stores = []
        for root in [roots] if isinstance(roots, str) else roots:
            fs, path = fsspec.core.url_to_fs(root)
            local = isinstance(fs, LocalFileSystem)
            self._stores.append((fs, path.rstrip("/"), local))
        self._shards = shards
        self._cache = None if cache is None else NodeCache(cache)
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._sized: set[str] = set()  # remote shards whose size has been checked

    def images(self, record: SampleRecord) -> list[memoryview]:
        """The image files of a sample, in order. Of the record, shard, images and source are used.

        Raises BadInputError if the shard is missing or unreadable, or does not hold what the index says.
        """
        images, shard = record.images, record.shard
        if not images:
            return []
        start = max(0, min([image.offset for image in images]) - _HEADER)
        end = max([image.offset + image.length for image in images])
        data = self._range(record.source, shard, start=start, end=end)
        if len(data) != end - start:
            raise BadInputError(f"{shard}: holds {len(data)} of the {end - start} bytes that the index names")
        found = []
        view = memoryview(data)  # no second copy of each image
        for image in images:
            at = image.offset - start
            if at >= _HEADER:
                _check_header(data[at - _HEADER : at], shard, image)
            found.append(view[at : at + image.length])
        return found

    def close(self) -> None:
        """Closes the open shards and ends the fetches of the cache."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        if self._cache is not None:
            self._cache.close()

    def _range(self, source: int, shard: str, *, start: int, end: int) -> bytes:
        """The bytes from start to before end, fewer at the end of the file."""
        if "/" in shard or shard.startswith("."):
            raise BadInputError(f"shard name {shard!r} in the index is not a file name; rebuild the index")
        fs, path, local = self._stores[source]
        name = f"{path}/{shard}"
        expected = self._shards[source].get(shard) if self._shards else None
        if self._cache is not None and expected is not None:
            if (wrong := self._cache.wrong.get(copy_name(expected))) is not None:
                raise BadInputError(wrong)
            if (copy := self._cache.path(fs, name, expected)) is not None:
                try:
                    return self._pread(str(copy), shard, None, start=start, end=end)
                except OSError:
                    pass  # another process has just evicted it
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                if local:
                    return self._pread(name, shard, expected, start=start, end=end)
                self._check_remote_size(fs, name, expected)
                return bytes(fs.cat_file(name, start=start, end=end))
            except BadInputError:
                raise
            except Exception as error:  # stores raise many types
                self._forget(name)
                if attempt == _ATTEMPTS or isinstance(error, _GONE):
                    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    times = "" if attempt == 1 else f", {attempt} times"
                    raise BadInputError(f"{shard}: cannot be read ({reason}{times})") from error
                time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1) * (0.5 + random.random()))
        raise AssertionError("unreachable")

    def _pread(self, name: str, shard: str, expected: ShardInfo | None, *, start: int, end: int) -> bytes:
        if name in self._descriptors:
            self._descriptors.move_to_end(name)
        else:
            if len(self._descriptors) >= _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = os.open(name, os.O_RDONLY)
            self._descriptors[name] = descriptor
            if expected is not None:
                try:
                    _check_size(os.fstat(descriptor).st_size, expected)
                except BadInputError:
                    self._forget(name)
                    raise
        descriptor = self._descriptors[name]
        data = os.pread(descriptor, end - start, start)
        while len(data) < end - start:  # reads of more than 2 GB, or from a network disk, may return less
            part = os.pread(descriptor, end - start - len(data), start + len(data))
            if not part:
                break
            data += part
        return data

    def _check_remote_size(self, fs: Any, name: str, expected: ShardInfo | None) -> None:
        if expected is not None and name not in self._sized:
            _check_size(int(fs.info(name)["size"]), expected)
            self._sized.add(name)

    def _forget(self, name: str) -> None:
        if name in self._descriptors:
            os.close(self._descriptors.pop(name))


def _check_size(size: int, expected: ShardInfo) -> None:
    if size != expected.bytes:
        raise BadInputError(
            f"{expected.name}: {size} bytes, {expected.bytes} in dataset.json; it was cut short or "
            "replaced by another version"
        )


def _check_header(header: bytes, shard: str, image: ImageRef) -> None:
    """Raises BadInputError unless the tar header before an image names it and its size. Names that need an
    extended header are not compared.
    """
    member = image.member
    if header[:100].rstrip(b"\0") == member.encode() and header[124:136] == b"%011o\0" % image.length:
        return  # as the builder writes it
    try:
        if sum(header) - sum(header[148:156]) + 8 * 32 != int(header[148:156].strip(b" \0") or b"0", 8):
            raise ValueError("checksum")
        size = header[124:136]
        length = int.from_bytes(size[1:], "big") if size[0] & 0x80 else int(size.strip(b" \0") or b"0", 8)
    except ValueError:
        raise BadInputError(
            f"{shard}: no tar header where the index has {member}; it is damaged or of another version"
        ) from None
    name = header[:100].rstrip(b"\0")
    if header[257:262] == b"ustar" and header[263:265] == b"00" and header[345]:
        name = header[345:500].rstrip(b"\0") + b"/" + name
    plain = len(member.encode()) <= 100 and member.isascii()
    if length != image.length or (plain and name.removeprefix(b"./") != member.removeprefix("./").encode()):
        raise BadInputError(
            f"{shard}: holds {name.decode(errors='replace')} of {length} bytes where the index has {member} "
            f"of {image.length}; it was replaced by another version"
        )
