"""Do the inputs of a run exist? Checked by launchers and by `phi3v train` before anything is written. No
torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phi3v_dist.config import RunConfig, load_config
from shards.common.errors import BadInputError
from shards.format.dataset import read_dataset_info


def load_run(path: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration in the file `path` with overrides, its inputs checked.

    Raises BadInputError as `load_config` and `check_inputs` do.
    """
    config = load_config(path, overrides)
    check_inputs(config)
    return config


def check_inputs(config: RunConfig) -> None:
    """Raises BadInputError if the dataset is incomplete or has no train split, or a model file is missing."""
    for path in config.data.paths:
        info = read_dataset_info(path)
        if not info.splits.get(config.data.train_split):
            known = ", ".join(sorted(info.splits))
            raise BadInputError(f"{path}: no split {config.data.train_split!r}; it has: {known}")
    wanted = []
    if config.model.path is not None:
        wanted.append((config.model.path, "config.json"))
    if (tokenizer := config.model.tokenizer or config.model.path) is not None:
        wanted.append((tokenizer, "tokenizer.json"))
    for directory, name in wanted:
        if not (Path(directory) / name).is_file():
            raise BadInputError(
                f"{directory}: no {name}; give the directory of a Phi-3-vision checkpoint, downloaded whole"
            )
