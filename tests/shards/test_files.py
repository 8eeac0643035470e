"""Files are replaced atomically; a directory has one writer."""

from pathlib import Path

import pytest

from shards.common.errors import BadInputError
from shards.common.files import partial_path, write_atomically
from shards.common.locks import alone_in, alone_with


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"one")
    partial_path(path).write_bytes(b"left by a killed process")
    write_atomically(path, b"two", durable=False)
    assert path.read_bytes() == b"two" and list(tmp_path.iterdir()) == [path]


def test_the_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path),
        pytest.raises(BadInputError, match="another process is writing here"),
        alone_in(tmp_path),
    ):
        pass
    with alone_in(tmp_path):
        pass


def test_a_lock_file_has_one_holder_and_is_deleted(tmp_path: Path) -> None:
    file = tmp_path / ".task-0000.lock"
    with (
        alone_with(file),
        pytest.raises(BadInputError, match="another process is writing here"),
        alone_with(file),
    ):
        pass
    assert not file.exists()
    with alone_with(file):
        assert file.exists()


def test_a_shared_directory_lock_keeps_out_a_sole_writer(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path, shared=True),
        alone_in(tmp_path, shared=True),
        pytest.raises(BadInputError, match="another process is writing here"),
        alone_in(tmp_path),
    ):
        pass
