"""The shard format, version 1: what a dataset directory holds and how it is read.

A dataset directory (local path or fsspec URL) holds `shard-000000.tar ...`, `index/*.parquet` and
`dataset.json`. The tars are plain WebDataset: the members of a sample are adjacent, `KEY.json` first, then
`KEY.jpg` (one image) or `KEY.0.jpg`, `KEY.1.png`, ... (several). The index repeats everything but the
pixels, one row a sample. `dataset.json` is written last: where it exists, the dataset is complete.

In: a directory. Out: `DatasetInfo`, the index as a pyarrow Table, checked messages. Called by every other
file of this package, and by the training side, which takes nothing else from `shards`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

FORMAT_VERSION = 1
DATASET_JSON = "dataset.json"
INDEX_DIR = "index"
LEDGER_DIR = "ledger"  # what became of every row of the source; for people, never read in training
BUILD_JSON = "build.json"  # what a build that is under way was asked to make
ROLES = ("system", "user", "assistant")

# offset and length of a row: bytes of the sample's members in the tar, from the first header to the end of
# the last member's padding. offset and length of an image: its data alone, absolute in the tar. width and
# height: as shown.
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        (
            "images",
            pa.list_(
                pa.struct(
                    [
                        ("member", pa.string()),
                        ("offset", pa.int64()),
                        ("length", pa.int64()),
                        ("width", pa.int32()),
                        ("height", pa.int32()),
                    ]
                )
            ),
        ),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("meta", pa.string()),
    ]
)

_ENCODER = json.JSONEncoder(ensure_ascii=False)
IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
# Phi-3's tokens of a turn: in a text they would be learnt as, or taken for, the end of one.
CONTROL_TOKENS = ("<|assistant|>", "<|user|>", "<|system|>", "<|end|>", "<|endoftext|>")


class BadInputError(ValueError):
    """The user's input cannot be used. The message is one line: what was found, where, and how to mend it."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar of a dataset: file name, number of samples, size in bytes, sha256 of the file in hex."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    num_samples: over all splits. splits: samples of each split. source: where the rows came from.
    built_with: the options that shaped the bytes. fingerprint: hex digest of source and options; equal
    fingerprints, equal datasets.
    """

    format_version: int
    num_samples: int
    splits: dict[str, int]
    shards: tuple[ShardInfo, ...]
    source: str
    built_with: dict[str, Any]
    fingerprint: str


_INFO = TypeAdapter(DatasetInfo)


def dataset_info_json(info: DatasetInfo) -> bytes:
    """The bytes of `dataset.json` for `info`, deterministic."""
    return (json.dumps(asdict(info), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def sample_json(messages: Sequence[dict[str, str]], meta: dict[str, Any]) -> bytes:
    """The bytes of `KEY.json`."""
    return _ENCODER.encode({"messages": list(messages), "meta": meta}).encode()


def read_dataset_info(root: str) -> DatasetInfo:
    """Reads ROOT/dataset.json.

    Raises BadInputError if ROOT is no directory, is incomplete (no dataset.json), is damaged, or has another
    version.
    """
    fs, path = fsspec.core.url_to_fs(str(root))
    name = f"{path.rstrip('/')}/{DATASET_JSON}"
    if not fs.exists(name):
        if not fs.exists(path):
            raise BadInputError(f"{root}: no such dataset directory; build one with `phi3v shards build`")
        raise BadInputError(
            f"{root}: no {DATASET_JSON}, so the dataset is incomplete; run its `phi3v shards build` command "
            "again (or `phi3v shards index` for tars from elsewhere)"
        )
    data = bytes(fs.cat_file(name))
    try:
        version = json.loads(data)["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadInputError(
            f"{name}: not a dataset.json of this format ({error!r}); rebuild the shards"
        ) from error
    if version != FORMAT_VERSION:
        raise BadInputError(
            f"{name}: format version {version!r}, this program reads version {FORMAT_VERSION}; "
            "rebuild the shards"
        )
    try:
        info = _INFO.validate_json(data, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"])) or "the whole"
        raise BadInputError(
            f"{name}: not a dataset.json of this format ({place}: {fault['msg']}); rebuild the shards"
        ) from error
    for shard in info.shards:
        if "/" in shard.name or shard.name.startswith("."):
            raise BadInputError(f"{name}: {shard.name!r} is no name of a shard; rebuild the shards")
    return info


def read_index(root: str, split: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The index of a complete dataset in canonical order (shard name, then offset), schema INDEX_SCHEMA.

    split: only its rows. columns: only these columns, in this order.
    Raises BadInputError if the dataset is incomplete, has no such split, or the index does not agree with
    dataset.json.
    """
    info = read_dataset_info(root)
    if split is not None and split not in info.splits:
        known = ", ".join(sorted(info.splits)) or "none"
        raise BadInputError(f"{root}: no split {split!r}; it has: {known}")
    fs, path = fsspec.core.url_to_fs(str(root))
    names = files_in(fs, f"{path.rstrip('/')}/{INDEX_DIR}", ".parquet")
    wanted = list(columns) if columns is not None else INDEX_SCHEMA.names
    needed = list(dict.fromkeys([*wanted, "shard", "offset", "split"]))
    schema = _subschema(needed)
    parts = []
    for name in names:
        try:
            with fs.open(name, "rb") as stream:
                parts.append(pq.read_table(stream, columns=needed).cast(schema))
        except (pa.ArrowException, OSError) as error:
            reason = first_line(error)
            raise BadInputError(f"{name}: unreadable index part ({reason}); rebuild it") from error
    table = pa.concat_tables(parts) if parts else schema.empty_table()
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    expected = info.num_samples if split is None else info.splits[split]
    if table.num_rows != expected:
        raise BadInputError(
            f"{root}: {INDEX_DIR}/ holds {table.num_rows} samples but {DATASET_JSON} says {expected}"
            f"{'' if split is None else f' for split {split}'}; rebuild the dataset"
        )
    return table.sort_by([("shard", "ascending"), ("offset", "ascending")]).select(wanted)


def files_in(filesystem: Any, folder: str, suffix: str) -> list[str]:
    """The paths right in a folder of an fsspec file system that end so, sorted; none if there is no such
    folder. (A glob would take brackets in the folder's name for a pattern.)
    """
    try:
        found = filesystem.ls(folder, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(str(path) for path in found if str(path).endswith(suffix))


def first_line(error: BaseException) -> str:
    """What an exception of another library says, on one line; its kind if it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def image_tags(messages: Sequence[dict[str, str]]) -> list[int]:
    """The K of every `<|image_K|>` in the messages, in order of appearance."""
    return [int(k) for message in messages for k in IMAGE_TAG.findall(message["content"])]


def check_messages(messages: Any, num_images: int) -> None:
    """Raises BadInputError naming the first fault of a sample's messages.

    Good messages: a non-empty list of {"role", "content"} with known roles and text contents, at least one
    user turn, a non-empty assistant reply that is the last turn, and the tags <|image_1|> .. <|image_N|>
    exactly once each, in this order (the model takes images in order of appearance, whatever their number
    says), never inside a reply; no control token of the model in a text.
    """
    if not isinstance(messages, list) or not messages:
        raise BadInputError("messages must be a non-empty list of {role, content}")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise BadInputError(f"message {place} must have exactly the fields role and content")
        if message["role"] not in ROLES:
            raise BadInputError(
                f"message {place} has role {message['role']!r}; use one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise BadInputError(
                f"message {place} has content of type {type(message['content']).__name__}, not text"
            )
        for token in CONTROL_TOKENS:
            if token in message["content"]:
                raise BadInputError(
                    f"message {place} holds the control token {token}; take it out of the text"
                )
        if message["role"] == "system" and place != 0:
            raise BadInputError(f"message {place} is a system message; only the first may be one")
        if message["role"] == "assistant":
            if not message["content"].strip():
                raise BadInputError(f"message {place}: the assistant's reply is empty")
            if IMAGE_TAG.search(message["content"]):
                raise BadInputError(f"message {place}: an image tag stands in the assistant's reply")
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise BadInputError("there is no user message")
    if roles[-1] != "assistant":
        raise BadInputError(
            f"the last message is by {roles[-1]!r}; the sample must end with the assistant's reply"
        )
    tags = image_tags(messages)
    if tags != list(range(1, num_images + 1)):
        named = " ".join(f"<|image_{k}|>" for k in tags) or "none"
        wanted = f"<|image_1|>..<|image_{num_images}|> once each, in order" if num_images else "no image tag"
        raise BadInputError(f"{num_images} image(s) but the prompt names {named}; it must name {wanted}")


def _subschema(names: Sequence[str]) -> pa.Schema:
    unknown = [name for name in names if name not in INDEX_SCHEMA.names]
    if unknown:
        raise BadInputError(
            f"the index has no column {unknown[0]!r}; it has: {', '.join(INDEX_SCHEMA.names)}"
        )
    return pa.schema([INDEX_SCHEMA.field(name) for name in names])
