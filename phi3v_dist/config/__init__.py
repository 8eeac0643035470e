"""The configuration of a run: `tree` (sections, defaults, descriptions) and `load` (reading it). No torch."""

from phi3v_dist.config.load import changed_keys, config_json, flatten, load_config, section_of
from phi3v_dist.config.tree import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    Group,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    Section,
    SourceConfig,
    TrackConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "Group",
    "LoraConfig",
    "ModelConfig",
    "ParallelConfig",
    "RunConfig",
    "Section",
    "SourceConfig",
    "TrackConfig",
    "TrainConfig",
    "changed_keys",
    "config_json",
    "flatten",
    "load_config",
    "section_of",
]
