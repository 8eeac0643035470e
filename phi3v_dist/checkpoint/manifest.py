"""Files of a checkpoint and their checksums: both are written in one pass, and checked later.

In: tensors, a directory. Out: safetensors files, `manifest.json` (bytes and xxh3-128 of every file), and
`COMPLETE` (the checksum of the manifest), which is written last. The checksums find accidents: truncated
files, flipped bits, incomplete copies. No torch.distributed here.
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

_CHUNK = 16 << 20  # bytes written, and read, at a time
_SMALL = 1 << 20  # bytes of a file whose content is always looked at
_DTYPES = {
    torch.float64: "F64", torch.int64: "I64",
    torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """One file of a checkpoint. digest: xxh3-128, hexadecimal."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Slot:
    """Where a flat tensor lies among the tensors of a file. offset, size: bytes."""

    name: str
    dtype: torch.dtype
    numel: int
    offset: int

    @property
    def size(self) -> int:
        return self.numel * self.dtype.itemsize


def lay_out(tensors: Sequence[tuple[str, torch.dtype, int]]) -> list[Slot]:
    """Places for flat tensors (name, dtype, elements) in a file; the widest dtype first, which aligns all."""
    slots, offset = [], 0
    for name, dtype, numel in sorted(tensors, key=lambda each: -each[1].itemsize):
        slots.append(Slot(name, dtype, numel, offset))
        offset += slots[-1].size
    return slots


def write_tensors(path: Path, slots: Sequence[Slot], data: Iterator[torch.Tensor]) -> Written:
    """Writes a safetensors file to the disk; the file and its sum. Writing and summing hold no lock of
    Python.

    data: the bytes of all slots in order, as contiguous CPU tensors of any lengths. Raises OSError.
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
            while block:  # a raw write may write less, for example on a full disk
                block = block[stream.write(block) :]
        expected = 8 + len(header) + sum(slot.size for slot in slots)
        if size != expected:
            raise OSError(f"{size} bytes of {expected} came")
        os.fsync(stream.fileno())
    return Written(path.name, size, digest.hexdigest())


def _blocks(header: bytes, data: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in data:
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(view), _CHUNK):
            yield view[start : start + _CHUNK]


def sum_file(path: Path) -> Written:
    """The size and sum of a file as it is on the disk. Raises OSError."""
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return Written(path.name, size, digest.hexdigest())


def seal(folder: Path, files: Sequence[Written]) -> None:
    """Writes the manifest of a directory whose files are all there, then COMPLETE. Raises OSError."""
    table = {each.name: {"bytes": each.size, "xxh3_128": each.digest} for each in files}
    data = (json.dumps({"files": table}, indent=1) + "\n").encode()
    write_atomically(folder / MANIFEST, data)
    write_atomically(folder / COMPLETE, f"{xxhash.xxh3_128(data).hexdigest()}\n".encode())


def shallow_fault(folder: Path) -> str | None:
    """What is wrong with a sealed directory, by names, sizes and the content of small files; None if
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
    """What is wrong with the content of file number `part`, `part + parts`, ... of a sealed directory."""
    try:
        faults = (_sum_fault(folder, name, entry) for name, entry in _entries(folder)[part::parts])
        return next((fault for fault in faults if fault is not None), None)
    except (_DamagedError, OSError) as error:
        return str(error)


class _DamagedError(Exception):
    """A sealed directory whose seal does not hold."""


def _entries(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        data = (folder / MANIFEST).read_bytes()
        if xxhash.xxh3_128(data).hexdigest() != (folder / COMPLETE).read_text().strip():
            raise _DamagedError(f"{MANIFEST} is not the one that {COMPLETE} stands for")
        return sorted(json.loads(data)["files"].items())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _DamagedError(f"damaged ({error})") from error


def _sum_fault(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    found = sum_file(folder / name)
    if found.digest == entry["xxh3_128"]:
        return None
    return f"{name} does not hold what was written (xxh3-128 {found.digest})"


def _size_fault(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    try:
        found = (folder / name).stat().st_size
    except OSError as error:
        return f"damaged ({error})"
    return None if found == entry["bytes"] else f"{name} has {found} bytes, {entry['bytes']} were written"
