"""Inspect counts what is there."""

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from shards.build import BuildOptions, build
from shards.format.index import read_index
from shards.inspect import Spread, inspect, spread
from shards.page import make_page
from tests.shards.conftest import write_csv


def test_counts_sizes_texts_duplicates_and_failures(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number, size=(20 + 10 * number, 40)))
    (tmp_path / "6.png").write_bytes(picture(6, "PNG", (300, 30)))
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    names = [*(f"{n}.jpg" for n in range(6)), "6.png", "copy.jpg", "missing.jpg"]
    rows = [(name, f"item {place // 2}", place) for place, name in enumerate(names)]
    source = write_csv(tmp_path / "t.csv", ("image", "name", "price"), rows)
    options = BuildOptions(("image",), "{name}?", "yes", group_by="price", val_fraction=0.5, min_success=0.5)
    build(str(source), str(tmp_path / "out"), options)
    found = inspect(str(tmp_path / "out"))
    assert found.info.num_samples == 8 and found.images_per_sample == {1: 8}
    assert found.formats == {"jpg": 7, "png": 1}
    assert found.width == Spread(20, 40, 300, 300, 20 + 30 + 40 + 50 + 60 + 70 + 300 + 20)
    assert found.prompt_chars.largest == len("<|image_1|>\nitem 0?") and found.reply_chars.total == 24
    assert found.frequent_replies == (("yes", 8),) and found.repeated_texts == 4
    ((first, second),) = found.duplicate_images
    assert {first.image.member, second.image.member} == {"00000000.jpg", "00000007.jpg"}
    assert found.failed == {"no such file": 1}
    assert found.shard_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))


def test_spread() -> None:
    assert spread([]) == Spread(0, 0, 0, 0, 0)
    assert spread(range(100)) == Spread(0, 49, 94, 99, 4950)


def test_the_page_shows_everything_and_needs_nothing_beside_it(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number // 2))
    rows = [(f"{n}.jpg", f"<b>item {n}</b>", n) for n in range(4)]
    source = write_csv(tmp_path / "t.csv", ("image", "name", "price"), [*rows, ("none.jpg", "x", 9)])
    options = BuildOptions(("image",), "{name}?", "yes", group_by="price", val_fraction=0.5, min_success=0.5)
    build(str(source), str(tmp_path / "out"), options)
    row = read_index(str(tmp_path / "out")).to_pylist()[0]
    with (tmp_path / "out" / row["shard"]).open("r+b") as tar:
        tar.seek(row["images"][0]["offset"])
        tar.write(b"damaged")
    page = make_page(str(tmp_path / "out"), inspect(str(tmp_path / "out")))
    HTMLParser(convert_charrefs=False).feed(page)
    assert "&lt;b&gt;item 0&lt;/b&gt;?" in page and "<b>item" not in page
    assert page.count("data:image/jpeg;base64,") >= 3 and "not a JPEG, PNG or WebP image" in page
    assert "no such file" in page and page.count("<svg") == 5
    assert "http" not in page and "<script" not in page and " src=" in page
