"""The memory that a configuration needs on each GPU and on its host, computed before a run starts.

In: the model's config, the run's settings, a number of GPUs. Out: bytes per component. Sizes follow from the
shapes of this implementation: ZeRO-3 slices, checkpointing per decoder layer, tiles, chunks, sequence
parallelism, offload. Of work that is not done at the same time (the backward pass of a decoder layer, the
loss head, the vision tower, the optimizer step) only the largest counts. Pure arithmetic. `phi3v estimate`
prints it, a run that does not fit is refused by it, and benchmarks/long_context.py compares it with resident
memory on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from phi3v_dist.budget.flops import RowShape, row_flops
from phi3v_dist.config import RunConfig
from phi3v_dist.engine.buckets import MAX_LIVE, REDUCE_BUCKET
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.model.groups import shapes_of
from phi3v_dist.processor.geometry import image_token_count

_SUB_GROUP = 1_000_000_000  # DeepSpeed's default: elements of an optimizer step at a time
_RESERVE = 3 * 2**30  # CUDA context, NCCL buffers, fragmentation


@dataclass(frozen=True)
class Component:
    """gpu, host: bytes on one GPU, and on the host for it. phase: when they are needed, "" for always."""

    name: str
    gpu: int
    host: int = 0
    phase: str = ""


@dataclass(frozen=True)
class Estimate:
    """components: in the order of the table. disk: bytes under parallel.offload_path for one GPU."""

    components: tuple[Component, ...]
    disk: int = 0

    def __getitem__(self, name: str) -> Component:
        """The component of this name."""
        return next(component for component in self.components if component.name == name)

    @property
    def busiest(self) -> str:
        """The phase that needs most memory."""
        phases = {c.phase for c in self.components if c.phase}
        return max(phases, key=self._of)

    def _of(self, phase: str) -> int:
        return sum(c.gpu for c in self.components if c.phase == phase)

    @property
    def total(self) -> int:
        """Bytes on one GPU at the peak."""
        return self._of("") + self._of(self.busiest)

    @property
    def without_reserve(self) -> int:
        """Bytes of tensors on one GPU at the peak: these must fit in any case."""
        return self.total - self["reserve"].gpu

    @property
    def host(self) -> int:
        """Bytes on the host for one GPU, in addition to the process itself and its data workers."""
        return sum(c.host for c in self.components)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters. total: of the model. learning: that are trained. layer: of one decoder layer.
    largest: of the largest tensor.
    """

    total: int
    learning: int
    layer: int
    largest: int


def sizes_of(config: RunConfig, model: Phi3VConfig) -> Sizes:
    """The sizes of a model under the run's `freeze` and `lora`."""
    learning, frozen = ({n: math.prod(s) for n, s in each.items()} for each in shapes_of(config.model, model))
    numels = learning | frozen
    layer = sum(numel for name, numel in numels.items() if name.startswith("model.layers.0."))
    return Sizes(
        total=sum(numels.values()),
        learning=sum(learning.values()),
        layer=layer,
        largest=max(numels.values()),
    )


def fullest_row(config: RunConfig, model: Phi3VConfig) -> tuple[int, int]:
    """(images, views) of a row of data.seq_len tokens that consists of square images only."""
    side = model.tile // model.clip_config().patch_size // 2
    edge = math.isqrt(config.data.num_crops)
    tokens = image_token_count(edge, edge, side)
    images = max(1, config.data.seq_len // tokens)
    return images, images * (edge * edge + 1)


def estimate(
    config: RunConfig,
    model: Phi3VConfig,
    gpus: int,
    *,
    targets: int | None = None,
    images: tuple[int, int] | None = None,
    reserve: int = _RESERVE,
    cuda: bool = True,
) -> Estimate:
    """The memory of one of `gpus` ranks that train on rows of data.seq_len tokens.

    targets: supervised positions of a row; None: an eighth of it. images: (images, views) of a row; None: as
    many as fill it. reserve: bytes that libraries take. cuda: False for ranks on a CPU, where GPU and host
    memory are the same.
    """
    parallel = config.parallel
    size = 2 if config.model.dtype == "bfloat16" else 4
    sizes = sizes_of(config, model)
    held, learning = -(-sizes.total // gpus), -(-sizes.learning // gpus)
    positions = -(-config.data.seq_len // parallel.sp)
    on_host, on_disk = parallel.offload_optimizer != "none", parallel.offload_optimizer == "nvme"
    params_on_host = parallel.offload_params == "cpu"
    gathers = gpus > 1 or params_on_host
    gradients = Component("gradients", learning * 4)
    optimizer = Component("optimizer", learning * 12)
    if on_host:
        gradients = Component("gradients", 0, learning * (4 if on_disk else 8))
        optimizer = Component("optimizer", 0, 0 if on_disk else learning * 12)
    supervised = config.data.seq_len // 8 if targets is None else targets
    found = [
        Component("weights", 0 if params_on_host else held * size, held * size if params_on_host else 0),
        Component("weights gathered", _gathered(sizes, size) if gathers else 0),
        gradients,
        optimizer,
        Component("communication buffers", _buffers(sizes, size)),
        *_layers(config, model, positions, size=size, cuda=cuda),
        _loss_head(model, positions, supervised, size=size),
        *_vision(config, model, images or fullest_row(config, model), size=size),
        # torch's AdamW and the copy of the gradients work on one DeepSpeed sub-group at a time
        Component("optimizer at work", 0 if on_host else 12 * min(learning, _SUB_GROUP), phase="step"),
        Component("reserve", reserve),
    ]
    return Estimate(tuple(found), learning * 16 if on_disk else 0)


def _gathered(sizes: Sizes, size: int) -> int:
    """Bytes of the gathered weights: the layer that is computed, and the next one, which is prefetched."""
    return min(sizes.total, MAX_LIVE, 2 * max(sizes.layer, sizes.largest)) * size


def _buffers(sizes: Sizes, size: int) -> int:
    """Bytes of gradients that wait to be reduced: the bucket in the compute dtype, and its float32 copy."""
    bucket = min(sizes.learning, REDUCE_BUCKET)
    return bucket * size + bucket * (4 if size < 4 else 0)


def _layers(
    config: RunConfig, model: Phi3VConfig, positions: int, *, size: int, cuda: bool
) -> list[Component]:
    """What the decoder layers keep for backward, and the peaks inside one layer: its attention and its MLP.

    positions: of a row, on one rank. size: bytes of a number in the compute dtype.
    """
    hidden, inner, count = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    kv = (model.num_key_value_heads or model.num_attention_heads) / model.num_attention_heads
    state = positions * hidden * size
    qkv, rotated = int(state * (1 + 2 * kv)), int(state * (1 + kv))
    # A norm keeps its normalised input and its output; in bf16 also its input in float32.
    norm = 2 * state + (positions * hidden * 4 if size < 4 else 0)
    # Attention keeps its inputs (exchanged, or projected and rotated) and its output.
    kept = norm + qkv + state + (state if config.parallel.sp > 1 else rotated)
    # In the exchange the projected, rotated, sent and received tensors exist at once; backward takes four
    # states more.
    exchange = qkv + rotated + (2 * qkv if config.parallel.sp > 1 else 0)
    attention = norm + max(exchange, 2 * qkv + rotated + 4 * state) + state
    tile = min(config.parallel.tile_mlp or positions, positions)
    tiled = tile < positions
    sums = 3 * hidden * inner * 4 if tiled else 0  # weight gradients summed over the tiles, in float32
    wide = tile * inner * size
    # Kept: gate, up, activation, product. In backward also their gradients, the residual and the gradients of
    # input and output.
    mlp_kept = norm + state + (0 if tiled else 4 * wide)
    mlp = mlp_kept + (8 if tiled else 4) * wide + sums + 2 * state
    if not config.model.gradient_checkpointing:
        return [
            Component("activations of all layers", count * (kept + mlp_kept)),
            Component("attention", max(0, attention - kept), phase="attention"),
            Component("MLP", mlp - mlp_kept, phase="MLP"),
        ]
    on_gpu, host = count * state, 0
    if config.parallel.offload_checkpoints:
        on_gpu = 2 * state if cuda else 0
        # torch's allocator of pinned memory rounds up to a power of two
        host = count * (1 << (state - 1).bit_length() if cuda else state)
    return [
        Component("layer inputs", on_gpu, host),
        Component("attention", attention, phase="attention"),
        Component("MLP (with what attention keeps)", kept + mlp, phase="MLP"),
    ]


def _loss_head(model: Phi3VConfig, positions: int, targets: int, *, size: int) -> Component:
    """Hidden states of the supervised positions and their gradients, a chunk of logits, the gradient of the
    weight. With sequence parallelism all targets may be on one rank.
    """
    targets = min(targets, positions)
    states = 3 * targets * model.hidden_size * size + positions * model.hidden_size * size
    logits = head_chunk(targets, model) * model.vocab_size * (size + 4)
    return Component("loss head", states + logits + model.vocab_size * model.hidden_size * 4, phase="head")


def head_chunk(targets: int, model: Phi3VConfig) -> int:
    """Positions whose logits the loss head computes at a time: the choice of torch 2.13 on a GPU, which makes
    the logits about half as large as the head's input.
    """
    share = max(1, -(-targets // -(-model.vocab_size // model.hidden_size)))
    return min(targets, (1 << (share - 1).bit_length()) // 2)


def _vision(config: RunConfig, model: Phi3VConfig, images: tuple[int, int], *, size: int) -> list[Component]:
    """The images themselves, and the vision tower: a chunk of views in backward with its layer inputs;
    without checkpointing all activations of all views. images: (images, views) of a row.
    """
    clip = model.clip_config()
    patches = (clip.image_size // clip.patch_size) ** 2 + 1
    count, views = images
    mine = -(-views // config.parallel.sp)
    chunk = min(config.model.vision_chunk, mine)
    pixels = 3 * clip.image_size**2
    raw = (views - count) * pixels + -(-count // config.parallel.sp) * pixels * 4
    token = clip.hidden_size * size
    layer = patches * (12 * token + 3 * clip.intermediate_size * size)
    projector = (patches // 4) * (4 * token + 3 * model.hidden_size * size)
    tokens = mine * (patches // 4) * model.hidden_size * size
    work, kept = 3 * tokens, []
    if "vision" in config.model.freeze and "projector" not in config.model.freeze:
        kept = [Component("features of the frozen tower", mine * (patches - 1) * token)]
    if config.model.gradient_checkpointing:
        work += chunk * (layer + clip.num_hidden_layers * patches * token + projector + pixels * (4 + size))
    else:  # all of it is kept while the decoder is computed
        everything = mine * (layer * (clip.num_hidden_layers - 1) + projector + pixels * (4 + size))
        kept = [Component("activations of the tower", everything)]
    return [Component("images", raw), *kept, Component("vision", work, phase="vision")]


def advice(config: RunConfig, model: Phi3VConfig, gpus: int, *, gpu_bytes: int) -> list[str]:
    """Changes of the config that make it fit into `gpu_bytes`, as lines: up to three changes that suffice
    alone, else one line with the fewest that suffice together.
    """
    changes: list[tuple[str, dict[str, dict[str, object]]]] = []
    parallel = config.parallel
    heads = math.gcd(model.num_attention_heads, model.num_key_value_heads or model.num_attention_heads)
    wider = [sp for sp in range(parallel.sp + 1, gpus + 1) if gpus % sp == 0 and heads % sp == 0]
    if not config.model.gradient_checkpointing:
        changes.append(("model.gradient_checkpointing=true", {"model": {"gradient_checkpointing": True}}))
    changes += [(f"parallel.sp={sp}", {"parallel": {"sp": sp}}) for sp in wider]
    if not parallel.tile_mlp:
        changes.append(("parallel.tile_mlp=4096", {"parallel": {"tile_mlp": 4096}}))
    if config.model.gradient_checkpointing and not parallel.offload_checkpoints:
        changes.append(("parallel.offload_checkpoints=true", {"parallel": {"offload_checkpoints": True}}))
    if parallel.offload_optimizer == "none":
        changes.append(("parallel.offload_optimizer=cpu", {"parallel": {"offload_optimizer": "cpu"}}))
    elif parallel.offload_params == "none" and parallel.offload_optimizer == "cpu":
        changes.append(("parallel.offload_params=cpu", {"parallel": {"offload_params": "cpu"}}))
    if config.model.vision_chunk > 16:
        changes.append(("model.vision_chunk=16", {"model": {"vision_chunk": 16}}))
    changes.append(
        (f"data.seq_len={config.data.seq_len // 2}", {"data": {"seq_len": config.data.seq_len // 2}})
    )
    saved = [
        (estimate(_changed(config, change), model, gpus).total, name, change) for name, change in changes
    ]
    alone = [f"{name} makes it {total / 1e9:.0f} GB" for total, name, _ in saved if total <= gpu_bytes]
    if alone:
        return alone[:3]
    best: dict[str, tuple[str, dict[str, dict[str, object]]]] = {}  # the best value of each key, best first
    for _, name, change in sorted(saved, key=lambda each: ("seq_len" in each[1], each[0])):
        best.setdefault(name.partition("=")[0], (name, change))
    together, names = config, []
    for name, change in best.values():
        together = _changed(together, change)
        names.append(name)
        total = estimate(together, model, gpus).total
        if total <= gpu_bytes:
            return [f"{', '.join(names)} together: {total / 1e9:.0f} GB"]
    return [f"all of {', '.join(names)} (still {total / 1e9:.0f} GB), and more or larger GPUs"]


def _changed(config: RunConfig, change: dict[str, dict[str, object]]) -> RunConfig:
    """change: section -> key -> value."""
    return config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=values) for section, values in change.items()
        }
    )


def describe(config: RunConfig, model: Phi3VConfig, gpus: int, *, gpu_bytes: int) -> list[str]:
    """The lines of `phi3v estimate`: a table in GB, whether it fits into `gpu_bytes`, what to change
    otherwise, and the FLOPs of a step.
    """
    found = estimate(config, model, gpus)
    lines = [f"{'on each of ' + str(gpus) + ' GPU(s), GB':34} {'GPU':>8} {'host':>8}"]
    for component in found.components:
        when = f"  ({component.phase})" if component.phase else ""
        host = f"{component.host / 1e9:8.2f}" if component.host else ""
        lines.append(f"{component.name + when:34} {component.gpu / 1e9:8.2f} {host}".rstrip())
    lines.append(
        f"{'at the peak (' + found.busiest + ')':34} {found.total / 1e9:8.2f} {found.host / 1e9:8.2f}"
    )
    if found.disk:
        lines.append(f"{'on ' + str(config.parallel.offload_path):34} {found.disk / 1e9:8.2f}")
    fits = found.total <= gpu_bytes
    lines.append(
        f"{found.total / 1e9:.1f} GB of {gpu_bytes / 1e9:.0f} GB: {'fits' if fits else 'does not fit'}"
    )
    if not fits:
        lines += [f"  try {change}" for change in advice(config, model, gpus, gpu_bytes=gpu_bytes)]
    lines.append(_work(config, model))
    return lines


def _work(config: RunConfig, model: Phi3VConfig) -> str:
    """A line about the FLOPs of a step whose rows are one document each (the most), half of it images."""
    rows, length = config.train.global_batch, config.data.seq_len
    _, views = fullest_row(config, model)
    flops = row_flops(config, model, RowShape([length], views=views // 2, targets=length // 8))
    return (
        f"a step of {rows} full rows: {rows * flops.model / 1e15:.2f} PFLOP, with recomputation "
        f"{rows * flops.hardware / 1e15:.2f} PFLOP (each row one document, half of it images)"
    )
