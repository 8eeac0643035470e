"""How much memory a configuration needs on each GPU, worked out before one is asked for. Pure arithmetic.

In: the model's config, the run's settings, a number of GPUs. Out: bytes per component. Sizes follow from the
shapes of this implementation (checkpointing per decoder layer, chunked loss, vision in chunks); what the
allocator and the libraries take on top is one flat allowance. Not yet held against a GPU: take it as a guide.
Called by `phi3v estimate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3v_dist.config import RunConfig
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.hub import expected_shapes
from phi3v_dist.optim import group_of

_RESERVE = 3 * 2**30  # CUDA context, NCCL buffers, fragmentation
_CHUNK = 4096  # positions of the loss head at a time, at most


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU by component, in the order of the table; total is their sum."""

    components: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.components.values())


def estimate(config: RunConfig, model: Phi3VConfig, gpus: int) -> Estimate:
    """Memory of one of `gpus` data-parallel ranks that train rows of data.seq_len tokens."""
    size = 2 if config.model.dtype == "bfloat16" else 4
    total = learning = largest = 0
    for name, shape in expected_shapes(model).items():
        numel = 1
        for side in shape:
            numel *= side
        total += numel
        largest = max(largest, numel)
        learning += 0 if group_of(name) in config.model.freeze else numel
    tokens, hidden = config.data.seq_len, model.hidden_size
    layer = 4 * hidden * hidden + 3 * hidden * model.intermediate_size
    # One decoder layer at work: residual, norms, q k v and their rotated copies, attention's output, gate, up
    # their product, and the gradients of the widest.
    layer_work = tokens * (10 * hidden + 5 * model.intermediate_size) * size
    checkpointed = config.model.gradient_checkpointing
    kept = model.num_hidden_layers * (tokens * hidden * size if checkpointed else layer_work)
    clip = model.clip_config()
    patches = (clip.image_size // clip.patch_size) ** 2 + 1
    chunk_work = (
        config.model.vision_chunk * patches * (8 * clip.hidden_size + 2 * clip.intermediate_size) * size
    )
    # Pictures fill a row at most; a view of 12 x 12 tokens and its separators costs about 150.
    views = tokens // max(1, (clip.image_size // clip.patch_size // 2) ** 2)
    chunks = -(-views // config.model.vision_chunk)
    vision = chunk_work if checkpointed else chunk_work * chunks * clip.num_hidden_layers
    features = views * patches * clip.hidden_size * size + views * 3 * clip.image_size**2 * (1 + size)
    return Estimate(
        {
            "weights": total * size // gpus,
            "weights gathered for a layer": 2 * max(layer, largest) * size if gpus > 1 else 0,
            "gradients": learning * size // gpus,
            "optimizer (fp32 master, two moments)": learning * 12 // gpus,
            "layer inputs" if checkpointed else "activations": kept,
            "one decoder layer at work": layer_work if checkpointed else 0,
            "vision": vision + features,
            "loss head": min(tokens, _CHUNK) * model.vocab_size * (size + 4),
            "reserve": _RESERVE,
        }
    )


def describe(found: Estimate, gpu_bytes: int) -> list[str]:
    """The table, and whether it fits into `gpu_bytes`."""
    lines = [f"{name:38} {value / 1e9:8.2f} GB" for name, value in found.components.items()]
    fits = (
        "fits"
        if found.total <= gpu_bytes
        else "does not fit: use more GPUs, a shorter data.seq_len or model.freeze"
    )
    lines.append(f"{'total on each GPU':38} {found.total / 1e9:8.2f} GB of {gpu_bytes / 1e9:.0f} GB: {fits}")
    return lines
