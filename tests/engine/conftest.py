"""The tiny model of tests/model, for the tests of the engine."""

from tests.model.conftest import tiny

__all__ = ["tiny"]
