"""The messages of a sample: the rules that they must follow.

In: messages as a source, a tar or an index holds them. Out: the same messages as `Message`, or BadInputError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shards.common.errors import BadInputError
from shards.format.phi3 import PHI3_CONTROL_TOKENS
from shards.format.records import Message

ROLES = ("system", "user", "assistant")

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")


def image_tags(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The K of every `<|image_K|>` in the messages, in order of appearance."""
    return [int(k) for message in messages for k in IMAGE_TAG.findall(message["content"])]


def check_messages(
    messages: Any, num_images: int, control_tokens: Sequence[str] = PHI3_CONTROL_TOKENS
) -> tuple[Message, ...]:
    """Returns the messages of a sample with `num_images` images if they follow all rules.

    The rules: a non-empty list of {"role", "content"} with known roles and text contents; a system message
    only at the start; at least one user message; every assistant message is non-empty, and the last message
    is one. The tags <|image_1|> .. <|image_N|> appear exactly once each, in this order (the model takes
    images in order of appearance and ignores their numbers), and never in an assistant message. No content
    holds one of `control_tokens`.

    Raises BadInputError naming the first rule that is broken.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise BadInputError("messages must be a non-empty list of {role, content}")
    for position, message in enumerate(messages):
        _check_message(message, position, control_tokens)
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
    return tuple(messages)


def _check_message(message: Any, position: int, control_tokens: Sequence[str]) -> None:
    """Checks what can be seen in one message alone. position: its index, from 0."""
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise BadInputError(f"message {position} must have exactly the fields role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise BadInputError(f"message {position} has role {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadInputError(f"message {position} has content of type {type(content).__name__}, not text")
    for token in control_tokens:
        if token in content:
            raise BadInputError(
                f"message {position} contains the control token {token}; remove it from the text"
            )
    if role == "system" and position != 0:
        raise BadInputError(f"message {position} is a system message; only the first message may be one")
    if role == "assistant":
        if not content.strip():
            raise BadInputError(f"message {position}: the assistant's reply is empty")
        if IMAGE_TAG.search(content):
            raise BadInputError(f"message {position}: there is an image tag in the assistant's reply")
