"""Checkpoints: per-parameter slices that any number of ranks can read, complete or absent.

A checkpoint `checkpoints/step-000123/` holds one safetensors file per rank (that rank's slices of the float32
master weights, of Adam's moments and of the frozen weights), `meta.json` (progress, hyper-parameters, shapes,
file sizes, the model's configuration), the tokenizer, and `COMPLETE`, written last; the directory gets its
name only then. `latest` names the newest, `best` the one with the best evaluation.

DeepSpeed's own format does not load at another world size, and its universal one loses the parameter groups'
hyper-parameters (0.19.8); hence this one. It reads ZeRO-3's internals, so DeepSpeed is pinned exactly.

Called by the train loop (save, resume) and by evaluation and export (`read_tensors`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phi3v_dist.parallel.mesh import Mesh
from shards.atomic import write_atomically
from shards.format import BadInputError

META = "meta.json"
COMPLETE = "COMPLETE"
LATEST = "latest"
BEST = "best"

_FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is. step: optimizer steps done; rows: packed rows of the plan consumed by them, all that
    is needed to go on.
    """

    step: int = 0
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    bad_samples: int = 0


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint must know of its model. config: fields of Phi3VConfig. tokenizer_dir: its files are
    copied.
    """

    config: dict[str, Any]
    num_crops: int
    tokenizer_dir: Path


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def save(
    engine: Any,
    folder: Path,
    progress: Progress,
    card: ModelCard,
    run: dict[str, Any],
    mesh: Mesh,
    keep_last: int,
    is_best: bool = False,
) -> Path:
    """Writes FOLDER/step-N from all ranks together and returns its path; then removes all but the `keep_last`
    newest and the best.

    is_best: `best` names it from then on. run: what else to keep (the resolved configuration, versions).
    Raises BadInputError on every rank if any rank could not write; what was there before is untouched.
    """
    target = folder / checkpoint_name(progress.step)
    partial = folder / f".{target.name}.partial"

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def publish() -> None:
        _publish(engine, partial, target, progress, card, run, {n: s for n, s, _ in written})
        if is_best:
            point_at_best(target)
        _remove_old(folder, keep_last)

    mesh.on_main(lambda: _writing(target, prepare))
    name = f"rank-{mesh.rank:05d}.safetensors"
    size, fault = 0, None
    try:
        save_file(_slices(engine), partial / name)
        with (partial / name).open("rb+") as stream:
            os.fsync(stream.fileno())
        size = (partial / name).stat().st_size
    except (OSError, SafetensorError) as error:
        fault = f"rank {mesh.rank}: {error}"
    written = mesh.gather((name, size, fault))
    faults = [each for _, _, each in written if each is not None]
    if faults:
        raise BadInputError(_cannot_write(target, faults[0]))
    mesh.on_main(lambda: _writing(target, publish))
    return target


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, None if there is none. A damaged one is passed over,
    aloud.
    """
    for target in sorted(folder.glob("step-*"), reverse=True):
        fault = _fault(target)
        if fault is None:
            return target
        _log.warning("%s: not used: %s; falling back to the one before", target, fault)
    return None


def best(folder: Path) -> Path | None:
    """The checkpoint that `point_at_best` named last, None if there is none or it is not whole."""
    try:
        target = folder / (folder / BEST).read_text().strip()
    except OSError:
        return None
    return target if _fault(target) is None else None


def point_at_best(target: Path) -> None:
    """Names `target` the best checkpoint of its folder; it is kept until another is better."""
    write_atomically(target.parent / BEST, f"{target.name}\n".encode())


def load(engine: Any, target: Path, mesh: Mesh) -> Progress:
    """Fills weights and optimizer of `engine` from a checkpoint of any world size, bit for bit.

    Raises BadInputError if it is of another model or damaged.
    """
    meta = read_meta(target)
    optimizer = engine.optimizer.optimizer
    with ExitStack() as stack:
        reader = _Slices(target, meta, stack)
        ours = {name: parameter.ds_numel for name, parameter in engine.module.named_parameters()}
        theirs = {name: math.prod(entry["shape"]) for name, entry in meta["parameters"].items()}
        if ours != theirs:
            different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
            raise BadInputError(
                f"{target}: of another model: {len(different)} parameters differ, the first is "
                f"{different[0]} ({theirs.get(different[0])} elements there, {ours.get(different[0])} here)"
            )
        for name, parameter, flat, offset, count in _trainable(engine):
            state = optimizer.state[flat]
            for kind in _MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(flat.data)
                reader.fill(f"{kind}/{name}", state[kind].narrow(0, offset, count), mesh.rank)
            state["step"] = torch.tensor(float(meta["adam_steps"]))
            master = flat.data.narrow(0, offset, count)
            reader.fill(f"master/{name}", master, mesh.rank)
            parameter.ds_tensor.data.copy_(master)
        for name, parameter in _frozen(engine):
            reader.fill(f"frozen/{name}", parameter.ds_tensor.data.view(-1), mesh.rank)
    for group, stored in zip(optimizer.param_groups, meta["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    persistent = engine.optimizer.persistent_parameters
    if persistent:  # whole on every rank: made anew from the slices
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
    return Progress(**meta["progress"])


def read_meta(target: Path) -> dict[str, Any]:
    """The content of meta.json. Raises BadInputError if `target` is no complete checkpoint of this format."""
    fault = _fault(target)
    if fault is not None:
        raise BadInputError(f"{target}: {fault}")
    meta: dict[str, Any] = json.loads((target / META).read_text())
    if meta["format"] != _FORMAT:
        raise BadInputError(f"{target}: checkpoint format {meta['format']}, this program reads {_FORMAT}")
    return meta


def read_tensors(target: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every parameter whole: the float32 master weights, frozen ones in their own dtype. One at a
    time.
    """
    meta = read_meta(target)
    with ExitStack() as stack:
        reader = _Slices(target, meta, stack)
        for name, entry in meta["parameters"].items():
            kind = "frozen" if entry["frozen"] else "master"
            yield name, reader.whole(f"{kind}/{name}", math.prod(entry["shape"])).view(entry["shape"])


def _slices(engine: Any) -> dict[str, torch.Tensor]:
    state = engine.optimizer.optimizer.state
    out = {}
    for name, _, flat, offset, count in _trainable(engine):
        out[f"master/{name}"] = flat.data.narrow(0, offset, count).cpu().clone()
        for kind in _MOMENTS:
            moment = state[flat].get(kind)
            part = torch.zeros(count) if moment is None else moment.narrow(0, offset, count).cpu().clone()
            out[f"{kind}/{name}"] = part
    for name, parameter in _frozen(engine):
        out[f"frozen/{name}"] = parameter.ds_tensor.data.view(-1).cpu().clone()
    return out


def _trainable(engine: Any) -> Iterator[tuple[str, Any, torch.Tensor, int, int]]:
    """(name, parameter, flat float32 partition, offset of its slice in it, elements of the slice) of each."""
    zero = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for number, group in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in group:
            count = parameter.partition_numel()
            yield names[parameter], parameter, zero.fp32_partitioned_groups_flat[number], offset, count
            offset += count


def _frozen(engine: Any) -> Iterator[tuple[str, Any]]:
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter


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


def _publish(
    engine: Any,
    partial: Path,
    target: Path,
    progress: Progress,
    card: ModelCard,
    run: dict[str, Any],
    files: dict[str, int],
) -> None:
    groups = [
        {k: v for k, v in group.items() if isinstance(v, int | float | bool | str | list | tuple | None)}
        for group in engine.optimizer.optimizer.param_groups
    ]
    steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values() if "step" in state}
    if len(steps) > 1:
        raise RuntimeError(f"Adam's step differs between parameters: {sorted(steps)}")
    meta = {
        "format": _FORMAT,
        "progress": asdict(progress),
        "adam_steps": max(steps, default=0.0),
        "world_size": len(files),
        "files": files,
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in groups],
        "parameters": {
            name: {"shape": list(p.ds_shape), "frozen": not p.requires_grad}
            for name, p in engine.module.named_parameters()
        },
        "model_config": card.config,
        "num_crops": card.num_crops,
        "run": run,
    }
    for file in sorted(card.tokenizer_dir.glob("*token*.json")):
        shutil.copyfile(file, partial / file.name)
    write_atomically(partial / META, (json.dumps(meta, indent=1) + "\n").encode())
    write_atomically(partial / COMPLETE, b"")
    if target.exists():  # of an earlier attempt at this step that was found damaged
        shutil.rmtree(target)
    os.replace(partial, target)
    write_atomically(target.parent / LATEST, f"{target.name}\n".encode())


def _remove_old(folder: Path, keep_last: int) -> None:
    kept = best(folder)
    for old in sorted(folder.glob("step-*"), reverse=True)[keep_last:]:
        if old == kept:
            continue
        # Its name goes first, so that a half-deleted one is never taken for a checkpoint.
        doomed = old.with_name(f".{old.name}.partial")
        os.replace(old, doomed)
        shutil.rmtree(doomed)
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _fault(target: Path) -> str | None:
    """Why `target` is no complete checkpoint; None if it is one."""
    if not target.is_dir():
        return "no such checkpoint"
    if not (target / COMPLETE).exists():
        return f"incomplete (no {COMPLETE})"
    try:
        meta = json.loads((target / META).read_text())
        for name, size in meta["files"].items():
            found = (target / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, {size} were written"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"damaged ({error})"
    return None


def _writing(target: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except OSError as error:
        raise BadInputError(_cannot_write(target, str(error))) from error


def _cannot_write(target: Path, fault: str) -> str:
    return f"{target}: cannot be written ({fault}); make room, earlier checkpoints are intact"
