"""Messages -> token ids and labels, as the published processor tokenises them.

A text is cut at its image tags and every piece is tokenised by itself, with special tokens: each piece starts
with `<s>`, also an empty one, and image K is that many copies of -K. Labels cover the assistant's replies up
to and including `<|end|>`, nothing else. Token counts of the plan are the lengths of what `encode` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.common.errors import BadInputError
from shards.format.messages import IMAGE_TAG
from shards.format.phi3 import PHI3_CONTROL_TOKENS

IGNORE = -100
# What ends a turn. "chat" is the published chat template; "seed" is the layout of the product fine-tuning
# script published in the Phi-3 cookbook, which has no newline after a turn.
TEMPLATES = {"chat": "<|end|>\n", "seed": "<|end|>"}


@dataclass(frozen=True)
class Encoded:
    """One document. input_ids: [L], image positions negative. labels: [L], -100 where nothing is learnt; not
    shifted.
    """

    input_ids: list[int]
    labels: list[int]


def render(
    messages: Sequence[dict[str, str]], add_generation_prompt: bool = False, template: str = "chat"
) -> str:
    """The text of a conversation in one of TEMPLATES; with `add_generation_prompt` the assistant is to go on.

    Raises BadInputError for an unknown template.
    """
    if template not in TEMPLATES:
        raise BadInputError(f"no prompt template {template!r}; choose one of {', '.join(TEMPLATES)}")
    text = "".join(f"<|{m['role']}|>\n{m['content']}{TEMPLATES[template]}" for m in messages)
    if add_generation_prompt and messages[-1]["role"] != "assistant":
        text += "<|assistant|>\n"
    return text


def seed_messages(title: object, category: object, price: object) -> list[dict[str, str]]:
    """A product as that script has it: `render(..., template="seed")` gives its text byte for byte."""
    return [
        {"role": "user", "content": "<|image_1|>What is shown in this image?"},
        {"role": "assistant", "content": f"Product: {title}, Category: {category}, Full Price: {price}"},
    ]


def image_tags(text: str) -> list[int]:
    """The K of every <|image_K|>, in order of appearance."""
    return [int(k) for k in IMAGE_TAG.findall(text)]


def encode_text(tokenizer: Any, text: str, image_tokens: Sequence[int]) -> list[int]:
    """Ids of a rendered text with image K as image_tokens[K - 1] copies of -K.

    Raises BadInputError if the tags are not exactly <|image_1|>..<|image_n|> for n pictures; order and
    repetition are the caller's concern, as published.
    """
    pieces = IMAGE_TAG.split(text)
    tags = [int(k) for k in pieces[1::2]]
    if sorted(set(tags)) != list(range(1, len(image_tokens) + 1)):
        raise BadInputError(_mismatch(tags, len(image_tokens)))
    ids: list[int] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            ids += [-int(piece)] * image_tokens[int(piece) - 1]
        else:
            ids += tokenizer(piece)["input_ids"]
    return ids


def encode(
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    image_tokens: Sequence[int],
    add_generation_prompt: bool = False,
    template: str = "chat",
) -> Encoded:
    """Ids and labels of a conversation; image_tokens[K - 1] is the number of tokens of picture K.

    Raises BadInputError if the tags are not <|image_1|>..<|image_n|>, once each and in this order (the model
    takes pictures in order of appearance), if one stands in a reply, or if a message's text holds a control
    token (it would be learnt as, or taken for, the end of a turn).
    """
    check_text(messages, len(image_tokens))
    ids = encode_text(tokenizer, render(messages, add_generation_prompt, template), image_tokens)
    return Encoded(ids, _reply_labels(tokenizer, ids))


def check_text(messages: Sequence[dict[str, str]], pictures: int) -> None:
    """Raises BadInputError as `encode` does."""
    for place, message in enumerate(messages):
        for control in PHI3_CONTROL_TOKENS:
            if control in message["content"]:
                raise BadInputError(
                    f"message {place} holds the control token {control}; remove it from the text"
                )
        if message["role"] == "assistant" and image_tags(message["content"]):
            raise BadInputError(
                f"message {place}: an image tag stands in a reply; move it to the user's turn"
            )
    tags = [k for message in messages for k in image_tags(message["content"])]
    if tags != list(range(1, pictures + 1)):
        raise BadInputError(_mismatch(tags, pictures))


def text_pieces(text: str) -> list[str]:
    """The pieces of a rendered text between its image tags: each is tokenised by itself."""
    return IMAGE_TAG.split(text)[::2]


def _reply_labels(tokenizer: Any, ids: list[int]) -> list[int]:
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    labels = [IGNORE] * len(ids)
    start = None  # of the reply being read
    for place, token in enumerate(ids):
        if token == assistant:
            start = place + 1
        elif token == end and start is not None:
            labels[start : place + 1] = ids[start : place + 1]
            start = None
    return labels  # the open reply of a generation prompt has no end, hence no labels


def _mismatch(tags: list[int], pictures: int) -> str:
    named = " ".join(f"<|image_{k}|>" for k in tags) or "none"
    wanted = " ".join(f"<|image_{k}|>" for k in range(1, min(pictures, 3) + 1)) or "no image tag"
    wanted += f" .. <|image_{pictures}|>" if pictures > 3 else ""
    return f"{pictures} picture(s) but the text names {named}; it must name {wanted}, once each and in order"
