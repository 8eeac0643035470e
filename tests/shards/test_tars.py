"""Tars: equal samples give equal bytes, other programs read them, damage is found."""

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from shards.common.errors import BadInputError
from shards.tars import TarShard, scan

SAMPLES = [
    ("a", [("json", b"{}"), ("jpg", b"x" * 700)]),
    ("b", [("json", b"[]"), ("0.jpg", b"y"), ("1.png", b"")]),
]


def write(path: Path) -> list:
    tar = TarShard(path)
    written = [tar.add(key, members) for key, members in SAMPLES]
    size = tar.size
    assert tar.close() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tar.samples == 2 and size <= path.stat().st_size
    return written


def test_written_and_scanned_ranges_agree_and_hold_the_data(tmp_path: Path) -> None:
    written = write(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    with (tmp_path / "a.tar").open("rb") as stream:
        assert list(scan(stream, "a.tar")) == written
    for sample, (_, members) in zip(written, SAMPLES, strict=True):
        for member, (suffix, content) in zip(sample.members, members, strict=True):
            assert member.suffix == suffix
            assert data[member.offset : member.offset + member.length] == content
    first, second = written
    assert first.offset + first.length == second.offset


def test_a_range_read_of_one_sample_is_a_tar_of_it(tmp_path: Path) -> None:
    _, second = write(tmp_path / "a.tar")
    piece = (tmp_path / "a.tar").read_bytes()[second.offset :][: second.length]
    with tarfile.open(fileobj=io.BytesIO(piece)) as tar:
        assert tar.getnames() == ["b.json", "b.0.jpg", "b.1.png"]


def test_equal_samples_give_equal_bytes_with_nothing_of_here_and_now(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    write(tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
    assert (tmp_path / "a.tar").stat().st_size % tarfile.RECORDSIZE == 0


def test_long_names_of_other_writers_are_scanned(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as tar:
            for suffix in ("jpg", "json"):
                info = tarfile.TarInfo("folder/" + "k" * 150 + "." + suffix)
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
        with (tmp_path / "long.tar").open("rb") as stream:
            (sample,) = scan(stream, "long.tar")
        assert sample.offset == 0 and [m.suffix for m in sample.members] == ["jpg", "json"]
        assert sample.key == "folder/" + "k" * 150


def test_damage_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(BadInputError, match="cut.tar: not a complete"):
        list(scan(io.BytesIO(data[:1800]), "cut.tar"))
    with pytest.raises(BadInputError, match="cut.tar: damaged or truncated header at byte 1024"):
        list(scan(io.BytesIO(data[:1500]), "cut.tar"))
    flipped = bytearray(data)
    flipped[2600] ^= 0xFF  # in the header of b.json
    with pytest.raises(BadInputError, match="flipped.tar: damaged or truncated header"):
        list(scan(io.BytesIO(flipped), "flipped.tar"))
    with pytest.raises(BadInputError, match="no.tar: not a complete, uncompressed tar"):
        list(scan(io.BytesIO(b"hello" * 500), "no.tar"))


def test_two_members_of_one_name_are_refused() -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("k.jpg"))
    data.seek(0)
    with pytest.raises(BadInputError, match="sample 'k' has two members .jpg"):
        list(scan(data, "twice.tar"))
