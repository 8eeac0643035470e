"""meta.json of a checkpoint: progress, hyper-parameters, shapes, the model's and the run's configuration."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

META = "meta.json"
FORMAT = 2
_RANDOM = "drawn anew for every step from config.seed, the step and the rank"


@dataclass(frozen=True)
class Progress:
    """How far a run is. step: optimizer steps, with those that were skipped; rows: packed rows of the plan
    that they consumed, all that the data needs to resume. samples, tokens, images: seen. bad_samples: that
    could not be read. skipped_steps: without an update, of which the last bad_streak came one after another.
    """

    step: int = 0
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    bad_samples: int = 0
    skipped_steps: int = 0
    bad_streak: int = 0


@dataclass(frozen=True)
class StoredParameter:
    """A parameter as a checkpoint describes it. shape: of the whole parameter."""

    shape: tuple[int, ...]
    frozen: bool


@dataclass(frozen=True)
class CheckpointMeta:
    """The content of meta.json.

    world_size: ranks that wrote it, and files. adam_steps: the optimizer's step count of each parameter group
    (the name is that of the format; any optimizer's). groups: hyper-parameters of each parameter group.
    parameters: by plain name (`lora.plain_name`). frozen_sums: sum of each frozen weight where these are not
    in the checkpoint, else None. frozen_dtype: a name in model.dtypes. model_dir: where the first weights
    came from. model_config: fields of Phi3VConfig. wandb_id: of the W&B run, None without one. run: the
    resolved configuration and provenance of the run.
    """

    progress: Progress
    world_size: int
    run: dict[str, Any]
    model_config: dict[str, Any]
    num_crops: int
    parameters: dict[str, StoredParameter]
    adam_steps: list[float] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)
    frozen_sums: dict[str, int] | None = None
    frozen_dtype: str = "bfloat16"
    model_dir: str = ""
    wandb_id: str | None = None
    random: str = _RANDOM
    format: int = FORMAT

    @classmethod
    def from_json(cls, text: str) -> CheckpointMeta:
        """Reads meta.json; fields that this version does not know are left out. Raises ValueError, KeyError
        or TypeError if it is not one.
        """
        found = json.loads(text)
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in found.items() if name in known}
        values["progress"] = Progress(**found["progress"])
        values["parameters"] = {
            name: StoredParameter(tuple(entry["shape"]), entry["frozen"])
            for name, entry in found["parameters"].items()
        }
        return cls(**values)

    def to_json(self) -> str:
        """The text of meta.json, as version 1 of this program wrote and reads it."""
        found = asdict(self)
        ordered = {name: found.pop(name) for name in _ORDER}
        return json.dumps(ordered | found, indent=1) + "\n"


_ORDER = (
    "format", "progress", "world_size", "adam_steps", "groups", "parameters", "frozen_sums", "frozen_dtype",
    "model_dir", "model_config", "num_crops", "random", "wandb_id", "run",
)  # fmt: skip


def format_of(target: Path) -> Any:
    """The format number in meta.json; FORMAT where it cannot be read, so that the manifest says what is
    wrong.
    """
    try:
        return json.loads((target / META).read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return FORMAT
