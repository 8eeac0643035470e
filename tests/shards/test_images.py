"""Pictures are judged by their content alone."""

import io
from collections.abc import Callable

import pytest
from PIL import Image

from shards.format import BadInputError
from shards.images import check_image, shrink, sniff


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_good_pictures_give_their_format_and_size(
    picture: Callable[..., bytes], kind: str, extension: str
) -> None:
    data = picture(1, kind, (75, 50))
    assert sniff(data) == extension
    facts = check_image(data)
    assert (facts.extension, facts.width, facts.height) == (extension, 75, 50)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_size_is_as_shown(picture: Callable[..., bytes], kind: str) -> None:
    facts = check_image(picture(1, kind, (75, 50), orientation=6))
    assert (facts.width, facts.height) == (50, 75)
    facts = check_image(picture(1, kind, (75, 50), orientation=3))
    assert (facts.width, facts.height) == (75, 50)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_short_is_damaged(picture: Callable[..., bytes], kind: str) -> None:
    data = picture(1, kind, (300, 200))
    with pytest.raises(BadInputError, match="damaged"):
        check_image(data[: len(data) * 2 // 3])


def test_others_are_refused_with_the_reason(picture: Callable[..., bytes]) -> None:
    with pytest.raises(BadInputError, match="empty file"):
        check_image(b"")
    with pytest.raises(BadInputError, match="not a JPEG, PNG or WebP image .starts with b'<html>'"):
        check_image(b"<html>")
    gif = io.BytesIO()
    Image.new("RGB", (9, 9)).save(gif, "GIF")
    with pytest.raises(BadInputError, match="not a JPEG"):
        check_image(gif.getvalue())
    moving = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "green")]
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(BadInputError, match="animated image of 3 frames"):
        check_image(moving.getvalue())
    with pytest.raises(BadInputError, match="60x40 pixels, more than the limit of 2000"):
        check_image(picture(1), max_pixels=2000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_without_decoding_files_cut_short_are_still_found(picture: Callable[..., bytes], kind: str) -> None:
    data = picture(1, kind, (300, 200), orientation=6)
    assert check_image(data, decode=False) == check_image(data)
    with pytest.raises(BadInputError, match="damaged"):
        check_image(data[: len(data) * 2 // 3], decode=False)


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_picture(picture: Callable[..., bytes]) -> None:
    data = picture(1, "JPEG", (300, 200))
    thumbnail = picture(2)
    segment = b"\xff\xe1" + (2 + len(thumbnail)).to_bytes(2, "big") + thumbnail
    nested = data[:2] + segment + data[2:]
    check_image(nested, decode=False)
    with pytest.raises(BadInputError, match="cut short"):
        check_image(nested[: len(nested) * 2 // 3], decode=False)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_shrunk_pictures_are_upright_and_of_the_same_format(picture: Callable[..., bytes], kind: str) -> None:
    data = picture(1, kind, (300, 200), orientation=6)
    small, facts = shrink(data, check_image(data), 90)
    assert (facts.width, facts.height) == (60, 90) and check_image(small) == facts
    assert Image.open(io.BytesIO(small)).format == kind
