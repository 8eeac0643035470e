"""One record of a source (a table, a file of conversations) becomes one sample: images, messages, meta.

In: the fields of a record as the source has them, and a `Recipe` (which columns are images, the templates of
prompt and answer). Out: a `SourceRecord`; one that cannot be used carries the reason. Three forms need no
recipe: `messages` (role and content, also OpenAI's content parts), `conversations` (LLaVA, ShareGPT) and a
product catalogue. Nothing is fetched here.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shards.common.errors import BadInputError
from shards.common.nearest import nearest
from shards.format.messages import check_messages, image_tags
from shards.format.records import Message, sample_json

Fields = Mapping[str, Any]
"""One record as its source has it: column or JSON field -> value."""

ImageSource = str | bytes
"""Where an image comes from: a path, a URL, or the bytes of the image file itself."""

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
    """How the records of a table become samples. Messages and conversations use only `key` and `group_by`.

    images: columns that hold a path, a URL, the bytes of an image, or a list of these; their order is that of
    the tags <|image_1|>, <|image_2|>. prompt, answer: templates with {column} fields; to a prompt without
    tags, tags are added in front, one a line. If all three are empty and the table has PRODUCT_COLUMNS, the
    product templates apply. key: column whose value becomes part of the sample's key. group_by: column (or
    field of the column meta) whose equal values stay in one split. meta: (name, column) pairs that become the
    sample's meta; empty: every column that does not hold image bytes.
    """

    images: tuple[str, ...] = ()
    prompt: str | None = None
    answer: str | None = None
    key: str | None = None
    group_by: str | None = None
    meta: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class SourceRecord:
    """One record of the source, ready to have its images fetched.

    number: its position in the source, from 0. key: unique in the dataset. images: in the order of their
    tags. messages: checked by `check_messages`. group: the value of group_by, None without one. fault: why
    the record cannot be used, None if it can; then images, messages and meta are empty.
    """

    number: int
    key: str
    images: tuple[ImageSource, ...] = ()
    messages: tuple[Message, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Content:
    """What a converter takes from the fields of a record. messages: {role, content}, not checked yet."""

    images: list[ImageSource]
    messages: list[dict[str, Any]]
    meta: dict[str, Any]


Converter = Callable[[Fields], Content]
"""Takes the content from the fields of a record. Raises RecordFault if they cannot be used."""


class RecordFault(Exception):
    """This record cannot be used; the message is the reason."""


def make_key(number: int, fields: Fields, column: str | None) -> str:
    """The key of record `number`, with the value of `column` in it. Raises RecordFault if that is empty."""
    key = f"{number:08d}"
    if column is not None:
        # The number makes it unique. A dot would end the key for webdataset; ustar names have 100 characters.
        key += "-" + re.sub(r"[^A-Za-z0-9_-]", "_", _text(fields, column))[:60]
    return key


def make_record(
    number: int, key: str, fields: Fields, *, convert: Converter, group_by: str | None
) -> SourceRecord:
    """The record of some fields. Does not raise: every fault of the fields ends in `SourceRecord.fault`."""
    try:
        content = convert(fields)
        group = None if group_by is None else _text({**content.meta, **fields}, group_by)
        messages = check_messages(content.messages, len(content.images))
        sample_json(messages, content.meta)  # raises UnicodeEncodeError for what cannot be written
        paths = [image for image in content.images if isinstance(image, str)]
        "".join([group or "", *paths]).encode()
        return SourceRecord(number, key, tuple(content.images), messages, meta=content.meta, group=group)
    except (RecordFault, BadInputError) as fault:
        return SourceRecord(number, key, fault=str(fault).encode(errors="backslashreplace").decode())
    except UnicodeEncodeError as error:
        reason = f"text with {error.object[error.start]!r}, which is not a character"
        return SourceRecord(number, key, fault=reason)
    except RecursionError:
        return SourceRecord(number, key, fault="nested too deeply")


def find_converter(source: str, columns: Sequence[str], recipe: Recipe) -> Converter:
    """The converter that fits the columns of `source` and the recipe.

    Raises BadInputError if the columns need a template that the recipe does not have, or if the recipe names
    a column that does not exist.
    """
    for option, column in (("key", recipe.key), ("group_by", recipe.group_by)):
        if column is not None and not (option == "group_by" and "meta" in columns):
            _need_column(source, columns, column, option=option)
    if not has_templates(recipe):
        if "messages" in columns:
            return _from_messages
        if "conversations" in columns:
            return _from_conversations
        if set(PRODUCT_COLUMNS) <= set(columns):
            return _from_product
    return _from_templates(source, columns, recipe)


def has_templates(recipe: Recipe) -> bool:
    """Whether the recipe says how images, prompt or answer are made of columns."""
    return bool(recipe.images) or recipe.prompt is not None or recipe.answer is not None


def _from_templates(source: str, columns: Sequence[str], recipe: Recipe) -> Converter:
    if recipe.prompt is None or recipe.answer is None:
        missing = "a prompt" if recipe.prompt is None else "an answer"
        raise BadInputError(
            f"{source}: {missing} template is needed: these are neither messages nor conversations nor a "
            f"product catalogue ({', '.join(PRODUCT_COLUMNS)}); the columns: {', '.join(columns)}"
        )
    for column in recipe.images:
        _need_column(source, columns, column, option="images")
    for _, column in recipe.meta:
        _need_column(source, columns, column, option="meta")
    prompt = _parse_template(source, columns, recipe.prompt, option="prompt")
    answer = _parse_template(source, columns, recipe.answer, option="answer")

    def convert(fields: Fields) -> Content:
        images = [image for column in recipe.images for image in _image_values(fields, column)]
        messages = _ask(_fill(prompt, fields), _fill(answer, fields), len(images))
        if recipe.meta:
            return Content(
                images, messages, {name: _plain(fields.get(column)) for name, column in recipe.meta}
            )
        return Content(images, messages, _meta(fields))

    return convert


def _from_product(fields: Fields) -> Content:
    """A record of a product catalogue. meta: product_code, title, category, price (a number), imageurl."""
    code, title, category, price, image = (_text(fields, column) for column in PRODUCT_COLUMNS)
    try:
        amount = float(price)
    except ValueError:
        amount = float("nan")
    if not 0 <= amount < float("inf"):
        raise RecordFault(f"column 'full_price' is {price!r}, not a price")
    answer = PRODUCT_ANSWER.format(title=title, category3_code=category, full_price=price)
    meta = {"product_code": code, "title": title, "category": category, "price": amount, "imageurl": image}
    return Content([image], _ask(PRODUCT_PROMPT, answer, 1), meta)


def _from_messages(fields: Fields) -> Content:
    """A record with "messages" and "images" (paths or URLs); all other fields become meta.

    A content may also be OpenAI's list of parts: its image parts become tags, and their URLs become the
    images. Placeholders <image> become tags; without any, tags are added before the first user message.
    """
    images = _image_values(fields, "images") if fields.get("images") else []
    parts: list[str | None] = []
    messages = []
    if not isinstance(fields.get("messages"), list):
        raise RecordFault("no list of messages")
    for message in fields["messages"]:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise RecordFault("a message without role and content")
        content = message["content"]
        if isinstance(content, list):
            content = "".join(_part(part, parts) for part in content)
        messages.append({"role": message["role"], "content": content})
    urls = [url for url in parts if url is not None]
    if urls and (images or len(urls) != len(parts)):
        raise RecordFault(
            "images both in `images` and in the parts of the messages; give them in only one of the two"
        )
    images = images or list(urls)
    _place_tags(messages, len(images))
    inner = fields.get("meta") if isinstance(fields.get("meta"), dict) else {}
    others = {name: value for name, value in fields.items() if name not in ("messages", "images", "meta")}
    return Content(images, messages, _meta({**others, **(inner or {})}))


def _from_conversations(fields: Fields) -> Content:
    """A record of LLaVA or ShareGPT: "conversations" of {"from", "value"}, "image" or "images"."""
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordFault("no list of conversations")
    messages = []
    for turn in turns:
        speaker = turn.get("from")
        if speaker not in _SPEAKERS:
            raise RecordFault(f"a turn from {speaker!r}; known are {', '.join(_SPEAKERS)}")
        messages.append({"role": _SPEAKERS[speaker], "content": turn.get("value")})
    column = "images" if fields.get("images") else "image"
    images = _image_values(fields, column) if fields.get(column) else []
    _place_tags(messages, len(images))
    others = {
        name: value for name, value in fields.items() if name not in ("conversations", "image", "images")
    }
    return Content(images, messages, _meta(others))


def _place_tags(messages: list[dict[str, Any]], num_images: int) -> None:
    """Replaces the placeholders <image> by numbered tags; if there are neither placeholders nor tags, adds
    tags before the first user message. Changes `messages`.

    Raises RecordFault if there are not as many placeholders as images. This includes a record that has lost
    its images: a model must not learn to answer about an image that it does not see.
    """
    if not all(isinstance(message["content"], str) for message in messages):
        return  # check_messages will report it
    if image_tags(messages):
        return
    asked = [message for message in messages if message["role"] == "user"]
    placeholders = sum(message["content"].count(_PLACEHOLDER) for message in asked)
    if placeholders:
        if placeholders != num_images:
            raise RecordFault(f"{num_images} image(s) but {placeholders} placeholder(s) {_PLACEHOLDER}")
        number = 0
        for message in asked:
            while _PLACEHOLDER in message["content"]:
                number += 1
                message["content"] = message["content"].replace(_PLACEHOLDER, f"<|image_{number}|>", 1)
    elif asked and num_images:
        asked[0]["content"] = _tags(num_images) + asked[0]["content"]


def _part(part: Any, images: list[str | None]) -> str:
    """The text of one part of a content: for an image part, a tag. An image part appends its URL to `images`,
    or None if it has none and only marks the position of an image.
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
    raise RecordFault(f"a content part of type {kind!r} that cannot be read; use text, image_url or image")


def _ask(prompt: str, answer: str, num_images: int) -> list[dict[str, Any]]:
    question = {"role": "user", "content": prompt}
    if not image_tags([question]):
        question["content"] = _tags(num_images) + prompt
    return [question, {"role": "assistant", "content": answer}]


def _tags(count: int) -> str:
    return "".join(f"<|image_{k + 1}|>\n" for k in range(count))


def _text(fields: Fields, column: str) -> str:
    """The value of a column as text. Raises RecordFault if it is empty, None or NaN: the words "None" and
    "nan" must not get into a text.
    """
    value = fields.get(column)
    text = "" if value is None or value != value else str(value)  # NaN is the value that differs from itself
    if not text.strip():
        raise RecordFault(f"column {column!r} is empty")
    return text


def _image_values(fields: Fields, column: str) -> list[ImageSource]:
    """The images of a column. Raises RecordFault if any is missing."""
    value = fields.get(column)
    values = [_image_value(item) for item in (value if isinstance(value, list) else [value])]
    images = [image for image in values if image]
    if not values or len(images) != len(values):
        found = value if isinstance(value, list) else [value]
        kinds = ", ".join(sorted({type(item).__name__ for item in found})) or "an empty list"
        raise RecordFault(f"column {column!r} holds no image path or URL (found: {kinds})")
    return images


def _image_value(value: Any) -> ImageSource | None:
    """The path, URL or bytes that a value holds (`datasets` gives {"bytes", "path"}); None: no image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, str):
        return value.strip()
    return value if isinstance(value, bytes) else None


def _meta(fields: Fields) -> dict[str, Any]:
    """The fields as JSON can hold them, without those that hold the bytes of an image."""
    return {name: _plain(value) for name, value in fields.items() if not _holds_bytes(value)}


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, list):
        return any(_holds_bytes(item) for item in value)
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: dates and decimals as text, NaN and Inf as None."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)


def _need_column(source: str, columns: Sequence[str], column: str, *, option: str) -> None:
    """Raises BadInputError if there is no such column. option: the setting that names it."""
    if column not in columns:
        near = nearest(column, columns)
        hint = f"; did you mean {near!r}?" if near else ""
        raise BadInputError(
            f"{source}: no column {column!r} (named by {option}){hint}; its columns: {', '.join(columns)}"
        )


def _parse_template(
    source: str, columns: Sequence[str], template: str, *, option: str
) -> list[tuple[str, str | None]]:
    """[(literal text, column that follows it or None)]. `{{` and `}}` are literal braces."""
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
                    f"{option} template {template!r}: only plain {{column}} fields are allowed"
                )
            _need_column(source, columns, column, option=f"the {option} template")
    return [(literal, column) for literal, column, _, _ in pieces]


def _fill(template: list[tuple[str, str | None]], fields: Fields) -> str:
    return "".join(
        literal + (_text(fields, column) if column is not None else "") for literal, column in template
    )
