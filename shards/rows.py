"""A record of a table, or of a file of conversations, as a row of the dataset: images, messages, meta.

In: records (dicts) and a `Recipe` (which columns are images, the prompt and answer templates). Out: one `Row`
each; a record that cannot be used gives a row that carries the reason. Forms that need no recipe: `messages`
(role and content, OpenAI's content parts too), `conversations` (LLaVA, ShareGPT), a product catalogue.
Nothing is fetched here. Called by `sources` and `index`.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.common.errors import BadInputError
from shards.format.messages import check_messages, image_tags
from shards.format.records import sample_json

Image = str | bytes  # a path or URL, or the picture itself
Made = tuple[list[Image], list[dict[str, str]], dict[str, Any]]  # images, messages, meta
RowMaker = Callable[[Mapping[str, Any]], Made]

PRODUCT_COLUMNS = ("product_code", "title", "category3_code", "full_price", "imageurl")
PRODUCT_PROMPT = "What is shown in this image? Give its title, category and price."
PRODUCT_ANSWER = "Title: {title}\nCategory: {category3_code}\nPrice: {full_price}"

_PLACEHOLDER = "<image>"
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Recipe:
    """How a row of a table becomes a sample. For messages and conversations only `key` and `group_by` apply.

    images: columns holding a path, a URL, the bytes of a picture, or a list of them; the order is that of the
    tags <|image_1|>, <|image_2|>. prompt, answer: templates with {column} fields; a prompt without tags gets
    them put in front, one a line. All None or empty, and the table has the columns of a product catalogue:
    the product recipe. key: column whose value is put into the sample's key. group_by: column (or field of
    the column meta) whose equal values stay in one split. meta: (name, column) pairs that become the sample's
    meta; none: every column but the pictures themselves.
    """

    images: tuple[str, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    key: str | None = None
    group_by: str | None = None
    meta: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """One row. number: its place in the source, from 0. key: unique in the dataset. images: as the source has
    them.

    group: the group_by value, None without one. fault: why the row cannot be used, None if it can.
    """

    number: int
    key: str
    images: tuple[Image, ...] = ()
    messages: list[dict[str, str]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    fault: str | None = None


class RowFault(Exception):
    """This row cannot be used; the message is the reason."""


def make_key(number: int, record: Mapping[str, Any], column: str | None) -> str:
    """The key of row `number`, with the value of `column` in it. Raises RowFault if that is empty."""
    key = f"{number:08d}"
    if column is not None:
        # The number keeps it unique; a dot would end the key for webdataset; ustar names have 100 characters.
        key += "-" + re.sub(r"[^A-Za-z0-9_-]", "_", _text(record, column))[:60]
    return key


def make_row(number: int, key: str, record: Mapping[str, Any], make: RowMaker, group_by: str | None) -> Row:
    """The row of a record; every fault of the record ends in `Row.fault`."""
    try:
        images, messages, meta = make(record)
        group = None if group_by is None else _text({**meta, **record}, group_by)
        check_messages(messages, len(images))
        sample_json(messages, meta)
        "".join([group or "", *(image for image in images if isinstance(image, str))]).encode()
        return Row(number, key, tuple(images), messages, meta, group)
    except (RowFault, BadInputError) as fault:
        return Row(number, key, fault=str(fault).encode(errors="backslashreplace").decode())
    except UnicodeEncodeError as error:
        return Row(number, key, fault=f"text with {error.object[error.start]!r}, which is no character")
    except RecursionError:
        return Row(number, key, fault="nested too deeply")


def row_maker(source: str, columns: Sequence[str], recipe: Recipe) -> RowMaker:
    """The function from a record to (images, messages, meta) that fits the columns and the recipe."""
    for option, column in (("key", recipe.key), ("group_by", recipe.group_by)):
        if column is not None and not (option == "group_by" and "meta" in columns):
            _need_column(source, columns, column, option)
    templated = recipe.images or recipe.prompt is not None or recipe.answer is not None
    if not templated:
        if "messages" in columns:
            return _from_messages
        if "conversations" in columns:
            return _from_conversations
    if not templated and set(PRODUCT_COLUMNS) <= set(columns):
        return _from_product
    if recipe.prompt is None or recipe.answer is None:
        missing = "a prompt" if recipe.prompt is None else "an answer"
        raise BadInputError(
            f"{source}: {missing} template is needed: these are neither messages nor conversations nor a "
            f"product catalogue ({', '.join(PRODUCT_COLUMNS)}); the columns: {', '.join(columns)}"
        )
    for column in recipe.images:
        _need_column(source, columns, column, "images")
    for _, column in recipe.meta:
        _need_column(source, columns, column, "meta")
    prompt = _parse_template(source, columns, recipe.prompt, "prompt")
    answer = _parse_template(source, columns, recipe.answer, "answer")

    def make(record: Mapping[str, Any]) -> Made:
        images = [image for column in recipe.images for image in _image_values(record, column)]
        messages = _ask(_fill(prompt, record), _fill(answer, record), len(images))
        if recipe.meta:
            return images, messages, {name: _plain(record.get(column)) for name, column in recipe.meta}
        return images, messages, _meta(record)

    return make


def _from_product(record: Mapping[str, Any]) -> Made:
    """A row of a product catalogue: the seed's task. meta: product_code, title, category, price (a number),
    imageurl.
    """
    code, title, category, price, image = (_text(record, column) for column in PRODUCT_COLUMNS)
    try:
        amount = float(price)
    except ValueError:
        amount = float("nan")
    if not 0 <= amount < float("inf"):
        raise RowFault(f"column 'full_price' is {price!r}, not a price")
    answer = PRODUCT_ANSWER.format(title=title, category3_code=category, full_price=price)
    meta = {"product_code": code, "title": title, "category": category, "price": amount, "imageurl": image}
    return [image], _ask(PRODUCT_PROMPT, answer, 1), meta


def _from_messages(record: Mapping[str, Any]) -> Made:
    """A record with "messages", "images" (paths or URLs), and anything else as meta.

    A content may also be OpenAI's list of parts; its image parts become tags, their URLs join the images in
    order. Placeholders <image> become tags; without any, the tags are put in front of the first user message.
    """
    images: list[Image] = _image_values(record, "images") if record.get("images") else []
    parts: list[str | None] = []
    messages = []
    if not isinstance(record.get("messages"), list):
        raise RowFault("no list of messages")
    for message in record["messages"]:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RowFault("a message without role and content")
        content = message["content"]
        if isinstance(content, list):
            content = "".join(_part(part, parts) for part in content)
        messages.append({"role": message["role"], "content": content})
    urls = [url for url in parts if url is not None]
    if urls and (images or len(urls) != len(parts)):
        raise RowFault(
            "images both in `images` and in the parts of the messages; give them in one of the two"
        )
    images = images or list(urls)
    _place_tags(messages, len(images))
    inner = record.get("meta") if isinstance(record.get("meta"), dict) else {}
    others = {name: value for name, value in record.items() if name not in ("messages", "images", "meta")}
    return images, messages, _meta({**others, **(inner or {})})


def _from_conversations(record: Mapping[str, Any]) -> Made:
    """A record of LLaVA or ShareGPT: "conversations" of {"from", "value"}, "image" or "images"."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowFault("no list of conversations")
    messages = []
    for turn in turns:
        speaker = turn.get("from")
        if speaker not in _SPEAKERS:
            raise RowFault(f"a turn from {speaker!r}; known are {', '.join(_SPEAKERS)}")
        messages.append({"role": _SPEAKERS[speaker], "content": turn.get("value")})
    column = "images" if record.get("images") else "image"
    images = _image_values(record, column) if record.get(column) else []
    _place_tags(messages, len(images))
    others = {
        name: value for name, value in record.items() if name not in ("conversations", "image", "images")
    }
    return images, messages, _meta(others)


def _place_tags(messages: list[dict[str, Any]], num_images: int) -> None:
    """Numbers the placeholders <image>; without any tag, puts the tags before the first user message.

    Raises RowFault unless there are as many placeholders as images, also for a record that has lost its own:
    a model must not learn to answer about a picture that it does not see.
    """
    if not all(isinstance(message["content"], str) for message in messages):
        return  # a fault that is not text is found by the check of the messages
    if image_tags(messages):
        return
    asked = [message for message in messages if message["role"] == "user"]
    placeholders = sum(message["content"].count(_PLACEHOLDER) for message in asked)
    if placeholders:
        if placeholders != num_images:
            raise RowFault(f"{num_images} image(s) but {placeholders} placeholder(s) {_PLACEHOLDER}")
        number = 0
        for message in asked:
            while _PLACEHOLDER in message["content"]:
                number += 1
                message["content"] = message["content"].replace(_PLACEHOLDER, f"<|image_{number}|>", 1)
    elif asked and num_images:
        asked[0]["content"] = _tags(num_images) + asked[0]["content"]


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
    raise RowFault(f"a content part of type {kind!r} that cannot be read; use text, image_url or image")


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
        raise RowFault(f"column {column!r} is empty")
    return text


def _image_values(record: Mapping[str, Any], column: str) -> list[Image]:
    value = record.get(column)
    values = [_image_value(item) for item in (value if isinstance(value, list) else [value])]
    images = [image for image in values if image]
    if not values or len(images) != len(values):
        found = value if isinstance(value, list) else [value]
        kinds = ", ".join(sorted({type(item).__name__ for item in found})) or "an empty list"
        raise RowFault(f"column {column!r} holds no image path or URL (found: {kinds})")
    return images


def _image_value(value: Any) -> Image | None:
    """The path, URL or bytes that a cell holds; `datasets` has {"bytes", "path"}. None: no image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, str):
        return value.strip()
    return value if isinstance(value, bytes) else None


def _meta(record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns as JSON has them, without those that hold pictures."""
    return {name: _plain(value) for name, value in record.items() if not _holds_bytes(value)}


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, list):
        return any(_holds_bytes(item) for item in value)
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _plain(value: Any) -> Any:
    """As JSON has it; dates and decimals as text."""
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
