"""Whole weights on every rank, for generation: whether they fit into memory, and the copy itself.

ZeRO-3 gathers every layer for every token; a copy that is gathered once makes generation fast.
"""

from __future__ import annotations

import logging
import math
import socket
from typing import Any

import psutil
import torch

from phi3v_dist.engine.gather import fill_from_engine
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import build_model, expected_shapes
from phi3v_dist.model.lora import merge_lora, same_adapters
from phi3v_dist.model.modeling import Phi3VForCausalLM
from phi3v_dist.parallel.mesh import Mesh
from shards.common.errors import BadInputError

_SPARE = 1.1  # fragmentation, the work of the vision tower, logits
_log = logging.getLogger(__name__)


def bytes_needed(config: Phi3VConfig, dtype: torch.dtype, batch_size: int, *, positions: int) -> int:
    """Bytes of the weights and of the keys and values of `batch_size` sequences of `positions` tokens."""
    weights = sum(math.prod(shape) for shape in expected_shapes(config).values())
    heads = config.num_key_value_heads or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim * batch_size * positions
    return int((weights + cache) * dtype.itemsize * _SPARE)


def bytes_free(mesh: Mesh) -> int:
    """Bytes that this rank may take: of its GPU, or its share of the host's memory."""
    if mesh.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(mesh.device)
        held = torch.cuda.memory_reserved(mesh.device) - torch.cuda.memory_allocated(mesh.device)
        return int(free + held)
    ranks_on_host = mesh.gather(socket.gethostname()).count(socket.gethostname())
    return int(psutil.virtual_memory().available // ranks_on_host)


def keep_whole(
    choice: str, config: Phi3VConfig, dtype: torch.dtype, *, batch_size: int, positions: int, mesh: Mesh
) -> bool:
    """Whether every rank takes the whole weights; the same on all ranks. choice: "auto", "whole" or
    "partitioned".

    Raises BadInputError if there is one process and it has no room for them.
    """
    if choice != "auto":
        return choice == "whole"
    needed, free = bytes_needed(config, dtype, batch_size, positions=positions), bytes_free(mesh)
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


def gather_weights(
    engine: Any, config: Phi3VConfig, dtype: torch.dtype, *, device: torch.device
) -> Phi3VForCausalLM:
    """A plain copy, on `device` of every rank, of the model that the ZeRO-3 `engine` holds in slices;
    adapters are merged. All ranks call it.
    """
    copy: Phi3VForCausalLM = build_model(config, dtype).to(device).eval()
    same_adapters(copy, engine.module)
    fill_from_engine(copy, engine, device)
    return merge_lora(copy)
