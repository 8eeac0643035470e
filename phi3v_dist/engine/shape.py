"""Shapes of parameters that ZeRO-3 may have partitioned."""

from __future__ import annotations

import torch


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, also where this rank keeps only a slice of it (DeepSpeed 0.19.8)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
