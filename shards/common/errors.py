"""The error that every package raises for input that the user can fix."""

from __future__ import annotations


class BadInputError(ValueError):
    """The user's input cannot be used. The message is one line: what was found, where, and how to fix it."""
