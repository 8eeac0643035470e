"""How much arithmetic a row is, and what part of the GPU's peak a run reaches. Pure arithmetic.

Model FLOPs are those that training asks for: forward and backward, attention within documents (half of the
square: causal), the tower on real views, the loss head on supervised positions. Hardware FLOPs add what
checkpointing computes a second time (not what an attention kernel recomputes inside). A multiply-add is two
FLOPs. Norms, softmax and the like are left out, as usual. Called by the train loop, `phi3v estimate` and the
benchmarks.
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

# Dense bf16 TFLOP/s from the vendors' data sheets, by a part of the device's name; the longest that fits.
PEAK_TFLOPS = {
    "B200": 2250.0, "GH200": 989.0, "H200": 989.0, "H100": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0,
    "H800": 989.0, "A100": 312.0, "A800": 312.0, "A40": 150.0, "A30": 165.0, "A10": 125.0, "L40S": 362.0,
    "L40": 181.0, "L4": 121.0, "MI300X": 1307.0,
}  # fmt: skip


@dataclass(frozen=True)
class RowShape:
    """lengths: tokens of each document, without padding. views: tiles and global views. targets: positions
    that are to be predicted.
    """

    lengths: Sequence[int]
    views: int
    targets: int


@dataclass(frozen=True)
class Flops:
    """Of one row, forward and backward. model: what training asks for; hardware: with recomputation."""

    model: float
    hardware: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.hardware + other.hardware)


def utilisation(flops: Flops, seconds: float, gpus: int, peak: float | None) -> dict[str, float | int | None]:
    """Metrics of `flops` done in `seconds` by `gpus`: TFLOP/s of each, and as a part of its peak (TFLOP/s).

    perf/mfu counts model FLOPs, perf/hfu hardware FLOPs; both None where the peak is not known.
    """
    rates = Flops(*(value / seconds / gpus / 1e12 for value in (flops.model, flops.hardware)))
    return {
        "perf/tflops_per_gpu": rates.model,
        "perf/hardware_tflops_per_gpu": rates.hardware,
        "perf/mfu": None if peak is None else rates.model / peak,
        "perf/hfu": None if peak is None else rates.hardware / peak,
    }


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device, None if it is no GPU or the table does not know it."""
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def known_peak(device_name: str) -> float | None:
    """The table's peak of a GPU by its name."""
    return by_name(PEAK_TFLOPS, device_name)


def by_name(table: Mapping[str, Entry], device_name: str) -> Entry | None:
    """The entry whose name is the longest that stands in `device_name` as whole words, None without one."""
    names = [name for name in table if re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", device_name)]
    return table[max(names, key=len)] if names else None


def shape_of(row: PackedRow, tokens: int) -> RowShape:
    """The shape of a loaded row. tokens: without padding (which is the last document, if there is any)."""
    lengths = row.cu_seqlens.diff().tolist()
    if sum(lengths) > tokens:
        lengths = lengths[:-1]
    return RowShape(lengths, len(row.tiles) + len(row.grids), row.num_targets)


def row_flops(run: RunConfig, model: Phi3VConfig, shape: RowShape) -> Flops:
    """FLOPs of a row under the run's settings: what is frozen has no gradients of its own."""
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
    # forward, gradients of inputs, gradients of weights; adapters themselves are too small to count
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
    again = head  # the loss head makes its logits a second time
    if run.model.gradient_checkpointing:
        # What is computed again ends at the last tensor that backward needs: without a last product.
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
