"""Parameter groups of the optimizer and the learning-rate schedule. Names and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from phi3v_dist.config import Group, TrainConfig
from phi3v_dist.engine.partition import full_shape
from phi3v_dist.model.groups import group_of

_VECTORS = " vectors"


def parameter_groups(model: torch.nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The optimizer's groups of the parameters that learn: by group and, within it, with and without weight
    decay.

    Vectors (norms, biases, separators) are not decayed. Each group has "name" and "lr_scale" for the
    schedule, and "lr" and "weight_decay" as torch's optimizers read them.
    """
    found: dict[tuple[Group, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = sum(side > 1 for side in full_shape(parameter)) > 1
            found.setdefault((group_of(name), is_matrix), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{group}{'' if is_matrix else _VECTORS}",
            "lr_scale": config.lr_scale.get(group, 1.0),
            "lr": config.lr * config.lr_scale.get(group, 1.0),
            "weight_decay": config.weight_decay if is_matrix else 0.0,
        }
        for (group, is_matrix), parameters in sorted(found.items(), key=lambda item: item[0])
    ]


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`: linear warm-up, then cosine."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, total - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def set_learning_rate(groups: Sequence[dict[str, Any]], rate: float) -> None:
    """Gives every group `rate` times its lr_scale."""
    for group in groups:
        group["lr"] = rate * group["lr_scale"]


def group_rates(groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of each group (vision, projector, decoder) that learns."""
    return {str(group["name"]).removesuffix(_VECTORS): group["lr"] for group in groups}
