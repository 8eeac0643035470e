"""The builders of tiny.py as a fixture, for the tests beside this file and in its folders."""

from collections.abc import Callable

import pytest

from tests.model import tiny as builders


@pytest.fixture(scope="session")
def tiny() -> type:
    """The builders above, for the tests beside this file."""

    class Builders:
        config: Callable = staticmethod(builders.tiny_config)
        model: Callable = staticmethod(builders.tiny_model)
        document: Callable = staticmethod(builders.make_document)
        pack: Callable = staticmethod(builders.pack)
        published: Callable = staticmethod(builders.published)

    return Builders
