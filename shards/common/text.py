"""Texts of exceptions on one line, for messages and logs."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an exception's text; the name of its class if the text is empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: object) -> str:
    """The whole text of an error (or anything else) on one line."""
    return " ".join(str(error).split())


def error_text(error: BaseException) -> str:
    """An error for a log or a message to the user: "reason: path" of an OSError, else "Class: text"."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {one_line(error)}"
