"""One-line texts of errors."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an exception of another library says, on one line; its kind if it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
