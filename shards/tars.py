"""WebDataset tars, written so that equal samples give equal bytes, and scanned for where everything lies.

Written with the standard library's tarfile in its ustar form. webdataset's own TarWriter is not used: it
sorts the members of a sample by name (the picture before the JSON, `10.jpg` before `2.jpg`) and importing it
imports torch. That webdataset reads these tars is tested.

In: samples (key, members). Out: a tar, its sha256, and the byte ranges of samples and members. Called by
`build`, `index` and `verify`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shards.common.errors import BadInputError

_BLOCK = 512
_AHEAD = 8  # pieces
_PIECE = 2**20  # bytes, at least, except the last
# webdataset's rule: the key ends at the base name's first dot.
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@dataclass(frozen=True)
class Member:
    """One file in a tar. name: as in the tar. suffix: what follows the key and its dot. offset, length: of
    the data.
    """

    name: str
    suffix: str
    offset: int
    length: int


@dataclass(frozen=True)
class TarSample:
    """The adjacent members that share a key. offset, length: first header to the end of the last one's
    padding.
    """

    key: str
    offset: int
    length: int
    members: tuple[Member, ...]


class TarShard:
    """A tar being written to `path`; `add` samples, then `close`. Until then the file is not a tar."""

    def __init__(self, path: Path) -> None:
        self.samples = 0
        self._file = _HashedFile(path)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> TarSample:
        """Writes KEY.SUFFIX for each (suffix, data); returns where they are."""
        start = place = self._file.tell()
        written = []
        pieces = []
        for suffix, data in members:
            name = f"{key}.{suffix}"
            padding = bytes(-len(data) % _BLOCK)
            pieces += [_header(name, len(data)), data, padding]
            written.append(Member(name, suffix, place + _BLOCK, len(data)))
            place += _BLOCK + len(data) + len(padding)
        self._file.write(pieces)
        self.samples += 1
        return TarSample(key, start, place - start, tuple(written))

    def close(self) -> str:
        """Ends the tar, brings it to the disk, returns its sha256 in hex."""
        end = self._file.tell() + 2 * _BLOCK
        self._file.write([bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE)])
        return self._file.close()

    def abandon(self) -> None:
        """Closes the file as it is; the caller deletes it."""
        self._file.abandon()


_BLANK = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
_BLANK[124:136] = bytes(12)
_BLANK[148:156] = b" " * 8
_BLANK_SUM = sum(_BLANK)


def _header(name: str, size: int) -> bytes:
    """The ustar header of a file: mode 644; mtime, uid, gid 0 and no names, so nothing of here and now.

    The bytes that tarfile makes, at a twentieth of its cost. Raises ValueError for a name of over 100 bytes.
    """
    encoded = name.encode()
    if len(encoded) > 100:
        raise ValueError(f"member name {name!r} has more than 100 bytes")
    header = bytearray(_BLANK)
    header[: len(encoded)] = encoded
    digits = header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % (_BLANK_SUM + sum(encoded) + sum(digits))
    return bytes(header)


def scan(stream: IO[bytes], name: str) -> Iterator[TarSample]:
    """Yields the samples of an uncompressed tar in order. name: for messages.

    Raises BadInputError at damage, and at two members of one sample with one name (webdataset would refuse
    it).
    """
    open_key: str | None = None
    found: list[tuple[Member, int, int]] = []
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps every header it has seen
                match = _KEY.match(info.name)
                if not info.isreg() or match is None or os.path.basename(info.name).startswith("."):
                    continue
                key, suffix = match.group(1), match.group(2).lower()
                if key != open_key:
                    if open_key is not None:
                        yield _sample(open_key, found)
                    open_key, found = key, []
                if any(member.suffix == suffix for member, *_ in found):
                    raise BadInputError(f"{name}: sample {key!r} has two members .{suffix}")
                end = info.offset_data + info.size + -info.size % _BLOCK
                found.append((Member(info.name, suffix, info.offset_data, info.size), info.offset, end))
            if open_key is not None:
                yield _sample(open_key, found)
            stream.seek(tar.offset)
            if stream.read(_BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end of the tar
                raise BadInputError(f"{name}: damaged or cut header at byte {tar.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise BadInputError(f"{name}: not a whole, uncompressed tar ({error})") from error


def read_member(stream: IO[bytes], member: Member) -> bytes:
    """The data of a member; `scan` may be under way on the same stream."""
    stream.seek(member.offset)
    return stream.read(member.length)


def sha256_of(stream: IO[bytes]) -> str:
    """Of the rest of a stream, in hex."""
    digest = hashlib.sha256()
    while block := stream.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _sample(key: str, found: list[tuple[Member, int, int]]) -> TarSample:
    start = found[0][1]
    return TarSample(key, start, found[-1][2] - start, tuple(member for member, *_ in found))


class _HashedFile:
    """A file being written, its size so far, and the sha256 of all that was written.

    A thread writes and hashes pieces of a megabyte, up to `_AHEAD` of them behind, so that both go on while
    the next images are fetched. What it raises comes out of a later `write` or of `close`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._size = self._flushed = 0
        self._waiting: list[bytes] = []
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: deque[Future[None]] = deque()

    def tell(self) -> int:
        return self._size

    def write(self, data: Sequence[bytes]) -> None:
        self._waiting += data
        self._size += sum(map(len, data))
        if self._size - self._flushed >= _PIECE:
            self._flush()

    def close(self) -> str:
        try:
            self._flush()
            while self._pending:
                self._pending.popleft().result()
            os.fsync(self._file.fileno())
        finally:
            self.abandon()
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        """Closes the file, whatever of it is written."""
        self._thread.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):
            self._file.close()

    def _flush(self) -> None:
        if len(self._pending) >= _AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, self._waiting))
        self._waiting, self._flushed = [], self._size

    def _write(self, pieces: list[bytes]) -> None:
        data = b"".join(pieces)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        if hasattr(os, "posix_fadvise"):  # Linux begins to bring it to the disk now: no long wait at the end
            place = self._file.tell() - len(data)
            os.posix_fadvise(self._file.fileno(), place, len(data), os.POSIX_FADV_DONTNEED)
        self._sha256.update(data)
