"""What an answer is worth: product fields read out of texts, and the scores over a set of answers. Pure.

An answer holds `Title: ...`, `Category: ...`, `Price: ...`, one a line, or the seed's `Product: ...,
Category: ..., Full Price: ...` in one line; truth is read from the reference reply in the same way. Called by
evaluation.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_NAMES = {
    "title": "title",
    "product": "title",
    "category": "category",
    "price": "price",
    "full price": "price",
}
_NAME = "|".join(sorted(_NAMES, key=len, reverse=True))
_FIELD = re.compile(
    rf"(?:^|,)[ \t]*({_NAME})[ \t]*:[ \t]*(.*?)[ \t]*(?=$|,[ \t]*(?:{_NAME})[ \t]*:)",
    re.IGNORECASE | re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\d.,-])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![.,]?\d)")


@dataclass(frozen=True)
class Product:
    """The fields of an answer; None where it does not say (or, of the price, says no single number)."""

    title: str | None
    category: str | None
    price: float | None


@dataclass(frozen=True)
class Scores:
    """Over a set of answers.

    price_mae: mean absolute error of the prices that could be read, in the price's unit; None if none could.
    price_parse_rate: part of the answers whose price could be read. category_accuracy, title_accuracy,
    exact_match: parts of all answers; one without the field is wrong.
    """

    samples: int
    price_mae: float | None
    price_parse_rate: float
    category_accuracy: float
    title_accuracy: float
    exact_match: float


def parse_price(text: str) -> float | None:
    """The price in `text`: currency signs and thousands commas allowed; None unless it holds exactly one
    number.
    """
    numbers = _NUMBER.findall(text)
    return float(numbers[0].replace(",", "")) if len(numbers) == 1 else None


def parse_product(answer: str) -> Product:
    """The fields of an answer; of a field said twice, the first."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(answer):
        fields.setdefault(_NAMES[name.lower()], value)
    price = parse_price(fields["price"]) if "price" in fields else None
    return Product(fields.get("title") or None, fields.get("category") or None, price)


def score(truths: Sequence[str], answers: Sequence[str]) -> Scores:
    """Scores `answers` against the reference replies, in the same order."""
    pairs = [(parse_product(t), parse_product(a)) for t, a in zip(truths, answers, strict=True)]
    if not pairs:
        raise ValueError("no answers to score")
    errors = [
        abs(truth.price - answer.price)
        for truth, answer in pairs
        if truth.price is not None and answer.price is not None
    ]
    return Scores(
        samples=len(pairs),
        price_mae=statistics.fmean(errors) if errors else None,
        price_parse_rate=_part(answer.price is not None for _, answer in pairs),
        category_accuracy=_part(t.category is not None and t.category == a.category for t, a in pairs),
        title_accuracy=_part(t.title is not None and t.title == a.title for t, a in pairs),
        exact_match=_part(t.strip() == a.strip() for t, a in zip(truths, answers, strict=True)),
    )


def constant_answer(replies: Sequence[str]) -> str:
    """The best answer that never looks at a picture: most frequent title and category, median price of
    `replies`.
    """
    products = [parse_product(reply) for reply in replies]
    title = Counter(p.title for p in products if p.title).most_common(1)
    category = Counter(p.category for p in products if p.category).most_common(1)
    prices = [p.price for p in products if p.price is not None]
    lines = [
        f"Title: {title[0][0]}" if title else "",
        f"Category: {category[0][0]}" if category else "",
        f"Price: {statistics.median(prices):.2f}" if prices else "",
    ]
    return "\n".join(line for line in lines if line)


def _part(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values)
