"""The shard format: messages that are refused, and dataset directories that are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards
from shards.common.errors import BadInputError
from shards.format.dataset import FORMAT_VERSION, DatasetInfo, ShardInfo, dataset_info_json, read_dataset_info
from shards.format.index import INDEX_SCHEMA, read_index
from shards.format.messages import check_messages, image_tags


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK = turn("user", "<|image_1|>\n<|image_2|>\nWhich is dearer?")
REPLY = turn("assistant", "The first.")


def test_good_messages_pass() -> None:
    check_messages([ASK, REPLY], 2)
    check_messages([turn("system", "Be brief."), ASK, REPLY, turn("user", "Why?"), REPLY], 2)
    check_messages([turn("user", "Hello"), REPLY], 0)
    assert image_tags([ASK, REPLY]) == [1, 2]


@pytest.mark.parametrize(
    ("messages", "images", "words"),
    [
        ([], 0, "non-empty list"),
        ([ASK, REPLY], 1, "1 image"),
        ([ASK, REPLY], 3, "3 image"),
        ([turn("user", "<|image_2|><|image_1|>"), REPLY], 2, "in order"),
        ([turn("user", "<|image_1|><|image_1|>"), REPLY], 1, "once each"),
        ([turn("human", "hi"), REPLY], 0, "role 'human'"),
        ([turn("user", "hi")], 0, "must end with the assistant"),
        ([REPLY], 0, "no user message"),
        ([turn("user", "hi"), turn("assistant", " ")], 0, "reply is empty"),
        ([turn("user", "hi"), turn("assistant", "<|image_1|>")], 1, "image tag in the assistant"),
        ([turn("user", "hi"), turn("system", "x"), REPLY], 0, "only the first"),
        ([{"role": "user", "content": None}, REPLY], 0, "not text"),
        ([{"role": "user"}, REPLY], 0, "role and content"),
    ],
)
def test_bad_messages_are_refused_in_one_line(messages: list, images: int, words: str) -> None:
    with pytest.raises(BadInputError, match=words) as caught:
        check_messages(messages, images)
    assert "\n" not in str(caught.value)


def write_dataset(root: Path, rows: list[dict], **changes: object) -> None:
    fields = {
        "format_version": FORMAT_VERSION,
        "num_samples": len(rows),
        "splits": {s: sum(r["split"] == s for r in rows) for s in ("train", "val")},
        "shards": (ShardInfo("shard-000000.tar", len(rows), 10, "0" * 64),),
        "source": "here",
        "built_with": {},
        "fingerprint": "f",
    }
    (root / "index").mkdir(parents=True)
    for part, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row], INDEX_SCHEMA), root / f"index/part-{part:06d}.parquet")
    (root / "dataset.json").write_bytes(dataset_info_json(DatasetInfo(**{**fields, **changes})))  # type: ignore[arg-type]


def index_row(key: str, shard: str, offset: int, split: str) -> dict:
    return {"key": key, "split": split, "shard": shard, "offset": offset, "length": 512, "images": [],
            "messages": [], "meta": "{}"}  # fmt: skip


def test_index_comes_in_canonical_order_and_by_split(tmp_path: Path) -> None:
    rows = [
        index_row("c", "shard-000001.tar", 0, "val"),
        index_row("b", "shard-000000.tar", 512, "train"),
        index_row("a", "shard-000000.tar", 0, "train"),
    ]
    write_dataset(tmp_path / "d", rows)
    root = str(tmp_path / "d")
    assert read_index(root)["key"].to_pylist() == ["a", "b", "c"]
    assert read_index(root).schema == INDEX_SCHEMA
    assert read_index(root, "val", ["key"]).to_pylist() == [{"key": "c"}]
    assert read_index(f"file://{root}", "train").num_rows == 2
    with pytest.raises(BadInputError, match="no split 'test'; it has: train, val"):
        read_index(root, "test")
    with pytest.raises(BadInputError, match="no column 'pixels'"):
        read_index(root, columns=["pixels"])
    (tmp_path / "d/index/part-000000.parquet").unlink()
    with pytest.raises(BadInputError, match="holds 2 samples but dataset.json says 3"):
        read_index(root)


def test_incomplete_other_version_and_damaged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such dataset directory"):
        read_dataset_info(str(tmp_path / "absent"))
    with pytest.raises(BadInputError, match="incomplete"):
        read_dataset_info(str(tmp_path))
    write_dataset(tmp_path / "d", [], format_version=7)
    with pytest.raises(BadInputError, match="format version 7"):
        read_dataset_info(str(tmp_path / "d"))
    (tmp_path / "d/dataset.json").write_text(json.dumps({"format_version": FORMAT_VERSION}))
    with pytest.raises(BadInputError, match="not a dataset.json"):
        read_dataset_info(str(tmp_path / "d"))


def test_importing_the_package_pulls_in_no_torch() -> None:
    rooms = [path.stem for path in Path(shards.__file__).parent.glob("*.py")]
    code = f"import sys, importlib\nfor r in {rooms}: importlib.import_module('shards.' + r)\n"
    code += "import launch.cli.shards\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
