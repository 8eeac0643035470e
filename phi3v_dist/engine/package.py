"""The name of the library below this package, for those that name it without importing it."""

PACKAGE = "deepspeed"
"""The distribution whose version decides the numbers of a run."""
