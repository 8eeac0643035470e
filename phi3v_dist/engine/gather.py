"""The weights in one piece on every rank, for generation: do they fit, and getting them there.

ZeRO-3 gathers every layer for every token; a copy gathered once is what makes generation fast. In: an engine
or a source. Out: a plain model, or the news that there is no room. Called by evaluation.
"""

from __future__ import annotations

import logging
import math
import socket
from typing import Any

import psutil
import torch
import torch.distributed as dist

from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import build_model, expected_shapes
from phi3v_dist.model.lora import merge_lora, same_adapters
from phi3v_dist.parallel.mesh import Mesh
from shards.common.errors import BadInputError

_SPARE = 1.1  # fragmentation, the tower at work, logits
_TOGETHER = 64 * 2**20  # elements of this rank in one collective
_log = logging.getLogger(__name__)


def bytes_needed(config: Phi3VConfig, dtype: torch.dtype, batch_size: int, positions: int) -> int:
    """Bytes of the weights and of the keys and values of `batch_size` sequences of `positions` tokens."""
    weights = sum(math.prod(shape) for shape in expected_shapes(config).values())
    heads = config.num_key_value_heads or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim * batch_size * positions
    return int((weights + cache) * dtype.itemsize * _SPARE)


def bytes_free(mesh: Mesh) -> int:
    """Bytes that this rank may take: of its GPU, else its share of the host's."""
    if mesh.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(mesh.device)
        held = torch.cuda.memory_reserved(mesh.device) - torch.cuda.memory_allocated(mesh.device)
        return int(free + held)
    neighbours = mesh.gather(socket.gethostname()).count(socket.gethostname())
    return int(psutil.virtual_memory().available // neighbours)


def keep_whole(
    choice: str, config: Phi3VConfig, dtype: torch.dtype, batch_size: int, positions: int, mesh: Mesh
) -> bool:
    """Whether every rank takes the weights whole; the same on all ranks. choice: "auto", "whole" or
    "partitioned".

    Raises BadInputError if one process alone has no room for them.
    """
    if choice != "auto":
        return choice == "whole"
    needed, free = bytes_needed(config, dtype, batch_size, positions), bytes_free(mesh)
    fits = mesh.sum([float(needed > free)])[0] == 0
    if not fits and mesh.size == 1:
        raise BadInputError(
            f"answering needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; use more ranks "
            "(torchrun), or a smaller batch size"
        )
    if not fits:
        _log.warning(
            "answering with whole weights needs %.1f GB, %.1f GB are free: every layer is gathered for every "
            "token instead, which is slow", needed / 1e9, free / 1e9,
        )  # fmt: skip
    return fits


def gather_weights(engine: Any, config: Phi3VConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """A plain copy, on `device` of every rank, of the model that the ZeRO-3 `engine` holds in parts; adapters
    are merged.

    The slices of many parameters travel together: DeepSpeed's own gathering takes a collective and two hooks
    for each.
    """
    copy = build_model(config, dtype).to(device).eval()
    same_adapters(copy, engine.module)
    pairs = list(zip(copy.parameters(), engine.module.parameters(), strict=True))
    with torch.no_grad():
        while pairs:
            together = [pairs.pop(0)]
            kind, size = together[0][1].ds_tensor.dtype, together[0][1].ds_tensor.numel()
            while pairs and pairs[0][1].ds_tensor.dtype == kind and size < _TOGETHER:
                size += pairs[0][1].ds_tensor.numel()
                together.append(pairs.pop(0))
            _gather([plain for plain, _ in together], [parts for _, parts in together], device)
    return merge_lora(copy)


def _gather(plain: list[torch.Tensor], parts: list[Any], device: torch.device) -> None:
    """Fills `plain` from the slices that the ranks keep of `parts`: flat, the last one padded at its end
    (DeepSpeed 0.19.8). They may be in host memory (parallel.offload_params); NCCL takes those of `device`.
    """
    own = torch.cat([part.ds_tensor.data.view(-1).to(device) for part in parts])
    everyone = own.new_empty(dist.get_world_size() * own.numel())
    dist.all_gather_into_tensor(everyone, own)
    everyone = everyone.view(dist.get_world_size(), own.numel())
    offset = 0
    for whole, part in zip(plain, parts, strict=True):
        width = part.ds_tensor.numel()
        flat = everyone[:, offset : offset + width].reshape(-1)[: part.ds_numel]
        whole.copy_(flat.view(whole.shape))
        offset += width
