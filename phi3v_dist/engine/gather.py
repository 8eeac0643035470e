"""Gathers whole weights from the slices of a ZeRO-3 engine, on every rank.

In: an engine, and a plain model with the same parameters. Out: the plain model, filled. One collective
gathers the slices of many parameters; DeepSpeed's own gathering needs a collective and two hooks for each
parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from phi3v_dist.engine.partition import full_numel, join, local_slice

_TOGETHER = 64 * 2**20  # elements of a rank in one collective


def fill_from_engine(plain: torch.nn.Module, engine: Any, device: torch.device) -> None:
    """Fills the parameters of `plain`, which is on `device`, from those of `engine`. All ranks call it.

    Both must have the same parameters in the same order. Values are cast to the dtype of `plain`.
    """
    pairs = list(zip(plain.parameters(), engine.module.parameters(), strict=True))
    with torch.no_grad():
        while pairs:
            together = [pairs.pop(0)]
            first = local_slice(together[0][1])
            kind, size = first.dtype, first.numel()
            while pairs and (own := local_slice(pairs[0][1])).dtype == kind and size < _TOGETHER:
                size += own.numel()
                together.append(pairs.pop(0))
            _gather([whole for whole, _ in together], [part for _, part in together], device)


def _gather(plain: list[torch.Tensor], parts: list[Any], device: torch.device) -> None:
    """Fills `plain` from the slices that the ranks keep of `parts`. The slices are moved to `device` first:
    they may be in host memory (parallel.offload_params), where NCCL cannot read them.
    """
    own = torch.cat([local_slice(part).to(device) for part in parts])
    ranks = dist.get_world_size()
    everyone = own.new_empty(ranks * own.numel())
    dist.all_gather_into_tensor(everyone, own)
    everyone = everyone.view(ranks, own.numel())
    offset = 0
    for whole, part in zip(plain, parts, strict=True):
        width = local_slice(part).numel()
        whole.copy_(join(everyone[:, offset : offset + width], full_numel(part)).view(whole.shape))
        offset += width
