"""Reads what W&B recorded on disk: the history of a run from its .wandb file.

The file has a header of 7 bytes and then LevelDB's log format (blocks of 32 KiB; fragments with checksum,
length, kind) with protobuf records. wandb 0.31.0 (pinned in pyproject.toml) writes it and has no public
reader in Python; the message types come from its private module wandb.proto.wandb_internal_pb2. In: a path.
Out: one dict per logged step.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3v_dist.run.layout import STEP

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def history(path: Path) -> Iterator[dict[str, Any]]:
    """The items of every history record of a .wandb file, in order; nested keys become nested dicts.

    An incomplete record at the end (of a killed process) is skipped.
    """
    from wandb.proto import wandb_internal_pb2  # private; wandb 0.31.0

    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items: dict[str, Any] = {}
            for item in record.history.item:
                *above, key = list(item.nested_key) or [item.key]
                place = items
                for name in above:
                    place = place.setdefault(name, {})
                place[key] = json.loads(item.value_json)
            yield items


def last_step(wandb_dir: Path, run_id: str) -> int:
    """The largest train/global_step that any start of the W&B run `run_id` has recorded under `wandb_dir`; 0
    without one.
    """
    step = 0
    for path in sorted(wandb_dir.glob(f"*run-*-{run_id}/run-{run_id}.wandb")):
        for items in history(path):
            step = max(step, int(items.get(STEP, 0)))
    return step


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind a file header of 7 bytes, fragments joined."""
    place, whole = _HEADER, b""  # the file's header, also 7 bytes, is part of the first block
    while place + _HEADER <= len(data):
        room = _BLOCK - place % _BLOCK
        if room < _HEADER:  # the end of a block is padding
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        piece = data[place + _HEADER : place + _HEADER + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(piece) < length:
            return
        place += _HEADER + length
        whole = piece if kind in (_FULL, _FIRST) else whole + piece
        if kind in (_FULL, _LAST):
            yield whole
