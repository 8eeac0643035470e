"""Messages -> token ids and labels, as the published processor tokenises them.

A text is cut at its image tags and every piece is tokenised by itself, with special tokens: each piece starts
with `<s>`, also an empty one, and image K is that many copies of -K. Labels cover the assistant's replies up
to and including `<|end|>`, nothing else. Token counts of the plan are the lengths of what `encode` returns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.format import BadInputError

IGNORE = -100
_TAG = re.compile(r"<\|image_(\d+)\|>")


@dataclass(frozen=True)
class Encoded:
    """One document. input_ids: [L], image positions negative. labels: [L], -100 where nothing is learnt; not
    shifted.
    """

    input_ids: list[int]
    labels: list[int]


def render(messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The published chat template."""
    text = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages)
    if add_generation_prompt and messages[-1]["role"] != "assistant":
        text += "<|assistant|>\n"
    return text


def image_tags(text: str) -> list[int]:
    """The K of every <|image_K|>, in order of appearance."""
    return [int(k) for k in _TAG.findall(text)]


def encode_text(tokenizer: Any, text: str, image_tokens: Sequence[int]) -> list[int]:
    """Ids of a rendered text with image K as image_tokens[K - 1] copies of -K.

    Raises BadInputError if the tags are not exactly <|image_1|>..<|image_n|> for n pictures.
    """
    pieces = _TAG.split(text)
    tags = [int(k) for k in pieces[1::2]]
    if sorted(set(tags)) != list(range(1, len(image_tokens) + 1)):
        named = ", ".join(f"<|image_{k}|>" for k in tags) or "none"
        raise BadInputError(
            f"{len(image_tokens)} picture(s) but the text names {named}; name <|image_1|>..<|image_n|>, one each"
        )
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
) -> Encoded:
    """Ids and labels of a conversation; image_tokens[K - 1] is the number of tokens of picture K.

    Raises BadInputError if the tags do not match the pictures, or a message's text holds a turn token of the
    chat template (it would be learnt as, or taken for, a turn of its own).
    """
    for place, message in enumerate(messages):
        for token in ("<|assistant|>", "<|user|>", "<|system|>", "<|end|>"):
            if token in message["content"]:
                raise BadInputError(
                    f"message {place} holds the control token {token}; remove it from the text"
                )
    ids = encode_text(tokenizer, render(messages, add_generation_prompt), image_tokens)
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    labels = [IGNORE] * len(ids)
    inside = False
    for place, token in enumerate(ids):
        if inside:
            labels[place] = token
            inside = token != end
        else:
            inside = token == assistant
    if inside:  # the open reply of a generation prompt
        last = len(ids) - 1 - ids[::-1].index(assistant)
        labels[last + 1 :] = [IGNORE] * (len(ids) - last - 1)
    return Encoded(ids, labels)
