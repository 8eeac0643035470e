"""The help of every command: what it does, an example that it takes, options that say what they are."""

import inspect
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from launch.cli.main import app

ROOT: Any = typer.main.get_command(app)


def commands(group: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[Any]:
    """(path, command) of every one that does something."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield pytest.param((*path, name), command, id=" ".join((*path, name)))


@pytest.mark.parametrize(("path", "command"), commands())
def test_help_has_an_example_that_works_and_says_what_each_option_is(
    path: tuple[str, ...], command: Any
) -> None:
    text = inspect.cleandoc(command.help)
    assert re.match(r"[A-Z][^\n]+[.;]", text), "the first line says what it does"
    examples = re.findall(r"Example: (.*)", text)
    assert examples, "an example"
    for example in examples:
        words = shlex.split(example)
        behind = words.index("launch.cli.main" if words[0] == "torchrun" else "phi3v") + 1
        assert tuple(words[behind : behind + len(path)]) == path
        # raises for what the command does not know, or lacks
        command.make_context(" ".join(path), words[behind + len(path) :])
    for parameter in command.params:
        if parameter.name == "help":
            continue
        said = parameter.help
        assert said and said[0].isupper() or said.startswith(("key=", "I/N", "v1:")), (
            f"{parameter.name}: {said}"
        )
        assert said.rstrip().endswith((".", ").")), f"{parameter.name}: {said}"
