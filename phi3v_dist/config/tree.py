"""The configuration tree of a run: one class per section, and the only place where defaults live.

The text under a field is its description; docs/config.md is generated from it. `load` reads a tree from YAML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shards.common.errors import BadInputError

Group = Literal["vision", "projector", "decoder"]


class Section(BaseModel):
    """A node of the tree: frozen, without unknown keys, without silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class LoraConfig(Section):
    """Adapters (LoRA) that are trained instead of the weights."""

    parts: list[Group] = Field(["decoder"], min_length=1)
    """Groups whose linear layers get adapters. Nothing else in these groups is trained."""
    rank: int = Field(16, ge=1)
    """Rank of the adapters: a larger one trains more parameters."""
    alpha: float = Field(32.0, gt=0)
    """The output of an adapter is multiplied by alpha / rank."""


class ModelConfig(Section):
    """The model that is trained: give exactly one of `model.path` and `model.config`."""

    path: str | None = None
    """Directory of a model in the published layout (weights, config, tokenizer)."""
    config: dict[str, Any] | None = None
    """Fields of a Phi3VConfig, for a new model. Its weights are drawn from `seed`."""
    tokenizer: str | None = None
    """Directory with a tokenizer.json. Default: `model.path`; without a path, a tokenizer with `vocab_size`
    entries is trained on the texts of the train split."""
    freeze: list[Group] = []
    """Groups of weights that are not trained."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the weights; they need much less GPU memory. Without this section all
    weights outside `model.freeze` are trained."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of numbers in the forward and backward pass. The optimizer always keeps float32 master weights."""
    gradient_checkpointing: bool = True
    """Keep only the input of each layer and compute the layer again in the backward pass: less memory, more
    arithmetic."""
    vision_chunk: int = Field(64, ge=1)
    """Views (tiles and global views) that go through the vision tower in one call. Fewer need less memory."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either model.path (a checkpoint directory) or model.config (a new model)")
        return self

    @model_validator(mode="after")
    def _trained_in_one_way(self) -> ModelConfig:
        both = sorted({*self.freeze} & {*(self.lora.parts if self.lora else [])})
        if both:
            raise ValueError(f"model.freeze and model.lora.parts both name {both[0]}; take it out of one")
        if self.lora is None and {*self.freeze} == {*get_args(Group)}:
            raise ValueError("model.freeze names every group, so nothing would learn; take one out")
        return self


class SourceConfig(Section):
    """One of several datasets."""

    path: str
    """Directory of the dataset, as in `data.path`."""
    weight: float | None = Field(None, gt=0)
    """Share of this dataset in the samples of an epoch, relative to the weights of the others."""


class DataConfig(Section):
    """The samples that the model learns from: give exactly one of `data.path` and `data.sources`."""

    path: str | None = None
    """Dataset directory written by `phi3v shards build`, local or a URL."""
    sources: list[SourceConfig] | None = None
    """Several datasets, as `[{path: a, weight: 3}, {path: b, weight: 1}]`. Without weights, an epoch holds
    every sample once. With weights, an epoch has the same number of samples, in these proportions: a dataset
    that is too small for its share is repeated; one that is larger than its share continues in the next
    epoch where it stopped."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to evaluate on during training."""
    seq_len: int = Field(131072, ge=16)
    """Length of a packed row in tokens (image tokens and padding included)."""
    num_crops: int = Field(16, ge=1)
    """Largest number of tiles that an image is cut into."""
    over_long: Literal["drop", "truncate", "fail"] = "fail"
    """What to do with samples longer than `data.seq_len`: `fail` refuses to start; `drop` leaves them out;
    `truncate` removes images, the last first, until the sample fits, keeps all of its text, and drops the
    sample if the text alone is too long. The samples affected are counted and reported."""
    shuffle: bool = True
    """Shuffle the samples in every epoch; false keeps the order of the datasets."""
    packing: bool = True
    """Pack several samples into each row; false puts one sample into each row."""
    workers: int = Field(2, ge=0)
    """Processes per rank that read and decode samples; 0 does this in the training process."""
    prefetch: int = Field(2, ge=1)
    """Rows that each worker prepares ahead. A row of 131,072 tokens takes up to 300 MB of /dev/shm."""
    cache_dir: str | None = None
    """Directory on a local disk of the node in which remote shards are cached."""
    cache_gb: float = Field(100.0, gt=0)
    """Largest size of the cache, in GB (10^9 bytes)."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Fraction of samples that may be unreadable before the run stops with exit code 4. It is a fraction of
    the samples seen so far, but of at least the first epoch or 1,000 samples, whichever is less. A single
    unreadable sample never stops a run, unless the fraction is 0."""

    @model_validator(mode="after")
    def _one_origin(self) -> DataConfig:
        if self.path is None and not self.sources:
            fault = ": input should be a valid string" if "path" in self.model_fields_set else " is missing"
            raise ValueError(f"data.path{fault}; give a dataset directory, or several as data.sources")
        if self.path is not None and self.sources:
            raise ValueError("give either data.path (a dataset directory) or data.sources (several)")
        weights = [source.weight for source in self.sources or []]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError("data.sources: give every source a weight, or none")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """The dataset directories."""
        return (self.path,) if self.path is not None else tuple(s.path for s in self.sources or [])

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weight of each dataset; None if an epoch holds every sample once."""
        weights = tuple(s.weight for s in self.sources or [] if s.weight is not None)
        return weights or None


class TrainConfig(Section):
    """Length of the run and the optimizer (AdamW). Give exactly one of `train.steps` and `train.epochs`. The
    learning rate rises linearly, then falls along a cosine.
    """

    steps: int | None = Field(None, ge=1)
    """Number of optimizer steps after which the run ends."""
    epochs: float | None = Field(None, gt=0)
    """Number of passes over the data after which the run ends; it may be a fraction."""
    global_batch: int = Field(8, ge=1)
    """Packed rows per optimizer step, over all ranks and accumulation steps. Each data-parallel rank
    accumulates its equal share, so the loss curve does not depend on the number of ranks."""
    lr: float = Field(1e-5, gt=0)
    """Largest learning rate."""
    lr_scale: dict[Group, Annotated[float, Field(ge=0)]] = {}
    """Factor on `train.lr` for each of vision, projector and decoder, as `{vision: 0.1}`."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps in which the learning rate rises."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the last step, as a fraction of `train.lr`."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW. It does not apply to biases and norms."""
    betas: list[float] = [0.9, 0.95]
    """Decay rates of AdamW's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Epsilon of AdamW, which keeps the division stable."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global norm of the gradient; a larger gradient is scaled down. 0 turns clipping off."""
    max_bad_steps: int = Field(5, ge=1)
    """Steps with a non-finite loss or gradient norm are skipped. After this number of them in a row, the run
    stops with exit code 4."""

    @model_validator(mode="after")
    def _one_end(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("train.betas must be two numbers from 0 to below 1")
        return self

    def rows_each(self, groups: int, called: str | None = None) -> int:
        """Packed rows per optimizer step of each of `groups` data-parallel groups of ranks.

        called: the groups' name in the error message. Raises BadInputError if the rows cannot be divided
        evenly.
        """
        if self.global_batch % groups:
            fitting = -(-self.global_batch // groups) * groups
            raise BadInputError(
                f"train.global_batch={self.global_batch} rows cannot be shared by "
                f"{called or f'{groups} ranks'}; set train.global_batch={fitting}"
            )
        return self.global_batch // groups


class ParallelConfig(Section):
    """How ZeRO-3 divides the work between ranks, and where tensors are kept. None of these keys changes the
    loss curve.
    """

    sp: int = Field(1, ge=1)
    """Neighbouring ranks that share a packed row (Ulysses sequence parallelism). It must divide the number of
    attention heads and the number of ranks."""
    tile_mlp: int = Field(0, ge=0)
    """Positions that an MLP computes at a time, to save memory; 0 computes all at once."""
    offload_checkpoints: bool = False
    """Keep the inputs of the decoder layers in host memory until the backward pass."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the gradients, the float32 master weights and Adam's moments are kept and the optimizer step is
    computed: on the GPU (`none`), in host memory (`cpu`), or in host memory with master weights and moments
    in files under `parallel.offload_path` (`nvme`)."""
    offload_params: Literal["none", "cpu"] = "none"
    """Where weights are kept while they are not in use: on the GPU (`none`) or in host memory (`cpu`)."""
    offload_path: str | None = None
    """Directory on a local disk of every node, for `offload_optimizer: nvme`."""
    persistence_threshold: int = Field(100_000, ge=0)
    """Parameters with fewer elements than this are kept whole on every rank, which saves communication."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds after which a collective that waits for a lost rank fails."""
    peak_tflops: float | None = Field(None, gt=0)
    """Dense bf16 peak of one GPU in TFLOP/s, from which MFU is computed. Default: from a built-in table of
    GPUs."""

    @model_validator(mode="after")
    def _offload_somewhere(self) -> ParallelConfig:
        if (self.offload_optimizer == "nvme") != (self.offload_path is not None):
            raise ValueError(
                "parallel.offload_path (a directory on a disk of the node) goes with "
                "parallel.offload_optimizer=nvme: give both or neither"
            )
        if self.offload_params != "none" and self.offload_optimizer == "none":
            raise ValueError(
                "parallel.offload_params needs parallel.offload_optimizer=cpu, which frees more memory; "
                "set that first"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are saved, and which of them are kept."""

    every_steps: int = Field(500, ge=1)
    """Optimizer steps between checkpoints. The last step always has one."""
    keep_last: int = Field(2, ge=1)
    """Number of newest checkpoints to keep. The best one is kept as well."""
    keep_every: int = Field(0, ge=0)
    """Also keep the checkpoints of steps that are multiples of this number; 0 for none."""
    async_: bool = Field(False, alias="async")
    """Continue training while a checkpoint is written from a copy in host memory. The copy is as large as the
    rank's share of the weights and optimizer state. False: training waits."""
    timeout_s: float = Field(1800.0, gt=0)
    """Seconds after which a save counts as failed."""
    max_failures: int = Field(3, ge=1)
    """Saves in a row that may fail (disk full, no permission, too slow) before the run stops."""


class EvalConfig(Section):
    """Evaluation during training, each time on the same samples of the val split. The same defaults hold for
    `phi3v evaluate`.
    """

    every_steps: int = Field(500, ge=0)
    """Optimizer steps between evaluations; 0 evaluates only at the end."""
    loss_samples: int = Field(256, ge=1)
    """Number of samples whose loss is computed."""
    generate_samples: int = Field(16, ge=0)
    """Number of samples that the model answers."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(16, ge=1)
    """Prompts answered together, per rank."""
    metrics: list[str] = ["price", "category", "title", "exact_match"]
    """Metrics of the answers: names in phi3v_dist.evaluation.metrics.METRICS, or `module:function` for one of
    your own."""
    slice_by: str = "category"
    """Field of the samples' `meta`. Each of its values also gets scores of its own."""
    best_metric: str | None = "eval/loss"
    """The eval/* metric by which the best checkpoint is chosen; it is kept and named `best`. null: none."""
    best_mode: Literal["min", "max"] = "min"
    """Whether a smaller (`min`) or a larger (`max`) value of the metric is better."""
    weights: Literal["auto", "whole", "partitioned"] = "auto"
    """Weights while answering: `whole` on every rank; `partitioned` over the ranks (slow, for models that do
    not fit); `auto`: whole if there is enough memory."""


class TrackConfig(Section):
    """Metrics in the log and in Weights & Biases (W&B)."""

    project: str = "phi3v"
    """W&B project."""
    entity: str | None = None
    """W&B entity: the user or team."""
    group: str | None = None
    """W&B group."""
    tags: list[str] = []
    """Tags of the W&B run."""
    name: str | None = None
    """Name of the W&B run. Default: the run's `name`."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: WANDB_MODE if it is set, else online if there is a key (WANDB_API_KEY or ~/.netrc), else
    offline. `phi3v report RUN --sync` uploads what was recorded offline."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between lines of metrics."""
    artifacts: Literal["none", "reference", "files"] = "reference"
    """Log the best and the last checkpoint as W&B artifacts: by `reference` (path and metadata) or with their
    `files`."""
    node_metrics: bool = False
    """Record system metrics of every node, not only of the first one. Online mode only."""
    close_timeout_s: float = Field(60.0, ge=0)
    """Longest time to wait for W&B at the end of the run, in seconds."""


class RunConfig(Section):
    """Keys outside the sections."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run. Its directory is runs_dir/name."""
    runs_dir: str = "runs"
    """Directory of all run directories, on storage that all nodes share."""
    seed: int = Field(0, ge=0)
    """Seed of new weights, of the order of the samples, and of dropout."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()

    @property
    def views_per_call(self) -> int:
        """Views of a packed row that go through the vision tower at once, on all ranks that share the row."""
        return self.model.vision_chunk * self.parallel.sp

    @property
    def run_dir(self) -> Path:
        """The directory of the run: checkpoints, metrics, logs, evaluations."""
        return Path(self.runs_dir) / self.name
