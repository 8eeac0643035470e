"""Files of a checkpoint and their checksums: written in one pass, and checked later.

In: tensors, a directory. Out: safetensors files, `manifest.json` (bytes and xxh3-128 of every file), and
`COMPLETE` (the checksum of the manifest), which is written last. The checksums find accidents, such as
truncated files, flipped bits and incomplete copies. Nothing here uses torch.distributed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from shards.common.files import write_atomically

MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"

_CHUNK = 16 << 20  # bytes that are written or read at a time
_SMALL = 1 << 20  # bytes of a file whose content `shallow_fault` checks too
_DTYPES = {
    torch.float64: "F64", torch.int64: "I64",
    torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint. size: bytes. digest: xxh3-128, hexadecimal."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Slot:
    """Where a flat tensor is among the tensors of a file. offset, size: bytes."""

    name: str
    dtype: torch.dtype
    numel: int
    offset: int

    @property
    def size(self) -> int:
        return self.numel * self.dtype.itemsize


def lay_out(tensors: Sequence[tuple[str, torch.dtype, int]]) -> list[Slot]:
    """The slots of flat tensors (name, dtype, elements) in a file, in its order.

    The widest dtype comes first, so that every tensor is aligned.
    """
    slots, offset = [], 0
    for name, dtype, numel in sorted(tensors, key=lambda each: -each[1].itemsize):
        slots.append(Slot(name, dtype, numel, offset))
        offset += slots[-1].size
    return slots


def write_tensors(path: Path, slots: Sequence[Slot], data: Iterator[torch.Tensor]) -> Written:
    """Writes a safetensors file to the disk; returns its size and checksum.

    data: the bytes of all slots in order, as contiguous CPU tensors of any lengths. Raises OSError. Writing
    and the checksum release Python's GIL, so that other threads run.
    """
    table = {
        slot.name: {
            "dtype": _DTYPES[slot.dtype],
            "shape": [slot.numel],
            "data_offsets": [slot.offset, slot.offset + slot.size],
        }
        for slot in slots
    }
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with path.open("wb", buffering=0) as stream:
        for block in _blocks(len(header).to_bytes(8, "little") + header, data):
            digest.update(block)
            size += len(block)
            while block:  # an unbuffered write may be partial, for example on a full disk
                block = block[stream.write(block) :]
        expected = 8 + len(header) + sum(slot.size for slot in slots)
        if size != expected:
            raise OSError(f"{path.name}: got {size} of {expected} bytes to write")
        os.fsync(stream.fileno())
    return Written(path.name, size, digest.hexdigest())


def _blocks(header: bytes, data: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in data:
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(view), _CHUNK):
            yield view[start : start + _CHUNK]


def sum_file(path: Path) -> Written:
    """The size and checksum of a file on the disk. Raises OSError."""
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return Written(path.name, size, digest.hexdigest())


def seal(folder: Path, files: Sequence[Written]) -> None:
    """Writes the manifest of a directory, then COMPLETE; all other files must be there. Raises OSError."""
    table = {each.name: {"bytes": each.size, "xxh3_128": each.digest} for each in files}
    data = (json.dumps({"files": table}, indent=1) + "\n").encode()
    write_atomically(folder / MANIFEST, data)
    write_atomically(folder / COMPLETE, f"{xxhash.xxh3_128(data).hexdigest()}\n".encode())


def shallow_fault(folder: Path) -> str | None:
    """What is wrong with a sealed directory, judged by names, sizes and the content of small files; None if
    nothing is.
    """
    try:
        for name, entry in _entries(folder):
            fault = _size_fault(folder, name, entry)
            if fault is None and entry["bytes"] <= _SMALL:
                fault = _sum_fault(folder, name, entry)
            if fault is not None:
                return fault
    except (_DamagedError, OSError) as error:
        return str(error)
    return None


def content_fault(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the content of the files number `part`, `part + parts`, ... of a sealed directory;
    None if nothing is.
    """
    try:
        faults = (_sum_fault(folder, name, entry) for name, entry in _entries(folder)[part::parts])
        return next((fault for fault in faults if fault is not None), None)
    except (_DamagedError, OSError) as error:
        return str(error)


class _DamagedError(Exception):
    """The manifest of a sealed directory is missing or damaged."""


def _entries(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        data = (folder / MANIFEST).read_bytes()
        if xxhash.xxh3_128(data).hexdigest() != (folder / COMPLETE).read_text().strip():
            raise _DamagedError(f"{MANIFEST} does not have the checksum in {COMPLETE}")
        return sorted(json.loads(data)["files"].items())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _DamagedError(f"damaged ({error})") from error


def _sum_fault(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    found = sum_file(folder / name)
    if found.digest == entry["xxh3_128"]:
        return None
    return f"{name} differs from what was written (its xxh3-128 is {found.digest})"


def _size_fault(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    try:
        found = (folder / name).stat().st_size
    except OSError as error:
        return f"damaged ({error})"
    return None if found == entry["bytes"] else f"{name} has {found} bytes, {entry['bytes']} were written"
