"""The hint "did you mean ...?" for an unknown name.

In: the name and all known ones. Out: the most similar one, or the end of an error message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CUTOFF = 0.5  # names that are less similar (0 to 1) give no hint


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name in `known` that is most similar to `name`; None if no name is similar enough."""
    found = difflib.get_close_matches(name, list(known), 1, _CUTOFF)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "", otherwise: str = "valid here") -> str:
    """The end of an error message about an unknown `name`: "did you mean PREFIXnearest?", else
    "OTHERWISE: all known names".
    """
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {prefix}{near}?" if near else f"{otherwise}: {', '.join(names)}"
