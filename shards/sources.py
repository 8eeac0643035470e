"""What people have, as rows: CSV, JSONL and Parquet tables with image columns, and messages JSONL.

In: a path and a `Recipe` (which columns are images, the prompt and answer templates). Out: `Source`, and
from it one `Row` per row of the file, in its order, with the messages made; a row that cannot be used
carries its reason. Nothing is fetched here. Called by `build`.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import re
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.format import BadInputError, check_messages, image_tags

PRODUCT_COLUMNS = ("product_code", "title", "category3_code", "full_price", "imageurl")
PRODUCT_PROMPT = "What is shown in this image? Give its title, category and price."
PRODUCT_ANSWER = "Title: {title}\nCategory: {category3_code}\nPrice: {full_price}"

_SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Recipe:
    """How a row of a table becomes a sample. Nothing of it applies to messages JSONL but `key` and
    `group_by`.

    images: columns holding a path, a URL, or a list of them; the order is that of the tags <|image_1|>,
    <|image_2|>. prompt, answer: templates with {column} fields; a prompt without tags gets them put in
    front, one a line. All None or empty, and the table has the columns of a product catalogue: the product
    recipe. key: column whose value is put into the sample's key. group_by: column (or field of the column
    meta) whose equal values stay in one split.
    """

    images: tuple[str, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    key: str | None = None
    group_by: str | None = None


@dataclass(frozen=True)
class Row:
    """One row. number: its place in the source, from 0. key: unique in the dataset. images: URLs or paths,
    as the source has them.

    group: the group_by value, None without one. fault: why the row cannot be used, None if it can.
    """

    number: int
    key: str
    images: tuple[str, ...] = ()
    messages: list[dict[str, str]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened source.

    base: the folder that image paths start from. num_rows: how many rows it has. sha256: of the file, in hex.
    rows(start): its rows from number `start` on.
    """

    name: str
    base: Path
    num_rows: int
    sha256: str
    rows: Callable[[int], Iterator[Row]]


class _RowFault(Exception):
    """This row cannot be used; the message is the reason."""


def open_source(source: str, recipe: Recipe) -> Source:
    """Reads the file once (to count and to hash it) and checks the recipe against its columns.

    Raises BadInputError: no such file, a kind not known, no rows, a column or template field that does not
    exist.
    """
    path = Path(source)
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None or path.is_dir():
        what = "a directory" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise BadInputError(
            f"{source}: {what}; sources are tables and messages in {', '.join(_SUFFIXES)} files"
        )
    if not path.is_file():
        raise BadInputError(f"{source}: no such file")
    try:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        columns, num_rows = _survey(path, kind)
    except OSError as error:
        raise BadInputError(f"{source}: cannot be read ({error.strerror or error})") from error
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowException) as error:
        raise BadInputError(f"{source}: not a readable {kind} file ({str(error).splitlines()[0]})") from error
    if num_rows == 0:
        raise BadInputError(f"{source}: no rows; nothing to build")
    make = row_maker(source, columns, recipe)
    base = path.resolve().parent

    def rows(start: int) -> Iterator[Row]:
        for number, record in enumerate(_records(path, kind)):
            if number >= start:
                yield _row(number, record, make, recipe)

    return Source(source, base, num_rows, sha256, rows)


def _survey(path: Path, kind: str) -> tuple[list[str], int]:
    """Columns (of a JSONL file: of all its lines) and number of rows."""
    if kind == "parquet":
        with pq.ParquetFile(path) as table:
            return table.schema_arrow.names, table.metadata.num_rows
    columns: dict[str, None] = {}
    count = 0
    first_fault = None
    for record in _records(path, kind):
        if isinstance(record, str):
            first_fault = first_fault or f"row {count}: {record}"
        else:
            columns.update(dict.fromkeys(record))
        count += 1
    if count and not columns:
        raise BadInputError(f"{path}: no row can be read; {first_fault}")
    return list(columns), count


def _records(path: Path, kind: str) -> Iterator[dict[str, Any] | str]:
    """Yields each row as a dict, or as a str that says why it is none."""
    if kind == "parquet":
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    elif kind == "jsonl":
        with path.open(encoding="utf-8-sig") as stream:
            for line in stream:
                if line.strip():
                    yield _json_record(line)
    else:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream, delimiter="\t" if kind == "tsv" else ",")
            header = next(reader, [])
            if len(set(header)) != len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise BadInputError(f"{path}: two columns are named {twice!r}; rename one")
            for fields in reader:
                if len(fields) == len(header):
                    yield dict(zip(header, fields, strict=True))
                elif fields:
                    yield f"{len(fields)} fields, the header has {len(header)}"


def _json_record(line: str) -> dict[str, Any] | str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error})"
    return record if isinstance(record, dict) else f"JSON of type {type(record).__name__}, not an object"


def _row(number: int, record: dict[str, Any] | str, make: RowMaker, recipe: Recipe) -> Row:
    key = f"{number:08d}"
    if isinstance(record, str):
        return Row(number, key, fault=record)
    if recipe.key is not None:
        try:
            # The number keeps it unique; a dot would end the key for webdataset; ustar names have 100
            # characters.
            key += "-" + re.sub(r"[^A-Za-z0-9_-]", "_", _text(record, recipe.key))[:60]
        except _RowFault as fault:
            return Row(number, key, fault=str(fault))
    return make_row(number, key, record, make, recipe.group_by)


def make_row(number: int, key: str, record: Mapping[str, Any], make: RowMaker, group_by: str | None) -> Row:
    """The row of a record; every fault of the record ends in `Row.fault`."""
    try:
        images, messages, meta = make(record)
        group = None if group_by is None else _text({**meta, **record}, group_by)
        check_messages(messages, len(images))
        return Row(number, key, tuple(images), messages, meta, group)
    except (_RowFault, BadInputError) as fault:
        return Row(number, key, fault=str(fault))


RowMaker = Callable[[Mapping[str, Any]], tuple[list[str], list[dict[str, str]], dict[str, Any]]]


def row_maker(source: str, columns: Sequence[str], recipe: Recipe) -> RowMaker:
    """The function from a record to (images, messages, meta) that fits the columns and the recipe."""
    for option, column in (("key", recipe.key), ("group_by", recipe.group_by)):
        if column is not None and not (option == "group_by" and "meta" in columns):
            _need_column(source, columns, column, option)
    templated = recipe.images or recipe.prompt is not None or recipe.answer is not None
    if "messages" in columns and not templated:
        return _from_messages
    if not templated and set(PRODUCT_COLUMNS) <= set(columns):
        return _from_product
    if recipe.prompt is None or recipe.answer is None:
        missing = "a prompt" if recipe.prompt is None else "an answer"
        raise BadInputError(
            f"{source}: {missing} template is needed: the table is neither messages nor a product catalogue "
            f"({', '.join(PRODUCT_COLUMNS)}); its columns: {', '.join(columns)}"
        )
    for column in recipe.images:
        _need_column(source, columns, column, "images")
    prompt = _parse_template(source, columns, recipe.prompt, "prompt")
    answer = _parse_template(source, columns, recipe.answer, "answer")

    def make(record: Mapping[str, Any]) -> tuple[list[str], list[dict[str, str]], dict[str, Any]]:
        images = [image for column in recipe.images for image in _image_values(record, column)]
        messages = _ask(_fill(prompt, record), _fill(answer, record), len(images))
        return images, messages, {name: _plain(value) for name, value in record.items()}

    return make


def _from_product(record: Mapping[str, Any]) -> tuple[list[str], list[dict[str, str]], dict[str, Any]]:
    """A row of a product catalogue: the seed's task. meta: product_code, title, category, price (a number),
    imageurl.
    """
    code, title, category, price, image = (_text(record, column) for column in PRODUCT_COLUMNS)
    try:
        amount = float(price)
    except ValueError:
        amount = float("nan")
    if not 0 <= amount < float("inf"):
        raise _RowFault(f"column 'full_price' is {price!r}, not a price")
    answer = PRODUCT_ANSWER.format(title=title, category3_code=category, full_price=price)
    meta = {"product_code": code, "title": title, "category": category, "price": amount, "imageurl": image}
    return [image], _ask(PRODUCT_PROMPT, answer, 1), meta


def _from_messages(record: Mapping[str, Any]) -> tuple[list[str], list[dict[str, str]], dict[str, Any]]:
    """A row of messages JSONL: "messages", "images" (paths or URLs), and anything else as meta.

    A content may also be OpenAI's list of parts; its image parts become tags, their URLs join the images in
    order. Without any tag, the tags are put in front of the first user message.
    """
    images = _image_values(record, "images") if record.get("images") else []
    parts: list[str | None] = []
    messages = []
    if not isinstance(record.get("messages"), list):
        raise _RowFault("no list of messages")
    for message in record["messages"]:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise _RowFault("a message without role and content")
        content = message["content"]
        if isinstance(content, list):
            content = "".join(_part(part, parts) for part in content)
        messages.append({"role": message["role"], "content": content})
    urls = [url for url in parts if url is not None]
    if urls and (images or len(urls) != len(parts)):
        raise _RowFault(
            "images both in `images` and in the parts of the messages; give them in one of the two"
        )
    images = images or urls
    if images and all(isinstance(m["content"], str) for m in messages) and not image_tags(messages):
        for message in messages:
            if message["role"] == "user":
                message["content"] = _tags(len(images)) + message["content"]
                break
    inner = record.get("meta") if isinstance(record.get("meta"), dict) else {}
    others = {name: value for name, value in record.items() if name not in ("messages", "images", "meta")}
    return images, messages, {name: _plain(value) for name, value in {**others, **(inner or {})}.items()}


def _part(part: Any, images: list[str | None]) -> str:
    """The text of one part of a content. An image part adds its URL to `images`, None if it only marks the
    place.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image_url", "image"):
        value = part.get("image_url", part.get("image", part.get("url")))
        value = value.get("url") if isinstance(value, dict) else value
        if value is None or isinstance(value, str):
            images.append(value)
            return f"<|image_{len(images)}|>\n"
    raise _RowFault(f"a content part of type {kind!r} that cannot be read; use text, image_url or image")


def _ask(prompt: str, answer: str, num_images: int) -> list[dict[str, str]]:
    question = {"role": "user", "content": prompt}
    if not image_tags([question]):
        question["content"] = _tags(num_images) + prompt
    return [question, {"role": "assistant", "content": answer}]


def _tags(count: int) -> str:
    return "".join(f"<|image_{k + 1}|>\n" for k in range(count))


def _text(record: Mapping[str, Any], column: str) -> str:
    """The value of a column as text; an empty one is a fault of the row, never the word "nan" or "None"."""
    value = record.get(column)
    text = "" if value is None or value != value else str(value)  # nan is unlike itself
    if not text.strip():
        raise _RowFault(f"column {column!r} is empty")
    return text


def _image_values(record: Mapping[str, Any], column: str) -> list[str]:
    value = record.get(column)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str) and item.strip() for item in values):
        kinds = ", ".join(sorted({type(item).__name__ for item in values})) or "an empty list"
        raise _RowFault(f"column {column!r} holds no image path or URL (found: {kinds})")
    return [str(item).strip() for item in values]


def _plain(value: Any) -> Any:
    """As JSON has it; dates, decimals and bytes as text."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)


def _need_column(source: str, columns: Sequence[str], column: str, option: str) -> None:
    if column not in columns:
        near = difflib.get_close_matches(column, columns, 1)
        hint = f"; did you mean {near[0]!r}" if near else ""
        raise BadInputError(
            f"{source}: no column {column!r} (asked for by {option}){hint}; its columns: {', '.join(columns)}"
        )


def _parse_template(
    source: str, columns: Sequence[str], template: str, option: str
) -> list[tuple[str, str | None]]:
    """[(literal text, column after it or None)]; `{{` and `}}` stand for braces."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise BadInputError(
            f"{option} template {template!r}: {error}; write {{{{ and }}}} for braces"
        ) from error
    for _, column, spec, conversion in pieces:
        if column is not None:
            if spec or conversion:
                raise BadInputError(
                    f"{option} template {template!r}: only plain {{column}} fields are filled in"
                )
            _need_column(source, columns, column, f"the {option} template")
    return [(literal, column) for literal, column, _, _ in pieces]


def _fill(template: list[tuple[str, str | None]], record: Mapping[str, Any]) -> str:
    return "".join(
        literal + (_text(record, column) if column is not None else "") for literal, column in template
    )
