"""The drawn catalogue: seeded, resumable, served, and readable off its pictures."""

import csv
import io
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from shards.common.errors import BadInputError
from shards.sample import make_catalogue, serve_catalogue


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    make_catalogue(tmp_path / "a", 12, 3)
    make_catalogue(tmp_path / "b", 12, 3)
    make_catalogue(tmp_path / "c", 12, 4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_the_catalogue_is_varied_and_its_prices_follow_the_rule(tmp_path: Path) -> None:
    with make_catalogue(tmp_path, 60, 0).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 60 and len({row["product_code"] for row in rows}) == 60
    prices = {row["title"]: row["full_price"] for row in rows}
    assert all(prices[row["title"]] == row["full_price"] for row in rows)
    images = [Image.open(tmp_path / row["imageurl"]) for row in rows]
    assert {image.format for image in images} == {"JPEG", "PNG"}
    assert len({image.size for image in images}) > 30


def test_made_twice_it_is_not_drawn_again_and_another_one_is_refused(tmp_path: Path) -> None:
    table = make_catalogue(tmp_path, 5, 0)
    before = table.stat().st_mtime_ns
    assert make_catalogue(tmp_path, 5, 0).stat().st_mtime_ns == before
    with pytest.raises(BadInputError, match="choose another folder or delete it"):
        make_catalogue(tmp_path, 6, 0)
    with pytest.raises(BadInputError, match="ask for at least 1"):
        make_catalogue(tmp_path, 0)


def test_the_server_gives_what_the_table_names_and_nothing_else(tmp_path: Path) -> None:
    table = make_catalogue(tmp_path / "c", 3)
    (tmp_path / "secret").write_text("x")
    with serve_catalogue(tmp_path / "c") as url:
        with table.open(newline="") as stream:
            links = [row["imageurl"] for row in csv.DictReader(stream)]
        assert all(link.startswith(f"{url}/images/") for link in links)
        assert Image.open(io.BytesIO(urllib.request.urlopen(links[0]).read())).size
        for path in ("/images/", "/../secret", "/%2e%2e/secret"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url + path)
    with serve_catalogue(tmp_path / "c") as again:
        assert again == url  # so that an interrupted build finds its URLs unchanged


def test_no_catalogue_and_a_taken_port_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="make a catalogue"), serve_catalogue(tmp_path):
        pass
    make_catalogue(tmp_path, 1)
    with serve_catalogue(tmp_path) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(BadInputError, match=f"port {port} is in use"), serve_catalogue(tmp_path, port):
            pass
