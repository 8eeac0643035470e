"""Bars for the size and the shape of the code of the three packages. Every message lists all offenders."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "phi3v_dist", "launch")

FILE_LINES, LOOP_LINES = 450, 200
FUNCTION_LINES, TRAIN_FUNCTION_LINES, MEDIAN_FUNCTION_LINES = 90, 60, 10
TRAIN_PARAMETERS = 8
POSITIONAL_PARAMETERS = 3
POSITIONAL_ARGUMENTS = 5

# Signatures that a library fixes: torch calls these by position, transformers passes its own names, and gives
# module, query, key, value and mask by position to an attention function that is registered with it.
FIXED_BY_A_LIBRARY = {
    "forward",
    "backward",
    "__exit__",
    "__call__",
    "prepare_inputs_for_generation",
    "packed_attention",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def sources() -> dict[str, str]:
    """Path from the root of the repository -> text of every module."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


@cache
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(text) for name, text in sources().items()}


def functions() -> Iterator[tuple[str, Function]]:
    """(file, function) for every function and method, nested ones too."""
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield name, node


def lines_of(function: Function) -> int:
    """From `def` to the last line."""
    return (function.end_lineno or 0) - function.lineno + 1


def parameters(function: Function) -> list[ast.arg]:
    """All parameters but `self` and `cls`."""
    listed = function.args
    every = [*listed.posonlyargs, *listed.args, *listed.kwonlyargs]
    return [each for each in every if each.arg not in ("self", "cls")]


def positional(function: Function) -> list[ast.arg]:
    """The parameters that a call may give by position."""
    return [each for each in parameters(function) if each not in function.args.kwonlyargs]


def is_command(function: Function) -> bool:
    """Whether typer calls it, always by keyword: @app.command(...), or, where launch/cli/main.py adds the
    command, every parameter is an Annotated option or one of the two types of launch/cli/arguments.py.
    """
    decorators = [each.func for each in function.decorator_list if isinstance(each, ast.Call)]
    if any(isinstance(each, ast.Attribute) and each.attr == "command" for each in decorators):
        return True
    types = [ast.unparse(each.annotation) if each.annotation else "" for each in parameters(function)]
    named = ("Config", "Overrides")
    return bool(types) and all(each in named or each.startswith("Annotated[") for each in types)


def report(offenders: list[str]) -> None:
    assert not offenders, f"{len(offenders)}:\n" + "\n".join(offenders)


def test_files_are_short() -> None:
    count = {name: len(text.splitlines()) for name, text in sources().items()}
    limit = {"phi3v_dist/train/loop.py": LOOP_LINES}
    report([f"{name}: {n} lines" for name, n in count.items() if n > limit.get(name, FILE_LINES)])


def test_functions_are_short() -> None:
    long = []
    for name, function in functions():
        limit = TRAIN_FUNCTION_LINES if "/train/" in name else FUNCTION_LINES
        if lines_of(function) > limit:
            long.append(
                f"{name}:{function.lineno} {function.name}: {lines_of(function)} lines, {limit} are the most"
            )
    report(long)
    median = statistics.median(lines_of(function) for _, function in functions())
    assert median <= MEDIAN_FUNCTION_LINES, f"the median function has {median} lines"


def test_no_function_of_train_has_many_parameters() -> None:
    report(
        [
            f"{name}:{function.lineno} {function.name}: {len(parameters(function))} parameters"
            for name, function in functions()
            if "/train/" in name and len(parameters(function)) > TRAIN_PARAMETERS
        ]
    )


def test_from_the_fourth_on_parameters_are_keyword_only() -> None:
    report(
        [
            f"{name}:{function.lineno} {function.name}: {len(positional(function))} positional parameters"
            for name, function in functions()
            if len(positional(function)) > POSITIONAL_PARAMETERS
            and function.name not in FIXED_BY_A_LIBRARY
            and not is_command(function)
        ]
    )


def names_of_the_house() -> set[str]:
    """Functions, methods and classes that the packages define."""
    kinds = (*Function.__args__, ast.ClassDef)
    return {node.name for tree in trees().values() for node in ast.walk(tree) if isinstance(node, kinds)}


def test_no_call_gives_six_arguments_by_position() -> None:
    ours, offenders = names_of_the_house(), []
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or len(node.args) <= POSITIONAL_ARGUMENTS:
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ours and not any(isinstance(each, ast.Starred) for each in node.args):
                offenders.append(
                    f"{name}:{node.lineno} {called}(...): {len(node.args)} arguments by position"
                )
    report(offenders)


def test_how_parameters_are_counted() -> None:
    (function,) = ast.parse("def f(self, a, b, *, c):\n    return a\n").body
    assert isinstance(function, ast.FunctionDef)
    assert lines_of(function) == 2
    assert len(parameters(function)) == 3 and len(positional(function)) == 2
