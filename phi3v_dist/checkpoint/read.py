"""Reads checkpoints, which any number of ranks can read, and which are complete or absent.

A checkpoint `checkpoints/step-000123/` holds one safetensors file per rank (that rank's slices of the float32
master weights, of the optimizer's state and of the frozen weights), `meta.json` (see `meta`), the tokenizer,
`manifest.json` with a checksum of each file, and `COMPLETE`. COMPLETE is written last; after that the
directory gets its name. `latest` names the newest checkpoint, `best` the one with the best evaluation.

Frozen weights are part of it, unless there are more of them than of trained ones (LoRA, or only the projector
trained). Then they are read from the model directory again, and compared with sums in the checkpoint.

`save` writes this format. DeepSpeed's own cannot be loaded at another world size, and its universal format
loses the hyper-parameters of the parameter groups (DeepSpeed 0.19.8).
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from phi3v_dist.checkpoint.manifest import COMPLETE, MANIFEST, content_fault, shallow_fault
from phi3v_dist.checkpoint.meta import FORMAT, META, CheckpointMeta, Progress, StoredParameter, format_of
from phi3v_dist.checkpoint.state import (
    bit_sum,
    frozen_key,
    frozen_sums,
    master_key,
    state_key,
    stored_parameters,
)
from phi3v_dist.engine.partition import Partition, join, local_slice
from phi3v_dist.engine.state import (
    OptimizerState,
    frozen_parameters,
    refresh_whole_parameters,
    trained_slices,
    write_back,
)
from phi3v_dist.model.hub import checkpoint_files
from phi3v_dist.model.lora import adapters_of, is_adapter, update
from phi3v_dist.parallel.mesh import Mesh
from shards.common.errors import BadInputError
from shards.common.files import write_atomically

LATEST = "latest"
BEST = "best"
_DAMAGED = "damaged-"
_log = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    """The name of the directory of the checkpoint of `step`."""
    return f"step-{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; they may be damaged."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(target: Path) -> int:
    """The step in the name of a checkpoint directory."""
    return int(target.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, None if there is none. Damaged ones are skipped with a
    warning.
    """
    for target in checkpoints(folder):
        fault = fault_of(target) or content_fault(target)
        if fault is None:
            return target
        _log.warning("%s: not used: %s; falling back to the previous one", target, fault)
    return None


def find_resume(folder: Path, mesh: Mesh) -> Path | None:
    """The newest complete checkpoint, None if there is none. All ranks call it; together they check all
    bytes.

    Damaged and unfinished ones are skipped with a warning, and renamed to damaged-step-N if an older one is
    used. Raises BadInputError if there are only damaged ones: only the user may decide to start again.
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
                _log.warning("resuming from %s instead", target)
                mesh.on_main(lambda: _set_aside([path for path, _ in damaged]))
            return Path(target)
        _log.warning("%s: not used: %s", target, fault)
        damaged.append((target, fault))
    finished = [(path, fault) for path, fault in damaged if (path / COMPLETE).exists()]
    if finished:
        path, fault = finished[0]
        raise BadInputError(
            f"{path}: {fault}; no other checkpoint is complete. Restore one from a backup, or remove "
            f"{folder} to start from the beginning"
        )
    return None


def fault_of(target: Path) -> str | None:
    """Why `target` is not a complete checkpoint, judged by names and sizes; None if it is."""
    if not target.is_dir():
        return "no such checkpoint"
    if not (target / COMPLETE).exists():
        return f"incomplete (no {COMPLETE})"
    if not (target / MANIFEST).exists() and format_of(target) != FORMAT:
        return None
    return shallow_fault(target)


def _fault_or_refusal(target: Path) -> str | None:
    """`fault_of`; raises BadInputError for a checkpoint of an old format, which has no manifest."""
    fault = fault_of(target)
    if fault is None and not (target / MANIFEST).exists():
        read_meta(target)
    return fault


def pointed(folder: Path, pointer: str) -> Path | None:
    """The checkpoint that `pointer` (LATEST or BEST) names, None if there is none."""
    try:
        name = (folder / pointer).read_text().strip()
    except OSError:
        return None
    return folder / name if name and (folder / name / COMPLETE).exists() else None


def best(folder: Path) -> Path | None:
    """The checkpoint with the best evaluation, None if there is none or it is not complete."""
    target = pointed(folder, BEST)
    return target if target is not None and fault_of(target) is None else None


def point(folder: Path, pointer: str, step: int) -> None:
    """Makes `pointer` name the checkpoint of `step`, atomically; it is kept while it is named."""
    write_atomically(folder / pointer, f"{checkpoint_name(step)}\n".encode())


def load(engine: Any, target: Path, mesh: Mesh) -> Progress:
    """Fills the weights and the optimizer of `engine` from a checkpoint of any world size, bit for bit. All
    ranks call it.

    Raises BadInputError if the checkpoint is damaged, of another model, or of another optimizer.
    """
    meta = read_meta(target)
    optimizer = OptimizerState(engine)
    with ExitStack() as stack:
        reader = mesh.everywhere(lambda: _Slices(target, meta, stack))
        _check_model(engine, target, meta)
        _check_optimizer(reader, optimizer, engine)
        for _, members in itertools.groupby(trained_slices(engine), lambda each: each.sub_group):
            for trained in members:
                optimizer.hold(trained)
                for kind in optimizer.tensors:
                    reader.fill(state_key(trained, kind), optimizer.place(trained, kind), mesh.rank)
                optimizer.set_step(trained, meta.adam_steps[trained.group])
                reader.fill(master_key(trained), trained.of(trained.master.data), mesh.rank)
                write_back(trained)
            optimizer.release(changed=True)
        if meta.frozen_sums is None:
            for name, parameter in frozen_parameters(engine):
                reader.fill(frozen_key(name), local_slice(parameter), mesh.rank)
        elif different := _first_difference(meta.frozen_sums, frozen_sums(engine, mesh)):
            raise BadInputError(
                f"{target}: was trained with other frozen weights than {meta.model_dir} holds now "
                f"(the first difference: {different}); restore that model directory"
            )
    optimizer.set_hyper_parameters(meta.groups)
    refresh_whole_parameters(engine)
    return meta.progress


def read_meta(target: Path) -> CheckpointMeta:
    """The content of meta.json. Raises BadInputError if `target` is not complete, or of another format."""
    fault = fault_of(target)
    if fault is not None:
        raise BadInputError(f"{target}: {fault}")
    if (found := format_of(target)) != FORMAT:
        raise BadInputError(
            f"{target}: checkpoint format {found}, this program reads format {FORMAT}; resume with the "
            "version of phi3v-dist that wrote it, or choose another name for the new run"
        )
    return CheckpointMeta.from_json((target / META).read_text())


def read_tensors(target: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, whole tensor) of every published parameter, one at a time.

    Trained parameters are float32, those with adapters float32 with the update merged, and other frozen ones
    have their own dtype. Raises BadInputError if frozen weights are in a model directory that is missing or
    has changed.
    """
    meta = read_meta(target)
    with ExitStack() as stack:
        reader = _Slices(target, meta, stack)
        base = _Base(target, meta, stack) if meta.frozen_sums is not None else None
        entries = meta.parameters

        def read(name: str) -> torch.Tensor:
            entry = entries[name]
            if entry.frozen and base is not None:
                return base.tensor(name)
            return reader.whole(f"{'frozen' if entry.frozen else 'master'}/{name}", entry.shape)

        for name in entries:
            if is_adapter(name):
                continue
            tensor, (a, b) = read(name), adapters_of(name)
            if a in entries:
                lora = meta.run["config"]["model"]["lora"]
                tensor = tensor.float() + update(read(a), read(b), rank=lora["rank"], alpha=lora["alpha"])
            yield name, tensor


def read_adapters(target: Path) -> dict[str, torch.Tensor]:
    """Plain name -> float32 tensor of the adapters of a checkpoint; empty if it has none."""
    meta = read_meta(target)
    with ExitStack() as stack:
        reader = _Slices(target, meta, stack)
        shapes = {name: entry.shape for name, entry in meta.parameters.items() if is_adapter(name)}
        return {name: reader.whole(f"master/{name}", shape) for name, shape in shapes.items()}


def _first_difference(theirs: dict[str, int], ours: dict[str, int]) -> str | None:
    """The first name whose values differ, or that only one of the two has; None without a difference."""
    return next((name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)), None)


def _check_model(engine: Any, target: Path, meta: CheckpointMeta) -> None:
    """Raises BadInputError unless the checkpoint has the parameters of `engine`, trained and frozen alike."""
    ours, theirs = stored_parameters(engine), meta.parameters
    if ours == theirs:
        return
    different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    first = different[0]
    raise BadInputError(
        f"{target}: of another model: {len(different)} parameters differ, the first is {first} "
        f"({_described(theirs.get(first))} there, {_described(ours.get(first))} here)"
    )


def _described(entry: StoredParameter | None) -> str:
    if entry is None:
        return "absent"
    return f"{'x'.join(map(str, entry.shape))}{', frozen' if entry.frozen else ''}"


def _check_optimizer(reader: _Slices, optimizer: OptimizerState, engine: Any) -> None:
    """Raises BadInputError if the checkpoint lacks state that the engine's optimizer keeps."""
    stored = reader.names()
    for trained in trained_slices(engine):
        for kind in optimizer.tensors:
            if (key := state_key(trained, kind)) not in stored:
                raise BadInputError(
                    f"{reader.target}: holds no {key}; it was written with another optimizer, use that one"
                )


class _Slices:
    """The rank files of a checkpoint, read as if every tensor were flattened in one piece."""

    def __init__(self, target: Path, meta: CheckpointMeta, stack: ExitStack) -> None:
        self.target = target
        try:
            self._files = [
                stack.enter_context(safe_open(target / f"rank-{rank:05d}.safetensors", "pt"))
                for rank in range(meta.world_size)
            ]
        except (SafetensorError, OSError) as error:
            raise BadInputError(
                f"{target}: damaged ({error}); delete it to fall back to the previous one"
            ) from error

    def names(self) -> set[str]:
        """The tensors that the files hold; every rank has a slice of each."""
        return set(self._files[0].keys())

    def fill(self, key: str, part: torch.Tensor, rank: int) -> None:
        """Fills `part`, which is slice number `rank` of a flattened tensor in slices of that length.

        Elements after the end of the tensor are padding and become zero.
        """
        width = self._files[0].get_slice(key).get_shape()[0]
        wanted = Partition(numel=width * len(self._files), rank=rank, width=part.numel())
        part.zero_()
        here = wanted.start
        while here < wanted.stop:
            file, offset = divmod(here, width)
            count = min(wanted.stop - here, width - offset)
            piece = self._files[file].get_slice(key)[offset : offset + count]
            part.narrow(0, here - wanted.start, count).copy_(piece)
            here += count

    def whole(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor of shape `shape`, from the slices of all ranks."""
        slices = torch.stack([file.get_tensor(key) for file in self._files])
        return join(slices, math.prod(shape)).view(shape)


class _Base:
    """The frozen weights that a checkpoint does not hold, read from the model directory."""

    def __init__(self, target: Path, meta: CheckpointMeta, stack: ExitStack) -> None:
        self._target, self._meta = target, meta
        self._where: dict[str, Any] = {}
        try:
            for file in checkpoint_files(Path(meta.model_dir)):
                opened = stack.enter_context(safe_open(file, "pt"))
                self._where.update(dict.fromkeys(opened.keys(), opened))
        except (BadInputError, SafetensorError, OSError) as error:
            raise BadInputError(
                f"{target}: holds only the trained weights; the frozen ones are those of "
                f"{meta.model_dir}, which cannot be read ({error})"
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter in the dtype of the run. Raises BadInputError if it is missing or has changed."""
        if name not in self._where:
            raise BadInputError(f"{self._target}: {self._meta.model_dir} has no tensor {name}")
        dtype = getattr(torch, self._meta.frozen_dtype)
        found: torch.Tensor = self._where[name].get_tensor(name).to(dtype)
        if int(bit_sum(found.view(-1))) != (self._meta.frozen_sums or {}).get(name):
            raise BadInputError(
                f"{self._target}: {name} in {self._meta.model_dir} differs from what the run was "
                "trained with; restore that model directory"
            )
        return found


def _set_aside(damaged: list[Path]) -> None:
    """Renames damaged checkpoints, so that none of them counts as the newest one any more."""
    for path in damaged:
        try:
            os.replace(path, path.with_name(f"{_DAMAGED}{path.name}"))
        except OSError as error:
            _log.warning("%s: cannot be renamed (%s); remove it", path, error)
