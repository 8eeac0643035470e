"""What makes long rows fit into memory: gradient checkpointing, MLPs in tiles, layer inputs in host memory.

All change the use of memory, not the results. `tile_mlp`: an MLP computes a limited number of positions at a
time, forward and backward. `offload_checkpoints`: the inputs of checkpointed layers are kept in host memory
until backward. `save_memory` turns on what the configuration of a run asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from phi3v_dist.config import RunConfig
from phi3v_dist.model.modeling import Phi3VForCausalLM


def save_memory(model: Phi3VForCausalLM, config: RunConfig) -> None:
    """Turns on gradient checkpointing, offloading of layer inputs and tiled MLPs, as `config` says."""
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        # transformers lets all embeddings require gradients, those of CLIP's patches too: backward would run
        # through a frozen tower for nothing. The text embeddings keep it, for runs with a frozen decoder.
        model.disable_input_require_grads()
        model.get_input_embeddings().register_forward_hook(_require_grad)
        if config.parallel.offload_checkpoints:
            offload_checkpoints(model)
    tile_mlp(model, config.parallel.tile_mlp)


def _require_grad(module: nn.Module, arguments: Any, embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings.requires_grad_(True)


def tile_mlp(model: Phi3VForCausalLM, positions: int) -> None:
    """Makes the MLPs of the decoder compute at most `positions` positions at a time; 0 changes nothing.

    Correct under ZeRO-3 and gradient accumulation: the gradients of an MLP's weights are summed over the
    tiles in float32 before autograd gets them, so each weight receives one gradient per layer, as without
    tiles.
    """
    if not positions:
        return
    for layer in model.model.layers:
        mlp: Any = layer.mlp
        mlp.forward = partial(_tiled, mlp, mlp.forward, positions=positions)


def _tiled(
    mlp: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, *, positions: int
) -> torch.Tensor:
    if hidden[..., 0].numel() <= positions:
        return whole(hidden)
    learning = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    kept = _Kept.apply(hidden)
    out: torch.Tensor = _Tiled.apply(kept, whole, positions, kept.grad_fn, *learning)
    return out


class _Kept(torch.autograd.Function):
    """Returns the input of a tiled MLP, and saves it before the MLP runs.

    The recomputation of a checkpointed layer stops at the last saved tensor. So it leaves out the MLP, whose
    tiles backward computes anyway.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class _Tiled(torch.autograd.Function):
    """Computes whole(hidden) tile by tile; backward computes each tile again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        whole: Callable[[torch.Tensor], torch.Tensor],
        positions: int,
        keeper: Any,
        *learning: torch.Tensor,
    ) -> torch.Tensor:
        ctx.whole, ctx.positions, ctx.keeper, ctx.learning = whole, positions, keeper, learning
        flat = hidden.flatten(0, -2)
        out = torch.empty_like(flat)
        for start in range(0, len(flat), positions):
            out[start : start + positions] = whole(flat[start : start + positions])
        return out.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (hidden,) = ctx.keeper.saved_tensors
        flat, coming = hidden.flatten(0, -2), grads[0].flatten(0, -2)
        going = torch.empty_like(flat)
        sums = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in ctx.learning]
        for start in range(0, len(flat), ctx.positions):
            tile = flat[start : start + ctx.positions].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.whole(tile)
            found = torch.autograd.grad(out, [tile, *ctx.learning], coming[start : start + ctx.positions])
            going[start : start + ctx.positions] = found[0]
            for total, gradient in zip(sums, found[1:], strict=True):
                total.add_(gradient)
        weights = [total.to(p.dtype) for total, p in zip(sums, ctx.learning, strict=True)]
        return going.view_as(hidden), None, None, None, *weights


def offload_checkpoints(model: Phi3VForCausalLM) -> None:
    """Makes the decoder layers keep their inputs in host memory until backward.

    Call it after gradient_checkpointing_enable. On CUDA the copy to the host overlaps with computation.
    """
    streams: dict[torch.device, Any] = {}

    def pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        cuda = tensor.is_cuda
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=cuda)
        if not cuda:
            return tensor.device, kept.copy_(tensor)
        side = streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            kept.copy_(tensor, non_blocking=True)
        tensor.record_stream(side)  # its memory is not reused before the copy has finished
        return tensor.device, kept

    def unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        device, kept = packed
        if device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(streams[device])
        return kept.to(device, non_blocking=True)

    def checkpointed(inner: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return inner(layer, *inputs)

    layer: Any
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = partial(checkpointed, layer._gradient_checkpointing_func)
