"""Tars that other programs wrote: indexed as they are, resumable, refused in one line."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards import index as index_module
from shards.build import BuildOptions, build
from shards.common.errors import BadInputError
from shards.format.index import read_index
from shards.index import IndexOptions, build_index
from shards.verify import verify

Picture = Callable[..., bytes]


def write_tars(root: Path, shards: dict[str, list[dict[str, Any]]]) -> Path:
    """Through webdataset's own writer, which sorts the members of a sample: the image before the JSON."""
    from webdataset.writer import TarWriter

    root.mkdir(exist_ok=True)
    for name, samples in shards.items():
        with TarWriter(str(root / name)) as tar:
            for sample in samples:
                tar.write(sample)
    return root


def captioned(picture: Picture, first: int, count: int) -> list[dict[str, Any]]:
    return [
        {"__key__": f"{n:04d}", "jpg": picture(n), "txt": f"a picture {n}"}
        for n in range(first, first + count)
    ]


def test_tars_with_our_json_by_another_writer(tmp_path: Path, picture: Picture) -> None:
    text = "".join(f"<|image_{k}|>" for k in range(1, 12)) + "Which?"
    content = {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "2"}],
        "meta": {"a": 1},
    }
    images = {f"{k}.jpg": picture(k, size=(20 + k, 20)) for k in range(11)}
    root = write_tars(tmp_path / "d", {"x.tar": [{"__key__": "s", "json": content, **images}]})
    info = build_index(str(root), IndexOptions(val_fraction=0))
    (row,) = read_index(str(root), "train").to_pylist()
    assert info.splits == {"train": 1} and row["messages"] == content["messages"]
    assert json.loads(row["meta"]) == {"a": 1}
    assert [image["width"] for image in row["images"]] == [20 + k for k in range(11)]  # 2.jpg before 10.jpg
    tar = (root / "x.tar").read_bytes()
    for k, image in enumerate(row["images"]):
        assert tar[image["offset"] :][: image["length"]] == images[f"{k}.jpg"]
    assert verify(str(root), decode=1).faults == ()


def test_captions_through_templates_and_splits_by_name(tmp_path: Path, picture: Picture) -> None:
    root = write_tars(
        tmp_path / "d",
        {"train-0.tar": captioned(picture, 0, 5), "train-1.tar": captioned(picture, 5, 5),
         "val-0.tar": captioned(picture, 10, 3)},
    )  # fmt: skip
    info = build_index(str(root), IndexOptions(prompt="Describe it.", answer="{txt}"))
    assert info.splits == {"train": 10, "val": 3} and info.num_samples == 13
    row = read_index(str(root), "val").to_pylist()[0]
    assert row["messages"][0]["content"] == "<|image_1|>\nDescribe it."
    assert row["messages"][1]["content"] == "a picture 10" and json.loads(row["meta"]) == {
        "txt": "a picture 10"
    }
    assert verify(str(root), decode=1).faults == ()


def test_keys_that_start_again_in_every_tar_are_told_apart(tmp_path: Path, picture: Picture) -> None:
    root = write_tars(tmp_path / "d", {"a.tar": captioned(picture, 0, 2), "b.tar": captioned(picture, 0, 2)})
    build_index(str(root), IndexOptions(prompt="?", answer="{txt}"))
    assert read_index(str(root))["key"].to_pylist() == ["a/0000", "a/0001", "b/0000", "b/0001"]
    assert verify(str(root), decode=1).faults == ()


def test_bad_samples_are_in_the_ledger_and_counted(tmp_path: Path, picture: Picture) -> None:
    samples = captioned(picture, 0, 6)
    samples[1]["jpg"] = b"<html>"
    samples[3]["txt"] = ""
    root = write_tars(tmp_path / "d", {"a.tar": samples})
    options = {"prompt": "?", "answer": "{txt}"}
    words = "only 4 of 6 samples can be used .min_success 0.95.; most frequent reason"
    with pytest.raises(BadInputError, match=words):
        build_index(str(root), IndexOptions(**options))
    info = build_index(str(root), IndexOptions(**options, min_success=0.5))
    assert info.num_samples == 4
    ledger = [json.loads(line) for line in (root / "ledger/part-000000.jsonl").read_text().splitlines()]
    assert [entry["outcome"] for entry in ledger] == ["ok", "failed", "ok", "failed", "ok", "ok"]
    assert "not a JPEG" in ledger[1]["reason"] and ledger[3]["reason"] == "column 'txt' is empty"
    assert verify(str(root), decode=1).faults == ()


def test_the_images_that_a_sample_names_must_be_there(tmp_path: Path, picture: Picture) -> None:
    def talk(count: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": "<image>" * count + "?"}, {"role": "assistant", "content": "x"}]

    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    two = {"a.jpg": picture(1, size=(30, 20)), "b.jpg": picture(2, size=(40, 20))}
    samples = [
        {"json": {"messages": talk(2), "images": ["x/b.jpg", "x/a.jpg"]}, **two},  # told in this order
        {"json": {"messages": talk(1), "images": ["x/a.jpg", "x/b.jpg"]}, "jpg": picture(1)},
        {"json": {"messages": talk(1)}},
        {"json": b'{"messages": ' + b"9" * 5000 + b"}", "jpg": picture(1)},
        {"json": {"messages": talk(1), "image": "a.jpg"}, "jpg": picture(1)},
    ]
    tar = [{"__key__": f"s{number}", **sample} for number, sample in enumerate(samples)]
    for each in tar:
        each["json"] = each["json"] if isinstance(each["json"], bytes) else json.dumps(each["json"]).encode()
    root = write_tars(tmp_path / "d", {"x.tar": tar})
    build_index(str(root), IndexOptions(val_fraction=0, min_success=0.1))
    rows = read_index(str(root)).to_pylist()
    assert [row["key"] for row in rows] == ["s0", "s4"]
    assert [image["width"] for image in rows[0]["images"]] == [40, 30]
    ledger = [json.loads(line) for line in (root / "ledger/part-000000.jsonl").read_text().splitlines()]
    reasons = ["names 2 image(s), the tar has 1", "0 image(s) but 1 placeholder", "not readable JSON"]
    assert all(reason in entry["reason"] for entry, reason in zip(ledger[1:4], reasons, strict=True))
    assert verify(str(root), decode=1).faults == ()
    llava = [{"__key__": f"s{n}", "json": {"conversations": turns, "image": "a.jpg"}} for n in range(2)]
    root = write_tars(tmp_path / "llava", {"x.tar": [{**llava[0], "jpg": picture(1)}, llava[1]]})
    build_index(str(root), IndexOptions(val_fraction=0, min_success=0.1))
    assert read_index(str(root))["key"].to_pylist() == ["s0"]
    assert "1 image(s) named, the tar has 0" in (root / "ledger/part-000000.jsonl").read_text()


def test_stopped_half_way_it_resumes_with_the_same_result(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"{name}.tar": captioned(picture, 0, 3) for name in "abc"}
    options = IndexOptions(prompt="?", answer="{txt}")
    whole, stopped = write_tars(tmp_path / "whole", shards), tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    build_index(str(whole), options)

    def stop_after(name: str, calls: int) -> None:
        original, count = getattr(index_module, name), 0

        def stopping(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(index_module, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                build_index(str(stopped), options)

    stop_after("_index_tar", 2)
    assert not (stopped / "dataset.json").exists()
    stop_after("prefix_keys", 1)
    build_index(str(stopped), options)
    assert (stopped / "dataset.json").read_bytes() == (whole / "dataset.json").read_bytes()
    assert read_index(str(stopped)) == read_index(str(whole))
    build_index(str(stopped), options)  # complete: nothing to do


def test_what_cannot_be_indexed_is_refused(
    tmp_path: Path, picture: Picture, table: Callable[..., Path]
) -> None:
    with pytest.raises(BadInputError, match="no such directory"):
        build_index(str(tmp_path / "none"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.tar.gz").write_bytes(b"")
    with pytest.raises(BadInputError, match="no .tar files to index; a.tar.gz is compressed"):
        build_index(str(tmp_path / "packed"))
    root = write_tars(tmp_path / "d", {"a.tar": captioned(picture, 0, 2)})
    with pytest.raises(BadInputError, match="sample 0000: a prompt template is needed"):
        build_index(str(root))
    with pytest.raises(BadInputError, match="no column 'caption' .* its columns: txt, images"):
        build_index(str(root), IndexOptions(prompt="?", answer="{caption}"))
    build_index(str(root), IndexOptions(prompt="?", answer="{txt}"))
    with pytest.raises(BadInputError, match="an index with other options"):
        build_index(str(root), IndexOptions(prompt="!", answer="{txt}"))
    shutil.copy(root / "a.tar", root / "b.tar")
    with pytest.raises(BadInputError, match="other tars than those that are here"):
        build_index(str(root), IndexOptions(prompt="?", answer="{txt}"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/a.tar").write_bytes((root / "a.tar").read_bytes()[:2000])
    with pytest.raises(BadInputError, match="not a complete, uncompressed tar|damaged or truncated"):
        build_index(str(tmp_path / "cut"), IndexOptions(prompt="?", answer="{txt}"))
    options = BuildOptions(images=("image",), prompt="?", answer="{name}")
    build(str(table(2)), str(tmp_path / "built"), options)
    with pytest.raises(BadInputError, match="was written by shards build"):
        build_index(str(tmp_path / "built"))


def test_images_can_be_chosen_by_suffix_and_arrays_are_ignored(tmp_path: Path, picture: Picture) -> None:
    sample = {
        "__key__": "a",
        "photo.jpg": picture(1),
        "mask.png": picture(2, "PNG"),
        "cls": "3",
        "npy": b"\xff\xfe",
    }
    root = write_tars(tmp_path / "d", {"a.tar": [sample]})
    build_index(str(root), IndexOptions(("photo.jpg",), "Class?", "{cls}", val_fraction=0))
    (row,) = read_index(str(root)).to_pylist()
    assert [image["member"] for image in row["images"]] == ["a.photo.jpg"]
    assert io.BytesIO(row["messages"][1]["content"].encode()).read() == b"3"
