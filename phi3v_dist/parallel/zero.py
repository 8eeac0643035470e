"""DeepSpeed as this project uses it: ZeRO stage 3, its own loop around it.

In: the run's configuration and the mesh. Out: the configuration dict and the engine. Called by the train
loop.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from phi3v_dist.config import RunConfig
from phi3v_dist.parallel.mesh import Mesh


def zero_config(config: RunConfig, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. accumulation: micro-steps of an optimizer step.

    DeepSpeed averages gradients over ranks and micro-steps; the loop scales the loss accordingly.
    reduce_scatter stays on: without it ZeRO-3 scales gradients otherwise.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.train.grad_clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "reduce_scatter": True,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": config.parallel.persistence_threshold,
        },
    }


def prepare_deepspeed(mesh: Mesh) -> None:
    """Imports DeepSpeed and hands it the process group that exists. On the CPU without its compiled
    extension.

    The shared-memory collectives of the CPU build need a compiler and 24 s at first use (DeepSpeed 0.19.8).
    """
    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # torch 2.13 on DeepSpeed's collectives, each call
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    if mesh.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


def make_engine(
    model: torch.nn.Module, groups: list[dict[str, Any]], config: RunConfig, accumulation: int
) -> Any:
    """The DeepSpeedEngine around `model`, with AdamW over the parameter `groups` (lr and weight_decay in
    each).
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer
    from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

    # A layer's weights are gathered together: a tenth of the hooks and collectives of module by module.
    set_z3_leaf_modules(model, [Phi3DecoderLayer, CLIPEncoderLayer])
    optimizer = torch.optim.AdamW(
        groups, lr=config.train.lr, betas=(config.train.betas[0], config.train.betas[1]), eps=config.train.eps
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=zero_config(config, accumulation), dist_init_required=False
    )
    return engine


def partitioned_fraction(engine: Any, mesh: Mesh) -> float:
    """Elements of the trainable weights that this rank keeps, as a part of all: 1 / ranks and some padding.

    Raises RuntimeError if it is more, that is if ZeRO-3 has not partitioned them.
    """
    held = sum(flat.numel() for flat in engine.optimizer.fp32_partitioned_groups_flat)
    total = sum(p.ds_numel for group in engine.optimizer.fp16_groups for p in group)
    if held > total / mesh.size * 1.05 + len(engine.optimizer.fp16_groups) * 4096:
        raise RuntimeError(
            f"ZeRO-3 keeps {held:,} of {total:,} weights on one of {mesh.size} ranks; not partitioned"
        )
    return float(held / total)
