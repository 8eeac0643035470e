"""Datasets copied to a local disk: complete, once, and equal to the original."""

from pathlib import Path

import pytest

from launch.stage import stage_dataset
from shards.common.errors import BadInputError
from shards.common.files import partial_path
from shards.format.dataset import read_dataset_info
from shards.format.index import read_index


def test_the_copy_equals_the_dataset_and_is_made_once(products: Path, tmp_path: Path) -> None:
    copy = stage_dataset(str(products), tmp_path / "local disk")
    assert read_dataset_info(str(copy)) == read_dataset_info(str(products))
    assert read_index(str(copy)).equals(read_index(str(products)))
    for shard in products.glob("*.tar"):
        assert (copy / shard.name).read_bytes() == shard.read_bytes()
    first = (copy / "dataset.json").stat().st_mtime_ns
    assert stage_dataset(str(products), tmp_path / "local disk") == copy
    assert (copy / "dataset.json").stat().st_mtime_ns == first


def test_an_incomplete_copy_is_completed(products: Path, tmp_path: Path) -> None:
    copy = stage_dataset(str(products), tmp_path)
    shard = next(iter(sorted(copy.glob("*.tar"))))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    (copy / "dataset.json").unlink()
    partial_path(shard).write_bytes(b"left by a start that was killed")
    stage_dataset(str(products), tmp_path)
    assert shard.read_bytes() == whole and not list(copy.glob("**/*.partial"))


def test_what_cannot_be_copied_is_one_line(products: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(BadInputError, match="cannot copy"):
        stage_dataset(str(products), tmp_path / "a file")
    with pytest.raises(BadInputError, match="no such dataset"):
        stage_dataset(str(tmp_path / "nothing"), tmp_path)
