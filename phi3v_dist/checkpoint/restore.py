"""Loads a trained model from a run, a checkpoint, or a directory in the published layout.

The name of a run may be followed by one of its checkpoints: `runs/x:best`, `runs/x:latest`, `runs/x:1500`.
Out: a model on this rank's device, whole or partitioned over the ranks by ZeRO-3, and its processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from phi3v_dist.checkpoint import read as checkpoint
from phi3v_dist.checkpoint.meta import META
from phi3v_dist.engine.partition import Partition, fill_slice, is_partitioned
from phi3v_dist.engine.zero import answering_config, answering_model, partitioned_parameters
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import build_model, load_config, load_weights
from phi3v_dist.model.modeling import Phi3VForCausalLM
from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.processor.tokenizer import load_tokenizer
from phi3v_dist.run.layout import CHECKPOINTS
from shards.common.errors import BadInputError


@dataclass(frozen=True)
class Source:
    """directory: a checkpoint, or a directory in the published layout. step: of a checkpoint, else None."""

    directory: Path
    step: int | None

    @property
    def is_checkpoint(self) -> bool:
        return self.step is not None


@dataclass(frozen=True)
class Restored:
    """A model in eval mode and what it needs to answer. partitioned: whether each rank holds a slice of every
    weight (ZeRO-3); then all ranks must call the model together.
    """

    model: Phi3VForCausalLM
    config: Phi3VConfig
    processor: Phi3VProcessor
    device: torch.device
    dtype: torch.dtype
    partitioned: bool = False


def find_source(named: str | Path) -> Source:
    """The source that `named` names: a checkpoint, a model directory, or a run. RUN and RUN:latest are its
    newest complete checkpoint; RUN:best and RUN:STEP another one.

    Raises BadInputError if `named` is none of these, or if the run has no such checkpoint.
    """
    path, which = _split(named)
    if (path / CHECKPOINTS).is_dir():
        path = _checkpoint(path, which)
    elif which is not None:
        raise BadInputError(f"{named}: {path} is not a run, so it has no checkpoint {which!r}")
    if (path / META).exists():
        return Source(path, checkpoint.read_meta(path).progress.step)
    if (path / "config.json").exists():
        return Source(path, None)
    raise BadInputError(
        f"{path}: neither a run, nor a checkpoint ({META}), nor a model directory (config.json)"
    )


def _split(named: str | Path) -> tuple[Path, str | None]:
    """(path, which checkpoint); a path that exists is not divided, even if it contains a colon."""
    if Path(named).exists():
        return Path(named), None
    head, colon, which = str(named).rpartition(":")
    return (Path(head), which) if colon and head else (Path(named), None)


def _checkpoint(run_dir: Path, which: str | None) -> Path:
    """A checkpoint of a run: latest (or None), best or a step. Raises BadInputError if there is none."""
    folder = run_dir / CHECKPOINTS
    if which in (None, "latest"):
        newest = checkpoint.newest(folder)
        if newest is None:
            raise BadInputError(f"{run_dir}: this run has no complete checkpoint yet")
        return newest
    if which == "best":
        best = checkpoint.best(folder)
        if best is None:
            raise BadInputError(
                f"{run_dir}: no best checkpoint; one is kept once an evaluation in training has "
                "eval.best_metric"
            )
        return best
    step = (which or "").removeprefix("step-")
    if not step.isdigit():
        raise BadInputError(f"{run_dir}:{which}: name a checkpoint as best, latest or a step, such as 1500")
    target = folder / checkpoint.checkpoint_name(int(step))
    if not target.is_dir():
        there = ", ".join(sorted(p.name.removeprefix("step-").lstrip("0") for p in folder.glob("step-*")))
        raise BadInputError(f"{run_dir}: no checkpoint of step {int(step)}; there are: {there or 'none'}")
    return target


def restore(source: Source, device: torch.device | str, dtype: torch.dtype) -> Restored:
    """The whole model of `source` on `device` in `dtype`. Raises BadInputError if `source` is damaged."""
    config = model_config(source)
    model = build_model(config, dtype)
    _fill(model, source)
    return Restored(model.to(device).eval(), config, processor(source), torch.device(device), dtype)


def restore_partitioned(source: Source, device: torch.device, dtype: torch.dtype) -> Restored:
    """The model of `source` with its weights partitioned over all ranks by ZeRO-3.

    All ranks call it, after `engine.zero.prepare_deepspeed`. Raises BadInputError if `source` is damaged.
    """
    config = model_config(source)
    with partitioned_parameters(answering_config(dtype), dtype):
        model = build_model(config, dtype)
    _fill(model, source)
    model = answering_model(model, dtype).eval()
    return Restored(model, config, processor(source), device, dtype, partitioned=True)


def _fill(model: Phi3VForCausalLM, source: Source) -> None:
    if not source.is_checkpoint:
        load_weights(model, source.directory)
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in checkpoint.read_tensors(source.directory):
            parameter = parameters.pop(name)
            if is_partitioned(parameter):
                fill_slice(parameter, partial(_slice_of, tensor))
            else:
                parameter.copy_(tensor)
    if parameters:
        raise BadInputError(
            f"{source.directory}: has no tensor {next(iter(parameters))}; it is of another model"
        )


def _slice_of(tensor: torch.Tensor, partition: Partition) -> torch.Tensor:
    return tensor.reshape(-1)[partition.start : partition.stop]


def answer_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def restore_for_answers(source: Source) -> Restored:
    """The whole model, on the GPU if there is one, in `answer_dtype`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return restore(source, device, answer_dtype(device))


def model_config(source: Source) -> Phi3VConfig:
    """The configuration of the model of `source`. Raises BadInputError."""
    if source.is_checkpoint:
        return Phi3VConfig(**checkpoint.read_meta(source.directory).model_config)
    return load_config(source.directory)


def processor(source: Source) -> Phi3VProcessor:
    """The tokenizer and image processor of `source`."""
    if not source.is_checkpoint:
        return Phi3VProcessor.from_pretrained(source.directory)
    meta = checkpoint.read_meta(source.directory)
    tokenizer = load_tokenizer(source.directory)
    return Phi3VProcessor(tokenizer=tokenizer, num_crops=meta.num_crops, tile=model_config(source).tile)
