"""WebDataset tars: written so that equal samples give equal bytes, and scanned for the positions of members.

The format is ustar. TarWriter of webdataset is not used: it sorts the members of a sample by name (the image
before the JSON, `10.jpg` before `2.jpg`), and importing it imports torch. A test holds that webdataset reads
these tars.

In: samples (key, members). Out: a tar, its sha256, and the byte ranges of samples and members.
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
_MAX_PENDING = 8  # pieces that wait to be written
_PIECE = 2**20  # minimum size of a piece in bytes, except the last
# The rule of webdataset: the key ends at the first dot of the base name.
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@dataclass(frozen=True)
class Member:
    """One file in a tar. name: as in the tar. suffix: what follows the key and the dot. offset, length: of
    the data, in bytes.
    """

    name: str
    suffix: str
    offset: int
    length: int


@dataclass(frozen=True)
class TarSample:
    """The adjacent members that share a key. offset, length: in bytes, from the first header to the end of
    the last member's padding.
    """

    key: str
    offset: int
    length: int
    members: tuple[Member, ...]


class TarShard:
    """Writes a tar to `path`: `add` samples, then `close`. Before `close`, the file is not a complete tar."""

    def __init__(self, path: Path) -> None:
        self.samples = 0
        self._file = _HashedFile(path)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> TarSample:
        """Writes the member KEY.SUFFIX for each (suffix, data); returns where they are.

        Raises ValueError if a member's name has more than 100 bytes.
        """
        start = position = self._file.tell()
        written = []
        pieces = []
        for suffix, data in members:
            name = f"{key}.{suffix}"
            padding = bytes(-len(data) % _BLOCK)
            pieces += [_header(name, len(data)), data, padding]
            written.append(Member(name, suffix, position + _BLOCK, len(data)))
            position += _BLOCK + len(data) + len(padding)
        self._file.write(pieces)
        self.samples += 1
        return TarSample(key, start, position - start, tuple(written))

    def close(self) -> str:
        """Ends the tar and flushes it to the disk (fsync); returns its sha256 in hex."""
        end = self._file.tell() + 2 * _BLOCK
        self._file.write([bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE)])
        return self._file.close()

    def abandon(self) -> None:
        """Closes the incomplete file; the caller deletes it."""
        self._file.abandon()


_BLANK = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
_BLANK[124:136] = bytes(12)
_BLANK[148:156] = b" " * 8
_BLANK_SUM = sum(_BLANK)


def _header(name: str, size: int) -> bytes:
    """The ustar header of a file: mode 644; mtime, uid and gid 0 and no user names, so that the bytes depend
    only on name and size.

    These are the bytes that tarfile writes, at a twentieth of the cost. Raises ValueError for a name of more
    than 100 bytes.
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
    """Yields the samples of an uncompressed tar in order. name: of the tar, for messages.

    Raises BadInputError if the tar is damaged, and if two members of a sample have the same suffix
    (webdataset refuses this too).
    """
    open_key: str | None = None
    found: list[tuple[Member, int, int]] = []
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
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
            if stream.read(_BLOCK).strip(b"\0"):  # for tarfile, a damaged header is the end of the tar
                raise BadInputError(f"{name}: damaged or truncated header at byte {tar.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise BadInputError(f"{name}: not a complete, uncompressed tar ({error})") from error


def read_member(stream: IO[bytes], member: Member) -> bytes:
    """The data of a member. Allowed while `scan` is reading the same stream."""
    stream.seek(member.offset)
    return stream.read(member.length)


def sha256_of(stream: IO[bytes]) -> str:
    """The sha256, in hex, of the rest of a stream."""
    digest = hashlib.sha256()
    while block := stream.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _sample(key: str, found: list[tuple[Member, int, int]]) -> TarSample:
    start = found[0][1]
    return TarSample(key, start, found[-1][2] - start, tuple(member for member, *_ in found))


class _HashedFile:
    """A file that is being written, its size so far, and the sha256 of its content.

    A thread writes and hashes pieces of a megabyte while the next images are fetched; at most `_MAX_PENDING`
    pieces wait for it. An error in the thread is raised by a later `write` or by `close`.
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
        """Closes the file without waiting for the pieces that are not written yet."""
        self._thread.shutdown(cancel_futures=True)
        with contextlib.suppress(OSError):
            self._file.close()

    def _flush(self) -> None:
        if len(self._pending) >= _MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, self._waiting))
        self._waiting, self._flushed = [], self._size

    def _write(self, pieces: list[bytes]) -> None:
        data = b"".join(pieces)
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        if hasattr(os, "posix_fadvise"):  # Linux starts to write it to the disk now, not at fsync
            position = self._file.tell() - len(data)
            os.posix_fadvise(self._file.fileno(), position, len(data), os.POSIX_FADV_DONTNEED)
        self._sha256.update(data)
