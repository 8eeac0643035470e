"""Checkpoints: per-parameter slices that any number of ranks can read, complete or absent.

A checkpoint `checkpoints/step-000123/` holds one safetensors file per rank (that rank's slices of the float32
master weights, of Adam's moments and of the frozen weights), `meta.json` (progress, hyper-parameters and Adam
steps of the groups, shapes, the model's configuration, the run's configuration and versions, the W&B run),
the tokenizer, `manifest.json` with a sum of each, and `COMPLETE`, written last; the directory gets its name
only then. `latest` names the newest, `best` the one with the best evaluation.

Frozen weights are in it where they are fewer than those that learn; else (LoRA, a projector alone) they are
read from the model directory again, and the checkpoint knows what they must be.

DeepSpeed's own format does not load at another world size, and its universal one loses the parameter groups'
hyper-parameters (0.19.8); hence this one. It reads ZeRO-3's internals, so DeepSpeed is pinned exactly.

This file reads; `saving` writes. Called by the train loop (resume), `restore`, export and whoever
looks for a run's checkpoints.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from phi3v_dist.checkpoint.manifest import COMPLETE, MANIFEST, content_fault, shallow_fault
from phi3v_dist.checkpoint.state import MOMENTS, bit_sum, frozen, frozen_sums, named_parameters, trainable
from phi3v_dist.engine.nvme import SwappedState
from phi3v_dist.model.hub import checkpoint_files
from phi3v_dist.model.lora import adapters_of, is_adapter, update
from phi3v_dist.parallel.mesh import Mesh
from shards.common.errors import BadInputError
from shards.common.files import write_atomically

META = "meta.json"
LATEST = "latest"
BEST = "best"
FORMAT = 2
_DAMAGED = "damaged-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is. step: optimizer steps taken or skipped; rows: packed rows of the plan consumed by
    them, all that the data needs to go on. skipped_steps: those without an update, of them bad_streak the
    last ones in a row.
    """

    step: int = 0
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    bad_samples: int = 0
    skipped_steps: int = 0
    bad_streak: int = 0


def checkpoint_name(step: int) -> str:
    """The name of its directory."""
    return f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that have a name, newest first; they may be damaged."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(target: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(target.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, None if there is none. A damaged one is passed over, aloud."""
    for target in checkpoints(folder):
        fault = fault_of(target) or content_fault(target)
        if fault is None:
            return target
        _log.warning("%s: not used: %s; falling back to the one before", target, fault)
    return None


def find_resume(folder: Path, mesh: Mesh) -> Path | None:
    """The newest whole checkpoint, checked byte for byte by all ranks together; None if there is none.

    Damaged ones are passed over, aloud, and renamed to damaged-step-N; those that were never finished too.
    Raises BadInputError if there are only damaged ones: to start from the beginning is the user's decision.
    """
    damaged: list[tuple[Path, str]] = []
    for target in mesh.on_main(lambda: checkpoints(folder)):
        fault = mesh.on_main(partial(_fault_or_refusal, target))
        if fault is None:
            faults = mesh.gather(content_fault(target, mesh.rank, mesh.size))
            fault = next((each for each in faults if each is not None), None)
        if fault is None:
            mesh.on_main(partial(read_meta, target))
            if damaged:
                _log.warning("going on from %s instead", target)
                mesh.on_main(lambda: _set_aside([path for path, _ in damaged]))
            return Path(target)
        _log.warning("%s: not used: %s", target, fault)
        damaged.append((target, fault))
    finished = [(path, fault) for path, fault in damaged if (path / COMPLETE).exists()]
    if finished:
        path, fault = finished[0]
        raise BadInputError(
            f"{path}: {fault}; no other checkpoint is whole. Restore one from a backup, or remove "
            f"{folder} to start from the beginning"
        )
    return None


def fault_of(target: Path) -> str | None:
    """Why `target` is no complete checkpoint, by names and sizes; None if it is one."""
    if not target.is_dir():
        return "no such checkpoint"
    if not (target / COMPLETE).exists():
        return f"incomplete (no {COMPLETE})"
    if not (target / MANIFEST).exists() and _format(target) != FORMAT:
        return None
    return shallow_fault(target)


def _fault_or_refusal(target: Path) -> str | None:
    """`fault_of`, and BadInputError for a checkpoint of a format that has no manifest."""
    fault = fault_of(target)
    if fault is None and not (target / MANIFEST).exists():
        read_meta(target)
    return fault


def pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that `pointer` (LATEST, BEST) names, None if it names none that is there."""
    try:
        name = (folder / pointer).read_text().strip()
    except OSError:
        return None
    return folder / name if name and (folder / name / COMPLETE).exists() else None


def best(folder: Path) -> Path | None:
    """The checkpoint with the best evaluation, None if there is none or it is not whole."""
    target = pointed(folder, BEST)
    return target if target is not None and fault_of(target) is None else None


def point(folder: Path, pointer: str, step: int) -> None:
    """Makes `pointer` name the checkpoint of `step`, at once or not at all; it is kept while it is named."""
    write_atomically(folder / pointer, f"{checkpoint_name(step)}\n".encode())


def load(engine: Any, target: Path, mesh: Mesh) -> Progress:
    """Fills weights and optimizer of `engine` from a checkpoint of any world size, bit for bit.

    Raises BadInputError if it is of another model or damaged.
    """
    meta = read_meta(target)
    optimizer = engine.optimizer.optimizer
    numbers = engine.optimizer.sub_group_to_group_id
    with ExitStack() as stack:
        reader = mesh.everywhere(lambda: _Slices(target, meta, stack))
        _check_model(engine, target, meta)
        swapped = SwappedState(engine.optimizer)
        for group, members in itertools.groupby(trainable(engine), lambda each: each[-1]):
            swapped.hold(group)
            for name, parameter, flat, offset, count, _ in members:
                state = optimizer.state[flat]
                for kind in MOMENTS:
                    if kind not in state:
                        state[kind] = torch.zeros_like(flat.data)
                    reader.fill(f"{kind}/{name}", state[kind].narrow(0, offset, count), mesh.rank)
                state["step"] = torch.tensor(float(meta["adam_steps"][numbers[group]]))
                master = flat.data.narrow(0, offset, count)
                reader.fill(f"master/{name}", master, mesh.rank)
                parameter.ds_tensor.data.copy_(master)
            swapped.release(changed=True)
        if meta["frozen_sums"] is None:
            for name, parameter in frozen(engine):
                reader.fill(f"frozen/{name}", parameter.ds_tensor.data.view(-1), mesh.rank)
        elif different := _first_difference(meta["frozen_sums"], frozen_sums(engine, mesh)):
            raise BadInputError(
                f"{target}: was trained on top of other frozen weights than {meta['model_dir']} holds now "
                f"(the first that differs: {different}); restore that model directory"
            )
    for group, stored in zip(optimizer.param_groups, meta["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    persistent = engine.optimizer.persistent_parameters
    if persistent:  # whole on every rank: made anew from the slices
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
    return Progress(**meta["progress"])


def read_meta(target: Path) -> dict[str, Any]:
    """The content of meta.json. Raises BadInputError if `target` is no complete checkpoint of this format."""
    fault = fault_of(target)
    if fault is not None:
        raise BadInputError(f"{target}: {fault}")
    if (found := _format(target)) != FORMAT:
        raise BadInputError(
            f"{target}: checkpoint format {found}, this program reads format {FORMAT}; go on with the "
            "version of phi3v-dist that wrote it, or choose another name for the new run"
        )
    meta: dict[str, Any] = json.loads((target / META).read_text())
    return meta


def read_tensors(target: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every published parameter whole, one at a time: the float32 master weights, those with adapters
    in float32 with what these add, other frozen ones in their own dtype.

    Raises BadInputError if frozen weights lie in a model directory that is gone or has changed.
    """
    meta = read_meta(target)
    with ExitStack() as stack:
        reader = _Slices(target, meta, stack)
        base = _Base(target, meta, stack) if meta["frozen_sums"] is not None else None
        entries = meta["parameters"]

        def read(name: str) -> torch.Tensor:
            shape, is_frozen = entries[name]["shape"], entries[name]["frozen"]
            if is_frozen and base is not None:
                return base.tensor(name)
            return reader.whole(f"{'frozen' if is_frozen else 'master'}/{name}", math.prod(shape)).view(shape)

        for name in entries:
            if is_adapter(name):
                continue
            tensor, (a, b) = read(name), adapters_of(name)
            if a in entries:
                lora = meta["run"]["config"]["model"]["lora"]
                tensor = tensor.float() + update(read(a), read(b), lora["rank"], lora["alpha"])
            yield name, tensor


def read_adapters(target: Path) -> dict[str, torch.Tensor]:
    """The adapters of a checkpoint by their plain names, float32; empty if it has none."""
    meta = read_meta(target)
    with ExitStack() as stack:
        reader = _Slices(target, meta, stack)
        shapes = {n: entry["shape"] for n, entry in meta["parameters"].items() if is_adapter(n)}
        return {n: reader.whole(f"master/{n}", math.prod(s)).view(s) for n, s in shapes.items()}


def _first_difference(theirs: dict[str, int], ours: dict[str, int]) -> str | None:
    return next((name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)), None)


def _check_model(engine: Any, target: Path, meta: dict[str, Any]) -> None:
    ours = {n: (tuple(p.ds_shape), not p.requires_grad) for n, p in named_parameters(engine)}
    theirs = {n: (tuple(entry["shape"]), entry["frozen"]) for n, entry in meta["parameters"].items()}
    if ours == theirs:
        return
    different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    first = different[0]
    raise BadInputError(
        f"{target}: of another model: {len(different)} parameters differ, the first is {first} "
        f"({_described(theirs.get(first))} there, {_described(ours.get(first))} here)"
    )


def _described(entry: tuple[tuple[int, ...], bool] | None) -> str:
    if entry is None:
        return "absent"
    return f"{'x'.join(map(str, entry[0]))}{', frozen' if entry[1] else ''}"


class _Slices:
    """The rank files of a checkpoint as if every tensor lay in one piece, flattened."""

    def __init__(self, target: Path, meta: dict[str, Any], stack: ExitStack) -> None:
        self._target = target
        try:
            self._files = [
                stack.enter_context(safe_open(target / f"rank-{rank:05d}.safetensors", "pt"))
                for rank in range(meta["world_size"])
            ]
        except (SafetensorError, OSError) as error:
            raise BadInputError(
                f"{target}: damaged ({error}); delete it to fall back to the one before"
            ) from error

    def fill(self, key: str, part: torch.Tensor, rank: int) -> None:
        """Fills `part`, which is piece number `rank` of the flattened tensor, each as long as `part`.

        Elements after the tensor's end are padding and become zero.
        """
        width = self._files[0].get_slice(key).get_shape()[0]
        part.zero_()
        here, stop = rank * part.numel(), min((rank + 1) * part.numel(), width * len(self._files))
        while here < stop:
            file, offset = divmod(here, width)
            count = min(stop - here, width - offset)
            piece = self._files[file].get_slice(key)[offset : offset + count]
            part.narrow(0, here - rank * part.numel(), count).copy_(piece)
            here += count

    def whole(self, key: str, numel: int) -> torch.Tensor:
        return torch.cat([file.get_tensor(key) for file in self._files])[:numel]


class _Base:
    """The frozen weights that a checkpoint does not hold itself, from the model directory they came from."""

    def __init__(self, target: Path, meta: dict[str, Any], stack: ExitStack) -> None:
        self._target, self._meta = target, meta
        self._where: dict[str, Any] = {}
        try:
            for file in checkpoint_files(Path(meta["model_dir"])):
                opened = stack.enter_context(safe_open(file, "pt"))
                self._where.update(dict.fromkeys(opened.keys(), opened))
        except (BadInputError, SafetensorError, OSError) as error:
            raise BadInputError(
                f"{target}: holds only what was trained; its frozen weights are those of "
                f"{meta['model_dir']}, which cannot be read ({error})"
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter in the dtype it was trained with."""
        if name not in self._where:
            raise BadInputError(f"{self._target}: {self._meta['model_dir']} has no tensor {name}")
        dtype = getattr(torch, self._meta["frozen_dtype"])
        found: torch.Tensor = self._where[name].get_tensor(name).to(dtype)
        if int(bit_sum(found.view(-1))) != self._meta["frozen_sums"][name]:
            raise BadInputError(
                f"{self._target}: {name} in {self._meta['model_dir']} is not what the run was "
                "trained on; restore that model directory"
            )
        return found


def _format(target: Path) -> Any:
    """The format number in meta.json; FORMAT where it cannot be read, so that the manifest says what is
    wrong.
    """
    try:
        return json.loads((target / META).read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return FORMAT


def _set_aside(damaged: list[Path]) -> None:
    """Renames checkpoints that are not used, so that they do not count as the newest ones any more."""
    for path in damaged:
        try:
            os.replace(path, path.with_name(f"{_DAMAGED}{path.name}"))
        except OSError as error:
            _log.warning("%s: cannot be set aside (%s); remove it", path, error)
