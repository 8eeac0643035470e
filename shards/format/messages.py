"""The messages of a sample: what good ones are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from shards.common.errors import BadInputError

ROLES = ("system", "user", "assistant")

IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")
# Phi-3's tokens of a turn: in a text they would be learnt as, or taken for, the end of one.
CONTROL_TOKENS = ("<|assistant|>", "<|user|>", "<|system|>", "<|end|>", "<|endoftext|>")


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
