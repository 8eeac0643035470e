"""How long a step takes on 8 to 1,024 GPUs, worked out from bandwidths before any is rented. Pure arithmetic.

In: the run's settings, the model's config, a GPU with its links. Out: seconds of a step and where they go.
Counted: arithmetic at a given part of the peak, ZeRO-3's gathers and reductions (beside the arithmetic, so
only what is longer than it shows), Ulysses' exchanges and those of the vision features (not beside it), the
optimizer. Not counted: waiting for data, ranks with more work than others, checkpoints, evaluation. Nothing
is fitted to measurements of ours; give the `perf/hfu` of a run as the efficiency, once there is one. Called
by `phi3v estimate --scaling`.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phi3v_dist.budget.flops import RowShape, by_name, known_peak, row_flops
from phi3v_dist.budget.memory import fullest_row, sizes_of
from phi3v_dist.config import RunConfig
from phi3v_dist.model.configuration import Phi3VConfig
from phi3v_dist.tracking.report.charts import Curve, chart
from shards.common.errors import BadInputError

GB = 1e9
_USABLE = 0.8  # of a link's bandwidth, for large messages
_HOP_S = 5e-6  # from one GPU to the next in a ring
_OPTIMIZER_BYTES = 30  # of an element: gradient, weight and moments read, weights and moments written
_HBM, _HOST = 2e12, 25e9  # bytes/s of a GPU's memory, and of its share of the host's and of PCIe
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Cluster:
    """peak: FLOP/s of a GPU, dense bf16. inside, across: bytes/s of one GPU in one direction, to the others
    of its node and to other nodes. efficiency: part of the peak that arithmetic reaches, recomputation
    counted.
    """

    peak: float
    inside: float
    across: float
    gpus_per_node: int = 8
    efficiency: float = 0.5

    def gather(self, size: float, ranks: int) -> float:
        """Seconds until each of `ranks` neighbours has all of `size` bytes that lie spread over them; a
        reduction that ends spread takes as long.
        """
        local = min(ranks, self.gpus_per_node)
        nodes = -(-ranks // self.gpus_per_node)
        within = size * (local - 1) / local / self.inside
        between = size * (nodes - 1) / nodes / (self.across * local)
        return max(within, between) / _USABLE + (ranks - 1) * _HOP_S

    def exchange(self, size: float, ranks: int) -> float:
        """Seconds of an all-to-all in which each of `ranks` has `size` bytes, of which it keeps one part."""
        link = self.inside if ranks <= self.gpus_per_node else self.across
        return size * (ranks - 1) / ranks / link / _USABLE + (_HOP_S if ranks > 1 else 0.0)


# Links of one GPU in one direction, GB/s, from data sheets: NVLink or PCIe, and one network adapter for each
# GPU, as clouds and vendors build them (400 Gbit/s for H100 and later, 200 for A100, 100 without NVLink).
_PCIE = (25.0, 12.5)
_LINKS = {"A100": (300, 25), "A800": (200, 25), "H100": (450, 50), "H100 PCIe": _PCIE, "H100 NVL": _PCIE,
          "H200": (450, 50), "H800": (200, 50),
          "GH200": (450, 50), "B200": (900, 50), "MI300X": (448, 50)}  # fmt: skip


def cluster(
    gpu: str, efficiency: float = 0.5, inside: float | None = None, across: float | None = None
) -> Cluster:
    """Nodes of eight of a GPU by its name. inside, across: GB/s, where the table is not right. Raises
    BadInputError for an unknown GPU.
    """
    peak = known_peak(gpu)
    if peak is None:
        raise BadInputError(f"no GPU {gpu!r} is known; name one such as A100, H100, H200, B200, L40S")
    usual = by_name(_LINKS, gpu) or _PCIE
    return Cluster(peak * 1e12, (inside or usual[0]) * GB, (across or usual[1]) * GB, efficiency=efficiency)


@dataclass(frozen=True)
class Step:
    """A step on `gpus` GPUs. rows: packed rows in it. seconds: of the step; the rest says where they go: zero
    is all of ZeRO's communication, of which hidden goes on beside the arithmetic.
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
        """Of the whole step."""
        return self.compute + self.zero - self.hidden + self.exchange + self.optimizer

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens a second of one GPU."""
        return self.tokens / self.seconds / self.gpus

    def mfu(self, cluster: Cluster) -> float:
        """Model FLOP/s as a part of the GPUs' peak."""
        return self.model_flops / self.seconds / self.gpus / cluster.peak


def step_time(config: RunConfig, model: Phi3VConfig, cluster: Cluster, gpus: int) -> Step:
    """A step of full rows, each one document that is half pictures, on `gpus` ranks."""
    sp, size = config.parallel.sp, 2 if config.model.dtype == "bfloat16" else 4
    dp = gpus // sp
    accumulation = -(-config.train.global_batch // dp)
    rows, length = accumulation * dp, config.data.seq_len
    pictures, views = (count // 2 for count in fullest_row(config, model))
    flops = row_flops(config, model, RowShape([length], max(1, views), length // 8))
    sizes, layers = sizes_of(config, model), model.num_hidden_layers
    compute = accumulation * flops.hardware / sp / (cluster.peak * cluster.efficiency)

    # Weights are gathered for forward and for backward, a layer at a time; gradients reduced in float32.
    parts = layers + 1
    gathered = cluster.gather(sizes.total * size / parts, gpus)
    reduced = cluster.gather(sizes.learning * 4 / parts, gpus)
    zero = accumulation * parts * (2 * gathered + reduced)
    seen = accumulation * (gathered + reduced)  # the first and the last have nothing beside them
    hidden = min(compute, zero - seen)

    kv = (model.num_key_value_heads or model.num_attention_heads) / model.num_attention_heads
    state = length / sp * model.hidden_size * size
    passes = 3 if config.model.gradient_checkpointing else 2
    ulysses = passes * layers * (cluster.exchange(state * (1 + 2 * kv), sp) + cluster.exchange(state, sp))
    features = 2 * cluster.gather(length / 2 * model.hidden_size * size, sp) if pictures and sp > 1 else 0.0

    each = sizes.learning / gpus
    if config.parallel.offload_optimizer == "none":
        optimizer = each * _OPTIMIZER_BYTES / _HBM
    else:
        optimizer = each * (_OPTIMIZER_BYTES + 4 + size) / _HOST
    exchange = accumulation * (ulysses + features)
    model_flops = rows * flops.model
    return Step(gpus, rows, rows * length, compute, zero, hidden, exchange, optimizer, model_flops)


def steps(config: RunConfig, model: Phi3VConfig, cluster: Cluster) -> Iterator[Step]:
    """A step at each size that parallel.sp divides."""
    for gpus in SIZES:
        if gpus % config.parallel.sp == 0:
            yield step_time(config, model, cluster, gpus)


def describe_scaling(config: RunConfig, model: Phi3VConfig, cluster: Cluster) -> list[str]:
    """The table, and what it leaves out."""
    found = list(steps(config, model, cluster))
    lines = [
        f"peak {cluster.peak / 1e12:.0f} TFLOP/s at {cluster.efficiency:.0%}, {cluster.inside / GB:.0f} GB/s "
        f"in a node of {cluster.gpus_per_node}, {cluster.across / GB:.1f} GB/s for each GPU between nodes",
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
            f"from {grown[0]} GPUs on a step has more rows than "
            f"train.global_batch={config.train.global_batch}: at least one for each data-parallel rank"
        )
    lines.append(
        "an estimate from bandwidths; waiting for data, uneven ranks, saves and evaluation come on top"
    )
    return lines


def plot(config: RunConfig, model: Phi3VConfig, cluster: Cluster) -> str:
    """A page with tokens/s of one GPU over the number of GPUs (its binary logarithm), with and without what
    communication takes.
    """
    found = list(steps(config, model, cluster))
    alone = [(s.gpus.bit_length() - 1.0, s.tokens / (s.compute + s.optimizer) / s.gpus) for s in found]
    real: Sequence[tuple[float, float]] = [(s.gpus.bit_length() - 1.0, s.tokens_per_gpu) for s in found]
    curves = [
        Curve("arithmetic alone", alone, 1, dashed=True),
        Curve("with communication", real, 0, dots=True),
    ]
    figure = chart("tokens a second of one GPU", curves, unit="log2 GPUs")
    text = html.escape("\n".join(describe_scaling(config, model, cluster)))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Scaling on paper</title><style>"
        "body{font:14px system-ui;max-width:760px;margin:2em auto}svg{width:100%;font-size:11px}"
        ".grid{stroke:#ddd}figure{margin:0}.legend i{display:inline-block;width:1.5em;margin:0 .4em 3px 1em}"
        f"</style><h1>{html.escape(config.name)}: scaling on paper</h1>{figure}<pre>{text}</pre></html>"
    )
