"""The arguments that several commands share, and their completion in the shell.

In: the part of a word that has been typed. Out: the words that it may become. Completion must be fast, so it
looks at names of files and keys and reads no file.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from shards.common.shipped import SHIPPED

_ENDINGS = (".yaml", ".yml")


def offer_configs(incomplete: str) -> list[str]:
    """YAML files and folders that begin with `incomplete`, in the working directory or among the installed
    recipes. If only one folder fits, its contents: after the only possible word the shell would add a space.
    """
    folder, slash, start = incomplete.rpartition("/")
    offered = set()
    for root in (Path(), SHIPPED):
        with contextlib.suppress(OSError):
            for each in (root / f"{folder}{slash}").iterdir():
                hidden = each.name.startswith(".") and not start
                if each.name.startswith(start) and not hidden and (each.is_dir() or each.suffix in _ENDINGS):
                    offered.add(f"{folder}{slash}{each.name}{'/' if each.is_dir() else ''}")
    (only,) = offered if len(offered) == 1 else ("",)
    return offer_configs(only) if only.endswith("/") and only != incomplete else sorted(offered)


def offer_keys(incomplete: str) -> list[str]:
    """Dotted keys of the run's config, with their `=`. If only one fits, also with its default, so that the
    shell adds no space.
    """
    if "=" in incomplete:
        return []
    from pydantic import BaseModel

    from phi3v_dist.config import RunConfig, section_of

    def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, field in section.model_fields.items():
            dotted, inner = f"{prefix}{field.alias or name}", section_of(field.annotation)
            if inner is None:
                default = "" if field.is_required() else json.dumps(field.default, separators=(",", ":"))
                yield f"{dotted}=", default.strip('"')
            else:
                yield from keys(inner, f"{dotted}.")

    found = [each for each in keys(RunConfig) if each[0].startswith(incomplete)]
    only = found if len(found) == 1 else []
    plain = [f"{key}{default}" for key, default in only if re.fullmatch(r"[\w./+-]+", default)]
    return [key for key, _ in found] + plain


Config = Annotated[
    str, typer.Argument(help="Recipe, such as configs/tiny.yaml.", autocompletion=offer_configs)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value", help="Settings that override the recipe, such as train.lr=1e-5.",
        autocompletion=offer_keys,
    ),
]  # fmt: skip
