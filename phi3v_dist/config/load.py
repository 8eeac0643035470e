"""Reading a configuration: a YAML file and dotted overrides become a checked `RunConfig`.

Unknown keys, values of a wrong type and settings that contradict each other are refused with one line. The
command line reads the configuration once; everything below it gets values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from phi3v_dist.config.tree import RunConfig
from shards.common.errors import BadInputError
from shards.common.nearest import did_you_mean
from shards.common.shipped import shipped
from shards.common.text import one_line


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the YAML file `path`, with `overrides` (`train.lr=1e-5`) applied.

    `${oc.env:VAR}` takes a value from the environment. Raises BadInputError, one line that names the key: no
    such file, not YAML, unknown key (with the nearest valid one), wrong type or value, an environment
    variable that is not set.
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
        raise BadInputError(f"{path}: {one_line(error)}") from error
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise BadInputError(f"{path}: {_first_fault(error)}") from error


def config_json(config: RunConfig) -> str:
    """The resolved configuration as JSON, which is also YAML: the content of RUN/config.yaml."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def changed_keys(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two dumped configurations, sorted."""
    flat_before, flat_after = dict(flatten(before)), dict(flatten(after))
    return sorted(key for key in {*flat_before, *flat_after} if flat_before.get(key) != flat_after.get(key))


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a dumped configuration."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def section_of(annotation: Any, in_list: bool = False) -> type[BaseModel] | None:
    """The section in a field's type annotation (`X` or `X | None`), None if there is none. in_list: also
    look inside `list[X]`.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = get_args(annotation) if in_list or get_origin(annotation) is not list else ()
    return next((found for kind in inner if (found := section_of(kind, in_list))), None)


def _first_fault(error: ValidationError) -> str:
    """One line about the most useful of pydantic's errors: an unknown key, else the first."""
    faults = error.errors(include_url=False)
    fault = next((each for each in faults if each["type"] == "extra_forbidden"), faults[0])
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        *above, key = path
        hint = did_you_mean(key, _keys_at(above), prefix="".join(f"{part}." for part in above))
        return f"unknown key {name}; {hint}"
    if fault["type"] == "missing":
        return f"{name} is missing; it has no default"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return message
    shown = "" if isinstance(fault["input"], dict) else f" (found {fault['input']!r})"
    return f"{name}: {message[0].lower() + message[1:]}{shown}"


def _keys_at(path: Sequence[str]) -> list[str]:
    """The valid keys of the section at a dotted path."""
    section: type[BaseModel] = RunConfig
    for part in path:
        if part.isdigit():  # an index into a list
            continue
        field = section.model_fields.get(part)
        inner = section_of(field.annotation, in_list=True) if field else None
        if inner is None:
            return []
        section = inner
    return sorted(field.alias or name for name, field in section.model_fields.items())
