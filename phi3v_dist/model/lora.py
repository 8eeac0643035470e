"""LoRA by the names of the model's parts, through PEFT: for one GPU and for debugging.

`add_lora` wraps the linear layers of the chosen parts; everything else stands still. `merge_lora` adds the
learnt updates into the weights, so that `hub.write_hub_directory` exports an ordinary checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from phi3v_dist.model.modeling import Phi3VForCausalLM
from shards.format import BadInputError

_TOWER = "model.vision_embed_tokens.img_processor."
PARTS = {
    "decoder": "model.layers.",  # qkv_proj, o_proj, gate_up_proj, down_proj
    "projector": "model.vision_embed_tokens.img_projection.",
    "vision": _TOWER,  # q_proj, k_proj, v_proj, out_proj, fc1, fc2 of the layers that feed something
}


def lora_targets(model: Phi3VForCausalLM, parts: Sequence[str]) -> list[str]:
    """Full names of the linear layers of `parts` (keys of PARTS) that take part in forward.

    lm_head is never among them: its forward computes the loss, which an adapter around it would miss. Raises
    BadInputError for an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise BadInputError(f"no part {part!r} to put LoRA on; choose among {', '.join(PARTS)}")
    prefixes = tuple(PARTS[part] for part in parts)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefixes) and not _is_dead(module)
    ]


def _is_dead(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def add_lora(
    model: Phi3VForCausalLM, parts: Sequence[str], rank: int = 16, alpha: int = 32, dropout: float = 0.0
) -> Any:
    """The PEFT model around `model`; forward (also of a packed row), generate and gradients go through it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_targets(model, parts),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def merge_lora(peft_model: Any) -> Phi3VForCausalLM:
    """The model with the updates added to its weights, under the published names, no adapters left."""
    with torch.no_grad():
        merged = peft_model.merge_and_unload()
    assert isinstance(merged, Phi3VForCausalLM)
    return merged
