"""DeepSpeed as this project uses it: ZeRO stage 3, with the project's own loop around it.

In: the run's configuration and the mesh. Out: DeepSpeed's settings, models whose weights are partitioned as
they are built, and the engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from phi3v_dist.config import RunConfig
from phi3v_dist.engine.buckets import MAX_LIVE, PREFETCH_BUCKET, REDUCE_BUCKET
from phi3v_dist.engine.nvme import swap_dir
from phi3v_dist.engine.partition import full_numel
from phi3v_dist.parallel.mesh import Mesh


def zero_config(config: RunConfig, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed settings of a run. accumulation: micro-steps per optimizer step.

    DeepSpeed averages gradients over all ranks and micro-steps, and the loop scales the loss accordingly.
    DeepSpeed is not told of sequence parallelism: each rank has the gradient of its own positions. Gradients
    are reduced and accumulated in float32.
    """
    parallel = config.parallel
    zero: dict[str, Any] = {
        "stage": 3,
        "reduce_scatter": True,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
        "stage3_max_live_parameters": MAX_LIVE,
        "stage3_max_reuse_distance": MAX_LIVE,
        "stage3_param_persistence_threshold": parallel.persistence_threshold,
    }
    pinned = torch.cuda.is_available()
    if parallel.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    elif parallel.offload_optimizer == "nvme":
        zero["offload_optimizer"] = {
            "device": "nvme",
            "nvme_path": str(swap_dir(config)),
            "pin_memory": pinned,
            "buffer_count": 4,  # float32 weights, their gradients, two moments
        }
    if parallel.offload_params == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.grad_clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too, without a compiler
        "zero_optimization": zero,
    }


def prepare_deepspeed(mesh: Mesh) -> None:
    """Imports DeepSpeed and gives it the existing process group. All ranks call it before anything else of
    this module.

    On the CPU its shared-memory collectives are turned off, because they need a compiler and 24 s at first
    use (DeepSpeed 0.19.8).
    """
    if mesh.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
    # torch 2.13 warns at each call of DeepSpeed's collectives
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    if mesh.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


@contextlib.contextmanager
def partitioned_parameters(settings: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """In this context new parameters are partitioned over the ranks as soon as they exist, in `dtype`.

    settings: the result of `zero_config` or `answering_config`.
    """
    import deepspeed

    # On the CPU zero.Init(dtype=...) always gives bfloat16 (DeepSpeed 0.19.8); a dtype in the settings works.
    precision = {
        name: {**settings.get(name, {}), "enabled": dtype == wanted}
        for name, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16))
    }
    with deepspeed.zero.Init(config_dict_or_path={**settings, **precision}):
        yield


def answering_config(dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed settings of a model that only generates answers."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }


def answering_model(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """`model`, built in `partitioned_parameters`, with hooks that gather its weights in forward."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=answering_config(dtype), dist_init_required=False)
    return engine.module


def make_engine(
    model: torch.nn.Module, groups: list[dict[str, Any]], config: RunConfig, *, accumulation: int
) -> Any:
    """The DeepSpeedEngine for `model`, with AdamW. groups: parameter groups, each with lr and weight_decay.
    accumulation: micro-steps per optimizer step.
    """
    from deepspeed.utils import set_z3_leaf_modules
    from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

    # All weights of a decoder layer are gathered together: a tenth of the hooks and collectives of gathering
    # them module by module. CLIP's layers run several times per forward, and the gradients of such a leaf are
    # reduced after each run: DeepSpeed 0.19.8 stops when it finds a parameter twice in its bucket.
    set_z3_leaf_modules(model, [Phi3DecoderLayer])
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.train.lr,
        betas=(config.train.betas[0], config.train.betas[1]),
        eps=config.train.eps,
        fused=True,
    )
    return initialize(model, optimizer, zero_config(config, accumulation))


def initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """The DeepSpeedEngine for `model`, with any torch optimizer. Raises RuntimeError if it would scale
    gradients otherwise than the loop assumes.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    _check_gradient_scale(engine)
    return engine


def _check_gradient_scale(engine: Any) -> None:
    """Raises RuntimeError unless gradients are averaged once over all ranks, as the loop assumes.

    DeepSpeed 0.19.8 scales them differently below stage 3, without reduce_scatter, and with its own sequence
    parallelism.
    """
    found = {
        "stage": engine.zero_optimization_stage(),
        "reduce_scatter": engine.zero_reduce_scatter(),
        "sequence_parallel_size": int(engine.optimizer.sequence_parallel_size),
        "averaged over ranks": torch.distributed.get_world_size(engine.optimizer.dp_process_group),
        "predivide": float(engine.gradient_predivide_factor()),
    }
    wanted = {
        "stage": 3,
        "reduce_scatter": True,
        "sequence_parallel_size": 1,
        "averaged over ranks": torch.distributed.get_world_size(),
        "predivide": 1.0,
    }
    if found != wanted:
        raise RuntimeError(f"DeepSpeed would scale gradients differently: {found}, expected {wanted}")


def partitioned_fraction(engine: Any, mesh: Mesh) -> float:
    """The fraction of the trained weights that this rank keeps: 1 / ranks and some padding.

    Raises RuntimeError if it is more, because ZeRO-3 has then not partitioned them.
    """
    held = sum(engine.optimizer.fp16_partitioned_groups_flat_numel)
    total = sum(full_numel(p) for group in engine.optimizer.fp16_groups for p in group)
    if held > total / mesh.size * 1.05 + len(engine.optimizer.fp16_groups) * 4096:
        raise RuntimeError(
            f"ZeRO-3 keeps {held:,} of {total:,} weights on one of {mesh.size} ranks; not partitioned"
        )
    return float(held / total)
