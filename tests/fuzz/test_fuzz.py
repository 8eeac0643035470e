"""Input that somebody else wrote: whatever the bytes, the answer is a result or a BadInputError of one line.

Good inputs are damaged at random places (and texts made from their own special words). In the suite each
target gets a second or two; `PHI3V_FUZZ_MINUTES=30 pytest tests/fuzz` gives each that many minutes.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from phi3v_dist.config import load_config
from phi3v_dist.processor.image import decode_image, hd_tiles
from phi3v_dist.processor.prompt import encode
from shards.common.errors import BadInputError
from shards.format.dataset import read_dataset_info
from shards.format.index import read_index
from shards.format.messages import check_messages
from shards.format.phi3 import PHI3_CONTROL_TOKENS
from shards.format.records import sample_json
from shards.images import check_image
from shards.index import IndexOptions, build_index
from shards.tars import TarShard, scan

MINUTES = float(os.environ.get("PHI3V_FUZZ_MINUTES", "0"))
CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.timeout(150 * MINUTES + 180)


def fuzz(target: Callable[[Any], object], inputs: st.SearchStrategy[Any], examples: int = 150) -> None:
    """Calls target with inputs; only BadInputError of one line may come out."""

    def once(value: Any) -> None:
        try:
            target(value)
        except BadInputError as error:
            assert str(error) and "\n" not in str(error), error

    count = 2000 if MINUTES else examples
    limits = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=not MINUTES,
        suppress_health_check=list(HealthCheck),
    )
    end = time.monotonic() + 60 * MINUTES
    limits(given(inputs)(once))()
    while time.monotonic() < end:
        limits(given(inputs)(once))()


def damaged(*seeds: bytes) -> st.SearchStrategy[bytes]:
    """One of the seeds with a few of its bytes changed, cut out, repeated, put in, or its end cut off."""
    edit = st.tuples(
        st.sampled_from(["set", "cut", "put", "end", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=8), st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"])
        ),
        st.integers(1, 600),
    )

    def apply(seed: bytes, edits: list[tuple[str, float, bytes, int]]) -> bytes:
        data = bytearray(seed)
        for kind, where, piece, length in edits:
            place = int(where * len(data))
            if kind == "set":
                data[place : place + len(piece)] = piece
            elif kind == "cut":
                del data[place : place + length]
            elif kind == "put":
                data[place:place] = piece
            elif kind == "copy":
                data[place:place] = data[place : place + length]
            else:
                del data[place:]
        return bytes(data)

    return st.builds(apply, st.sampled_from(seeds), st.lists(edit, min_size=1, max_size=4))


def pictures() -> list[bytes]:
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    found = []
    for kind, mode in (
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
    ):
        stream = io.BytesIO()
        image.convert(mode).save(stream, kind)
        found.append(stream.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    return [*found, stream.getvalue()]


MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "<|image_1|>\nWhat is shown?"},
    {"role": "assistant", "content": "A hat."},
]


def tar_bytes(folder: Path) -> bytes:
    tar = TarShard(folder / "seed.tar")
    tar.add("a", [("json", sample_json(MESSAGES, {"price": 3})), ("jpg", pictures()[0])])
    tar.add("b", [("json", sample_json(MESSAGES, {})), ("0.png", pictures()[2]), ("1.webp", pictures()[4])])
    tar.close()
    return (folder / "seed.tar").read_bytes()


def test_tar_reader(tmp_path: Path) -> None:
    def target(data: bytes) -> None:
        for sample in scan(io.BytesIO(data), "x.tar"):
            for member in sample.members:
                assert 0 <= member.offset <= member.offset + member.length

    fuzz(target, damaged(tar_bytes(tmp_path)))


def test_index_of_foreign_tars(tmp_path: Path) -> None:
    data = tar_bytes(tmp_path)
    count = 0

    def target(data: bytes) -> None:
        nonlocal count
        count += 1
        root = tmp_path / "set"
        root.mkdir()
        try:
            (root / "part-0.tar").write_bytes(data)
            build_index(str(root), IndexOptions(min_success=0.0))
            read_index(str(root))
        finally:
            for file in sorted(root.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            root.rmdir()

    fuzz(target, damaged(data), examples=60)
    assert count


def test_dataset_json(tmp_path: Path) -> None:
    shard = {"name": "shard-000000.tar", "samples": 1, "bytes": 10240, "sha256": "0" * 64}
    info = {
        "format_version": 1, "num_samples": 1, "splits": {"train": 1}, "shards": [shard], "source": "x.csv",
        "built_with": {"seed": 0}, "fingerprint": "abc",
    }  # fmt: skip

    def target(data: bytes) -> None:
        (tmp_path / "dataset.json").write_bytes(data)
        info = read_dataset_info(str(tmp_path))
        assert isinstance(info.num_samples, int) and all(isinstance(each.name, str) for each in info.shards)
        assert all("/" not in each.name and not each.name.startswith(".") for each in info.shards)

    fuzz(target, damaged(json.dumps(info).encode()))
    fuzz(target, json_values().map(lambda value: json.dumps(value).encode()))


def json_values() -> st.SearchStrategy[Any]:
    words = [
        "role",
        "content",
        "messages",
        "user",
        "assistant",
        "system",
        "<|image_1|>",
        "<|image_2|>",
        "shards",
    ]
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(words)
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(words), inner, max_size=4)
        ),
        max_leaves=12,
    )


def test_messages_of_a_sample() -> None:
    fuzz(lambda value: check_messages(value, 1), json_values())
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": texts()}
    )
    fuzz(lambda value: check_messages(value, 2), st.lists(message, max_size=5))


def texts() -> st.SearchStrategy[str]:
    words = [
        *PHI3_CONTROL_TOKENS,
        "<|image_1|>",
        "<|image_2|>",
        "<|image_0|>",
        "<|image_99|>",
        "<|image_",
        "|>",
        "\n",
        " ",
    ]
    piece = st.one_of(st.sampled_from(words), st.text(max_size=6))
    return st.lists(piece, max_size=8).map("".join)


class Words:
    """A tokenizer of one id a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(100 + ord(letter) for letter in text)]}

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<|assistant|>": 32001, "<|end|>": 32007}[token]


def test_prompt_splitter() -> None:
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": texts()}
    )

    def target(value: tuple[list[dict[str, str]], int]) -> None:
        messages, images = value
        encoded = encode(Words(), messages, [3] * images)
        assert len(encoded.input_ids) == len(encoded.labels)
        assert sum(token < 0 for token in encoded.input_ids) == 3 * images

    fuzz(target, st.tuples(st.lists(message, min_size=1, max_size=4), st.integers(0, 3)), examples=300)


@pytest.mark.parametrize("check", [decode_image, check_image], ids=["training", "shards"])
def test_image_decoders(check: Callable[[bytes], Any]) -> None:
    def target(data: bytes) -> None:
        found = check(data)
        if isinstance(found, Image.Image):
            assert found.mode == "RGB"
            hd_tiles(found, 1)

    fuzz(target, damaged(*pictures()), examples=400)


def test_config_loader(tmp_path: Path) -> None:
    seeds = [file.read_bytes() for file in sorted(CONFIGS.glob("*.yaml"))]

    def target(data: bytes) -> None:
        file = tmp_path / "run.yaml"
        file.write_bytes(data)
        load_config(file)

    fuzz(target, damaged(*seeds), examples=100)
    tree = yaml.safe_load((CONFIGS / "tiny.yaml").read_text())

    def override(value: str) -> None:
        load_config(CONFIGS / "tiny.yaml", [value])

    key = st.sampled_from(
        [f"{section}.{name}" for section, names in tree.items() if isinstance(names, dict) for name in names]
    )
    value = st.one_of(
        st.text(max_size=8),
        st.sampled_from(["null", "${oc.env:X_Y}", "${name}", "[", "{a: 1}", "nan", "1e400"]),
    )
    fuzz(override, st.builds("{}={}".format, key, value), examples=100)
