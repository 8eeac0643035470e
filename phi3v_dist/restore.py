"""A trained model from whatever names one: a run, a checkpoint, or a directory in the published layout.

Out: a plain model on one device, its tokenizer and processor. Called by evaluation and export.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phi3v_dist import checkpoint
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import build_model, load_config, load_weights
from phi3v_dist.model.modeling import Phi3VForCausalLM
from phi3v_dist.processor.processing import Phi3VProcessor
from phi3v_dist.processor.tokenizer import load_tokenizer
from phi3v_dist.rundir import CHECKPOINTS
from shards.format import BadInputError


@dataclass(frozen=True)
class Source:
    """directory: a checkpoint or a directory in the published layout. step: of a checkpoint, else None."""

    directory: Path
    step: int | None

    @property
    def is_checkpoint(self) -> bool:
        return self.step is not None


@dataclass(frozen=True)
class Restored:
    """A model in eval mode and what it needs to answer."""

    model: Phi3VForCausalLM
    config: Phi3VConfig
    processor: Phi3VProcessor


def find_source(path: str | Path) -> Source:
    """A run directory stands for its newest complete checkpoint.

    Raises BadInputError if `path` is none of the three.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir():
        newest = checkpoint.newest(path / CHECKPOINTS)
        if newest is None:
            raise BadInputError(f"{path}: this run has no complete checkpoint yet")
        path = newest
    if (path / checkpoint.META).exists():
        return Source(path, int(checkpoint.read_meta(path)["progress"]["step"]))
    if (path / "config.json").exists():
        return Source(path, None)
    raise BadInputError(
        f"{path}: neither a run, nor a checkpoint ({checkpoint.META}), nor a model directory (config.json)"
    )


def restore(source: Source, device: torch.device | str, dtype: torch.dtype) -> Restored:
    """Builds the model of `source` on `device` in `dtype`."""
    config = model_config(source)
    model = build_model(config, dtype)
    if source.is_checkpoint:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in checkpoint.read_tensors(source.directory):
                parameters.pop(name).copy_(tensor)
        if parameters:
            raise BadInputError(f"{source.directory}: no tensor {next(iter(parameters))}; not of this model")
    else:
        load_weights(model, source.directory)
    return Restored(model.to(device).eval(), config, processor(source))


def restore_for_answers(source: Source) -> Restored:
    """On the GPU in bfloat16 if there is one, else on the CPU in float32."""
    if torch.cuda.is_available():
        return restore(source, "cuda", torch.bfloat16)
    return restore(source, "cpu", torch.float32)


def model_config(source: Source) -> Phi3VConfig:
    if source.is_checkpoint:
        return Phi3VConfig(**checkpoint.read_meta(source.directory)["model_config"])
    return load_config(source.directory)


def processor(source: Source) -> Phi3VProcessor:
    if not source.is_checkpoint:
        return Phi3VProcessor.from_pretrained(source.directory)
    meta: dict[str, Any] = checkpoint.read_meta(source.directory)
    tokenizer = load_tokenizer(source.directory)
    return Phi3VProcessor(tokenizer=tokenizer, num_crops=meta["num_crops"], tile=model_config(source).tile)
