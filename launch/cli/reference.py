"""docs/config.md, made from the typed config: every key with its type, default and meaning.

In: the classes of phi3v_dist.config; a key's meaning is the sentence `key: ...` of its section's docstring.
Out: Markdown. Called by `make docs`; a test holds that the page is what this makes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from phi3v_dist.config import RunConfig, section_of

_HEAD = """# Every key of a config

A config is a YAML file; `key=value` behind it on any command line overrides it (`train.lr=2e-5`), and
`${oc.env:VAR}` takes a value from the environment. Unknown keys and values of a wrong type are refused with
the nearest valid name. The run directory keeps the resolved config as `config.yaml`. This page is made by
`make docs`.
"""


def config_reference() -> str:
    """The page."""
    sections = [_HEAD, _section("The run", RunConfig, "")]
    for name, field in RunConfig.model_fields.items():
        if (model := section_of(field.annotation)) is not None:
            sections.append(_section(f"`{name}`", model, f"{name}."))
    return "\n".join(sections)


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Key -> its sentence in the class's docstring, "" where there is none."""
    text = " ".join((inspect.getdoc(model) or "").split())
    names = "|".join(sorted(_keys(model), key=len, reverse=True))
    found = list(re.finditer(rf"(?:(?<=^)|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): ", text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    said = dict.fromkeys(_keys(model), "")
    for match, end in zip(found, ends, strict=False):
        sentence = text[match.end() : end].strip().rstrip(";")
        for name in match[1].split(", "):
            said[name] = sentence[:1].upper() + sentence[1:]
    return said


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _section(title: str, model: type[BaseModel], prefix: str) -> str:
    text = " ".join((inspect.getdoc(model) or "").split())
    first = re.split(rf"(?:(?<=^)|(?<=[.;] ))(?:{'|'.join(_keys(model))})(?:, \w+)*: ", text)[0].strip()
    lines = [
        f"## {title}",
        "",
        *([first, ""] if first else []),
        "| key | type | default | |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *_rows(model, prefix), ""])


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    said = descriptions(model)
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and not prefix:
            continue  # a section of its own
        key = f"{prefix}{field.alias or name}"
        cells = (f"`{key}`", _type(field), _default(field), said[field.alias or name])
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        if inner is not None:
            yield from _rows(inner, f"{key}.")


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if hasattr(rule, name)
    ]
    return ", ".join([_words(field.annotation), *limits])


def _words(annotation: Any) -> str:
    if section_of(annotation) is not None:
        return "section"
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return "mapping"
    if parts:
        return " or ".join(_words(part) for part in parts if part is not type(None))
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if value is None or value is PydanticUndefined:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(config_reference())
