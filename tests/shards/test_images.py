"""Pictures are judged by their content alone."""

import contextlib
import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps, PngImagePlugin

from phi3v_dist.processor.image import decode_image
from shards.common.errors import BadInputError
from shards.images import check_image, parse_coding, reencode, sniff


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
    for orientation in (1, 6):
        data = picture(1, kind, (300, 200), orientation=orientation)
        assert check_image(data, decode=False) == check_image(data)
        with pytest.raises(BadInputError, match="60000 pixels|x.* pixels, more than the limit of 100"):
            check_image(data, max_pixels=100, decode=False)
        for length in (len(data) * 2 // 3, len(data) - 2):
            with pytest.raises(BadInputError, match="damaged"):
                check_image(data[:length], decode=False)


def test_the_quick_look_at_a_jpeg_agrees_with_pillow() -> None:
    image = Image.frombytes("RGB", (8, 8), random.Random(1).randbytes(192)).resize((301, 203))
    for mode, settings in [
        ("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True}), ("RGB", {"optimize": True}),
        ("RGB", {"restart_marker_rows": 1}), ("RGB", {"comment": b"\xff\xd9\xff\xda"}),
        ("RGB", {"subsampling": 0, "quality": 100}),
    ]:  # fmt: skip
        data = io.BytesIO()
        image.convert(mode).save(data, "JPEG", **settings)
        assert check_image(data.getvalue(), decode=False) == check_image(data.getvalue()), (mode, settings)
        rng = random.Random(2)
        for _ in range(200):  # whatever the damage: a size or a refusal
            damaged = bytearray(data.getvalue())
            damaged[rng.randrange(2, 700)] = rng.randrange(256)
            with contextlib.suppress(BadInputError):
                check_image(bytes(damaged), decode=False)


@pytest.mark.parametrize("coding", ["jpeg:90", "webp:80", "png", "jpeg"])
def test_pictures_are_made_anew_upright_and_alike(picture: Callable[..., bytes], coding: str) -> None:
    data = picture(1, "PNG", (75, 50), orientation=6)
    first, facts = reencode(data, check_image(data), coding=coding)
    assert reencode(data, check_image(data), coding=coding)[0] == first and check_image(first) == facts
    assert facts.extension == {"jpeg": "jpg"}.get(coding.split(":")[0], coding.split(":")[0])
    assert (facts.width, facts.height) == (50, 75)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    made = Image.open(io.BytesIO(first)).convert("RGB")
    most = max(high for _, high in ImageChops.difference(upright, made).getextrema())
    assert most < (1 if coding == "png" else 80)


def test_what_shines_through_becomes_white_in_a_jpeg() -> None:
    for mode in ("RGBA", "LA"):
        data = io.BytesIO()
        Image.new(mode, (20, 20), 0).save(data, "PNG")
        small, facts = reencode(data.getvalue(), check_image(data.getvalue()), coding="jpeg:95")
        assert facts.extension == "jpg" and Image.open(io.BytesIO(small)).convert("L").getextrema()[0] > 250


@pytest.mark.parametrize("coding", ["gif", "jpeg:0", "jpeg:101", "jpeg:", "png:9", "jpeg:x"])
def test_other_codings_are_refused(coding: str) -> None:
    with pytest.raises(BadInputError, match="it must be jpeg, webp or png"):
        parse_coding(coding)


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_picture(picture: Callable[..., bytes]) -> None:
    data = picture(1, "JPEG", (300, 200))
    thumbnail = picture(2)
    segment = b"\xff\xe1" + (2 + len(thumbnail)).to_bytes(2, "big") + thumbnail
    nested = data[:2] + segment + data[2:]
    check_image(nested, decode=False)
    with pytest.raises(BadInputError, match="truncated"):
        check_image(nested[: len(nested) * 2 // 3], decode=False)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_shrunk_pictures_are_upright_and_of_the_same_format(picture: Callable[..., bytes], kind: str) -> None:
    data = picture(1, kind, (300, 200), orientation=6)
    small, facts = reencode(data, check_image(data), 90)
    assert (facts.width, facts.height) == (60, 90) and check_image(small) == facts
    assert Image.open(io.BytesIO(small)).format == kind


def test_deep_grey_stays_what_training_would_have_seen() -> None:
    """Pillow's own conversion would make nearly all of it white."""
    ramp = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = io.BytesIO()
    Image.fromarray(ramp).save(data, "PNG")
    made, _ = reencode(data.getvalue(), check_image(data.getvalue()), coding="png")
    seen = [np.asarray(decode_image(each).convert("L"), dtype=int) for each in (data.getvalue(), made)]
    assert np.array_equal(*seen) and seen[0].min() == 0 and 120 < seen[0].mean() < 135


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("decode", [True, False])
def test_what_is_too_thin_to_train_on_is_refused(kind: str, decode: bool) -> None:
    data = io.BytesIO()
    Image.new("RGB", (1500, 1)).save(data, kind)
    with pytest.raises(BadInputError, match="1500x1 pixels: too long and thin"):
        check_image(data.getvalue(), decode=decode)


def test_a_png_is_not_decoded_for_its_orientation(
    picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    turned, plain = (picture(3, "PNG", (80, 50), orientation=each) for each in (6, 1))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: 1 / 0)
    for data, size in ((turned, (50, 80)), (plain, (80, 50))):
        facts = check_image(data, decode=False)
        assert (facts.width, facts.height) == size


def test_what_a_format_cannot_hold_is_said() -> None:
    data = io.BytesIO()
    Image.new("L", (17_000, 100)).save(data, "PNG")
    with pytest.raises(BadInputError, match="17000x100 pixels, webp allows 16383 on a side"):
        reencode(data.getvalue(), check_image(data.getvalue()), coding="webp")
