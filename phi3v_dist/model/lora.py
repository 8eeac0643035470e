"""LoRA by the names of the model's parts, through PEFT's layers: for one GPU and for debugging.

`add_lora` puts adapters beside the linear layers of the chosen parts, in place: the model stays what it is,
so rows, ZeRO-3, generation and checkpoints go through it as ever. `plain_name` and `update` let a checkpoint
be read as if the learnt updates were in the weights; `merge_lora` adds them to a whole model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from phi3v_dist.model.modeling import Phi3VForCausalLM
from shards.common.errors import BadInputError

_TOWER = "model.vision_embed_tokens.img_processor."
PARTS = {
    "decoder": "model.layers.",  # qkv_proj, o_proj, gate_up_proj, down_proj
    "projector": "model.vision_embed_tokens.img_projection.",
    "vision": _TOWER,  # q_proj, k_proj, v_proj, out_proj, fc1, fc2 of the layers that feed something
}
_ADAPTER = "default"  # PEFT's name of the only adapter
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


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
    model: Phi3VForCausalLM, parts: Sequence[str], *, rank: int = 16, alpha: float = 32.0, seed: int = 0
) -> Phi3VForCausalLM:
    """Puts adapters on `parts` of `model` and returns it; from then on nothing learns but them. They change
    nothing yet (B is zero); A is drawn from `seed`, alike on every rank.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora_targets(model, parts)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return model


def has_adapters(model: Phi3VForCausalLM) -> bool:
    """Whether `add_lora` has been called on it (PEFT notes its configuration there)."""
    return bool(getattr(model, "peft_config", None))


def same_adapters(copy: Phi3VForCausalLM, model: Phi3VForCausalLM) -> None:
    """Puts such adapters on `copy` as `model` has, if it has any; their values are not copied."""
    if not has_adapters(model):
        return
    from peft import inject_adapter_in_model

    inject_adapter_in_model(model.peft_config[_ADAPTER], copy)


def merge_lora(model: Phi3VForCausalLM) -> Phi3VForCausalLM:
    """Adds the updates to the weights of a whole `model` and takes the adapters, if any, away, in place."""
    if not has_adapters(model):
        return model
    from peft.tuners.lora import LoraLayer

    adapted = [(name, each) for name, each in model.named_modules() if isinstance(each, LoraLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    model.peft_config = {}
    return model


def plain_name(name: str) -> str:
    """The name of a parameter without PEFT's insertions: of a weight under an adapter the published one, of
    an adapter `LAYER.lora_A.weight`, as in PEFT's files.
    """
    return name.replace(".base_layer.", ".").replace(f".{_ADAPTER}.weight", ".weight")


def is_adapter(name: str) -> bool:
    """Whether a plain name is one of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def adapters_of(name: str) -> tuple[str, str]:
    """Plain names of the two factors that belong to the weight `name`."""
    layer = name.removesuffix(".weight")
    return layer + LORA_A, layer + LORA_B


def update(a: torch.Tensor, b: torch.Tensor, *, rank: int, alpha: float) -> torch.Tensor:
    """What an adapter adds to its weight. a: [rank, in], b: [out, rank] -> [out, in]."""
    return (alpha / rank) * (b @ a)


def adapter_shapes(
    shapes: Mapping[str, tuple[int, ...]], parts: Iterable[str], rank: int
) -> dict[str, tuple[int, ...]]:
    """Plain names and shapes of the adapters that `add_lora` makes. shapes: of the weights that feed
    something, under their published names.
    """
    found: dict[str, tuple[int, ...]] = {}
    prefixes = tuple(PARTS[part] for part in parts)
    for name, shape in shapes.items():
        is_linear = len(shape) == 2 and name.endswith(".weight") and ".embeddings." not in name
        if is_linear and name.startswith(prefixes):
            a, b = adapters_of(name)
            found[a], found[b] = (rank, shape[1]), (shape[0], rank)
    return found
