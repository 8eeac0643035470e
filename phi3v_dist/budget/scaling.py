"""The time of a step on 8 to 1,024 GPUs, computed from bandwidths before any GPU is rented. Pure arithmetic.

In: the run's settings, the model's config, a GPU with its links. Out: seconds of a step and where they go.
Counted: arithmetic at a given fraction of the peak; ZeRO-3's gathers and reductions, which overlap with the
arithmetic, so that only the excess counts; the exchanges of Ulysses and of the vision features, which do not
overlap; the optimizer. Not counted: waiting for data, uneven work between ranks, checkpoints, evaluation.
Nothing is fitted to our own measurements. Once a run has a `perf/hfu`, use it as the efficiency.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from phi3v_dist.budget.flops import RowShape, by_name, known_peak, row_flops
from phi3v_dist.budget.memory import fullest_row, sizes_of
from phi3v_dist.config import RunConfig
from phi3v_dist.model.configuration import Phi3VConfig
from shards.common.errors import BadInputError

GB = 1e9
_USABLE = 0.8  # fraction of a link's bandwidth that large messages reach
_HOP_S = 5e-6  # latency from one GPU to the next in a ring
_OPTIMIZER_BYTES = 30  # per element: gradient, weight, moments read; weights and moments written
_HBM, _HOST = 2e12, 25e9  # bytes/s: a GPU's memory; its share of the host's memory and of PCIe
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Cluster:
    """peak: FLOP/s of a GPU, dense bf16. inside, across: bytes/s of one GPU in one direction, to the other
    GPUs of its node and to other nodes. efficiency: fraction of the peak that arithmetic reaches, with
    recomputation counted as arithmetic.
    """

    peak: float
    inside: float
    across: float
    gpus_per_node: int = 8
    efficiency: float = 0.5

    def gather(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather after which each of `ranks` ranks has all `size` bytes. A reduce-scatter
        of `size` bytes takes as long.
        """
        local = min(ranks, self.gpus_per_node)
        nodes = -(-ranks // self.gpus_per_node)
        within = size * (local - 1) / local / self.inside
        between = size * (nodes - 1) / nodes / (self.across * local)
        return max(within, between) / _USABLE + (ranks - 1) * _HOP_S

    def exchange(self, size: float, ranks: int) -> float:
        """Seconds of an all-to-all in which each of `ranks` ranks has `size` bytes and keeps its own part."""
        link = self.inside if ranks <= self.gpus_per_node else self.across
        return size * (ranks - 1) / ranks / link / _USABLE + (_HOP_S if ranks > 1 else 0.0)


# (inside a node, between nodes): GB/s of one GPU in one direction, from data sheets. NVLink or PCIe, and one
# network adapter per GPU, as is usual (400 Gbit/s for H100 and later, 200 for A100, 100 without NVLink).
_PCIE = (25.0, 12.5)
_LINKS = {"A100": (300, 25), "A800": (200, 25), "H100": (450, 50), "H100 PCIe": _PCIE, "H100 NVL": _PCIE,
          "H200": (450, 50), "H800": (200, 50),
          "GH200": (450, 50), "B200": (900, 50), "MI300X": (448, 50)}  # fmt: skip


def cluster(
    gpu: str, *, efficiency: float = 0.5, inside: float | None = None, across: float | None = None
) -> Cluster:
    """Nodes of eight GPUs of this name. inside, across: GB/s of the links; None: from the table.

    Raises BadInputError for an unknown GPU.
    """
    peak = known_peak(gpu)
    if peak is None:
        raise BadInputError(f"no GPU {gpu!r} is known; name one such as A100, H100, H200, B200, L40S")
    usual = by_name(_LINKS, gpu) or _PCIE
    return Cluster(peak * 1e12, (inside or usual[0]) * GB, (across or usual[1]) * GB, efficiency=efficiency)


@dataclass(frozen=True)
class StepTime:
    """A step on `gpus` GPUs. rows, tokens: in the step. Seconds: compute, zero (all of ZeRO's communication),
    hidden (the part of `zero` that overlaps with compute), exchange (sequence parallelism), optimizer.
    model_flops: FLOPs of the step without recomputation.
    """

    gpus: int
    rows: int
    tokens: int
    compute: float
    zero: float
    hidden: float
    exchange: float
    optimizer: float
    model_flops: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.zero - self.hidden + self.exchange + self.optimizer

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens per second of one GPU."""
        return self.tokens / self.seconds / self.gpus

    def mfu(self, cluster: Cluster) -> float:
        """Model FLOP/s as a fraction of the GPUs' peak."""
        return self.model_flops / self.seconds / self.gpus / cluster.peak


def step_time(config: RunConfig, model: Phi3VConfig, cluster: Cluster, *, gpus: int) -> StepTime:
    """The time of a step on `gpus` ranks; each row is full, and is one document that is half images."""
    sp, size = config.parallel.sp, 2 if config.model.dtype == "bfloat16" else 4
    dp = gpus // sp
    accumulation = -(-config.train.global_batch // dp)
    rows, length = accumulation * dp, config.data.seq_len
    images, views = (count // 2 for count in fullest_row(config, model))
    flops = row_flops(config, model, RowShape([length], views=max(1, views), targets=length // 8))
    sizes, layers = sizes_of(config, model), model.num_hidden_layers
    compute = accumulation * flops.hardware / sp / (cluster.peak * cluster.efficiency)

    # Per layer: weights are gathered for forward and for backward, gradients are reduced in float32.
    parts = layers + 1
    gathered = cluster.gather(sizes.total * size / parts, gpus)
    reduced = cluster.gather(sizes.learning * 4 / parts, gpus)
    zero = accumulation * parts * (2 * gathered + reduced)
    seen = accumulation * (gathered + reduced)  # the first gather and the last reduction overlap with nothing
    hidden = min(compute, zero - seen)

    kv = (model.num_key_value_heads or model.num_attention_heads) / model.num_attention_heads
    state = length / sp * model.hidden_size * size
    passes = 3 if config.model.gradient_checkpointing else 2
    ulysses = passes * layers * (cluster.exchange(state * (1 + 2 * kv), sp) + cluster.exchange(state, sp))
    features = 2 * cluster.gather(length / 2 * model.hidden_size * size, sp) if images and sp > 1 else 0.0

    each = sizes.learning / gpus
    if config.parallel.offload_optimizer == "none":
        optimizer = each * _OPTIMIZER_BYTES / _HBM
    else:
        optimizer = each * (_OPTIMIZER_BYTES + 4 + size) / _HOST
    return StepTime(
        gpus=gpus,
        rows=rows,
        tokens=rows * length,
        compute=compute,
        zero=zero,
        hidden=hidden,
        exchange=accumulation * (ulysses + features),
        optimizer=optimizer,
        model_flops=rows * flops.model,
    )


def step_times(config: RunConfig, model: Phi3VConfig, cluster: Cluster) -> Iterator[StepTime]:
    """The time of a step at each of SIZES that parallel.sp divides."""
    for gpus in SIZES:
        if gpus % config.parallel.sp == 0:
            yield step_time(config, model, cluster, gpus=gpus)


def describe_scaling(config: RunConfig, model: Phi3VConfig, cluster: Cluster) -> list[str]:
    """The lines of a table of step times, and what they leave out."""
    found = list(step_times(config, model, cluster))
    lines = [
        f"peak {cluster.peak / 1e12:.0f} TFLOP/s at {cluster.efficiency:.0%}, {cluster.inside / GB:.0f} GB/s "
        f"in a node of {cluster.gpus_per_node}, {cluster.across / GB:.1f} GB/s per GPU between nodes",
        f"{'GPUs':>5} {'rows':>5} {'step s':>8} {'compute':>8} {'ZeRO':>7} {'shown':>7} {'sp':>7} "
        f"{'optim.':>7} {'tokens/s/GPU':>13} {'MFU':>5} {'of first':>8}",
    ]
    for step in found:
        lines.append(
            f"{step.gpus:5} {step.rows:5} {step.seconds:8.2f} {step.compute:8.2f} {step.zero:7.2f} "
            f"{step.zero - step.hidden:7.2f} {step.exchange:7.2f} {step.optimizer:7.3f} "
            f"{step.tokens_per_gpu:13,.0f} {step.mfu(cluster):5.0%} "
            f"{step.tokens_per_gpu / found[0].tokens_per_gpu:8.0%}"
        )
    grown = [step.gpus for step in found if step.rows > config.train.global_batch]
    if grown:
        lines.append(
            f"from {grown[0]} GPUs on, a step has more rows than "
            f"train.global_batch={config.train.global_batch}: at least one per data-parallel rank"
        )
    lines.append(
        "an estimate from bandwidths; waiting for data, uneven ranks, saves and evaluation are not included"
    )
    return lines
