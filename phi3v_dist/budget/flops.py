"""The arithmetic of a packed row, and the fraction of the GPU's peak that a run reaches.

Model FLOPs are those that training needs: forward and backward, attention inside documents (half of the
square, because it is causal), the vision tower on real views, the loss head on supervised positions. Hardware
FLOPs add what checkpointing computes again (but not what an attention kernel recomputes inside). A
multiply-add is two FLOPs. Norms, softmax and similar operations are not counted, as is usual.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from phi3v_dist.config import RunConfig
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.row import PackedRow

Entry = TypeVar("Entry")

# Dense bf16 TFLOP/s from the vendors' data sheets, by a part of the device's name (the longest that matches).
PEAK_TFLOPS = {
    "B200": 2250.0, "GH200": 989.0, "H200": 989.0, "H100": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0,
    "H800": 989.0, "A100": 312.0, "A800": 312.0, "A40": 150.0, "A30": 165.0, "A10": 125.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0, "MI300X": 1307.0,
}  # fmt: skip


@dataclass(frozen=True)
class RowShape:
    """lengths: tokens of each document, without padding. views: tiles and global views. targets: supervised
    positions.
    """

    lengths: Sequence[int]
    views: int
    targets: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward. model: without recomputation. hardware: with it."""

    model: float
    hardware: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.hardware + other.hardware)


def utilisation(
    flops: Flops, seconds: float, gpus: int, *, peak: float | None
) -> dict[str, float | int | None]:
    """The metrics perf/* of `flops` done in `seconds` by `gpus` GPUs. peak: TFLOP/s of one GPU.

    TFLOP/s per GPU, and as a fraction of the peak: perf/mfu counts model FLOPs, perf/hfu hardware FLOPs; both
    are None without a known peak.
    """
    rates = Flops(*(value / seconds / gpus / 1e12 for value in (flops.model, flops.hardware)))
    return {
        "perf/tflops_per_gpu": rates.model,
        "perf/hardware_tflops_per_gpu": rates.hardware,
        "perf/mfu": None if peak is None else rates.model / peak,
        "perf/hfu": None if peak is None else rates.hardware / peak,
    }


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in TFLOP/s; None for a CPU, or a GPU that is not in the table."""
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def known_peak(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in TFLOP/s by its name; None if it is not in the table."""
    return by_name(PEAK_TFLOPS, device_name)


def by_name(table: Mapping[str, Entry], device_name: str) -> Entry | None:
    """The entry of `table` with the longest name that `device_name` contains as whole words; None without
    one.
    """
    names = [name for name in table if re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", device_name)]
    return table[max(names, key=len)] if names else None


def shape_of(row: PackedRow, tokens: int) -> RowShape:
    """The shape of a loaded row. tokens: without padding, which is its last document if there is any."""
    lengths = row.cu_seqlens.diff().tolist()
    if sum(lengths) > tokens:
        lengths = lengths[:-1]
    return RowShape(lengths, views=len(row.tiles) + len(row.grids), targets=row.num_targets)


def row_flops(run: RunConfig, model: Phi3VConfig, shape: RowShape) -> Flops:
    """FLOPs of a row under the run's settings: frozen weights need no gradients."""
    hidden, layers = model.hidden_size, model.num_hidden_layers
    head_dim = hidden // model.num_attention_heads
    heads = model.num_attention_heads + 2 * (model.num_key_value_heads or model.num_attention_heads)
    tokens = float(sum(shape.lengths))
    projections = (heads * head_dim * hidden + hidden * hidden) * tokens * layers
    gate_up = 2 * hidden * model.intermediate_size * tokens * layers
    down = hidden * model.intermediate_size * tokens * layers
    attention = layers * hidden * float(sum(length * length for length in shape.lengths))
    head = float(hidden * model.vocab_size * shape.targets)

    clip = model.clip_config()
    patches = (clip.image_size // clip.patch_size) ** 2
    linear = 4 * clip.hidden_size**2 + 2 * clip.hidden_size * clip.intermediate_size
    per_view = linear * (patches + 1) + 2 * clip.hidden_size * (patches + 1) ** 2
    tower = float((clip.num_hidden_layers - 1) * per_view * shape.views)
    pixels = float(patches * clip.patch_size**2 * 3 * clip.hidden_size * shape.views)
    tower_last = (clip.num_hidden_layers - 1) * clip.hidden_size * clip.intermediate_size * (patches + 1)
    projector_in = 4.0 * clip.hidden_size * hidden * (patches // 4) * shape.views
    projector_out = float(hidden * hidden * (patches // 4) * shape.views)

    frozen = run.model.freeze
    adapted = run.model.lora.parts if run.model.lora else []
    tower_learns, projector_learns = "vision" not in frozen, "projector" not in frozen
    # Passes: forward, gradients of inputs, gradients of weights. Adapters are too small to count.
    decoder_passes = 2 if "decoder" in (*frozen, *adapted) else 3
    tower_passes = (2 if "vision" in adapted else 3) if tower_learns else 1
    projector_passes = 1 + (projector_learns and "projector" not in adapted)
    used = (
        decoder_passes * (projections + gate_up + down + head)
        + 3 * attention
        + tower_passes * tower
        + (1 + tower_learns) * pixels
        + (projector_passes + tower_learns) * projector_in
        + (projector_passes + (tower_learns or projector_learns)) * projector_out
    )
    again = head  # the loss head computes its logits twice
    if run.model.gradient_checkpointing:
        # Recomputation stops at the last tensor that backward needs, so the last product is left out.
        again += projections + attention + gate_up
        again += down if run.parallel.tile_mlp else 0.0
        in_chunks = shape.views > run.views_per_call
        if tower_learns:
            again += tower - tower_last * shape.views
            again += (pixels + tower + projector_in) if in_chunks else 0.0
        elif projector_learns:
            again += projector_in if in_chunks else 0.0
    elif run.parallel.tile_mlp:
        again += gate_up + down
    return Flops(2.0 * used, 2.0 * (used + again))
