"""Recipes: a source and its build options in a YAML file, such as configs/shards/burberry.yaml.

In: a file, or the name of one in configs/shards. Out: the source that it names (or None) and `BuildOptions`;
options given on the command line replace those of the recipe.

    source: hf:NAME                 optional; the command line may name another one
    images: [imageurl]              any field of `BuildOptions`
    meta: {price: full_price}
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from shards.common.errors import BadInputError
from shards.common.nearest import nearest
from shards.common.shipped import SHIPPED, shipped
from shards.common.text import one_line
from shards.options import BuildOptions

_FOLDER = Path("configs/shards")


def load_recipe(recipe: str | None, given: dict[str, Any]) -> tuple[str | None, BuildOptions]:
    """The source and the options of a recipe.

    recipe: file or name; None: no recipe. given: options that replace those of the recipe.
    Raises BadInputError: no such recipe, not YAML, an unknown key (naming the nearest known one), a value of
    the wrong type.
    """
    found: dict[str, Any] = {}
    if recipe is not None:
        path = _find(recipe)
        try:
            found = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise BadInputError(f"{path}: not YAML ({one_line(error)})") from error
        if not isinstance(found, dict):
            raise BadInputError(f"{path}: a {type(found).__name__}, not keys and values")
    source = found.pop("source", None)
    if source is not None and not isinstance(source, str):
        raise BadInputError(f"{recipe}: source is {source!r}, not the name of a source")
    options = {**found, **given}
    known = [field.name for field in fields(BuildOptions)]
    for name in options:
        if name not in known:
            near = nearest(str(name), known)
            hint = f"; did you mean {near!r}" if near else ""
            raise BadInputError(f"{recipe}: unknown key {name!r}{hint}; known: source, {', '.join(known)}")
    if isinstance(options.get("meta"), dict):
        options["meta"] = tuple(options["meta"].items())
    try:
        return source, TypeAdapter(BuildOptions).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(step) for step in first["loc"])
        raise BadInputError(f"{recipe}: {name} is {first['input']!r}: {first['msg']}") from error


def _find(recipe: str) -> Path:
    beside = Path(__file__).resolve().parent.parent / _FOLDER
    named = shipped(_FOLDER / f"{recipe}.yaml")
    for path in (Path(recipe), named, beside / f"{recipe}.yaml"):
        if path.is_file():
            return path
    folders = (_FOLDER, beside, SHIPPED / _FOLDER)
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise BadInputError(f"{recipe}: no such recipe; give a YAML file or one of: {', '.join(known) or 'none'}")
