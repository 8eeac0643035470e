"""Which parameters learn, how fast, and when: frozen groups, adapters, parameter groups, the learning-rate
schedule. Names and arithmetic.

Called by the train loop, and by what works out its memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from phi3v_dist.config import Group, ModelConfig, TrainConfig
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import expected_shapes
from phi3v_dist.model.lora import adapter_shapes, add_lora
from phi3v_dist.model.modeling import Phi3VForCausalLM

_VISION = "model.vision_embed_tokens.img_processor."
Shape = tuple[int, ...]
_PROJECTOR = "model.vision_embed_tokens."


def group_of(name: str) -> Group:
    """The group of a parameter by its official name: vision tower, projector (with the separators),
    decoder.
    """
    if name.startswith(_VISION):
        return "vision"
    return "projector" if name.startswith(_PROJECTOR) else "decoder"


def freeze(model: torch.nn.Module, groups: Sequence[Group]) -> None:
    """Stops the parameters of `groups` from learning."""
    for name, parameter in model.named_parameters():
        if group_of(name) in groups:
            parameter.requires_grad_(False)


def choose_learning(model: Phi3VForCausalLM, config: ModelConfig, seed: int) -> None:
    """Stops what `config` freezes, and puts its adapters in place: of their parts nothing else learns."""
    freeze(model, config.freeze)
    if config.lora is None:
        return
    parts = config.lora.parts
    others = [p for n, p in model.named_parameters() if p.requires_grad and group_of(n) not in parts]
    add_lora(model, parts, config.lora.rank, config.lora.alpha, seed)
    for parameter in others:
        parameter.requires_grad_(True)


def shapes_of(config: ModelConfig, model: Phi3VConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Name -> shape of the tensors that learn under `config`, and of those that do not."""
    learning: dict[str, Shape] = {}
    still: dict[str, Shape] = {}
    last = model.clip_config().num_hidden_layers - 1
    tower = f"{_VISION}vision_model."
    dead = (f"{tower}encoder.layers.{last}.", f"{tower}post_layernorm.")
    shapes = expected_shapes(model)
    fixed = [*config.freeze, *(config.lora.parts if config.lora else [])]
    for name, shape in shapes.items():
        (still if group_of(name) in fixed or name.startswith(dead) else learning)[name] = shape
    if config.lora is not None:
        alive = {name: shape for name, shape in shapes.items() if not name.startswith(dead)}
        learning |= adapter_shapes(alive, config.lora.parts, config.lora.rank)
    return learning, still


def parameter_groups(model: torch.nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups of the parameters that learn: by group and, within it, with and without weight decay.

    Vectors (norms, biases, separators) are not decayed. Each group has "name" and "lr_scale" for the
    schedule.
    """
    found: dict[tuple[Group, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
            matrix = sum(side > 1 for side in shape) > 1
            found.setdefault((group_of(name), matrix), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": f"{group}{'' if matrix else ' vectors'}",
            "lr_scale": config.lr_scale.get(group, 1.0),
            "lr": config.lr * config.lr_scale.get(group, 1.0),
            "weight_decay": config.weight_decay if matrix else 0.0,
        }
        for (group, matrix), parameters in sorted(found.items(), key=lambda item: item[0])
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


def group_rates(engine: Any) -> dict[str, float]:
    """The learning rate of each group (vision, projector, decoder) of a DeepSpeed engine that learns."""
    return {
        str(group["name"]).removesuffix(" vectors"): group["lr"] for group in engine.optimizer.param_groups
    }
