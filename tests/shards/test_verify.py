"""Verify finds what has changed since dataset.json was written, and names it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.build import BuildOptions, build
from shards.common.errors import BadInputError
from shards.verify import Report, verify


@pytest.fixture
def dataset(tmp_path: Path, table: Callable[..., Path]) -> Path:
    options = BuildOptions(images=("image",), prompt="?", answer="{name}", val_fraction=0)
    build(str(table(6)), str(tmp_path / "out"), options)
    return tmp_path / "out"


def change_tar(root: Path, at: int, new: bytes) -> None:
    with (root / "shard-000000.tar").open("r+b") as tar:
        tar.seek(at)
        tar.write(new)


def change_index(root: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path = root / "index/part-000000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def check(root: Path, decode: float = 1) -> list[str]:
    report = verify(str(root), decode)
    assert report.num_faults == len(report.faults)
    return list(report.faults)


def test_a_good_dataset_has_no_faults_and_is_read_to_the_end(dataset: Path) -> None:
    seen: list[tuple[int, int]] = []
    size = (dataset / "shard-000000.tar").stat().st_size
    report = verify(str(dataset), 1, lambda done, total: seen.append((done, total)))
    assert report == Report(1, 6, 6, 6, (), 0) and seen == [(size, size)]
    assert verify(str(dataset), 0).images_decoded == 0
    with pytest.raises(BadInputError, match="decode is 2; it must be from 0"):
        verify(str(dataset), 2)


def test_changed_pixels(dataset: Path) -> None:
    row = pq.read_table(dataset / "index").to_pylist()[2]
    image = row["images"][0]
    change_tar(dataset, image["offset"], b"\0" * image["length"])
    checksum, picture = check(dataset)
    assert checksum.startswith("shard-000000.tar: its sha256 is not that of dataset.json")
    assert picture.startswith("shard-000000.tar: sample '00000002': image 00000002.jpg: not a JPEG")
    assert len(check(dataset, decode=0)) == 1


def test_changed_text(dataset: Path) -> None:
    data = (dataset / "shard-000000.tar").read_bytes()
    change_tar(dataset, data.index(b"thing 3"), b"thing 4")
    faults = check(dataset)
    assert (
        "shard-000000.tar: sample '00000003': the messages of 00000003.json are not those of the index"
        in faults
    )


def test_a_damaged_tar_a_missing_one_and_a_stray_one(dataset: Path) -> None:
    row = pq.read_table(dataset / "index").to_pylist()[4]
    change_tar(dataset, row["offset"], b"\xff" * 100)
    faults = check(dataset)
    assert any("damaged or truncated header" in fault for fault in faults)
    assert any("no sample at byte" in fault and "'00000004'" in fault for fault in faults)
    (dataset / "shard-000000.tar").rename(dataset / "shard-000009.tar")
    assert check(dataset) == [
        "shard-000009.tar: not in dataset.json; delete it or build again",
        "shard-000000.tar: missing; copy it again or build again",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1].update(key="x"), "sample 'x': the tar has '00000001' at this place"),
        (lambda rows: rows[1].update(key="00000002"), "index: key '00000002' occurs 2 times"),
        (lambda rows: rows[1].update(split="val"), "index: splits {'train': 5, 'val': 1}, dataset.json says"),
        (lambda rows: rows[1].update(offset=512), "sample '00000001' is not in the index"),
        (lambda rows: rows[1].update(length=1), "bytes in the tar, 1 in the index"),
        (
            lambda rows: rows[1].update(images=[]),
            "0 image.s. but the prompt names <|image_1|>".replace(".", ""),
        ),
        (
            lambda rows: rows[1]["images"][0].update(offset=9),
            "image 00000001.jpg is not where the index says",
        ),
        (lambda rows: rows[1]["images"][0].update(width=9), "is 60x40, the index says 9x40"),
        (lambda rows: rows[1]["messages"].pop(), "the last message is by 'user'"),
        (lambda rows: rows[1].update(meta="{}"), "the meta of 00000001.json is not that of the index"),
        (lambda rows: rows[1].update(shard="shard-000007.tar"), "index: names shard-000007.tar"),
    ],
)
def test_an_index_that_does_not_agree(dataset: Path, change: Callable[[Any], object], words: str) -> None:
    change_index(dataset, change)
    faults = check(dataset)
    assert any(words in fault.replace("(s)", "s") for fault in faults), faults
    assert all("\n" not in fault for fault in faults)
