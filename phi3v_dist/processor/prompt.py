"""Messages -> token ids and labels, as the published processor tokenises them.

A text is cut at its image tags and every piece is tokenised on its own, with special tokens: each piece,
including an empty one, starts with `<s>`, and image K is that many copies of -K. Labels cover the assistant's
replies, up to and including `<|end|>`, and nothing else (`reply_spans` is the one home of this rule). The
token counts of the plan are the lengths of what `encode` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.common.errors import BadInputError
from shards.format.messages import IMAGE_TAG, check_messages
from shards.format.records import Message

IGNORE = -100  # the label of a position that is not learnt, as in torch's cross entropy


@dataclass(frozen=True)
class Encoded:
    """One document. input_ids: [L], negative at image positions. labels: [L], -100 at positions that are not
    learnt; not shifted.
    """

    input_ids: list[int]
    labels: list[int]


def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The text of a conversation in the published chat template. add_generation_prompt: end with an open
    assistant turn, unless the last message is a reply.
    """
    text = "".join([f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages])
    if add_generation_prompt and messages[-1]["role"] != "assistant":
        text += "<|assistant|>\n"
    return text


def image_tags(text: str) -> list[int]:
    """The K of every <|image_K|>, in order of appearance."""
    return [int(k) for k in IMAGE_TAG.findall(text)]


def text_pieces(text: str) -> list[str]:
    """The pieces of a rendered text between its image tags: each is tokenised on its own."""
    return IMAGE_TAG.split(text)[::2]


def encode_text(tokenizer: Any, text: str, image_tokens: Sequence[int]) -> list[int]:
    """Ids of a rendered text, with image K as image_tokens[K - 1] copies of -K.

    Raises BadInputError if the tags do not name exactly <|image_1|>..<|image_n|> for n images. Any order and
    repeated tags are accepted, as by the published processor.
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
    messages: Sequence[Message],
    image_tokens: Sequence[int],
    *,
    add_generation_prompt: bool = False,
) -> Encoded:
    """Ids and labels of a conversation; image_tokens[K - 1] is the number of tokens of image K.

    Raises BadInputError as `check_encodable`.
    """
    check_encodable(messages, len(image_tokens))
    ids = encode_text(tokenizer, render(messages, add_generation_prompt), image_tokens)
    labels = [IGNORE] * len(ids)
    for start, stop in zip(*reply_spans(tokenizer, np.array(ids, dtype=np.int64)), strict=True):
        labels[start:stop] = ids[start:stop]
    return Encoded(ids, labels)


def check_encodable(messages: Sequence[Message], num_images: int) -> None:
    """`check_messages` for a whole sample, and for a prompt that still waits for its reply.

    Raises BadInputError: unchecked, a control token in a text would be learnt as the end of a turn, and tags
    out of order would give the model the images in another order than the text names them.
    """
    ends_open = not messages or messages[-1]["role"] != "assistant"
    check_messages([*messages, *_ANY_REPLY] if ends_open else list(messages), num_images)


_ANY_REPLY: tuple[Message, ...] = ({"role": "assistant", "content": "any"},)


def reply_spans(
    tokenizer: Any, ids: np.ndarray, documents: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where the assistant's replies are: the positions starts[i] .. stops[i] - 1 carry labels.

    A reply is what follows <|assistant|>, up to and including the next <|end|>, if no other of these two
    tokens stands in between. So the open turn of a generation prompt has no labels.
    ids: int64 [L]. documents: int64 [L], number of the document or piece that each id belongs to, where
    several are joined; a reply never spans two. Out: (starts, stops), int64 [replies] each.
    """
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    marks = np.flatnonzero((ids == assistant) | (ids == end))
    opening, closing = marks[:-1], marks[1:]
    is_reply = (ids[opening] == assistant) & (ids[closing] == end)
    if documents is not None:
        is_reply &= documents[opening] == documents[closing]
    return opening[is_reply] + 1, closing[is_reply] + 1


def _mismatch(tags: list[int], num_images: int) -> str:
    named = " ".join(f"<|image_{k}|>" for k in tags) or "none"
    wanted = " ".join(f"<|image_{k}|>" for k in range(1, min(num_images, 3) + 1)) or "no image tag"
    wanted += f" .. <|image_{num_images}|>" if num_images > 3 else ""
    return f"{num_images} image(s) but the text names {named}; it must name {wanted}, once each and in order"
