"""Configurations that cannot work are refused before weights are loaded: shapes, ranks, paths, memory.

In: the configurations of the run and of the model, the number of ranks, a GPU's memory where it is known.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from phi3v_dist.budget.memory import advice, estimate
from phi3v_dist.config import RunConfig
from phi3v_dist.model.configuration import Phi3VConfig
from shards.common.errors import BadInputError


def check_limits(config: RunConfig, model: Phi3VConfig, ranks: int, *, gpu_bytes: int | None) -> None:
    """gpu_bytes: memory of one GPU, None where it is not known (then memory is not checked).

    Raises BadInputError, naming the key to change: a row longer than the model's positions, parallel.sp that
    does not divide the heads or the ranks, a configuration that does not fit into gpu_bytes.
    """
    check_shapes(config, model, ranks)
    if gpu_bytes is None:
        return
    needed = estimate(config, model, ranks)
    if needed.without_reserve > gpu_bytes:
        raise BadInputError(
            f"a GPU of {gpu_bytes / 1e9:.0f} GB cannot hold this configuration, which needs "
            f"{needed.total / 1e9:.0f} GB: "
            f"{'; '.join(advice(config, model, ranks, gpu_bytes=gpu_bytes))}; see `phi3v estimate`"
        )


def check_shapes(config: RunConfig, model: Phi3VConfig, ranks: int) -> None:
    """The part of `check_limits` that does not look at memory. Raises BadInputError."""
    sp = config.parallel.sp
    if config.data.seq_len > model.max_position_embeddings:
        raise BadInputError(
            f"data.seq_len={config.data.seq_len} is more than the model's {model.max_position_embeddings} "
            "positions (max_position_embeddings); lower it"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model, name)
        if heads % sp:
            good = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise BadInputError(f"parallel.sp={sp} does not divide the model's {name}={heads}; use {good}")
    if ranks % sp:
        raise BadInputError(
            f"parallel.sp={sp} does not divide the {ranks} ranks of this job; use a divisor of {ranks}, or "
            "another number of GPUs"
        )


def check_offload_path(config: RunConfig) -> None:
    """Raises BadInputError if parallel.offload_path is set and this process cannot write there."""
    path = config.parallel.offload_path
    if path is None:
        return
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as probe:
            probe.write(b"phi3v")
    except OSError as error:
        raise BadInputError(
            f"parallel.offload_path={path}: cannot write there ({os.strerror(error.errno or 0)}); give a "
            "directory on a local disk of every node"
        ) from error
