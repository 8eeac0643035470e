"""LoRA on chosen parts of the model, with PEFT's layers: for one GPU and for debugging.

`add_lora` replaces the linear layers of the chosen parts by layers with adapters, in place. The model keeps
its class, so packed rows, ZeRO-3, generation and checkpoints work without changes. With `plain_name` and
`update` a checkpoint can be read as if the updates were merged; `merge_lora` merges them in a model.
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
    "vision": _TOWER,  # q_proj, k_proj, v_proj, out_proj, fc1, fc2 of the layers that are used
}
_ADAPTER = "default"  # the name that PEFT gives to the first adapter
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"


def lora_targets(model: Phi3VForCausalLM, parts: Sequence[str]) -> list[str]:
    """Full names of the linear layers of `parts` (keys of PARTS) that forward uses.

    lm_head is never one of them: its forward computes the loss, and an adapter would be left out there.
    Raises BadInputError for an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise BadInputError(f"LoRA has no part {part!r}; choose among {', '.join(PARTS)}")
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
    """Puts adapters on `parts` of `model`, freezes everything else, and returns `model`.

    The output does not change yet, because B is zero; A is random from `seed`, the same on every rank. Raises
    BadInputError for an unknown part.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora_targets(model, parts)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return model


def has_adapters(model: Phi3VForCausalLM) -> bool:
    """Whether `add_lora` has been called on `model`: PEFT stores its configuration there."""
    return bool(getattr(model, "peft_config", None))


def same_adapters(copy: Phi3VForCausalLM, model: Phi3VForCausalLM) -> None:
    """Puts adapters like those of `model`, if it has any, on `copy`. Their values are not copied."""
    if not has_adapters(model):
        return
    from peft import inject_adapter_in_model

    inject_adapter_in_model(model.peft_config[_ADAPTER], copy)


def merge_lora(model: Phi3VForCausalLM) -> Phi3VForCausalLM:
    """Adds the updates to the weights of `model`, which is not partitioned, and removes the adapters, in
    place. Does nothing without adapters.
    """
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
    """The name of a parameter without PEFT's insertions: the published name of a weight that has an adapter,
    and `LAYER.lora_A.weight` for the adapter, as in PEFT's files.
    """
    return name.replace(".base_layer.", ".").replace(f".{_ADAPTER}.weight", ".weight")


def is_adapter(name: str) -> bool:
    """Whether a plain name is that of an adapter's factor."""
    return name.endswith((LORA_A, LORA_B))


def adapters_of(name: str) -> tuple[str, str]:
    """Plain names (of A, of B) of the adapter's two factors for the weight `name`."""
    layer = name.removesuffix(".weight")
    return layer + LORA_A, layer + LORA_B


def update(a: torch.Tensor, b: torch.Tensor, *, rank: int, alpha: float) -> torch.Tensor:
    """What an adapter adds to its weight, [out, in]. a: [rank, in]; b: [out, rank]."""
    return (alpha / rank) * (b @ a)


def adapter_shapes(
    shapes: Mapping[str, tuple[int, ...]], parts: Iterable[str], rank: int
) -> dict[str, tuple[int, ...]]:
    """Plain names and shapes of the adapters that `add_lora` makes. shapes: of the weights that forward uses,
    by published name.
    """
    found: dict[str, tuple[int, ...]] = {}
    prefixes = tuple(PARTS[part] for part in parts)
    for name, shape in shapes.items():
        is_linear = len(shape) == 2 and name.endswith(".weight") and ".embeddings." not in name
        if is_linear and name.startswith(prefixes):
            a, b = adapters_of(name)
            found[a], found[b] = (rank, shape[1]), (shape[0], rank)
    return found
