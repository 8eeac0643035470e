"""Which parameters belong to the vision tower, the projector and the decoder, and which are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phi3v_dist.config import Group, ModelConfig
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import expected_shapes
from phi3v_dist.model.lora import adapter_shapes, add_lora
from phi3v_dist.model.modeling import Phi3VForCausalLM

_VISION = "model.vision_embed_tokens.img_processor."
Shape = tuple[int, ...]
_PROJECTOR = "model.vision_embed_tokens."


def group_of(name: str) -> Group:
    """The group of a parameter by its published name: vision tower, projector (with the separators) or
    decoder.
    """
    if name.startswith(_VISION):
        return "vision"
    return "projector" if name.startswith(_PROJECTOR) else "decoder"


def freeze(model: torch.nn.Module, groups: Sequence[Group]) -> None:
    """Freezes the parameters of `groups`."""
    for name, parameter in model.named_parameters():
        if group_of(name) in groups:
            parameter.requires_grad_(False)


def choose_learning(model: Phi3VForCausalLM, config: ModelConfig, seed: int) -> None:
    """Freezes the groups that `config` names, and adds its LoRA adapters; in the parts that have adapters
    only these are trained. seed: of the adapters' first values.
    """
    freeze(model, config.freeze)
    if config.lora is None:
        return
    parts = config.lora.parts
    others = [p for n, p in model.named_parameters() if p.requires_grad and group_of(n) not in parts]
    add_lora(model, parts, rank=config.lora.rank, alpha=config.lora.alpha, seed=seed)
    for parameter in others:
        parameter.requires_grad_(True)


def shapes_of(config: ModelConfig, model: Phi3VConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Name -> shape of the tensors that are trained under `config`, and of those that are not."""
    trained: dict[str, Shape] = {}
    frozen: dict[str, Shape] = {}
    last = model.clip_config().num_hidden_layers - 1
    tower = f"{_VISION}vision_model."
    unused = (f"{tower}encoder.layers.{last}.", f"{tower}post_layernorm.")
    shapes = expected_shapes(model)
    fixed = [*config.freeze, *(config.lora.parts if config.lora else [])]
    for name, shape in shapes.items():
        (frozen if group_of(name) in fixed or name.startswith(unused) else trained)[name] = shape
    if config.lora is not None:
        used = {name: shape for name, shape in shapes.items() if not name.startswith(unused)}
        trained |= adapter_shapes(used, config.lora.parts, config.lora.rank)
    return trained, frozen
