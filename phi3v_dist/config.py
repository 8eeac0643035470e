"""The configuration of a run: one typed tree, and the only place where defaults live.

In: a YAML file and dotted overrides (`train.lr=1e-5`), `${oc.env:VAR}` allowed. Out: a frozen `RunConfig`.
Unknown keys, ill-typed values and settings that contradict each other are refused in one line. Read once, by
the command line; everything below it gets values.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from yaml import YAMLError

from shards.common.errors import BadInputError
from shards.common.shipped import shipped

Group = Literal["vision", "projector", "decoder"]


class Section(BaseModel):
    """A node of the tree: frozen, no keys but its own, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, serialize_by_alias=True, allow_inf_nan=False
    )


class LoraConfig(Section):
    """Adapters (LoRA) that learn instead of weights.

    parts: groups whose linear layers get adapters; nothing else of them learns. rank: of the adapters. alpha:
    their output is scaled by alpha / rank.
    """

    parts: list[Group] = Field(["decoder"], min_length=1)
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)


class ModelConfig(Section):
    """What is trained.

    path: a directory in the published layout (weights, config, tokenizer). config: without path, the fields
    of a Phi3VConfig whose weights are drawn from the seed. tokenizer: a directory with tokenizer.json;
    default `path`. Without both, one of `vocab_size` pieces is trained on the texts of the train split.
    freeze: groups that do not learn. lora: adapters, for one small GPU; without it weights learn in full.
    dtype: of the forward and backward pass; the optimizer always has float32 master weights.
    gradient_checkpointing: layers keep their inputs alone and run again in backward.
    vision_chunk: tiles and global views that pass the vision tower in one call.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    freeze: list[Group] = []
    lora: LoraConfig | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: bool = True
    vision_chunk: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either model.path (a checkpoint directory) or model.config (a new model)")
        return self

    @model_validator(mode="after")
    def _learns_one_way(self) -> ModelConfig:
        both = sorted({*self.freeze} & {*(self.lora.parts if self.lora else [])})
        if both:
            raise ValueError(f"model.freeze and model.lora.parts both name {both[0]}; take it out of one")
        if self.lora is None and {*self.freeze} == {*get_args(Group)}:
            raise ValueError("model.freeze names every group, so nothing would learn; take one out")
        return self


class SourceConfig(Section):
    """One of several data sets. path: as data.path. weight: its share in the samples of an epoch, relative to
    the weights of the others.
    """

    path: str
    weight: float | None = Field(None, gt=0)


class DataConfig(Section):
    """What is trained on.

    path: a dataset directory of `phi3v shards build`, local or a URL. sources: several instead, as
    `[{path: a, weight: 3}, {path: b, weight: 1}]`. Without weights an epoch holds every sample once. With
    weights it has as many samples, in these proportions: a data set that gets more than it holds is gone
    through again, one that gets less goes on in the next epoch where it stopped.
    train_split: the split to learn from. val_split: the split that evaluations answer.
    seq_len: positions of a packed row. num_crops: most tiles of a picture.
    over_long: what happens to samples longer than seq_len: `fail` refuses to start, `drop` leaves them out,
    `truncate` leaves out pictures from the end until the sample fits (text and answers stay) and drops it if
    its text alone is too long. All are counted.
    shuffle: false keeps the order of the data sets. packing: false puts one sample into each row.
    workers: processes that read and decode, per rank; 0 does so in the training process. prefetch: rows
    ahead, per worker; a row of 131,072 tokens takes up to 300 MB of /dev/shm.
    cache_dir: a directory on a disk of the node where shards are kept that come from elsewhere; cache_gb:
    10^9 bytes that it may take.
    max_bad_fraction: part of the samples that may be unreadable before the run stops with exit code 4. It is
    taken of the samples seen so far, or of the first epoch (at most 1,000 samples of it) until there are
    more; a single bad sample stops no run, unless the part is 0.
    """

    path: str | None = None
    sources: list[SourceConfig] | None = None
    train_split: str = "train"
    val_split: str = "val"
    seq_len: int = Field(131072, ge=16)
    num_crops: int = Field(16, ge=1)
    over_long: Literal["drop", "truncate", "fail"] = "fail"
    shuffle: bool = True
    packing: bool = True
    workers: int = Field(2, ge=0)
    prefetch: int = Field(2, ge=1)
    cache_dir: str | None = None
    cache_gb: float = Field(100.0, gt=0)
    max_bad_fraction: float = Field(0.01, ge=0, le=1)

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
        """The weight of each, None if an epoch holds every sample once."""
        weights = tuple(s.weight for s in self.sources or [] if s.weight is not None)
        return weights or None


class TrainConfig(Section):
    """How it is trained.

    The learning rate rises linearly, then falls along a cosine.

    steps, epochs: exactly one of the two ends the run; epochs may be a fraction. global_batch: packed rows of
    one optimizer step over all ranks and accumulation steps; a rank accumulates global_batch / (data-parallel
    ranks) of them, so the curve does not depend on the number of ranks. lr: AdamW's largest learning rate.
    lr_scale: factor on lr for vision, projector or decoder. warmup_steps: optimizer steps of the rise.
    min_lr_ratio: where the fall ends, as a part of lr. weight_decay: of weights; biases and norms have none.
    betas, eps: AdamW's. grad_clip: largest global norm of the gradient, 0 for none.
    max_bad_steps: steps in a row without a finite loss or gradient norm, which are skipped, before the run
    stops with exit code 4.
    """

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    global_batch: int = Field(8, ge=1)
    lr: float = Field(1e-5, gt=0)
    lr_scale: dict[Group, Annotated[float, Field(ge=0)]] = {}
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: list[float] = [0.9, 0.95]
    eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(1.0, ge=0)
    max_bad_steps: int = Field(5, ge=1)

    @model_validator(mode="after")
    def _one_end(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("train.betas must be two numbers from 0 to below 1")
        return self

    def rows_each(self, groups: int, called: str | None = None) -> int:
        """Rows of a step for each of `groups` groups of ranks that share a row (called so in the message).

        Raises BadInputError if they cannot be shared evenly.
        """
        if self.global_batch % groups:
            fitting = -(-self.global_batch // groups) * groups
            raise BadInputError(
                f"train.global_batch={self.global_batch} rows cannot be shared by "
                f"{called or f'{groups} ranks'}; set train.global_batch={fitting}"
            )
        return self.global_batch // groups


class ParallelConfig(Section):
    """How the work is spread over ranks by ZeRO-3, and what is kept where. None of it changes the curve.

    sp: neighbouring ranks that share a packed row (Ulysses sequence parallelism); divides the attention heads
    and the number of ranks. tile_mlp: positions that an MLP works on at a time, 0 for all.
    offload_checkpoints: inputs of the decoder layers wait for backward in host memory. offload_optimizer:
    where gradients, float32 master weights and Adam's moments live, and the step is taken; nvme: in files
    under offload_path. offload_params: where weights live that are not in use. offload_path: a directory on a
    disk of every node, for nvme. persistence_threshold: parameters with fewer elements stay whole on every
    rank. timeout_s: seconds before a collective that waits for a lost rank fails. peak_tflops: dense bf16
    peak of one GPU for MFU, where the built-in table does not know the GPU.
    """

    sp: int = Field(1, ge=1)
    tile_mlp: int = Field(0, ge=0)
    offload_checkpoints: bool = False
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_params: Literal["none", "cpu"] = "none"
    offload_path: str | None = None
    persistence_threshold: int = Field(100_000, ge=0)
    timeout_s: float = Field(600.0, gt=0)
    peak_tflops: float | None = Field(None, gt=0)

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
    """every_steps: optimizer steps between checkpoints; the last step always has one. keep_last: newest kept,
    beside the best one. keep_every: checkpoints of every so many steps are kept as well, 0 for none. async:
    the run goes on while a copy in host memory is written, as large as the rank's share of weights and
    optimizer state; else it waits. timeout_s: seconds after which a save has failed. max_failures: saves in a
    row that may fail (no room, no permission, too slow) before the run stops.
    """

    every_steps: int = Field(500, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    async_: bool = Field(False, alias="async")
    timeout_s: float = Field(1800.0, gt=0)
    max_failures: int = Field(3, ge=1)


class EvalConfig(Section):
    """Evaluation during training, on samples of the val split, the same ones each time.

    every_steps: optimizer steps between evaluations, 0 for one at the end alone. loss_samples: so many have
    their loss taken. generate_samples: so many are answered. max_new_tokens: longest answer. batch_size:
    questions answered together, per rank. metrics: names in phi3v_dist.evaluation.metrics.METRICS, or
    module:function for your own. slice_by: field of the samples' meta whose values are scored one by one.
    best_metric: the eval/* metric whose best checkpoint is kept and named `best` (null for none); best_mode:
    whether less or more of it is better. weights: for the answers whole on every rank, partitioned (slow, for
    models that do not fit), or auto: whole if there is room.
    """

    every_steps: int = Field(500, ge=0)
    loss_samples: int = Field(256, ge=1)
    generate_samples: int = Field(16, ge=0)
    max_new_tokens: int = Field(64, ge=1)
    batch_size: int = Field(16, ge=1)
    metrics: list[str] = ["price", "category", "title", "exact_match"]
    slice_by: str = "category"
    best_metric: str | None = "eval/loss"
    best_mode: Literal["min", "max"] = "min"
    weights: Literal["auto", "whole", "partitioned"] = "auto"


class TrackConfig(Section):
    """W&B and the log.

    log_every: optimizer steps between lines of metrics.
    mode: `auto` is WANDB_MODE if it is set, else online with a key (WANDB_API_KEY or ~/.netrc), else offline;
    `phi3v report RUN --sync` uploads what was recorded offline. project, entity, group, tags: of W&B.
    name: of the W&B run, default the run's.
    artifacts: the best and the last checkpoint as artifacts, by reference (path and metadata) or with their
    files. node_metrics: system metrics of every node, not of the first alone (online only). close_timeout_s:
    the longest wait for W&B at the end of the run.
    """

    project: str = "phi3v"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []
    name: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    log_every: int = Field(10, ge=1)
    artifacts: Literal["none", "reference", "files"] = "reference"
    node_metrics: bool = False
    close_timeout_s: float = Field(60.0, ge=0)


class RunConfig(Section):
    """The whole tree.

    name: of the run; its directory is runs_dir/name. runs_dir: where run directories lie, on storage that all
    nodes see. seed: of new weights, of the order of the samples, of dropout.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    seed: int = Field(0, ge=0)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    track: TrackConfig = TrackConfig()

    @property
    def views_per_call(self) -> int:
        """Views of a row that pass the tower at once, on all the ranks that share the row."""
        return self.model.vision_chunk * self.parallel.sp

    @property
    def run_dir(self) -> Path:
        """Where everything of the run lies."""
        return Path(self.runs_dir) / self.name


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in `path` with dotted `key=value` overrides on top.

    Raises BadInputError, one line that names the key: no such file, not YAML, unknown key (with the nearest
    valid one), wrong type or value, an environment variable that is not set.
    """
    file = shipped(Path(path))
    if not file.is_file():
        raise BadInputError(f"{path}: no such config file; the recipes are in configs/")
    for override in overrides:
        if "=" not in override:
            raise BadInputError(f"override {override!r} is not of the form key=value, such as train.lr=1e-5")
    try:
        tree = OmegaConf.load(file)
        if not isinstance(tree, DictConfig):
            raise BadInputError(f"{path}: holds no mapping of keys to values")
        merged = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError, OSError) as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise BadInputError(f"{path}: {_first_fault(error)}") from error


def config_json(config: RunConfig) -> str:
    """The resolved tree as JSON, which is YAML too; what `config.yaml` of a run directory holds."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def changed_keys(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two dumped trees, sorted."""
    flat_before, flat_after = dict(flatten(before)), dict(flatten(after))
    return sorted(key for key in {*flat_before, *flat_after} if flat_before.get(key) != flat_after.get(key))


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a dumped tree."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    fault = next((each for each in faults if each["type"] == "extra_forbidden"), faults[0])
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _keys_at(path[:-1]), 1, 0.5)
        hint = (
            f"did you mean {'.'.join([*path[:-1], near[0]])}?"
            if near
            else f"valid here: {', '.join(_keys_at(path[:-1]))}"
        )
        return f"unknown key {name}; {hint}"
    if fault["type"] == "missing":
        return f"{name} is missing; it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message
    shown = "" if isinstance(fault["input"], dict) else f" (found {fault['input']!r})"
    return f"{name}: {message[0].lower() + message[1:]}{shown}"


def section_of(annotation: Any, in_list: bool = False) -> type[BaseModel] | None:
    """The section that a key of this type holds, also where it may be null. in_list: also lists of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = get_args(annotation) if in_list or get_origin(annotation) is not list else ()
    return next((found for kind in inner if (found := section_of(kind, in_list))), None)


def _keys_at(path: Sequence[str]) -> list[str]:
    """The valid keys of the section at a dotted path."""
    section: type[BaseModel] = RunConfig
    for part in path:
        if part.isdigit():  # of a list
            continue
        field = section.model_fields.get(part)
        inner = section_of(field.annotation, in_list=True) if field else None
        if inner is None:
            return []
        section = inner
    return sorted(field.alias or name for name, field in section.model_fields.items())
