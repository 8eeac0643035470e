"""What one answer is worth: product fields read out of texts, and small functions that hold an answer against
the truth. Pure.

A metric is a function (truth, answer) -> {name: value}; None: this sample says nothing about it. `scores`
makes numbers over a set of answers from them. METRICS names the built-in ones; `find_metrics` also takes a
user's own as "package.module:function".

An answer holds `Title: ...`, `Category: ...`, `Price: ...`, one a line, or the seed's `Product: ...,
Category: ..., Full Price: ...` in one line; truth is read from the reference reply in the same way. Called by
evaluation.
"""

from __future__ import annotations

import importlib
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shards.common.errors import BadInputError

Metric = Callable[[str, str], Mapping[str, float | None]]

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
# A run of digits with whatever may stand between the digits of one number, or between two numbers.
_RUN = re.compile(r"[0-9](?:[0-9.,'’ \u00a0\u202f]*[0-9])?")
_SPACE = r"['’ \u00a0\u202f]"
_NUMBERS = (  # (what one number looks like, what groups its thousands, its decimal sign)
    (re.compile(r"(?:[0-9]+|0)(?:\.[0-9]+)?"), "", "."),  # 1290, 1290.5
    (re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?"), ",", "."),  # 1,290.50
    (re.compile(r"[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?"), ",", "."),  # 1,00,000
    (re.compile(r"[0-9]{1,3}(?:\.[0-9]{3})+,[0-9]{1,2}"), ".", ","),  # 1.290,50
    (re.compile(r"[0-9]{1,3}(?:\.[0-9]{3}){2,}"), ".", ","),  # 1.234.567
    (re.compile(r"[0-9]+,[0-9]{1,2}"), "", ","),  # 12,50
    (re.compile(rf"[0-9]{{1,3}}(?:{_SPACE}[0-9]{{3}})+(?:[.,][0-9]{{1,2}})?"), _SPACE, "[.,]"),  # 1 290,50
)
_DOT_AND_THREE = re.compile(r"[1-9][0-9]{0,2}\.[0-9]{3}")  # 1.290: a decimal point, or Europe's thousands?
_EURO = re.compile(r"€|\bEUR\b")
_BEFORE = re.compile(r"(?:(?:^|[^A-Za-z0-9_.,\-−–])|\b(?:[A-Z]{3}|Rs\.?|kr\.?))$")
_NOT_AFTER = re.compile(r"%|[.,]?[0-9]|\s*(?:k|m|mn|mio|thousand|million|lakh|crore)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Product:
    """The fields of an answer; None where it does not say (or, of the price, says no single number)."""

    title: str | None
    category: str | None
    price: float | None


def parse_price(text: str) -> float | None:
    """The price in `text`; None unless it holds exactly one number that can be read in one way only.

    Currency signs and codes, thousands (1,290  1.290,50  1 290  1'290) and decimal commas (12,50) are read.
    Not read: two numbers, a negative one, "12k", "5%", and "1.290" without a euro sign, which is 1.29 to some
    and 1290 to others.
    """
    runs = list(_RUN.finditer(text))
    if len(runs) != 1:
        return None
    run = runs[0]
    if not _BEFORE.search(text[: run.start()]) or _NOT_AFTER.match(text[run.end() :]):
        return None
    digits = run.group()
    if _DOT_AND_THREE.fullmatch(digits):
        return float(digits.replace(".", "")) if _EURO.search(text) else None
    for shape, group, decimal in _NUMBERS:
        if shape.fullmatch(digits):
            plain = (
                re.sub(group, "", digits)
                if group == _SPACE
                else digits.replace(group, "")
                if group
                else digits
            )
            return float(re.sub(decimal, ".", plain) if decimal != "." else plain)
    return None


def parse_product(answer: str) -> Product:
    """The fields of an answer; of a field said twice, the first."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(answer):
        fields.setdefault(_NAMES[name.lower()], value)
    price = parse_price(fields["price"]) if "price" in fields else None
    return Product(fields.get("title") or None, fields.get("category") or None, price)


def price(truth: str, answer: str) -> dict[str, float | None]:
    """Errors of the price: absolute (in its unit), relative to the truth (0.1 = 10 %), for mean and median.

    Nothing about a sample whose truth has no price. An answer whose price cannot be read has no error; it
    lowers price_parse_rate instead, so the two belong together.
    """
    wanted, said = parse_product(truth).price, parse_product(answer).price
    if wanted is None:
        return {"price_mae": None, "price_mape": None, "price_median_ape": None, "price_parse_rate": None}
    error = None if said is None else abs(said - wanted)
    relative = None if error is None or wanted == 0 else error / wanted
    return {
        "price_mae": error,
        "price_mape": relative,
        "price_median_ape": relative,
        "price_parse_rate": float(said is not None),
    }


def category(truth: str, answer: str) -> dict[str, float | None]:
    """1 if the category is the same; an answer without one is wrong."""
    return {"category_accuracy": _same(parse_product(truth).category, parse_product(answer).category)}


def title(truth: str, answer: str) -> dict[str, float | None]:
    """1 if the title is the same; an answer without one is wrong."""
    return {"title_accuracy": _same(parse_product(truth).title, parse_product(answer).title)}


def exact_match(truth: str, answer: str) -> dict[str, float | None]:
    """1 if the whole answer is the truth, space around it apart."""
    return {"exact_match": float(truth.strip() == answer.strip())}


def anls(truth: str, answer: str) -> dict[str, float | None]:
    """Normalised Levenshtein similarity, 0 below a half (the measure of document VQA, arXiv:1907.00490)."""
    one, other = truth.strip().lower(), answer.strip().lower()
    longest = max(len(one), len(other))
    similarity = 1 - _edits(one, other) / longest if longest else 1.0
    return {"anls": similarity if similarity >= 0.5 else 0.0}


METRICS: dict[str, Metric] = {
    "price": price,
    "category": category,
    "title": title,
    "exact_match": exact_match,
    "anls": anls,
}


def find_metrics(names: Sequence[str]) -> list[Metric]:
    """The functions of `names`: keys of METRICS, or "package.module:function" for one's own.

    Raises BadInputError for a name that is neither.
    """
    found = []
    for name in names:
        module, colon, function = name.partition(":")
        if not colon:
            if name not in METRICS:
                known = ", ".join(METRICS)
                raise BadInputError(f"no metric {name!r}; there are {known}, and your own as module:function")
            found.append(METRICS[name])
            continue
        try:
            metric = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise BadInputError(
                f"metric {name!r}: {error}; it must be module:function, importable from here (PYTHONPATH)"
            ) from error
        if not callable(metric):
            raise BadInputError(f"metric {name!r} is no function")
        found.append(metric)
    return found


def constant_answer(replies: Sequence[str]) -> str:
    """The best answer that never looks at a picture: most frequent title and category, median price of
    `replies`.
    """
    products = [parse_product(reply) for reply in replies]
    titles = Counter(p.title for p in products if p.title).most_common(1)
    categories = Counter(p.category for p in products if p.category).most_common(1)
    prices = [p.price for p in products if p.price is not None]
    lines = [
        f"Title: {titles[0][0]}" if titles else "",
        f"Category: {categories[0][0]}" if categories else "",
        f"Price: {statistics.median(prices):.2f}" if prices else "",
    ]
    return "\n".join(line for line in lines if line)


def _same(wanted: str | None, said: str | None) -> float | None:
    return None if wanted is None else float(wanted == said)


def _edits(one: str, other: str) -> int:
    """Levenshtein distance."""
    before = list(range(len(other) + 1))
    for row, here in enumerate(one, 1):
        now = [row]
        for column, there in enumerate(other, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (here != there)))
        before = now
    return before[-1]
